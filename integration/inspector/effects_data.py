"""Effects that change a file's contents through descriptors."""
from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import tempfile
import threading
from typing import Iterator

import syscalls as sc
import uring
from effects import FILE_SIZE, Place, effect, everywhere, only

PAGE = sc.PAGE
Steps = Iterator[None]


@effect("file", gentle=True)
def write(t: Place) -> Steps:
    fd = t.open()
    yield
    os.write(fd, b"abc")
    yield
    os.close(fd)


@effect("file", gentle=True)
def pwrite_same_page(t: Place) -> Steps:
    fd = t.open()
    yield
    os.pwrite(fd, b"abc", 100)
    yield
    os.close(fd)


@effect("file", gentle=True)
def pwrite_full_page(t: Place) -> Steps:
    fd = t.open()
    yield
    os.pwrite(fd, b"p" * PAGE, PAGE)
    yield
    os.close(fd)


@effect("file", gentle=True)
def write_same_bytes(t: Place) -> Steps:
    fd = t.open()
    old = os.pread(fd, 10, 0)
    yield
    os.pwrite(fd, old, 0)
    yield
    os.close(fd)


@effect("file", gentle=True)
def pwritev2(t: Place) -> Steps:
    fd = t.open()
    yield
    os.pwritev(fd, [b"ab", b"cd"], 50)
    yield
    os.close(fd)


@effect("file", gentle=True)
def pwritev2_DSYNC(t: Place) -> Steps:
    fd = t.open()
    yield
    os.pwritev(fd, [b"ab"], 60, sc.RWF_DSYNC)
    yield
    os.close(fd)


@effect("file")
def pwritev2_APPEND(t: Place) -> Steps:
    fd = t.open()
    yield
    os.pwritev(fd, [b"ab"], 0, sc.RWF_APPEND)
    yield
    os.close(fd)


@effect("file", refused=everywhere("EOPNOTSUPP"))
def write_RWF_NOWAIT(t: Place) -> Steps:
    fd = t.open()
    yield
    os.pwritev(fd, [b"ab"], 0, sc.RWF_NOWAIT)


@effect("file")
def append(t: Place) -> Steps:
    fd = t.open(flags=os.O_WRONLY | os.O_APPEND)
    yield
    os.write(fd, b"abc")
    yield
    os.close(fd)


@effect("file")
def write_beyond_end(t: Place) -> Steps:
    fd = t.open()
    yield
    os.pwrite(fd, b"abc", 1 << 20)
    yield
    os.close(fd)


@effect("file")
def open_O_TRUNC(t: Place) -> Steps:
    yield
    os.close(t.open(flags=os.O_WRONLY | os.O_TRUNC))


@effect("file")
def ftruncate_up(t: Place) -> Steps:
    fd = t.open()
    yield
    os.ftruncate(fd, FILE_SIZE + 5000)
    yield
    os.close(fd)


@effect("file")
def ftruncate_down(t: Place) -> Steps:
    fd = t.open()
    yield
    os.ftruncate(fd, 5000)
    yield
    os.close(fd)


@effect("file")
def truncate_path(t: Place) -> Steps:
    yield
    os.truncate(t / "file", 5000)


@effect("file", gentle=True)
def ftruncate_same(t: Place) -> Steps:
    """To the size that it has: mtime changes all the same."""
    fd = t.open()
    size = os.fstat(fd).st_size
    yield
    os.ftruncate(fd, size)
    yield
    os.close(fd)


@effect("file", gentle=True)
def write_O_SYNC(t: Place) -> Steps:
    fd = t.open(flags=os.O_RDWR | os.O_SYNC)
    yield
    os.pwrite(fd, b"abc", 200)
    yield
    os.close(fd)


def _uring(t: Place, setup: int = 0, sqe: int = 0) -> Steps:
    fd = t.open()
    ring = uring.Ring(setup)
    yield
    ring.run(uring.OP_WRITE, fd, ring.text(b"uring"), 5, 300, sqe_flags=sqe)
    yield
    ring.close()
    os.close(fd)


