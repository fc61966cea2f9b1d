"""Digests of file trees: walked by directory descriptor, never through a symbolic link, never into a mount."""
from __future__ import annotations

import hashlib
import os
import stat
from typing import Any, Iterator

from definition import OVERLAY_XATTRS, SPARSE_BLOCK, SPARSE_FROM

Entry = dict[str, Any]
Tree = dict[str, Entry]

_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOATIME
_OPEN_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "symlink", stat.S_IFIFO: "fifo",
          stat.S_IFSOCK: "socket", stat.S_IFCHR: "char", stat.S_IFBLK: "block"}


class Scan:
    """One tree. `skip`: paths (as in the tree, "/x/y") where another mount begins; noted, not entered.

    mtime_unit_ns: nanoseconds to which mtimes are rounded down (rule TMPFS_MTIME).
    `inodes` maps (device, inode) of everything seen to its first path, in sorted order.
    """

    def __init__(self, root_fd: int, skip: frozenset[str] = frozenset(), mtime_unit_ns: int = 1):
        self.tree: Tree = {}
        self.mtime_unit_ns = mtime_unit_ns
        self.inodes: dict[tuple[int, int], str] = {}
        self.skip = skip
        st = os.fstat(root_fd)
        self.device = st.st_dev
        self.tree["/"] = self._directory(st, root_fd)
        self.inodes[(st.st_dev, st.st_ino)] = "/"
        self._walk(root_fd, "/")

    def _walk(self, dir_fd: int, prefix: str) -> None:
        with os.scandir(dir_fd) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
        for entry in entries:
            path = prefix + entry.name
            if path in self.skip:
                self.tree[path] = {"type": "mount"}
                continue
            st = entry.stat(follow_symlinks=False)
            first = self.inodes.setdefault((st.st_dev, st.st_ino), path)
            if stat.S_ISDIR(st.st_mode):
                self._enter(dir_fd, entry.name, path)
            elif first != path:
                self.tree[path] = {"type": "link", "to": first}
            else:
                self.tree[path] = self._leaf(dir_fd, entry.name, st)

    def _enter(self, parent_fd: int, name: str, path: str) -> None:
        fd = os.open(name, _OPEN_DIR, dir_fd=parent_fd)
        try:
            st = os.fstat(fd)
            if st.st_dev != self.device:
                self.tree[path] = {"type": "mount"}
                return
            self.tree[path] = self._directory(st, fd)
            self._walk(fd, path + "/")
        finally:
            os.close(fd)

    def _leaf(self, dir_fd: int, name: str, st: os.stat_result) -> Entry:
        """Rules SOCKET_MTIME, TMPFS_MTIME."""
        entry = _leaf(dir_fd, name, st)
        if entry["type"] != "socket":
            entry["mtime_ns"] = st.st_mtime_ns // self.mtime_unit_ns * self.mtime_unit_ns
        return entry

    @staticmethod
    def _directory(st: os.stat_result, fd: int) -> Entry:
        """Rules DIRECTORY_MTIME, DIRECTORY_SIZE."""
        entry = _common(st)
        _add_xattrs(entry, fd)
        return entry


def _common(st: os.stat_result) -> Entry:
    """Rules CTIME, ATIME, INODE_NUMBER: what is not here is not compared."""
    return {"type": _KINDS[stat.S_IFMT(st.st_mode)], "mode": f"{stat.S_IMODE(st.st_mode):04o}",
            "uid": st.st_uid, "gid": st.st_gid}


def _leaf(dir_fd: int, name: str, st: os.stat_result) -> Entry:
    entry = _common(st)
    kind = entry["type"]
    if kind == "file":
        fd = os.open(name, _OPEN_FILE, dir_fd=dir_fd)
        try:
            entry["size"] = st.st_size
            entry["sha256"] = file_digest(fd, st.st_size)
            _add_xattrs(entry, fd)
        finally:
            os.close(fd)
        return entry
    if kind == "symlink":
        entry["target"] = os.readlink(name, dir_fd=dir_fd)
    elif kind in ("char", "block"):
        entry["device"] = f"{os.major(st.st_rdev)}:{os.minor(st.st_rdev)}"
    _add_xattrs(entry, f"/proc/self/fd/{dir_fd}/{name}")
    return entry


def _add_xattrs(entry: Entry, target: int | str) -> None:
    """ACLs and capabilities are extended attributes. Rule OVERLAY_XATTRS."""
    follow = {} if isinstance(target, int) else {"follow_symlinks": False}
    try:
        names = os.listxattr(target, **follow)
    except OSError:  # a file system without them
        return
    found = {name: os.getxattr(target, name, **follow).hex() for name in sorted(names)
             if not name.startswith(OVERLAY_XATTRS)}
    if found:
        entry["xattrs"] = found


def file_digest(fd: int, size: int) -> str:
    """The digest of an open regular file's contents. Rule SPARSENESS."""
    if size > SPARSE_FROM:
        return _sparse_digest(fd, size)
    digest = hashlib.sha256()
    offset = 0
    while chunk := os.pread(fd, min(size - offset, 1 << 22) + 1, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()


def _sparse_digest(fd: int, size: int) -> str:
    digest = hashlib.sha256(b"by block")
    zeros = bytes(SPARSE_BLOCK)
    for block in _blocks_with_data(fd, size):
        chunk = os.pread(fd, SPARSE_BLOCK, block * SPARSE_BLOCK)
        if chunk != zeros[:len(chunk)]:
            digest.update(block.to_bytes(8, "big"))
            digest.update(chunk)
    return digest.hexdigest()


def _blocks_with_data(fd: int, size: int) -> Iterator[int]:
    """Numbers of the blocks that are not wholly in a hole, as far as the file system tells. Moves fd's offset."""
    block = 0
    while block * SPARSE_BLOCK < size:
        try:
            block = max(block, os.lseek(fd, block * SPARSE_BLOCK, os.SEEK_DATA) // SPARSE_BLOCK)
        except OSError:  # ENXIO: nothing but a hole from here on
            return
        yield block
        block += 1


def scan_directory(path: str) -> Scan:
    """The tree below an ordinary directory, other mounts left out."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return Scan(fd)
    finally:
        os.close(fd)
