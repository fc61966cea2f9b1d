"""A process with one of everything that a checkpoint promises to keep. Runs inside a sandbox, then sleeps.

`python3 zoo.py NAME…` takes the named animals only, without names all. Each is small, and kept alive by `keep`.
"""
import ctypes
import fcntl
import mmap
import os
import resource
import select
import signal
import socket
import struct
import sys
import termios
import threading
import time
import warnings

keep = []
libc = ctypes.CDLL(None, use_errno=True)
TMP = "/tmp/zoo"


def child(work):
    """A child that does `work` and sleeps; returns once the work is done."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        work()
        os.write(writer, b"1")
        os.close(writer)
        while True:
            time.sleep(1000)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    return pid


def open_files():
    f = open(f"{TMP}/append", "a+b", buffering=0); f.write(b"q" * 1000)
    g = os.open(f"{TMP}/append", os.O_RDWR); os.lseek(g, 123, os.SEEK_SET)
    keep.extend([f, g, os.dup(g), os.open(TMP, os.O_RDONLY), os.open("/etc/passwd", os.O_PATH)])
    child(lambda: None)  # shares all of them


def deleted_files():
    f = open(f"{TMP}/gone", "w+b", buffering=0); f.write(b"abc"); os.unlink(f.name)
    keep.append(f)
    os.mkdir(f"{TMP}/dir")
    child(lambda: os.chdir(f"{TMP}/dir"))


def locks():
    f = open(f"{TMP}/flock", "w"); fcntl.flock(f, fcntl.LOCK_EX)
    g = open(f"{TMP}/posix", "w"); fcntl.lockf(g, fcntl.LOCK_EX, 10, 5)
    keep.extend([f, g])


def pipes():
    r, w = os.pipe(); os.write(w, b"z" * 100)
    r2, w2 = os.pipe(); fcntl.fcntl(w2, 1031, 1 << 18); os.set_blocking(r2, False)
    r3, w3 = os.pipe(); os.write(w3, b"last words"); os.close(w3)
    r4, w4 = os.pipe(); os.close(r4)
    os.mkfifo(f"{TMP}/fifo"); named = os.open(f"{TMP}/fifo", os.O_RDWR); os.write(named, b"in a fifo")
    keep.extend([r, w, r2, w2, r3, w4, named])


def unix_sockets():
    a, b = socket.socketpair(); a.send(b"stream")
    c, d = socket.socketpair(type=socket.SOCK_DGRAM); c.send(b"one"); c.send(b"two")
    e = socket.socket(socket.AF_UNIX); e.bind(f"{TMP}/listen"); e.listen(3)
    f = socket.socket(socket.AF_UNIX); f.connect(f"{TMP}/listen"); g, _ = e.accept(); f.send(b"hello")
    h = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); h.bind("\0abstract")
    keep.extend([a, b, c, d, e, f, g, h])


def tcp():
    s = socket.create_server(("127.0.0.1", 4711)); c = socket.create_connection(("127.0.0.1", 4711))
    d = s.accept()[0]; d.send(b"hello"); c.setsockopt(6, 1, 1)
    six = socket.create_server(("::1", 4712), family=socket.AF_INET6)
    keep.extend([s, c, d, six])


def udp():
    s = socket.socket(type=socket.SOCK_DGRAM); s.bind(("127.0.0.1", 4713))
    c = socket.socket(type=socket.SOCK_DGRAM); c.connect(("127.0.0.1", 4713))
    keep.extend([s, c])


def anonymous_files():
    e = os.eventfd(7)
    p = select.epoll(); p.register(e, select.EPOLLIN | select.EPOLLET)
    t = os.timerfd_create(time.CLOCK_MONOTONIC); os.timerfd_settime(t, initial=5000, interval=3)
    s = libc.signalfd(-1, (ctypes.c_ulong * 16)(1 << 9), 0)
    m = os.memfd_create("memory", os.MFD_ALLOW_SEALING); os.write(m, b"in memory"); fcntl.fcntl(m, 1033, 2)
    keep.extend([e, p, t, s, m, os.pidfd_open(os.getpid())])


def mappings():
    a = mmap.mmap(-1, 1 << 20); a[5000] = 7                                          # shared with a child
    b = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE); b[9000] = 8
    c = mmap.mmap(-1, 1 << 33, flags=mmap.MAP_PRIVATE | 0x4000); c[1 << 32] = 9      # 8 GiB, MAP_NORESERVE
    with open(f"{TMP}/mapped", "wb") as f: f.write(b"m" * 10000)
    f = open(f"{TMP}/mapped", "r+b")
    d = mmap.mmap(f.fileno(), 10000); d[1] = 1
    e = mmap.mmap(f.fileno(), 10000, flags=mmap.MAP_PRIVATE); e[5000] = 2
    g = mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE); g[0] = 3; g.madvise(mmap.MADV_DONTFORK)
    h = mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE); h[0] = 4
    libc.mprotect(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(h))), 8192, 0)
    keep.extend([a, b, c, d, e, g, h, f])
    child(lambda: a.__setitem__(6000, 5))


def locked_memory():
    m = mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE); m[0] = 1
    libc.mlock(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(m))), 8192)
    keep.append(m)


def posix_shm():
    f = open("/dev/shm/zoo", "w+b"); f.truncate(8192)
    m = mmap.mmap(f.fileno(), 8192); m[0:3] = b"shm"
    keep.extend([f, m])


def sysv():
    i = libc.shmget(1234, 8192, 0o1600)
    libc.shmat.restype = ctypes.c_void_p
    at = libc.shmat(i, None, 0); ctypes.memset(at, 5, 100)
    s = libc.semget(1235, 3, 0o1600); libc.semctl(s, 1, 16, 42)  # SETVAL


def threads():
    for number in range(3):
        threading.Thread(target=time.sleep, args=(1000 + number,), daemon=True).start()


def signals():
    def work():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGRTMIN])
        signal.signal(signal.SIGUSR2, lambda *_: None); signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.kill(os.getpid(), signal.SIGUSR1)
        libc.pthread_kill(ctypes.c_ulong(threading.get_ident()), int(signal.SIGRTMIN))
    child(work)


def timers():
    def work():
        signal.signal(signal.SIGALRM, signal.SIG_IGN); signal.setitimer(signal.ITIMER_REAL, 5000, 3)
        timer = ctypes.c_void_p(); libc.timer_create(1, None, ctypes.byref(timer))
        libc.timer_settime(timer, 0, (ctypes.c_long * 4)(3, 0, 5000, 0), None)
    child(work)


def attributes():
    def work():
        os.umask(0o027); os.nice(3); os.setpgid(0, 0); os.chdir("/usr/lib")
        resource.setrlimit(resource.RLIMIT_NOFILE, (77, 777)); resource.setrlimit(resource.RLIMIT_CORE, (0, 100))
        libc.prctl(15, b"renamed", 0, 0, 0)    # PR_SET_NAME
        libc.prctl(29, 123456, 0, 0, 0)        # PR_SET_TIMERSLACK
        with open("/proc/self/coredump_filter", "w") as f: f.write("0x7f")
        with open("/proc/self/oom_score_adj", "w") as f: f.write("500")
    child(work)


def oom_group():
    child(lambda: libc.personality(0x0040000))  # ADDR_NO_RANDOMIZE


def sessions():
    child(os.setsid)
    child(lambda: (os.setsid(), child(lambda: os.setpgid(0, 0))))


def rooted():
    os.mkdir(f"{TMP}/root")
    child(lambda: (os.chroot(f"{TMP}/root"), os.chdir("/")))


def zombie():
    if os.fork() == 0:
        os._exit(7)


def _stopped():
    # Not among the animals: CRIU hangs when it dumps a stopped task that is frozen by cgroup v1.
    os.kill(child(lambda: None), signal.SIGSTOP)


def cpus():
    child(lambda: os.sched_setaffinity(0, [1]))


def policy():
    child(lambda: os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0)))


def terminal():
    master, slave = os.openpty()
    settings = termios.tcgetattr(slave); settings[3] &= ~(termios.ECHO | termios.ICANON); termios.tcsetattr(slave, 0, settings)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 99, 0, 0))
    os.write(slave, b"shown"); os.write(master, b"typed")
    child(lambda: (os.setsid(), fcntl.ioctl(slave, termios.TIOCSCTTY, 0)))
    keep.extend([master, slave])


def seccomp():
    def work():
        libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        program = (ctypes.c_ubyte * 8)(*struct.pack("HBBI", 6, 0, 0, 0x7FFF0000))  # return ALLOW
        header = struct.pack("HxxxxxxQ", 1, ctypes.addressof(program))
        assert libc.prctl(22, 2, ctypes.c_char_p(header), 0, 0) == 0  # PR_SET_SECCOMP, FILTER
    child(work)


def dumpable():
    child(lambda: libc.prctl(4, 0, 0, 0, 0))


ANIMALS = {name: thing for name, thing in list(globals().items())
           if callable(thing) and getattr(thing, "__module__", "") == "__main__" and not name.startswith("_") and name != "child"}

if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.makedirs(TMP, exist_ok=True)
    warnings.simplefilter("ignore")  # fork in a process with threads
    for name in sys.argv[1:] or ANIMALS:
        ANIMALS[name]()
    while True:
        time.sleep(1000)