@effect("file", gentle=True, lingers=True)
def uring_write(t: Place) -> Steps:
    yield from _uring(t)


@effect("file", gentle=True, lingers=True)
def uring_write_ASYNC(t: Place) -> Steps:
    """By a worker thread of the kernel, io-wq."""
    yield from _uring(t, sqe=uring.SQE_ASYNC)


@effect("file", gentle=True, lingers=True)
def uring_write_SQPOLL(t: Place) -> Steps:
    """By the ring's polling thread of the kernel."""
    yield from _uring(t, setup=uring.SETUP_SQPOLL)


@effect("file", gentle=True, lingers=True)
def uring_write_FIXED(t: Place) -> Steps:
    fd = t.open()
    ring, buffer = uring.Ring(), sc.aligned(b"fixed")
    ring.register(buffer)
    yield
    ring.run(uring.OP_WRITE_FIXED, fd, buffer.address, 5, 300)
    yield
    ring.close()
    buffer.unmap()
    os.close(fd)


@effect("file")
def uring_ftruncate(t: Place) -> Steps:
    fd = t.open()
    ring = uring.Ring()
    yield
    ring.run(uring.OP_FTRUNCATE, fd, offset=5000)
    yield
    ring.close()
    os.close(fd)


@effect("file", gentle=True, lingers=True)
def uring_fallocate(t: Place) -> Steps:
    fd = t.open()
    ring = uring.Ring()
    yield
    ring.run(uring.OP_FALLOCATE, fd, address=2 * FILE_SIZE, length=0, offset=0)
    yield
    ring.close()
    os.close(fd)


@effect("file", gentle=True, lingers=True)
def uring_fsetxattr(t: Place) -> Steps:
    fd = t.open()
    ring = uring.Ring()
    yield
    ring.run(uring.OP_FSETXATTR, fd, ring.text("user.ring"), 3, ring.text("abc"))
    yield
    ring.close()
    os.close(fd)


@effect("file", gentle=True)
def sendfile(t: Place) -> Steps:
    source, fd = t.open("g", os.O_RDONLY), t.open()
    yield
    os.sendfile(fd, source, 0, 4096)
    yield
    os.close(source)
    os.close(fd)


@effect("file", gentle=True)
def splice(t: Place) -> Steps:
    fd = t.open()
    ends = os.pipe()
    os.write(ends[1], b"spliced")
    yield
    os.splice(ends[0], fd, 7, offset_dst=10)
    yield
    for end in (*ends, fd):
        os.close(end)


@effect("file", gentle=True)
def vmsplice_splice(t: Place) -> Steps:
    fd = t.open()
    ends = os.pipe()
    yield
    sc.vmsplice(ends[1], b"gifted")
    os.splice(ends[0], fd, 6, offset_dst=10)
    yield
    for end in (*ends, fd):
        os.close(end)


@effect("file", gentle=True)
def copy_file_range(t: Place) -> Steps:
    source, fd = t.open("g", os.O_RDONLY), t.open()
    yield
    os.copy_file_range(source, fd, 4096, 0, 0)
    yield
    os.close(source)
    os.close(fd)


@effect("file", gentle=True)
def copy_file_range_odd(t: Place) -> Steps:
    """Not of whole blocks: no file system can share them."""
    source, fd = t.open("g", os.O_RDONLY), t.open()
    yield
    os.copy_file_range(source, fd, 99, 1, 7)
    yield
    os.close(source)
    os.close(fd)


@effect("file", refused=only("xfs", "btrfs"))
def FICLONE(t: Place) -> Steps:
    source, fd = t.open("g", os.O_RDONLY), t.open()
    yield
    fcntl.ioctl(fd, sc.FICLONE, source)
    yield
    os.close(source)
    os.close(fd)


