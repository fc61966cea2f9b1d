"""Processes that CRIU cannot dump, or dumps and can never restore (D9b): each with the real thing. The checkpoint is
refused in words that name the process, a turn keeps its files alone, the sandbox is none the worse, and once the cause
is gone it is protected."""

import json
import pathlib
import socket
import tempfile
import time

from equality import Compared, armed_restore, hooks_installed
from harness import Terminal, crab, run, together, until
from test_armed_restore import Sandbox

BEGIN = """
import ctypes, os, signal, socket, struct, time
libc = ctypes.CDLL(None, use_errno=True)
keep = []
def call(number, *args):
    result = libc.syscall(number, *args)
    assert result >= 0, os.strerror(ctypes.get_errno())
    keep.append(result)
def queue(name):
    fd = libc.mq_open(name, os.O_RDWR | os.O_CREAT, 0o600, None)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return fd
def child(work):
    reader, writer = os.pipe2(os.O_CLOEXEC)
    if os.fork() == 0:
        work(); os.write(writer, b"x"); os.close(writer); time.sleep(10000)
    os.close(writer); os.read(reader, 1); os.close(reader)
def users():
    assert libc.unshare(0x10000000) == 0, os.strerror(ctypes.get_errno())
def trace():
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    assert libc.ptrace(0x4206, os.getppid(), None, None) == 0, os.strerror(ctypes.get_errno())
"""
END = """
with open("/ready", "w") as ready: ready.write(str(os.getpid()))
while True: time.sleep(10000)
"""

CANNOT = {
    "a program in memory": ("program that is no file", """
program = os.memfd_create("program", os.MFD_CLOEXEC); os.write(program, open("/usr/bin/sleep", "rb").read())
if os.fork() == 0: os.execve(program, ["sleep", "10000"], {})"""),
    "a file of the image that was deleted": ("deleted file \"/etc/services\"", 'keep.append(open("/etc/services")); os.unlink("/etc/services")'),
    "a program of the image that was replaced": ("deleted file \"/usr/bin/tac\"", """
if os.fork() == 0: os.execv("/usr/bin/tac", ["tac", "/dev/random"])
import shutil; shutil.copy("/usr/bin/tac", "/new"); until = time.time() + 60
while "tac" not in os.popen("ps -eo comm=").read(): assert time.time() < until
os.rename("/new", "/usr/bin/tac")"""),
    "a watched file that was deleted": ("CRIU", 'keep.append(open("/w", "w")); assert libc.inotify_add_watch(libc.inotify_init1(0), b"/w", 2) > 0; os.unlink("/w")'),
    "a deleted file with another name": ("deleted file \"/a\"", 'keep.append(open("/a", "w")); os.link("/a", "/b"); os.unlink("/a")'),
    "the same in memory": ("deleted file \"/dev/shm/a\"", 'keep.append(open("/dev/shm/a", "w")); os.link("/dev/shm/a", "/dev/shm/b"); os.unlink("/dev/shm/a")'),
    "SQLite's WAL": ("holds a POSIX lock on \"/db-shm\"", """
import sqlite3
db = sqlite3.connect("/db"); db.execute("pragma journal_mode=wal"); db.execute("create table t (n)"); keep.append(db)"""),
    "io_uring": ("io_uring", "call(425, 4, ctypes.create_string_buffer(120))"),
    "userfaultfd": ("userfaultfd", "call(323, 1)"),
    "a landlock ruleset": ("landlock-ruleset", 'call(444, struct.pack("Q", 1), 8, 0)'),
    "secret memory": ("secretmem", "call(447, 0)"),
    "a socket of a virtual machine": ("AF 40", "keep.append(socket.socket(40, socket.SOCK_STREAM))"),
    "a connection that nobody accepts": ("has not accepted a connection to its port 7000", 'keep.append(socket.create_server(("127.0.0.1", 7000))); keep.append(socket.create_connection(("127.0.0.1", 7000)))'),
    "an open message queue": ("message queue", 'queue(b"/q")'),
    "a message queue that nobody has open": ("(/q)", 'os.close(queue(b"/q"))'),
    "a user namespace": ("user namespace", "child(users)"),
    "a traced process": ("being traced", "libc.prctl(0x59616d61, ctypes.c_ulong(-1)); child(trace)"),
}
"""What to start, and what is said of it."""

