"""System calls that Python does not offer, by ctypes; and mappings whose addresses are known."""
from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap as _mmap
import os
import struct
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
_libc.syscall.restype = ctypes.c_long

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
PAGE = _mmap.PAGESIZE

CLONE_NEWNS = 0x20000
MS_REMOUNT, MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 0x20, 0x1000, 0x2000, 0x4000, 0x40000
MNT_DETACH = 2

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4

FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_COLLAPSE, FALLOC_ZERO, FALLOC_INSERT, FALLOC_UNSHARE = 1, 2, 8, 16, 32, 64

SYNC_RANGE_WAIT_BEFORE, SYNC_RANGE_WRITE, SYNC_RANGE_WAIT_AFTER = 1, 2, 4
MS_SYNC = 4

FICLONE = 0x40049409
FICLONERANGE = 0x4020940D
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602
FS_NOATIME_FL = 0x80
FIFREEZE, FITHAW = 0xC0045877, 0xC0045878

RWF_HIPRI, RWF_DSYNC, RWF_SYNC, RWF_NOWAIT, RWF_APPEND = 1, 2, 4, 8, 16

# Numbers of system calls newer than glibc; the same on all architectures since 424.
NR_FCHMODAT2, NR_SETXATTRAT, NR_FILE_GETATTR, NR_FILE_SETATTR = 452, 463, 468, 469
_AIO = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}  # io_setup, io_destroy, io_getevents, io_submit


def _check(result: int | None, failed: int = -1) -> int:
    if result == failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result or 0


def syscall(number: int, *args: Any) -> int:
    """Integers are passed as longs, bytes and buffers as pointers."""
    return _check(_libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in args)))


def mount(source: str, target: str, kind: str = "none", flags: int = 0, data: str = "") -> None:
    _check(_libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode() or None))


def umount(target: str, flags: int = 0) -> None:
    _check(_libc.umount2(target.encode(), flags))


def private_mounts() -> None:
    """A mount namespace of this process's own: whatever it mounts from now on goes with it and its children."""
    _check(_libc.unshare(CLONE_NEWNS))
    mount("none", "/", flags=MS_REC | MS_PRIVATE)


def renameat2(old: str, new: str, flags: int) -> None:
    _check(_libc.renameat2(AT_FDCWD, old.encode(), AT_FDCWD, new.encode(), flags))


def link_descriptor(fd: int, path: str) -> None:
    """linkat(2) with AT_SYMLINK_FOLLOW; os.link() never follows."""
    _check(_libc.linkat(AT_FDCWD, f"/proc/self/fd/{fd}".encode(), AT_FDCWD, path.encode(), 0x400))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    _check(_libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)))


def sync_file_range(fd: int, offset: int = 0, length: int = 0) -> None:
    flags = SYNC_RANGE_WAIT_BEFORE | SYNC_RANGE_WRITE | SYNC_RANGE_WAIT_AFTER
    _check(_libc.sync_file_range(fd, ctypes.c_long(offset), ctypes.c_long(length), flags))


def syncfs(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        _check(_libc.syncfs(fd))
    finally:
        os.close(fd)


def empty_caches(path: str) -> None:
    """Has the file system of `path` write everything back, log and all, and the kernel forget its inodes and names."""
    fd = os.open(path, os.O_RDONLY)
    try:
        _check(_libc.syncfs(fd))
        try:  # XFS keeps inodes that are in its log; freezing empties it
            fcntl.ioctl(fd, FIFREEZE, 0)
            fcntl.ioctl(fd, FITHAW, 0)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
    finally:
        os.close(fd)
    with open("/proc/sys/vm/drop_caches", "w") as drop:
        drop.write("2")


def vmsplice(pipe: int, data: bytes) -> int:
    buffer = ctypes.create_string_buffer(data, len(data))
    vector = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), len(data))
    return _check(_libc.vmsplice(pipe, vector, ctypes.c_size_t(1), 0))


def fchmodat2(path: str, mode: int) -> None:
    syscall(NR_FCHMODAT2, AT_FDCWD, path.encode(), mode, 0)


def has_file_setattr() -> bool:
    """Kernel 6.17 and newer."""
    try:
        syscall(NR_FILE_GETATTR, AT_FDCWD, b"", None, 0, 0)
    except OSError as error:
        return error.errno != errno.ENOSYS
    return True


