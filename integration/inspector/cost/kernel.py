"""What the kernel tells of BPF objects, through bpf(2): no bpftool is needed."""
from __future__ import annotations

import ctypes
import os
import platform
import struct
from pathlib import Path

_SYS_BPF = {"x86_64": 321, "aarch64": 280}[platform.machine()]
_PROG_NEXT, _MAP_NEXT, _PROG_FD, _INFO = 11, 12, 13, 15
_libc = ctypes.CDLL(None, use_errno=True)


def _bpf(command: int, attr: ctypes.Array) -> int:
    return _libc.syscall(_SYS_BPF, command, attr, len(attr))


def _ids(command: int) -> list[int]:
    found, last = [], 0
    while True:
        attr = ctypes.create_string_buffer(struct.pack("III", last, 0, 0), 12)
        if _bpf(command, attr) < 0:
            return found
        last = struct.unpack_from("I", attr, 4)[0]
        found.append(last)


def _open(command: int, number: int) -> int | None:
    fd = _bpf(command, ctypes.create_string_buffer(struct.pack("III", number, 0, 0), 12))
    return None if fd < 0 else fd  # gone in between


def programs() -> dict[int, str]:
    """Tracing programs of the host, by number: their names."""
    found = {}
    for number in _ids(_PROG_NEXT):
        fd = _open(_PROG_FD, number)
        if fd is None:
            continue
        info = ctypes.create_string_buffer(256)
        attr = ctypes.create_string_buffer(struct.pack("IIQ", fd, len(info), ctypes.addressof(info)), 16)
        if _bpf(_INFO, attr) == 0:
            kind = struct.unpack_from("I", info, 0)[0]
            if kind in (17, 26):  # raw tracepoint, tracing
                found[number] = info.raw[64:80].split(b"\0")[0].decode()
        os.close(fd)
    return found


def held_by(pid: int) -> tuple[dict[int, int], set[int]]:
    """What a process holds: maps, by number, with the bytes of kernel memory that each takes now; and programs."""
    sizes, attached = {}, set()
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        values = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        if "map_id" in values:
            sizes[int(values["map_id"])] = int(values["memlock"])
        if "prog_id" in values:
            attached.add(int(values["prog_id"]))
    return sizes, attached


def alive(maps: set[int], attached: set[int]) -> tuple[set[int], set[int]]:
    """Those of them that the kernel still has."""
    return maps & set(_ids(_MAP_NEXT)), attached & set(_ids(_PROG_NEXT))