def start(box, code):
    box.exec("sh", "-c", 'nohup python3 -c "$1" >/log 2>&1 </dev/null & until test -e /ready; do kill -0 $! || { cat /log >&2; exit 1; }; sleep 0.02; done', "sh", BEGIN + code + END)


def refused(box, words):
    said = crab("checkpoint", box.name, check=False)
    assert said.rc == 1 and words in said.err and "not protected" in said.err, (words, said)
    line = box.turns()[-1]
    assert line["checkpoint"] is None and words in line["note"], (words, line)
    return line


def protected_again(box):
    line = json.loads(crab("checkpoint", "--json", box.name).out)
    assert line["action"] == "full" and line["checkpoint"], line


def test_what_criu_cannot_keep_is_named_and_the_sandbox_lives_on(tmp_path):
    def case(what):
        words, code = CANNOT[what]
        with Sandbox("ctr", tmp_path) as box:
            start(box, code)
            begin = time.monotonic()
            line = refused(box, words)
            # The turn that started it has a checkpoint nevertheless: of its files.
            kept = box.turns()[-2]
            assert kept["action"] == "files" and kept["missing"][0] == "processes" and words in kept["note"], kept
            print(f"  {what}: {time.monotonic() - begin:.2f} s: {line['note']}")
            assert 'process' in line["note"] or "there is" in line["note"]
            # All live, and what the cause was may be ended.
            assert box.sh("kill -0 $(cat /ready) && echo alive") == "alive\n", what
            box.sh("kill -9 -1; rm -f /dev/mqueue/*; true", check=False)
            protected_again(box)

    together([lambda w=what: case(w) for what in CANNOT], workers=5)


def test_what_is_left_on_the_terminal_of_an_exec_is_named(tmp_path):
    with Sandbox("ctr", tmp_path) as box:
        for number, (command, words) in enumerate([
            # Deaf to the hang-up, and in a session of its own: neither has a terminal that comes back.
            ("trap '' HUP; sleep 1001 & :", "sleep"),
            # (The init is a sleep, too; and until setsid has become it, the hang-up would end this one.)
            ("setsid sleep 1002 & until pgrep -f '^sleep 1002' >/dev/null; do sleep 0.02; done", "sleep"),
        ]):
            with Terminal("ctr", "task", "exec", "--tty", "--exec-id", f"tty{number}", box.name, "sh", "-c", command) as terminal:
                terminal.finish()
            line = refused(box, "terminal of an exec that has ended")
            assert words in line["note"], line
            box.sh("pkill -9 -x sleep")
            protected_again(box)


def test_an_address_that_is_gone_is_named(tmp_path):
    server = 'server = socket.create_server(("{}", 7000)); keep += [server, socket.create_connection(("{}", 7000)), server.accept()]'

    def case(address, begin, end, again, words):
        def ip(*command):
            run("nsenter", "-t", box.container.pid, "-n", "ip", *command)

        with Sandbox("ctr", tmp_path) as box:
            for command in begin:
                ip(*command)
            start(box, server.replace("{}", address))
            protected_again(box)
            ip(*end)
            refused(box, words)
            ip(*again)
            protected_again(box)

    bridge = ["link", "add", "b0", "type", "bridge"], ["address", "add", "10.9.9.2/24", "dev", "b0"], ["link", "set", "b0", "up"]
    together([
        lambda: case("127.0.0.1", [], ["link", "set", "lo", "down"], ["link", "set", "lo", "up"], "lo is down"),
        lambda: case("10.9.9.2", bridge, ["address", "delete", "10.9.9.2/24", "dev", "b0"], bridge[1], "10.9.9.2:7000"),
    ])


