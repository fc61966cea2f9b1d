"""The few system calls that Python's standard library does not have, and namespaces."""
from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import threading
from typing import Callable, Iterator, TypeVar

T = TypeVar("T")

_LIBC = ctypes.CDLL(None, use_errno=True)
_X86 = platform.machine() == "x86_64"
_PIDFD_OPEN, _PIDFD_GETFD = 434, 438
_KCMP = 312 if _X86 else 272
_GET_ROBUST_LIST = 274 if _X86 else 100
_KCMP_FILE = 0

CLONE_NEW = {"ipc": 0x08000000, "uts": 0x04000000, "net": 0x40000000}


def _call(number: int, *args: object) -> int:
    result = _LIBC.syscall(ctypes.c_long(number), *args)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


@contextlib.contextmanager
def borrowed(pid: int, fd: int) -> Iterator[int]:
    """A duplicate of descriptor `fd` of process `pid`. It is the same open file: its offset must not be moved."""
    pidfd = _call(_PIDFD_OPEN, ctypes.c_int(pid), ctypes.c_uint(0))
    try:
        copy = _call(_PIDFD_GETFD, ctypes.c_int(pidfd), ctypes.c_int(fd), ctypes.c_uint(0))
    finally:
        os.close(pidfd)
    try:
        yield copy
    finally:
        os.close(copy)


def compare_files(pid1: int, fd1: int, pid2: int, fd2: int) -> int:
    """0: one open file description. 1 or 2: a total order, valid until reboot. 3: different, without order."""
    return _call(_KCMP, ctypes.c_int(pid1), ctypes.c_int(pid2), ctypes.c_int(_KCMP_FILE),
                 ctypes.c_ulong(fd1), ctypes.c_ulong(fd2))


def robust_list(tid: int) -> int:
    """The address of the thread's robust-futex list head; 0 if it has none."""
    head, size = ctypes.c_void_p(), ctypes.c_size_t()
    _call(_GET_ROBUST_LIST, ctypes.c_int(tid), ctypes.byref(head), ctypes.byref(size))
    return head.value or 0


def peek_pipe(fd: int, limit: int = 1 << 20) -> bytes:
    """What is in the pipe whose read end is `fd`, without taking it out (tee(2))."""
    reader, writer = os.pipe()
    try:
        with contextlib.suppress(OSError):
            _LIBC.fcntl(writer, 1031, ctypes.c_int(limit))  # F_SETPIPE_SZ: room for a pipe of any usual size
        copied = _LIBC.tee(fd, writer, ctypes.c_size_t(limit), ctypes.c_uint(2))  # SPLICE_F_NONBLOCK
        if copied < 0:
            code = ctypes.get_errno()
            if code == errno.EAGAIN:
                return b""
            raise OSError(code, os.strerror(code))
        data = b""
        while len(data) < copied:
            data += os.read(reader, copied - len(data))
        return data
    finally:
        os.close(reader)
        os.close(writer)


def semaphore_values(semid: int, count: int) -> list[int]:
    """The values of one SysV semaphore set, of the calling thread's IPC namespace."""
    array = (ctypes.c_ushort * count)()
    if _LIBC.semctl(semid, 0, 13, array) < 0:  # GETALL
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return list(array)


def shared_memory(shmid: int, size: int) -> bytes:
    """The contents of one SysV segment, of the calling thread's IPC namespace."""
    _LIBC.shmat.restype = ctypes.c_void_p
    address = _LIBC.shmat(shmid, None, 0o10000)  # SHM_RDONLY
    if address in (None, ctypes.c_void_p(-1).value):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    try:
        return ctypes.string_at(address, size)
    finally:
        _LIBC.shmdt(ctypes.c_void_p(address))


def inside(pid: int, kind: str, function: Callable[[], T]) -> T:
    """Runs `function` in a thread that has joined the namespace `kind` (net, ipc, uts) of process `pid`.

    Sockets made there stay there; the calling thread never leaves its own namespace.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            fd = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _LIBC.setns(fd, CLONE_NEW[kind]) != 0:
                    code = ctypes.get_errno()
                    raise OSError(code, os.strerror(code), f"setns {kind} of {pid}")
            finally:
                os.close(fd)
            outcome.append(function())
        except BaseException as error:  # handed to the caller's thread below
            failure.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
