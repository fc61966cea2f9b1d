"""Effects that make, move and remove names."""
from __future__ import annotations

import os
import socket
import stat
from typing import Iterator

import syscalls as sc
import uring
from effects import Place, effect, everywhere

Steps = Iterator[None]


@effect(". file")
def link(t: Place) -> Steps:
    yield
    os.link(t / "file", t / "new")


@effect(". +new")
def symlink(t: Place) -> Steps:
    yield
    os.symlink("target", t / "new")


@effect(". +new")
def symlink_long(t: Place) -> Steps:
    """Does not fit into the inode. (XFS takes 1024 bytes.)"""
    yield
    os.symlink("target/" * 100, t / "new")


@effect(". g")
def unlink(t: Place) -> Steps:
    yield
    os.unlink(t / "g")


@effect(". h")
def unlink_one_of_two(t: Place) -> Steps:
    os.link(t / "h", t / "h2")
    yield
    os.unlink(t / "h2")


@effect(". h")
def unlink_open(t: Place) -> Steps:
    fd = t.open("h")
    yield
    os.unlink(t / "h")
    yield
    os.close(fd)


@effect(". h")
def rename(t: Place) -> Steps:
    yield
    os.rename(t / "h", t / "moved")


@effect(". file g")
def rename_over(t: Place) -> Steps:
    yield
    os.rename(t / "file", t / "g")


@effect(". file g")
def RENAME_EXCHANGE(t: Place) -> Steps:
    yield
    sc.renameat2(t / "file", t / "g", sc.RENAME_EXCHANGE)


@effect(". file")
def RENAME_NOREPLACE(t: Place) -> Steps:
    yield
    sc.renameat2(t / "file", t / "moved", sc.RENAME_NOREPLACE)


@effect(". file", refused=everywhere("EINVAL"))
def RENAME_WHITEOUT(t: Place) -> Steps:
    yield
    sc.renameat2(t / "file", t / "moved", sc.RENAME_WHITEOUT)


@effect(". sub sub/y")
def rename_across_directories(t: Place) -> Steps:
    yield
    os.rename(t / "sub/y", t / "y")


@effect(". empty")
def rename_directory(t: Place) -> Steps:
    yield
    os.rename(t / "empty", t / "moved")


@effect(". sub empty")
def rename_directory_into_other(t: Place) -> Steps:
    yield
    os.rename(t / "empty", t / "sub/moved")


@effect(". sub empty")
def rename_directory_over_empty(t: Place) -> Steps:
    yield
    os.rename(t / "sub", t / "empty")


@effect(". sub h")
def RENAME_EXCHANGE_directory_and_file(t: Place) -> Steps:
    yield
    sc.renameat2(t / "sub", t / "h", sc.RENAME_EXCHANGE)


@effect(". +new")
def mkdir(t: Place) -> Steps:
    yield
    os.mkdir(t / "new")


@effect(". empty")
def rmdir(t: Place) -> Steps:
    yield
    os.rmdir(t / "empty")


@effect(". +new +new/a +new/a/b")
def makedirs_and_file(t: Place) -> Steps:
    yield
    os.makedirs(t / "new/a")
    t.write("new/a/b")


@effect(". +new")
def creat(t: Place) -> Steps:
    yield
    os.close(t.open("new", os.O_CREAT | os.O_WRONLY))


@effect(". +new")
def creat_write(t: Place) -> Steps:
    yield
    t.write("new", b"new" * 1000)


@effect(". +g")
def replace_atomically(t: Place) -> Steps:
    """As editors and package managers do."""
    yield
    t.write("g.tmp", b"replaced")
    os.rename(t / "g.tmp", t / "g")


@effect(". +new")
def mknod_fifo(t: Place) -> Steps:
    yield
    os.mkfifo(t / "new")


@effect(". +new")
def mknod_char(t: Place) -> Steps:
    yield
    os.mknod(t / "new", stat.S_IFCHR | 0o600, os.makedev(1, 3))


@effect(". +new")
def mknod_block(t: Place) -> Steps:
    yield
    os.mknod(t / "new", stat.S_IFBLK | 0o600, os.makedev(7, 250))


@effect(". +new", refused=everywhere("EPERM"))
def mknod_whiteout(t: Place) -> Steps:
    yield
    os.mknod(t / "new", stat.S_IFCHR, os.makedev(0, 0))


@effect(". +new")
def unix_bind(t: Place) -> Steps:
    here = os.open(t / ".", os.O_PATH)
    server = socket.socket(socket.AF_UNIX)
    yield
    server.bind(f"/proc/self/fd/{here}/new")
    yield
    server.close()
    os.close(here)


@effect(". +new")
def O_TMPFILE_linkat(t: Place) -> Steps:
    yield
    fd = os.open(t / ".", os.O_TMPFILE | os.O_RDWR, 0o644)
    os.write(fd, b"temporary")
    sc.link_descriptor(fd, t / "new")
    yield
    os.close(fd)


@effect(". +new")
def linkat_of_old_O_TMPFILE(t: Place) -> Steps:
    fd = os.open(t / ".", os.O_TMPFILE | os.O_RDWR, 0o644)
    os.write(fd, b"temporary")
    yield
    sc.link_descriptor(fd, t / "new")
    yield
    os.close(fd)


@effect(". h")
def uring_unlinkat(t: Place) -> Steps:
    ring = uring.Ring()
    yield
    ring.run(uring.OP_UNLINKAT, sc.AT_FDCWD, ring.text(t / "h"))
    yield
    ring.close()


@effect(". h")
def uring_renameat(t: Place) -> Steps:
    ring = uring.Ring()
    yield
    ring.run(uring.OP_RENAMEAT, sc.AT_FDCWD, ring.text(t / "h"), sc.AT_FDCWD & 0xFFFFFFFF, ring.text(t / "moved"))
    yield
    ring.close()


@effect(". +new")
def uring_mkdirat(t: Place) -> Steps:
    ring = uring.Ring()
    yield
    ring.run(uring.OP_MKDIRAT, sc.AT_FDCWD, ring.text(t / "new"), 0o755)
    yield
    ring.close()


@effect(". +new", outside=True)
def outsider_creat_write(t: Place) -> Steps:
    yield
    t.write("new", b"docker cp")


@effect(". g", outside=True)
def outsider_unlink(t: Place) -> Steps:
    yield
    os.unlink(t / "g")


@effect(". h", outside=True)
def outsider_rename(t: Place) -> Steps:
    yield
    os.rename(t / "h", t / "moved")


@effect(".", outside=True)
def outsider_mkdir(t: Place) -> Steps:
    """The new inode is found by listing its directory."""
    yield
    os.mkdir(t / "new")
