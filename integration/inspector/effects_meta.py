"""Effects that change attributes."""
from __future__ import annotations

import fcntl
import os
import struct
from typing import Iterator

import syscalls as sc
from effects import Place, effect, everywhere

Steps = Iterator[None]


def acl(*entries: tuple[int, int, int]) -> bytes:
    """The value of system.posix_acl_*: (tag, permissions, id) each; ids as -1 where they have none."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, perm, who & 0xFFFFFFFF) for tag, perm, who in entries)


#: user::rw-, user:1000:r--, group::r--, mask::rw-, other::r--
SOME_ACL = acl((1, 6, -1), (2, 4, 1000), (4, 4, -1), (0x10, 6, -1), (0x20, 4, -1))
#: CAP_NET_RAW as setcap writes it, version 2.
SOME_CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)


@effect("file", gentle=True)
def chmod(t: Place) -> Steps:
    yield
    os.chmod(t / "file", 0o600)


@effect("file", gentle=True)
def chmod_same_mode(t: Place) -> Steps:
    mode = os.stat(t / "file").st_mode & 0o7777
    yield
    os.chmod(t / "file", mode)


@effect("file", gentle=True)
def fchmod(t: Place) -> Steps:
    fd = t.open(flags=os.O_RDONLY)
    yield
    os.fchmod(fd, 0o640)
    yield
    os.close(fd)


@effect("file", gentle=True)
def fchmodat2(t: Place) -> Steps:
    yield
    sc.fchmodat2(t / "file", 0o660)


@effect("empty", gentle=True)
def chmod_directory(t: Place) -> Steps:
    yield
    os.chmod(t / "empty", 0o700)


@effect("file", gentle=True)
def chown(t: Place) -> Steps:
    yield
    os.chown(t / "file", 1000, 1000)


@effect("empty", gentle=True)
def chown_directory(t: Place) -> Steps:
    yield
    os.chown(t / "empty", 1000, 1000)


@effect("sym", gentle=True)
def lchown_symlink(t: Place) -> Steps:
    yield
    os.chown(t / "sym", 1000, 1000, follow_symlinks=False)


@effect("file", gentle=True)
def utimensat_set(t: Place) -> Steps:
    yield
    os.utime(t / "file", (1, 2))


@effect("file", gentle=True)
def utimensat_now(t: Place) -> Steps:
    yield
    os.utime(t / "file")


@effect("sym", gentle=True)
def utimensat_symlink(t: Place) -> Steps:
    yield
    os.utime(t / "sym", (1, 2), follow_symlinks=False)


@effect("file", gentle=True)
def setxattr(t: Place) -> Steps:
    yield
    os.setxattr(t / "file", "user.new", b"value")


@effect("file", gentle=True)
def setxattr_over(t: Place) -> Steps:
    yield
    os.setxattr(t / "file", "user.old", b"other")


@effect("file", gentle=True)
def setxattr_large(t: Place) -> Steps:
    """Does not fit into the inode."""
    yield
    os.setxattr(t / "file", "user.large", b"v" * 2000)


@effect("file")
def removexattr(t: Place) -> Steps:
    os.setxattr(t / "file", "user.gone", b"value")
    yield
    os.removexattr(t / "file", "user.gone")


@effect("empty", gentle=True)
def setxattr_directory(t: Place) -> Steps:
    yield
    os.setxattr(t / "empty", "trusted.new", b"value")


@effect("file", gentle=True)
def setxattr_capability(t: Place) -> Steps:
    yield
    os.setxattr(t / "file", "security.capability", SOME_CAPABILITY)


@effect("file", gentle=True)
def set_posix_acl(t: Place) -> Steps:
    yield
    os.setxattr(t / "file", "system.posix_acl_access", SOME_ACL)


@effect("file")
def remove_posix_acl(t: Place) -> Steps:
    os.setxattr(t / "file", "system.posix_acl_access", SOME_ACL)
    yield
    os.removexattr(t / "file", "system.posix_acl_access")


@effect("empty", gentle=True)
def set_default_acl(t: Place) -> Steps:
    yield
    os.setxattr(t / "empty", "system.posix_acl_default", SOME_ACL)


@effect("file")
def FS_IOC_SETFLAGS(t: Place) -> Steps:
    fd = t.open(flags=os.O_RDONLY)
    flags = struct.unpack("<i", fcntl.ioctl(fd, sc.FS_IOC_GETFLAGS, bytes(4)))[0]
    yield
    fcntl.ioctl(fd, sc.FS_IOC_SETFLAGS, struct.pack("<i", flags ^ sc.FS_NOATIME_FL))
    yield
    os.close(fd)


@effect("file", refused={} if sc.has_file_setattr() else everywhere("ENOSYS"))
def file_setattr(t: Place) -> Steps:
    yield
    sc.file_flip_noatime(t / "file")


@effect("file", outside=True, gentle=True)
def outsider_chmod(t: Place) -> Steps:
    yield
    os.chmod(t / "file", 0o604)


@effect("file", outside=True, gentle=True)
def outsider_setxattr(t: Place) -> Steps:
    yield
    os.setxattr(t / "file", "user.outside", b"value")