def file_flip_noatime(path: str) -> None:
    """file_getattr(2), file_setattr(2): what FS_IOC_FSSETXATTR does, by path. FS_XFLAG_NOATIME is 0x40."""
    attributes = ctypes.create_string_buffer(24)  # struct file_attr: u64 xflags, u32 extsize, nextents, projid, cowextsize
    syscall(NR_FILE_GETATTR, AT_FDCWD, path.encode(), attributes, 24, 0)
    struct.pack_into("<Q", attributes, 0, struct.unpack_from("<Q", attributes)[0] ^ 0x40)
    syscall(NR_FILE_SETATTR, AT_FDCWD, path.encode(), attributes, 24, 0)


def process_vm_write(pid: int, address: int, data: bytes) -> None:
    buffer = ctypes.create_string_buffer(data, len(data))
    local = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), len(data))
    remote = (ctypes.c_void_p * 2)(address, len(data))
    _check(_libc.process_vm_writev(pid, local, ctypes.c_ulong(1), remote, ctypes.c_ulong(1), ctypes.c_ulong(0)))


class Mapping:
    """A file's mapping. Python's own mmap duplicates the descriptor and hides the address."""

    def __init__(self, fd: int, length: int, prot: int = _mmap.PROT_READ | _mmap.PROT_WRITE,
                 flags: int = _mmap.MAP_SHARED, offset: int = 0, at: int = 0):
        self.length = length
        self.address = _check(_libc.mmap(at or None, length, prot, flags, fd, offset), ctypes.c_void_p(-1).value or -1)

    def store(self, offset: int, data: bytes) -> None:
        ctypes.memmove(self.address + offset, data, len(data))

    def load(self, offset: int, length: int = 1) -> bytes:
        return ctypes.string_at(self.address + offset, length)

    def protect(self, prot: int, offset: int = 0, length: int | None = None) -> None:
        _check(_libc.mprotect(ctypes.c_void_p(self.address + offset), ctypes.c_size_t(length or self.length), prot))

    def sync(self) -> None:
        _check(_libc.msync(ctypes.c_void_p(self.address), ctypes.c_size_t(self.length), MS_SYNC))

    def advise(self, advice: int) -> None:
        _check(_libc.madvise(ctypes.c_void_p(self.address), ctypes.c_size_t(self.length), advice))

    def remap(self, length: int) -> None:
        """To another size, perhaps elsewhere."""
        self.address = _check(_libc.mremap(self.address, self.length, length, 1), ctypes.c_void_p(-1).value or -1)
        self.length = length

    def unmap(self) -> None:
        if self.length:
            _check(_libc.munmap(ctypes.c_void_p(self.address), ctypes.c_size_t(self.length)))
            self.length = 0


def aligned(data: bytes) -> Mapping:
    """A page-aligned buffer, as O_DIRECT wants it."""
    buffer = Mapping(-1, -(-len(data) // PAGE) * PAGE, flags=_mmap.MAP_PRIVATE | _mmap.MAP_ANONYMOUS)
    buffer.store(0, data)
    return buffer


class Aio:
    """The kernel's own asynchronous I/O: io_setup(2) and friends."""

    def __init__(self) -> None:
        self._setup, self._destroy, self._getevents, self._submit = _AIO[os.uname().machine]
        context = ctypes.c_ulong(0)
        syscall(self._setup, 8, ctypes.byref(context))
        self._context = context.value

    def submit_write(self, fd: int, address: int, length: int, offset: int) -> None:
        # struct iocb: data, key, rw_flags, opcode (1 = PWRITE), reqprio, fildes, buf, nbytes, offset, reserved2, flags, resfd
        self._iocb = ctypes.create_string_buffer(
            struct.pack("<QIiHhIQQqQII", 0, 0, 0, 1, 0, fd, address, length, offset, 0, 0, 0), 64)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._iocb))
        syscall(self._submit, self._context, 1, pointers)

    def wait(self) -> None:
        events = ctypes.create_string_buffer(32)
        syscall(self._getevents, self._context, 1, 1, events, ctypes.c_void_p(None))
        result = struct.unpack_from("<QQqq", events)[2]
        if result < 0:
            raise OSError(-result, os.strerror(-result))

    def close(self) -> None:
        syscall(self._destroy, self._context)