@effect("file", refused=only("xfs", "btrfs"), gentle=True)
def FICLONERANGE(t: Place) -> Steps:
    source, fd = t.open("g", os.O_RDONLY), t.open()
    yield
    fcntl.ioctl(fd, sc.FICLONERANGE, struct.pack("<qQQQ", source, 0, 4096, 4096))
    yield
    os.close(source)
    os.close(fd)


def _fallocate(t: Place, mode: int, offset: int, length: int) -> Steps:
    fd = t.open()
    yield
    sc.fallocate(fd, mode, offset, length)
    yield
    os.close(fd)


@effect("file")
def fallocate(t: Place) -> Steps:
    yield from _fallocate(t, 0, FILE_SIZE, 8192)


@effect("file", gentle=True)
def fallocate_KEEP_SIZE(t: Place) -> Steps:
    yield from _fallocate(t, sc.FALLOC_KEEP_SIZE, FILE_SIZE, 8192)


@effect("file", gentle=True)
def fallocate_PUNCH(t: Place) -> Steps:
    yield from _fallocate(t, sc.FALLOC_PUNCH_HOLE | sc.FALLOC_KEEP_SIZE, 4096, 4096)


@effect("file", gentle=True)
def fallocate_PUNCH_partial(t: Place) -> Steps:
    yield from _fallocate(t, sc.FALLOC_PUNCH_HOLE | sc.FALLOC_KEEP_SIZE, 8292, 100)


@effect("file", refused=only("ext4", "xfs", "btrfs"), gentle=True)
def fallocate_ZERO(t: Place) -> Steps:
    yield from _fallocate(t, sc.FALLOC_ZERO, 4096, 4096)


@effect("file", refused=only("ext4", "xfs"))
def fallocate_COLLAPSE(t: Place) -> Steps:
    yield from _fallocate(t, sc.FALLOC_COLLAPSE, 4096, 4096)


@effect("file", refused=only("ext4", "xfs"))
def fallocate_INSERT(t: Place) -> Steps:
    yield from _fallocate(t, sc.FALLOC_INSERT, 4096, 4096)


def _direct(t: Place, opened_before: bool) -> Steps:
    buffer = sc.aligned(b"d" * 4096)
    view = memoryview((sc.ctypes.c_char * 4096).from_address(buffer.address))
    fd = t.open(flags=os.O_RDWR | os.O_DIRECT) if opened_before else -1
    yield
    if fd < 0:
        fd = t.open(flags=os.O_RDWR | os.O_DIRECT)
    os.pwrite(fd, view, 4096)
    yield
    os.close(fd)
    view.release()
    buffer.unmap()


@effect("file", gentle=True)
def O_DIRECT_open_write(t: Place) -> Steps:
    yield from _direct(t, opened_before=False)


@effect("file", gentle=True)
def O_DIRECT_old_descriptor(t: Place) -> Steps:
    yield from _direct(t, opened_before=True)


def _aio(t: Place, flags: int) -> Steps:
    buffer, context = sc.aligned(b"a" * 4096), sc.Aio()
    fd = t.open(flags=os.O_RDWR | flags)
    yield
    context.submit_write(fd, buffer.address, 4096, 4096)
    context.wait()
    yield
    context.close()
    os.close(fd)
    buffer.unmap()


@effect("file", gentle=True, lingers=True)
def O_DIRECT_aio(t: Place) -> Steps:
    yield from _aio(t, os.O_DIRECT)


@effect("file", gentle=True, lingers=True)
def buffered_aio(t: Place) -> Steps:
    yield from _aio(t, 0)