ACCEPTED = """
import threading
def accept():
    open("/accept").read()
    keep.append(server.accept()[0])
    open("/accepted", "w").close()
server = socket.socket(socket.AF_UNIX); server.bind("/srv.sock"); server.listen(); os.mkfifo("/accept")
threading.Thread(target=accept).start()
"""


def test_a_connection_of_a_client_of_the_host_is_named(tmp_path):
    with Sandbox("ctr", tmp_path) as box:
        start(box, ACCEPTED)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"/proc/{box.container.pid}/root/srv.sock")
            box.sh("echo >/accept; until test -e /accepted; do sleep 0.02; done")
            line = refused(box, "a client outside of the sandbox")
            assert "python3" in line["note"], line
        box.sh("kill -9 $(cat /ready)")
        protected_again(box)


def test_a_connection_to_a_server_of_the_host_is_named():
    # A short path: that of a socket has 108 bytes.
    with tempfile.TemporaryDirectory() as name, socket.socket(socket.AF_UNIX) as server:
        directory = pathlib.Path(name)
        server.bind(f"{directory}/socket")
        server.listen()
        with Sandbox("ctr", directory, options=["--mount", f"type=bind,src={directory},dst=/host,options=rbind:rw"]) as box:
            start(box, 'keep.append(socket.socket(socket.AF_UNIX)); keep[0].connect("/host/socket")')
            line = refused(box, "a server outside of the sandbox")
            assert "python3" in line["note"], line
            box.sh("kill -9 $(cat /ready)")
            protected_again(box)


KEPT = """
import fcntl, mmap, shutil, subprocess
def deleted(name, size):
    file = open(name, "w+b", buffering=0); file.write(os.urandom(size)); os.unlink(name); keep.append(file)
deleted("/small", 1000); deleted("/large", 5 << 20); deleted("/dev/shm/large", 5 << 20)
os.rename("/etc/services", "/etc/services.old"); keep.append(open("/etc/services.old"))
keep.append(open("/lock", "w")); fcntl.flock(keep[-1], fcntl.LOCK_EX)
keep.append(open("/lock2", "w")); fcntl.lockf(keep[-1], fcntl.LOCK_EX)
shutil.copy("/usr/bin/sleep", "/program"); keep.append(subprocess.Popen(["/program", "10000"])); os.unlink("/program")
os.mkdir("/gone"); os.chdir("/gone"); os.rmdir("/gone")
server = socket.create_server(("127.0.0.1", 7000)); one = socket.create_connection(server.getsockname()); two, _ = server.accept()
one.sendall(b"on its way"); keep += [server, one, two]
os.mkdir("/watched"); open("/watched/file", "w").close()
watches = libc.inotify_init1(os.O_NONBLOCK)
for name in (b"/watched", b"/watched/file", b"/usr/share", b"/usr/bin/env", b"/dev/shm"):
    assert libc.inotify_add_watch(watches, name, 2) > 0
keep.append(subprocess.Popen(["tail", "-F", "/log"], stdout=open("/tail", "w")))
memory = os.memfd_create("memory"); os.write(memory, b"x" * 10000); keep.append(mmap.mmap(memory, 10000))
"""


def test_what_needs_an_option_is_kept(tmp_path):
    """Deleted files of any size, locks, a program that was deleted, a connection inside, watched files."""
    with hooks_installed(), Compared("ctr", tmp_path) as box:
        start(box, KEPT)
        box.back(armed_restore, box.checkpoint())
        assert box.sh("kill -0 $(cat /ready) && echo alive; echo more >>/log") == "alive\n"
        until(lambda: box.read("/tail") == "more\n", "tail is told of what comes")
