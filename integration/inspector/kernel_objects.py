"""Programs, maps and links of the kernel, by bpf(2): which there are, and who holds which."""

import ctypes
import errno
import os
import pathlib
import platform
import struct
import time

CALL = {"x86_64": 321, "aarch64": 280}[platform.machine()]
MAP_LOOKUP, MAP_UPDATE, OBJ_GET, OBJ_GET_INFO_BY_FD = 1, 2, 7, 15
NEXT_ID = {"prog": 11, "map": 12, "link": 31}
FD_BY_ID = {"prog": 13, "map": 14, "link": 30}
# Where struct bpf_prog_info and bpf_map_info have the name, of 16 bytes; a link has none.
NAME_AT = {"prog": 64, "map": 24}

libc = ctypes.CDLL(None, use_errno=True)


def bpf(command, attr):
    """`attr`: the arguments, as a bytearray, which the kernel may change."""
    attr.extend(bytes(128 - len(attr)))
    buffer = (ctypes.c_char * len(attr)).from_buffer(attr)
    done = libc.syscall(CALL, command, buffer, len(attr))
    if done < 0:
        raise OSError(ctypes.get_errno(), f"bpf command {command}")
    return done


def ids(kind):
    """The ids of all objects of a kind: "prog", "map", "link"."""
    number = 0
    while True:
        attr = bytearray(struct.pack("=II", number, 0))
        try:
            bpf(NEXT_ID[kind], attr)
        except FileNotFoundError:
            return
        (number,) = struct.unpack_from("=I", attr, 4)
        yield number


def open_by_id(kind, number):
    """A descriptor, or None if there is no such object any more."""
    try:
        return bpf(FD_BY_ID[kind], bytearray(struct.pack("=I", number)))
    except OSError as e:
        # EAGAIN: its last reference is gone, its number not yet.
        if e.errno in (errno.ENOENT, errno.EAGAIN):
            return None
        raise


def is_there(thing):
    """Whether an object, a pair of kind and id, exists."""
    fd = open_by_id(*thing)
    if fd is not None:
        os.close(fd)
    return fd is not None


def name(kind, number):
    """The first 15 bytes of its name; "" if it is gone."""
    fd = open_by_id(kind, number)
    if fd is None:
        return ""
    try:
        info = ctypes.create_string_buffer(256)
        bpf(OBJ_GET_INFO_BY_FD, bytearray(struct.pack("=IIQ", fd, len(info), ctypes.addressof(info))))
        return info.raw[NAME_AT[kind] :][:16].rstrip(b"\0").decode()
    finally:
        os.close(fd)


def named(kind, wanted):
    """The ids of all objects of this name."""
    return {number for number in ids(kind) if name(kind, number) == wanted[:15]}


def element(command, number, key, value):
    """Looks up or updates what a map (its id) has at `key`; `value` is a bytearray of the map's size."""
    fd = open_by_id("map", number)
    try:
        there = [(ctypes.c_char * len(part)).from_buffer(part) for part in (bytearray(key), value)]
        bpf(command, bytearray(struct.pack("=IIQQQ", fd, 0, *(ctypes.addressof(part) for part in there), 0)))
    finally:
        os.close(fd)


def of_fdinfo(path):
    """The object that a descriptor is, from its file in /proc/PID/fdinfo; None if it is none."""
    kinds = {}
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("prog_id", "map_id", "link_id"):
            kinds[key.removesuffix("_id")] = int(value)
    # Of a link its program is shown, too.
    for kind in ("link", "prog", "map"):
        if kind in kinds:
            return kind, kinds[kind]
    return None


def of_process(pid):
    """What a process holds."""
    found = set()
    try:
        for entry in os.scandir(f"/proc/{pid}/fdinfo"):
            try:
                found.add(of_fdinfo(pathlib.Path(entry.path)))
            except (FileNotFoundError, ProcessLookupError):
                pass
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found - {None}


def pins(directory):
    """Paths below a bpffs, but for what the kernel puts there by itself."""
    return sorted(p for p in pathlib.Path(directory).rglob("*") if p.suffix != ".debug")


def of_pins(directory):
    """What is pinned below a directory."""
    found = set()
    for path in pins(directory):
        text = ctypes.create_string_buffer(os.fsencode(path))
        try:
            fd = bpf(OBJ_GET, bytearray(struct.pack("=Q", ctypes.addressof(text))))
        except OSError:
            continue  # a directory, or gone by now
        found.add(of_fdinfo(pathlib.Path(f"/proc/self/fdinfo/{fd}")))
        os.close(fd)
    return found - {None}


class Census:
    """All that was seen of some processes and pins. Their numbers are not used again soon."""

    def __init__(self):
        self.seen = set()

    def note(self, directory, *pids):
        self.seen |= of_pins(directory)
        for pid in pids:
            self.seen |= of_process(pid)

    def left(self, patience=5.0):
        """What is still there, once nothing goes any more. `patience`: seconds; the kernel frees late."""
        end = time.monotonic() + patience
        while True:
            self.seen = {thing for thing in self.seen if is_there(thing)}
            if not self.seen or time.monotonic() > end:
                return self.seen
            time.sleep(0.01)
