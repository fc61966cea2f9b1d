"""Digests of a process's memory: its mappings, and the contents of every page that is not all zeros."""
from __future__ import annotations

import array
import fcntl
import hashlib
import os
import re
import struct
from dataclasses import dataclass
from typing import Any, Iterator

import kernel
from definition import DROPPABLE, KERNEL_MAPPINGS, KERNEL_VM_FLAGS, PAGE, RENAMED_SHARED_MEMORY, RSEQ_KERNEL_BYTES

_HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) (\d+)\s*(.*)$")
_CHUNK = 1 << 20
_ZERO = bytes(PAGE)
#: Documentation/admin-guide/mm/pagemap.rst: PAGE_IS_PRESENT | PAGE_IS_SWAPPED.
_POPULATED = 8 | 16
_PAGEMAP_SCAN = 0xC0606610
_REGIONS = 1024  # per call

#: Where glibc keeps the robust-list head, relative to the thread pointer (struct pthread, unchanged since 2.4).
_ROBUST_HEAD_X86_64 = 0x2E0

Masks = dict[int, list[tuple[int, int]]]


@dataclass
class Mapping:
    """One line of /proc/PID/smaps. Addresses and offset in bytes."""
    start: int
    end: int
    perms: str
    offset: int
    inode: tuple[str, int]
    name: str
    flags: frozenset[str] = frozenset()

    @property
    def is_shared(self) -> bool:
        return self.perms[3] == "s"

    @property
    def has_file(self) -> bool:
        """SysV segment 0 has inode 0 and seems to have none: ask is_shared first."""
        return self.inode[1] != 0

    @property
    def is_readable(self) -> bool:
        """Contents belong to the process (rules KERNEL_MAPPINGS, DROPPABLE), and can be read (device memory cannot)."""
        return self.name not in KERNEL_MAPPINGS and not self.flags & {"io", "pf", DROPPABLE}


def mappings(pid: int) -> list[Mapping]:
    """All mappings, by address."""
    found: list[Mapping] = []
    with open(f"/proc/{pid}/smaps", errors="surrogateescape") as file:
        for line in file:
            if match := _HEADER.match(line):
                start, end, perms, offset, device, inode, name = match.groups()
                found.append(Mapping(int(start, 16), int(end, 16), perms, int(offset, 16), (device, int(inode)), name))
            elif line.startswith("VmFlags:"):
                found[-1].flags = frozenset(line.split()[1:]) - KERNEL_VM_FLAGS
    return found


def describe(all_mappings: list[Mapping], objects: dict[tuple[str, int], str]) -> dict[str, dict[str, Any]]:
    """The mappings by start address, neighbours that agree merged (rule MERGED_MAPPINGS).

    `objects` numbers the shared memory that has no name of its own, over all processes in their order, so that
    it shows which mappings are one memory.
    """
    merged: list[tuple[Mapping, dict[str, Any]]] = []
    for mapping in all_mappings:
        if mapping.name == "[vsyscall]":
            continue
        entry: dict[str, Any] = {"perms": mapping.perms, "flags": " ".join(sorted(mapping.flags))}
        if mapping.name:
            entry["name"] = mapping.name.removeprefix(RENAMED_SHARED_MEMORY)
        if mapping.is_shared:
            entry["object"] = objects.setdefault(mapping.inode, f"object {len(objects) + 1}")
        if mapping.has_file:
            entry["offset"] = mapping.offset
        if merged and _continues(*merged[-1], mapping, entry):
            merged[-1][0].end = mapping.end
        else:
            merged.append((Mapping(**vars(mapping)), entry))
    return {f"{mapping.start:x}": {"end": f"{mapping.end:x}", **entry} for mapping, entry in merged}


def _continues(last: Mapping, last_entry: dict[str, Any], mapping: Mapping, entry: dict[str, Any]) -> bool:
    if last.end != mapping.start or last.inode != mapping.inode:
        return False
    if mapping.has_file and entry["offset"] != last_entry["offset"] + (last.end - last.start):
        return False
    return {**entry, "offset": 0} == {**last_entry, "offset": 0}


def pages(pid: int, all_mappings: list[Mapping], masks: Masks) -> dict[str, str]:
    """Address → digest (128 bits of SHA-256) of every page that is not all zeros.

    Pages beyond the end of a mapped file, which a program could not read either, are "unreadable".
    """
    found: dict[str, str] = {}
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for mapping in all_mappings:
            if not mapping.is_readable:
                continue
            if mapping.is_shared:
                chunks = _shared_chunks(pid, mapping)
            elif mapping.has_file:
                chunks = _chunks(memory, mapping.start, mapping.end)
            else:
                chunks = _anonymous_chunks(memory, pagemap, mapping)
            for address, data in chunks:
                _hash_pages(found, address, data, masks)
    finally:
        os.close(pagemap)
        os.close(memory)
    return found


def _hash_pages(found: dict[str, str], address: int, data: bytes | None, masks: Masks) -> None:
    """data None: one page that cannot be read."""
    if data is None:
        found[f"{address:x}"] = "unreadable"
        return
    sha256 = hashlib.sha256
    for at in range(0, len(data), PAGE):
        page = data[at:at + PAGE]
        if address + at in masks:
            page = _masked(page, masks[address + at])
        if page != _ZERO[:len(page)]:
            found[f"{address + at:x}"] = sha256(page).hexdigest()[:32]


def _masked(page: bytes, ranges: list[tuple[int, int]]) -> bytes:
    copy = bytearray(page)
    for offset, length in ranges:
        copy[offset:offset + length] = bytes(length)
    return bytes(copy)


