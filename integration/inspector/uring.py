"""A small io_uring: one request at a time, by raw system calls."""
from __future__ import annotations

import ctypes
import os
import struct

from syscalls import Mapping, syscall

_SETUP, _ENTER, _REGISTER = 425, 426, 427
_OFF_SQ_RING, _OFF_CQ_RING, _OFF_SQES = 0, 0x8000000, 0x10000000
_SQE, _CQE = 64, 16

SETUP_SQPOLL = 2
SQE_ASYNC = 1 << 4

OP_WRITE_FIXED, OP_FALLOCATE, OP_WRITE, OP_RENAMEAT, OP_UNLINKAT, OP_MKDIRAT, OP_FSETXATTR, OP_FTRUNCATE = (
    5, 17, 23, 35, 36, 37, 41, 55)

_ENTER_GETEVENTS, _ENTER_SQ_WAKEUP = 1, 2
_REGISTER_BUFFERS = 0


class Ring:
    """`flags` of io_uring_setup(2). An SQPOLL ring's kernel thread goes to sleep after 1 ms."""

    def __init__(self, flags: int = 0):
        parameters = ctypes.create_string_buffer(120)
        struct.pack_into("<IIIII", parameters, 0, 0, 0, flags, 0, 1)
        self.fd = syscall(_SETUP, 4, parameters)
        self._poll = bool(flags & SETUP_SQPOLL)
        entries = struct.unpack_from("<II", parameters)
        # struct io_sqring_offsets at 40: head, tail, ring_mask, ring_entries, flags, dropped, array
        _, self._sq_tail, self._sq_mask, _, self._sq_flags, _, self._sq_array = struct.unpack_from("<7I", parameters, 40)
        # struct io_cqring_offsets at 80: head, tail, ring_mask, ring_entries, overflow, cqes
        self._cq_head, self._cq_tail, self._cq_mask, _, _, self._cqes = struct.unpack_from("<6I", parameters, 80)
        self._sq = Mapping(self.fd, self._sq_array + 4 * entries[0], offset=_OFF_SQ_RING)
        self._cq = Mapping(self.fd, self._cqes + _CQE * entries[1], offset=_OFF_CQ_RING)
        self._sqe = Mapping(self.fd, _SQE * entries[0], offset=_OFF_SQES)
        self._keep: list[object] = []

    @staticmethod
    def _u32(ring: Mapping, offset: int) -> int:
        return struct.unpack("<I", ring.load(offset, 4))[0]

    def submit(self, opcode: int, fd: int, address: int = 0, length: int = 0, offset: int = 0, sqe_flags: int = 0,
               op_flags: int = 0) -> None:
        tail = self._u32(self._sq, self._sq_tail)
        index = tail & self._u32(self._sq, self._sq_mask)
        self._sqe.store(index * _SQE, struct.pack("<BBHiQQII", opcode, sqe_flags, 0, fd, offset & 0xFFFFFFFFFFFFFFFF, address, length,
                                                  op_flags).ljust(_SQE, b"\0"))
        self._sq.store(self._sq_array + 4 * index, struct.pack("<I", index))
        self._sq.store(self._sq_tail, struct.pack("<I", tail + 1))
        if not self._poll:
            syscall(_ENTER, self.fd, 1, 0, 0, ctypes.c_void_p(None), 0)
        elif self._u32(self._sq, self._sq_flags) & 1:  # IORING_SQ_NEED_WAKEUP
            syscall(_ENTER, self.fd, 1, 0, _ENTER_SQ_WAKEUP, ctypes.c_void_p(None), 0)

    def wait(self) -> int:
        """The result of the request; an error is raised."""
        while (head := self._u32(self._cq, self._cq_head)) == self._u32(self._cq, self._cq_tail):
            syscall(_ENTER, self.fd, 0, 1, _ENTER_GETEVENTS, ctypes.c_void_p(None), 0)
        at = self._cqes + _CQE * (head & self._u32(self._cq, self._cq_mask))
        result = struct.unpack("<Qii", self._cq.load(at, 16))[1]
        self._cq.store(self._cq_head, struct.pack("<I", head + 1))
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def run(self, *args: int, **named: int) -> int:
        self.submit(*args, **named)
        return self.wait()

    def text(self, value: str | bytes) -> int:
        """The address of a string that lives as long as the ring."""
        buffer = ctypes.create_string_buffer(value.encode() if isinstance(value, str) else value)
        self._keep.append(buffer)
        return ctypes.addressof(buffer)

    def register(self, buffer: Mapping) -> None:
        vector = (ctypes.c_void_p * 2)(buffer.address, buffer.length)
        syscall(_REGISTER, self.fd, _REGISTER_BUFFERS, vector, 1)

    def close(self) -> None:
        for part in (self._sq, self._cq, self._sqe):
            part.unmap()
        os.close(self.fd)
