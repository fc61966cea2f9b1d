"""What the fuzzer has its workers do. An operation is a list: name, arguments. Most may fail: names come and go.

Three kinds: some change the tree (or try to), some only read, and some change it and undo that to the last bit.
"""
from __future__ import annotations

import mmap
import os
import random
import struct
import threading
from typing import Any, Callable

import syscalls as sc
import uring
from syscalls import Mapping

DIRECTORIES = ("", "a", "b", "a/c", "low", "low/deep")
NAMES = ("f0", "f1", "f2", "f3", "l0", "l1", "x0")
SIZE = 8192

#: Mappings that a worker keeps over turns, at most.
SLOTS = 3

Order = list[Any]


def furnish_lower(lower: str) -> None:
    """What the image brings."""
    os.makedirs(f"{lower}/low/deep")
    for path in ("low/l0", "low/l1", "low/deep/l0", "l0", "low/deep/l1"):
        with open(f"{lower}/{path}", "wb") as out:
            out.write(path.encode() * 200)


def furnish() -> list[Order]:
    """What the writable layer holds at the beginning."""
    return [["mkdir", d] for d in ("a", "b", "a/c")] + [
        ["creat", f"{d}/{n}".lstrip("/"), 1] for d in ("", "a", "b", "a/c") for n in ("f0", "f1", "f2")]


def path(rng: random.Random) -> str:
    return f"{rng.choice(DIRECTORIES)}/{rng.choice(NAMES)}".lstrip("/")


def change(rng: random.Random) -> Order:
    """An operation that changes something, if it works."""
    seed = rng.randrange(1 << 30)
    at = rng.randrange(SIZE - 100)
    return rng.choice([
        lambda: ["write", path(rng), at, seed],
        lambda: ["write", path(rng), at, seed],
        lambda: ["append", path(rng), seed],
        lambda: ["ring", path(rng), at, seed, rng.choice([0, uring.SQE_ASYNC])],
        lambda: ["child", ["write", path(rng), at, seed]],
        lambda: ["thread", ["write", path(rng), at, seed]],
        lambda: ["direct", path(rng), seed],
        lambda: ["copy", path(rng), path(rng)],
        lambda: ["truncate", path(rng), rng.randrange(SIZE)],
        lambda: ["punch", path(rng), at],
        lambda: ["creat", path(rng), seed],
        lambda: ["replace", path(rng), seed],
        lambda: ["unlink", path(rng)],
        lambda: ["rename", path(rng), path(rng)],
        lambda: ["exchange", path(rng), path(rng)],
        lambda: ["link", path(rng), path(rng)],
        lambda: ["symlink", path(rng), seed],
        lambda: ["mkfifo", path(rng)],
        lambda: ["mkdir", f"{rng.choice(DIRECTORIES)}/{rng.choice('de')}".lstrip("/")],
        lambda: ["rmdir", f"{rng.choice(DIRECTORIES)}/{rng.choice('de')}".lstrip("/")],
        lambda: ["rename", f"{rng.choice(['', 'a/', 'b/'])}d", f"{rng.choice(['', 'a/', 'b/'])}e"],
        lambda: ["chmod", rng.choice([path(rng), "a", "low"]), rng.choice([0o600, 0o644, 0o755])],
        lambda: ["chown", path(rng), rng.choice([0, 1000])],
        lambda: ["utime", path(rng), seed],
        lambda: ["setxattr", path(rng), f"user.x{seed % 2}", seed],
        lambda: ["removexattr", path(rng), f"user.x{seed % 2}"],
        lambda: ["tmpfile", path(rng), seed],
        lambda: ["map_and_store", path(rng), at, seed],
        lambda: ["map", rng.randrange(SLOTS), path(rng)],
        lambda: ["store", rng.randrange(SLOTS), at, seed],
        lambda: ["store", rng.randrange(SLOTS), at, seed],
        lambda: ["store", rng.randrange(SLOTS), at, seed],
    ])()


def read(rng: random.Random) -> Order:
    """An operation that changes nothing."""
    return rng.choice([
        lambda: ["stat", path(rng)],
        lambda: ["read", path(rng)],
        lambda: ["list", rng.choice(DIRECTORIES) or "."],
        lambda: ["open_for_writing", f"{rng.choice(['', 'a/', 'b/'])}{rng.choice(NAMES[:3])}"],
        lambda: ["map_private", path(rng), rng.randrange(1 << 30)],
        lambda: ["load", rng.randrange(SLOTS)],
        lambda: ["unmap", rng.randrange(SLOTS)],
        lambda: ["child", ["read", path(rng)]],
        lambda: ["sync_range", path(rng)],
        lambda: ["fsync", path(rng)],
        lambda: ["forget", path(rng)],
        lambda: ["page_out", rng.randrange(SLOTS)],
        lambda: ["hog", rng.randrange(1, 5)],
    ])()