def _chunks(memory: int, start: int, end: int) -> Iterator[tuple[int, bytes | None]]:
    """(address, bytes) over [start, end), through /proc/PID/mem; a page that cannot be read as (address, None)."""
    at = start
    while at < end:
        try:
            data = os.pread(memory, min(_CHUNK, end - at), at)
        except OSError:
            data = b""
        if not data:
            yield at, None
            at += PAGE
            continue
        yield at, data
        at += len(data)


def _anonymous_chunks(memory: int, pagemap: int, mapping: Mapping) -> Iterator[tuple[int, bytes | None]]:
    """Only the pages that exist: reading the others would allocate page tables for gigabytes of nothing."""
    for start, end in _populated(pagemap, mapping.start, mapping.end):
        yield from _chunks(memory, start, end)


def _populated(pagemap: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Runs of pages that are present or swapped out (PAGEMAP_SCAN, Linux 6.7: costs nothing over holes)."""
    regions = array.array("Q", bytes(24 * _REGIONS))
    while start < end:
        request = bytearray(struct.pack("<12Q", 96, 0, start, end, 0, regions.buffer_info()[0], _REGIONS, 0,
                                        0, 0, _POPULATED, _POPULATED))
        count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, request)
        for index in range(count):
            yield regions[3 * index], regions[3 * index + 1]
        start = struct.unpack_from("<Q", request, 32)[0]


def _shared_chunks(pid: int, mapping: Mapping) -> Iterator[tuple[int, bytes | None]]:
    """Shared memory and shared files through the mapped object itself: a read of a hole there allocates nothing."""
    path = f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        at, end = mapping.offset, mapping.offset + (mapping.end - mapping.start)
        while at < min(end, size):
            try:
                at = max(at, os.lseek(fd, at, os.SEEK_DATA) // PAGE * PAGE)
            except OSError:
                break
            data = os.pread(fd, max(0, min(_CHUNK, end - at)), at)
            if not data:
                break
            data += bytes(-len(data) % PAGE)
            yield mapping.start + at - mapping.offset, data
            at += len(data)
    finally:
        os.close(fd)


# --- struct rseq -----------------------------------------------------------------------------------------------

def rseq_masks(pid: int, tids: list[int], all_mappings: list[Mapping]) -> Masks:
    """Where the kernel writes CPU numbers into the threads' rseq areas (rule RSEQ_KERNEL_BYTES).

    Known for dynamically linked programs of glibc 2.35 and newer on x86-64: `__rseq_offset` of the dynamic loader
    is the area's distance from the thread pointer, and the thread pointer lies at a fixed distance from the robust
    list's head, which the kernel tells.
    """
    offset = _rseq_offset(pid, all_mappings)
    masks: Masks = {}
    if offset is None:
        return masks
    for tid in tids:
        pointer = _thread_pointer(pid, tid)
        if pointer is None:
            continue
        for start, length in RSEQ_KERNEL_BYTES:
            address = pointer + offset + start
            masks.setdefault(address // PAGE * PAGE, []).append((address % PAGE, length))
    return masks


def _thread_pointer(pid: int, tid: int) -> int | None:
    try:
        head = kernel.robust_list(tid)
        pointer = head - _ROBUST_HEAD_X86_64
        own, _, itself = struct.unpack("<QQQ", _read(pid, pointer, 24))
    except (OSError, OverflowError, ValueError, struct.error):
        return None
    return pointer if own == itself == pointer else None  # tcbhead_t: tcb and self


def _rseq_offset(pid: int, all_mappings: list[Mapping]) -> int | None:
    for mapping in all_mappings:
        if mapping.has_file and mapping.offset == 0 and re.search(r"/ld-linux[^/]*\.so[^/]*$", mapping.name):
            path = f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"
            value = symbol(path, b"__rseq_offset")
            if value is not None:
                return struct.unpack("<q", _read(pid, mapping.start + value, 8))[0]
    return None


_SYMBOLS: dict[tuple[int, int, bytes], int | None] = {}


def symbol(path: str, name: bytes) -> int | None:
    """The value of a dynamic symbol of a 64-bit little-endian ELF file; None without such a symbol."""
    try:
        with open(path, "rb") as file:
            st = os.fstat(file.fileno())
            key = (st.st_dev, st.st_ino, name)
            if key not in _SYMBOLS:
                _SYMBOLS[key] = _find_symbol(file.read(), name)
            return _SYMBOLS[key]
    except (OSError, struct.error):
        return None


def _find_symbol(elf: bytes, name: bytes) -> int | None:
    if elf[:6] != b"\x7fELF\x02\x01":
        return None
    table, = struct.unpack_from("<Q", elf, 0x28)
    entry_size, count = struct.unpack_from("<HH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, table + index * entry_size) for index in range(count)]
    for section in sections:
        if section[1] != 11:  # SHT_DYNSYM
            continue
        strings = sections[section[6]][4]
        for at in range(section[4], section[4] + section[5], 24):
            string, _info, _other, _section, value, _size = struct.unpack_from("<IBBHQQ", elf, at)
            if elf.startswith(name + b"\0", strings + string):
                return value
    return None


def _read(pid: int, address: int, length: int) -> bytes:
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, length, address)
    finally:
        os.close(fd)


def system_call_address(pid: int, pc: int) -> int:
    """Rule SYSCALL_RESTART: the address of the system call instruction that pc stands behind, or pc itself."""
    try:
        if os.uname().machine == "x86_64":
            return pc - 2 if _read(pid, pc - 2, 2) in (b"\x0f\x05", b"\x0f\x34", b"\xcd\x80") else pc
        return pc - 4 if _read(pid, pc - 4, 4) == b"\x01\x00\x00\xd4" else pc
    except OSError:
        return pc
