"""What changes nothing."""
from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import subprocess
from typing import Callable, Iterator

import syscalls
from effects import FILE_SIZE, Place, effect
from syscalls import Mapping

Steps = Iterator[None]


@effect(read_only=True)
def RO_noop(t: Place) -> Steps:
    yield


@effect(read_only=True)
def RO_stat(t: Place) -> Steps:
    yield
    for name in (".", "file", "sym", "sub/y"):
        os.lstat(t / name)
    os.statvfs(t / ".")


@effect(read_only=True)
def RO_open(t: Place) -> Steps:
    yield
    os.close(t.open(flags=os.O_RDONLY))


@effect(read_only=True)
def RO_open_O_RDWR(t: Place) -> Steps:
    yield
    os.close(t.open(flags=os.O_RDWR))


@effect(read_only=True)
def RO_open_O_CREAT_existing(t: Place) -> Steps:
    yield
    os.close(t.open(flags=os.O_RDWR | os.O_CREAT))


@effect(read_only=True)
def RO_read(t: Place) -> Steps:
    yield
    with open(t / "file", "rb") as source:
        source.read()


@effect(read_only=True)
def RO_readdir(t: Place) -> Steps:
    yield
    os.listdir(t / ".")
    os.listdir(t / "sub")


@effect(read_only=True)
def RO_readlink(t: Place) -> Steps:
    yield
    os.readlink(t / "sym")


@effect(read_only=True)
def RO_access(t: Place) -> Steps:
    yield
    os.access(t / "file", os.W_OK)


@effect(read_only=True)
def RO_mmap_PROT_READ(t: Place) -> Steps:
    fd = t.open(flags=os.O_RDONLY)
    yield
    mapping = Mapping(fd, FILE_SIZE, mmap.PROT_READ)
    mapping.load(0, FILE_SIZE)
    mapping.unmap()
    yield
    os.close(fd)


@effect(read_only=True)
def RO_mmap_PRIVATE_store(t: Place) -> Steps:
    fd = t.open()
    yield
    mapping = Mapping(fd, FILE_SIZE, flags=mmap.MAP_PRIVATE)
    mapping.store(0, b"private")
    mapping.unmap()
    yield
    os.close(fd)


@effect("file", conservative=True)
def RO_mmap_SHARED_RW_no_store(t: Place) -> Steps:
    """Nobody can tell that there was no store."""
    fd = t.open()
    yield
    mapping = Mapping(fd, FILE_SIZE)
    mapping.load(0)
    mapping.unmap()
    yield
    os.close(fd)


@effect(read_only=True)
def RO_getxattr(t: Place) -> Steps:
    yield
    os.listxattr(t / "file")
    os.getxattr(t / "file", "user.old")


@effect(read_only=True)
def RO_fsync(t: Place) -> Steps:
    fd = t.open()
    yield
    os.fsync(fd)
    os.fdatasync(fd)
    yield
    os.close(fd)


@effect(read_only=True)
def RO_lock(t: Place) -> Steps:
    fd = t.open()
    yield
    fcntl.flock(fd, fcntl.LOCK_EX)
    fcntl.lockf(fd, fcntl.LOCK_EX)
    yield
    os.close(fd)


@effect(read_only=True)
def RO_sendfile_to_pipe(t: Place) -> Steps:
    fd = t.open(flags=os.O_RDONLY)
    ends = os.pipe()
    yield
    os.sendfile(ends[1], fd, 0, 4096)
    os.splice(fd, ends[1], 4096)
    yield
    for end in (*ends, fd):
        os.close(end)


@effect(read_only=True)
def RO_fadvise(t: Place) -> Steps:
    fd = t.open(flags=os.O_RDONLY)
    yield
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    yield
    os.close(fd)


@effect(read_only=True)
def RO_read_lower(t: Place) -> Steps:
    """Of the lower layer, through the merged view."""
    yield
    for name in sorted(os.listdir(t / "../lower-only")):
        with open(t / f"../lower-only/{name}", "rb") as source:
            source.read()


@effect(read_only=True)
def RO_chdir(t: Place) -> Steps:
    yield
    os.chdir(t / ".")
    os.chdir("/")


@effect(read_only=True)
def RO_exec(t: Place) -> Steps:
    """A program that lies in the layer."""
    with open("/bin/true", "rb") as source:
        t.write("true", source.read())
    os.chmod(t / "true", 0o755)
    yield
    subprocess.run([t / "true"], check=True)


@effect(read_only=True)
def RO_device_null(t: Place) -> Steps:
    fd = os.open("/dev/null", os.O_RDWR)
    yield
    os.write(fd, b"nothing")
    yield
    os.close(fd)


@effect(read_only=True)
def RO_pipe_and_poll(t: Place) -> Steps:
    yield
    ends = os.pipe()
    os.write(ends[1], b"x")
    select.select([ends[0]], [], [])
    for end in ends:
        os.close(end)


def _refused(*attempts: Callable[[], object]) -> None:
    for attempt in attempts:
        with contextlib.suppress(OSError):
            attempt()
            raise AssertionError("what must be refused was done")


@effect(read_only=True)
def RO_refused(t: Place) -> Steps:
    """Fails before anything happens."""
    yield
    _refused(lambda: os.mkdir(t / "sub"), lambda: os.unlink(t / "missing"), lambda: os.unlink(t / "sub"),
             lambda: os.rename(t / "missing", t / "other"), lambda: os.link(t / "missing", t / "other"),
             lambda: os.symlink("x", t / "sym"), lambda: os.truncate(t / "sub", 0),
             lambda: os.open(t / "file", os.O_CREAT | os.O_EXCL | os.O_WRONLY), lambda: os.chmod(t / "missing", 0o600))


@effect(conservative=True)
def RO_refused_by_overlay(t: Place) -> Steps:
    """Overlay takes the upper inode's times anew even if the upper file system refused."""
    yield
    _refused(lambda: os.rmdir(t / "sub"), lambda: os.removexattr(t / "file", "user.missing"),
             lambda: os.setxattr(t / "file", "user.old", b"", os.XATTR_CREATE))


@effect(read_only=True)
def RO_utimensat_OMIT(t: Place) -> Steps:
    omit = (1 << 30) - 2
    times = (syscalls.ctypes.c_long * 4)(0, omit, 0, omit)
    yield
    syscalls._check(syscalls._libc.utimensat(syscalls.AT_FDCWD, (t / "file").encode(), times, 0))


@effect(read_only=True, once=True)
def RO_cold_walk(t: Place) -> Steps:
    """With nothing in the caches: inodes are read in, which sets their times, too."""
    syscalls.empty_caches(t.upper)
    yield
    for base, _, files in os.walk(t / ".."):
        for name in files:
            os.lstat(f"{base}/{name}")


@effect(read_only=True, outside=True)
def RO_outsider_reads(t: Place) -> Steps:
    yield
    for base, _, files in os.walk(t / "."):
        for name in files:
            with open(f"{base}/{name}", "rb") as source:
                source.read()