def undone(rng: random.Random) -> Order:
    """An operation that takes itself back."""
    seed = rng.randrange(1 << 30)
    plain = f"{rng.choice(['', 'a/', 'b/'])}{rng.choice(NAMES[:3])}"  # nothing that would be copied up
    return rng.choice([
        lambda: ["come_and_go", rng.choice(["", "a/", "b/", "a/c/"]) + f".t{seed}", seed],
        lambda: ["directory_comes_and_goes", rng.choice(["", "a/", "b/", "a/c/"]) + f".t{seed}"],
        lambda: ["write_and_back", plain, rng.randrange(SIZE - 100), seed],
        lambda: ["chmod_and_back", plain],
        lambda: ["rename_and_back", plain, f"b/.t{seed}"],
        lambda: ["xattr_and_back", plain, seed],
        lambda: ["store_and_back", plain, rng.randrange(SIZE - 100), seed],
        lambda: ["link_and_back", plain, f".t{seed}"],
    ])()


def _bytes(seed: int, length: int = 16) -> bytes:
    return (struct.pack("<I", seed) * (length // 4 + 1))[:length]


class Operations:
    """Runs them. What it keeps from one turn to the next: mappings."""

    def __init__(self) -> None:
        self._kept: dict[int, Mapping] = {}

    def run(self, orders: list[Order]) -> int:
        return sum(self._try(order) for order in orders)

    def _try(self, order: Order) -> bool:
        try:
            getattr(self, order[0])(*order[1:])
        except (OSError, KeyError):
            return False
        return True

    # --- which change ---

    @staticmethod
    def _with(path: str, flags: int, use: Callable[[int], object]) -> None:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            use(fd)
        finally:
            os.close(fd)

    def write(self, path: str, at: int, seed: int) -> None:
        self._with(path, os.O_RDWR, lambda fd: os.pwrite(fd, _bytes(seed), at))

    def append(self, path: str, seed: int) -> None:
        def use(fd: int) -> None:
            os.write(fd, _bytes(seed))
            if os.fstat(fd).st_size > 4 * SIZE:
                os.ftruncate(fd, SIZE)
        self._with(path, os.O_RDWR | os.O_APPEND, use)

    def ring(self, path: str, at: int, seed: int, flags: int) -> None:
        def use(fd: int) -> None:
            ring = uring.Ring()
            try:
                ring.run(uring.OP_WRITE, fd, ring.text(_bytes(seed)), 16, at, sqe_flags=flags)
            finally:
                ring.close()
        self._with(path, os.O_RDWR, use)

    def child(self, order: Order) -> None:
        pid = os.fork()
        if not pid:
            try:
                self._try(order)
            finally:
                os._exit(0)
        os.waitpid(pid, 0)

    def thread(self, order: Order) -> None:
        thread = threading.Thread(target=self._try, args=(order,))
        thread.start()
        thread.join()

    def direct(self, path: str, seed: int) -> None:
        def use(fd: int) -> None:
            buffer = sc.aligned(_bytes(seed, 4096))
            view = memoryview((sc.ctypes.c_char * 4096).from_address(buffer.address))
            try:
                os.pwrite(fd, view, 4096)
            finally:
                view.release()
                buffer.unmap()
        self._with(path, os.O_RDWR | os.O_DIRECT, use)

    def copy(self, source: str, target: str) -> None:
        self._with(source, os.O_RDONLY, lambda s: self._with(
            target, os.O_RDWR, lambda t: os.copy_file_range(s, t, 4096, 0, 0)))

    def truncate(self, path: str, size: int) -> None:
        self._with(path, os.O_RDWR, lambda fd: os.ftruncate(fd, size))

    def punch(self, path: str, at: int) -> None:
        self._with(path, os.O_RDWR, lambda fd: sc.fallocate(fd, sc.FALLOC_PUNCH_HOLE | sc.FALLOC_KEEP_SIZE, at, 300))

    def creat(self, path: str, seed: int) -> None:
        self._with(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, lambda fd: os.write(fd, _bytes(seed, SIZE)))

    def replace(self, path: str, seed: int) -> None:
        self.creat(f"{path}.tmp{os.getpid()}", seed)
        try:
            os.rename(f"{path}.tmp{os.getpid()}", path)
        except OSError:
            os.unlink(f"{path}.tmp{os.getpid()}")
            raise

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new)

    def exchange(self, old: str, new: str) -> None:
        sc.renameat2(old, new, sc.RENAME_EXCHANGE)

    def link(self, old: str, new: str) -> None:
        os.link(old, new, follow_symlinks=False)

    def symlink(self, path: str, seed: int) -> None:
        os.symlink(f"nowhere{seed}", path)

    def mkfifo(self, path: str) -> None:
        os.mkfifo(path)

    def mkdir(self, path: str) -> None:
        os.mkdir(path)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(path, mode)

    def chown(self, path: str, who: int) -> None:
        os.chown(path, who, who, follow_symlinks=False)

    def utime(self, path: str, seed: int) -> None:
        os.utime(path, ns=(seed, seed), follow_symlinks=False)

    def setxattr(self, path: str, name: str, seed: int) -> None:
        os.setxattr(path, name, _bytes(seed), follow_symlinks=False)

    def removexattr(self, path: str, name: str) -> None:
        os.removexattr(path, name, follow_symlinks=False)

    def tmpfile(self, path: str, seed: int) -> None:
        def use(fd: int) -> None:
            os.write(fd, _bytes(seed, SIZE))
            sc.link_descriptor(fd, path)
        self._with(os.path.dirname(path) or ".", os.O_TMPFILE | os.O_RDWR, use)

    @staticmethod
    def _put(mapping: Mapping, at: int, seed: int) -> None:
        """A store. The file may have been cut short meanwhile, which must not be the worker's death."""
        if seed % 4:
            sc.process_vm_write(os.getpid(), mapping.address + at, _bytes(seed))  # an error instead of SIGBUS
            return
        pid = os.fork()
        if not pid:
            mapping.store(at, _bytes(seed))
            os._exit(0)
        os.waitpid(pid, 0)

    @staticmethod
    def _mapped(path: str, use: Callable[[Mapping], object]) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            mapping = Mapping(fd, SIZE)
        finally:
            os.close(fd)
        try:
            use(mapping)
        finally:
            mapping.unmap()

    def map_and_store(self, path: str, at: int, seed: int) -> None:
        self._mapped(path, lambda mapping: self._put(mapping, at, seed))

    def map(self, slot: int, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            mapping = Mapping(fd, SIZE)
        finally:
            os.close(fd)
        self.unmap(slot)
        self._kept[slot] = mapping

    def store(self, slot: int, at: int, seed: int) -> None:
        self._put(self._kept[slot], at, seed)

    # --- which do not ---

    def unmap(self, slot: int) -> None:
        if slot in self._kept:
            self._kept.pop(slot).unmap()

    def stat(self, path: str) -> None:
        os.lstat(path)

    def read(self, path: str) -> None:
        self._with(path, os.O_RDONLY, lambda fd: os.read(fd, SIZE))

    def list(self, path: str) -> None:
        os.listdir(path)

    def open_for_writing(self, path: str) -> None:
        self._with(path, os.O_RDWR, lambda fd: None)

    def map_private(self, path: str, seed: int) -> None:
        def use(fd: int) -> None:
            mapping = Mapping(fd, SIZE, flags=mmap.MAP_PRIVATE)
            try:
                sc.process_vm_write(os.getpid(), mapping.address, _bytes(seed))
            finally:
                mapping.unmap()
        self._with(path, os.O_RDONLY, use)

    def load(self, slot: int) -> None:
        mapping = self._kept[slot]
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            memory.seek(mapping.address)
            memory.read(100)

    def sync_range(self, path: str) -> None:
        self._with(path, os.O_RDONLY, sc.sync_file_range)

    def fsync(self, path: str) -> None:
        self._with(path, os.O_RDONLY, os.fsync)

    def forget(self, path: str) -> None:
        self._with(path, os.O_RDONLY, lambda fd: os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED))

    def page_out(self, slot: int) -> None:
        self._kept[slot].advise(21)  # MADV_PAGEOUT

    def hog(self, megabytes: int) -> None:
        """Memory that comes and goes."""
        memory = Mapping(-1, megabytes << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.store(0, bytes(megabytes << 20))
        memory.unmap()

    # --- which take themselves back ---

    def come_and_go(self, path: str, seed: int) -> None:
        self.creat(path, seed)
        os.unlink(path)

    def directory_comes_and_goes(self, path: str) -> None:
        os.mkdir(path)
        self.creat(f"{path}/in", 1)
        os.unlink(f"{path}/in")
        os.rmdir(path)

    def _restoring(self, path: str, use: Callable[[int], object]) -> None:
        """Around what changes contents: what was there, and when it was written."""
        def around(fd: int) -> None:
            st = os.fstat(fd)
            old = os.pread(fd, 1 << 20, 0)
            try:
                use(fd)
            finally:
                os.pwrite(fd, old, 0)
                os.ftruncate(fd, st.st_size)
                os.utime(fd, ns=(st.st_atime_ns, st.st_mtime_ns))
        self._with(path, os.O_RDWR, around)

    def write_and_back(self, path: str, at: int, seed: int) -> None:
        self._restoring(path, lambda fd: os.pwrite(fd, _bytes(seed), at))

    def store_and_back(self, path: str, at: int, seed: int) -> None:
        self._restoring(path, lambda fd: self._mapped(path, lambda mapping: self._put(mapping, at, seed)))

    def chmod_and_back(self, path: str) -> None:
        mode = os.lstat(path).st_mode & 0o7777
        os.chmod(path, mode ^ 0o7, follow_symlinks=True)
        os.chmod(path, mode)

    def rename_and_back(self, old: str, new: str) -> None:
        os.rename(old, new)
        os.rename(new, old)

    def xattr_and_back(self, path: str, seed: int) -> None:
        os.setxattr(path, "user.gone", _bytes(seed), follow_symlinks=False)
        os.removexattr(path, "user.gone", follow_symlinks=False)

    def link_and_back(self, path: str, new: str) -> None:
        os.link(path, new, follow_symlinks=False)
        os.unlink(new)
