"""Effects through shared mappings.

A mapping that is there when a turn begins (made before the first `yield`) is covered by the rule that its inode
counts as changed; one made within the turn by what the kernel reports.
"""
from __future__ import annotations

import mmap
import os
import time
from typing import Iterator

import syscalls as sc
from effects import FILE_SIZE, Place, effect
from effects_data import in_child
from syscalls import Mapping

READ, WRITE = mmap.PROT_READ, mmap.PROT_WRITE
SHARED, POPULATE = mmap.MAP_SHARED, getattr(mmap, "MAP_POPULATE", 0x8000)
Steps = Iterator[None]

#: Longer than a clock tick of any configuration (HZ=100: 10 ms).
TICK = 0.012


def _mapped(t: Place, prot: int = READ | WRITE, flags: int = SHARED, name: str = "file") -> Mapping:
    fd = t.open(name)
    try:
        return Mapping(fd, FILE_SIZE, prot, flags)
    finally:
        os.close(fd)


def _old(t: Place, before: object = None, wait: float = 0) -> Steps:
    """A store in a mapping of an earlier turn, after `before(mapping)`."""
    mapping = _mapped(t)
    if before:
        before(mapping)  # type: ignore[operator]
    time.sleep(wait)
    yield
    mapping.store(10, b"store")
    yield
    mapping.unmap()


@effect("file")
def mmap_first_store(t: Place) -> Steps:
    yield from _old(t)


@effect("file")
def mmap_store_after_msync(t: Place) -> Steps:
    def before(mapping: Mapping) -> None:
        mapping.store(0, b"1")
        mapping.sync()
    yield from _old(t, before)


@effect("file")
def mmap_store_after_sync_file_range(t: Place) -> Steps:
    def before(mapping: Mapping) -> None:
        mapping.store(0, b"1")
        fd = t.open()
        sc.sync_file_range(fd)
        os.close(fd)
    yield from _old(t, before)


@effect("file")
def mmap_store_after_upper_sync_file_range(t: Place) -> Steps:
    def before(mapping: Mapping) -> None:
        mapping.store(0, b"1")
        fd = os.open(f"{t.upper}/file", os.O_RDONLY)
        sc.sync_file_range(fd)
        os.close(fd)
    yield from _old(t, before)


@effect("file")
def mmap_store_after_fsync(t: Place) -> Steps:
    def before(mapping: Mapping) -> None:
        mapping.store(0, b"1")
        fd = t.open()
        os.fsync(fd)
        os.close(fd)
    yield from _old(t, before)


@effect("file")
def mmap_store_dirty_pte(t: Place) -> Steps:
    """Writable in the page table already: the kernel does not see the store at all."""
    yield from _old(t, lambda mapping: mapping.store(0, b"1"))


@effect("file")
def mmap_store_dirty_pte_12ms(t: Place) -> Steps:
    yield from _old(t, lambda mapping: mapping.store(0, b"1"), wait=TICK)


@effect("file")
def mmap_read_then_store(t: Place) -> Steps:
    yield from _old(t, lambda mapping: mapping.load(10))


def _new(t: Place, use: object, flags: int = SHARED, prot: int = READ | WRITE) -> Steps:
    """Mapped, used and unmapped within the turn."""
    fd = t.open()
    yield
    mapping = Mapping(fd, FILE_SIZE, prot, flags)
    use(mapping)  # type: ignore[operator]
    mapping.unmap()
    yield
    os.close(fd)


@effect("file", gentle=True, lingers=True)
def mmap_store_munmap(t: Place) -> Steps:
    yield from _new(t, lambda mapping: mapping.store(10, b"store"))


@effect("file", gentle=True, lingers=True)
def mmap_read_store_munmap(t: Place) -> Steps:
    def use(mapping: Mapping) -> None:
        mapping.load(10)
        mapping.store(10, b"store")
    yield from _new(t, use)


@effect("file", gentle=True, lingers=True)
def mmap_POPULATE_store(t: Place) -> Steps:
    yield from _new(t, lambda mapping: mapping.store(10, b"store"), flags=SHARED | POPULATE)