def in_child(work: object) -> None:
    """Runs work() in a forked child and waits for it. A failed one raises ChildProcessError."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()  # type: ignore[operator]
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise ChildProcessError("the child could not do it")


@effect("file", gentle=True)
def write_by_forked_child(t: Place) -> Steps:
    fd = t.open()
    yield
    in_child(lambda: os.write(fd, b"child"))
    yield
    os.close(fd)


@effect("file", gentle=True)
def write_by_descendant_cgroup(t: Place) -> Steps:
    """As systemd or Docker inside of the sandbox would have it."""
    group = tempfile.mkdtemp(prefix="deeper-", dir=t.cgroup)

    def work() -> None:
        with open(f"{group}/cgroup.procs", "w") as procs:
            procs.write("0")
        t.write("file", b"descendant", os.O_RDWR)
    yield
    in_child(work)
    yield
    os.rmdir(group)


@effect("file", gentle=True)
def write_by_thread(t: Place) -> Steps:
    fd = t.open()
    yield
    thread = threading.Thread(target=os.write, args=(fd, b"thread"))
    thread.start()
    thread.join()
    yield
    os.close(fd)


@effect("file", gentle=True)
def write_by_shell(t: Place) -> Steps:
    yield
    subprocess.run(["/bin/sh", "-c", 'printf shell 1<>"$0"', t / "file"], check=True)


@effect("file", gentle=True)
def write_via_proc_self_fd(t: Place) -> Steps:
    fd = t.open(flags=os.O_RDONLY)
    yield
    again = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
    os.write(again, b"proc")
    yield
    os.close(again)
    os.close(fd)


@effect("file", gentle=True)
def write_via_proc_root(t: Place) -> Steps:
    parent = os.getpid()
    yield
    in_child(lambda: os.close(_written(f"/proc/{parent}/root{t / 'file'}")))


def _written(path: str) -> int:
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, b"root")
    return fd


@effect("file", gentle=True)
def write_via_O_PATH(t: Place) -> Steps:
    fd = t.open(flags=os.O_PATH)
    yield
    os.close(_written(f"/proc/self/fd/{fd}"))
    yield
    os.close(fd)


@effect("")
def write_to_orphan(t: Place) -> Steps:
    """Unlinked in an earlier turn, still open: part of a process's state."""
    fd = t.open("h")
    os.unlink(t / "h")
    t.nameless.append(fd)
    yield
    os.write(fd, b"orphan")
    yield
    os.close(fd)


@effect("file")
def write_via_bind_inside(t: Place) -> Steps:
    """A bind mount made inside of the sandbox, of the sandbox's own directory."""
    sc.mount(t / ".", t / "empty", flags=sc.MS_BIND)
    try:
        yield
        t.write("empty/file", b"bound", os.O_WRONLY)
        yield
    finally:
        sc.umount(t / "empty", sc.MNT_DETACH)


@effect("volume:file", gentle=True)
def write_to_volume(t: Place) -> Steps:
    """A directory of the host, bound into the sandbox."""
    yield
    t.write("volume:file", b"volume", os.O_WRONLY)


@effect("volume:. +volume:new")
def creat_in_volume(t: Place) -> Steps:
    yield
    t.write("volume:new")


@effect("shm:file", gentle=True)
def write_to_dev_shm(t: Place) -> Steps:
    yield
    t.write("shm:file", b"shm", os.O_WRONLY)


@effect("shm:. +shm:new")
def creat_in_dev_shm(t: Place) -> Steps:
    yield
    t.write("shm:new")


@effect("", flag="memory")
def write_to_memfd(t: Place) -> Steps:
    fd = os.memfd_create("memory")
    st = os.fstat(fd)
    t.elsewhere.append((st.st_dev, st.st_ino))
    yield
    os.write(fd, b"memfd")
    yield
    os.close(fd)


@effect("file", outside=True, gentle=True)
def outsider_write(t: Place) -> Steps:
    """From another cgroup, through the sandbox's mount: docker cp, nsenter."""
    yield
    t.write("file", b"outsider", os.O_WRONLY)


@effect("file", outside=True, gentle=True)
def outsider_write_old_descriptor(t: Place) -> Steps:
    fd = t.open()
    yield
    os.write(fd, b"outsider")
    yield
    os.close(fd)


@effect("file", outside=True)
def outsider_truncate(t: Place) -> Steps:
    yield
    os.truncate(t / "file", 77)


@effect("file", outside=True, gentle=True)
def outsider_uring_ASYNC(t: Place) -> Steps:
    yield from _uring(t, sqe=uring.SQE_ASYNC)