@effect("file", gentle=True, lingers=True)
def mmap_mprotect_store_munmap(t: Place) -> Steps:
    def use(mapping: Mapping) -> None:
        mapping.protect(READ | WRITE, 4096, 4096)
        mapping.store(4096, b"store")
    yield from _new(t, use, prot=READ)


@effect("file", gentle=True, lingers=True)
def mmap_mremap_store(t: Place) -> Steps:
    def use(mapping: Mapping) -> None:
        mapping.remap(4 * FILE_SIZE)
        mapping.store(10, b"store")
    yield from _new(t, use)


@effect("file", gentle=True, lingers=True)
def mmap_FIXED_over_anonymous(t: Place) -> Steps:
    fd = t.open()
    ground = Mapping(-1, 2 * FILE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    yield
    Mapping(fd, FILE_SIZE, flags=SHARED | 0x10, at=ground.address)  # MAP_FIXED
    ground.store(10, b"store")
    ground.unmap()
    yield
    os.close(fd)


@effect("file", gentle=True, lingers=True)
def mmap_store_by_child(t: Place) -> Steps:
    fd = t.open()

    def work() -> None:
        Mapping(fd, FILE_SIZE).store(10, b"child")
    yield
    in_child(work)
    yield
    os.close(fd)


@effect("file")
def mmap_kept_store(t: Place) -> Steps:
    """Made in the turn and still there at its end."""
    fd = t.open()
    yield
    mapping = Mapping(fd, FILE_SIZE)
    mapping.store(10, b"store")
    yield
    mapping.unmap()
    os.close(fd)


@effect("file")
def mprotect_R_to_RW_store(t: Place) -> Steps:
    mapping = _mapped(t, READ)
    mapping.load(10)
    yield
    mapping.protect(READ | WRITE)
    mapping.store(10, b"store")
    yield
    mapping.unmap()


@effect("file")
def mprotect_NONE_to_RW_store(t: Place) -> Steps:
    mapping = _mapped(t, 0)
    yield
    mapping.protect(READ | WRITE)
    mapping.store(10, b"store")
    yield
    mapping.unmap()


@effect("file")
def read_into_mapping(t: Place) -> Steps:
    mapping, source = _mapped(t), t.open("g", os.O_RDONLY)
    view = memoryview((sc.ctypes.c_char * 100).from_address(mapping.address))
    yield
    os.preadv(source, [view], 0)
    yield
    view.release()
    os.close(source)
    mapping.unmap()


@effect("file")
def process_vm_writev_mapping(t: Place) -> Steps:
    mapping = _mapped(t)
    yield
    sc.process_vm_write(os.getpid(), mapping.address + 10, b"from elsewhere")
    yield
    mapping.unmap()


@effect("file")
def store_via_proc_self_mem(t: Place) -> Steps:
    mapping = _mapped(t)
    yield
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(mapping.address + 10)
        memory.write(b"memory")
    yield
    mapping.unmap()


@effect("file")
def mmap_store_then_munmap_old(t: Place) -> Steps:
    """An old mapping, written and gone before the turn ends: no scan at the end can find it."""
    mapping = _mapped(t)
    mapping.store(0, b"1")
    yield
    mapping.store(10, b"store")
    mapping.unmap()


@effect("file")
def mmap_store_by_inheriting_child(t: Place) -> Steps:
    """The child got the mapping by fork."""
    mapping = _mapped(t)
    mapping.store(0, b"1")
    yield
    in_child(lambda: mapping.store(10, b"child"))
    yield
    mapping.unmap()


@effect("+lf", lower=True)
def mmap_of_copied_up_store(t: Place) -> Steps:
    yield
    mapping = _mapped(t, name="lf")
    mapping.store(10, b"store")
    yield
    mapping.unmap()


@effect("shm:file")
def mmap_dev_shm_store(t: Place) -> Steps:
    fd = t.open("shm:file")
    yield
    mapping = Mapping(fd, 4096)
    mapping.store(10, b"store")
    mapping.unmap()
    yield
    os.close(fd)


@effect("file", outside=True, holds=True)
def outsider_mmap_store_munmap(t: Place) -> Steps:
    yield from _new(t, lambda mapping: mapping.store(10, b"store"))


@effect("file", outside=True, holds=True)
def outsider_mmap_old_store(t: Place) -> Steps:
    yield from _old(t, lambda mapping: mapping.store(0, b"1"))
