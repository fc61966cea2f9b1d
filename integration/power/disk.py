"""The logged disk: a file system with a file `disk` that remembers, in order, what was done to it.

    disk.py IMAGE LOG MOUNTPOINT

IMAGE holds what was written. LOG gets a record for each write and each flush (an fsync of `disk`: a loop device
makes one of every flush that its file system asks for), and for whatever is written to the file `mark`, at the place
where it was written: the log says what the disk had been told when a mark was made. Serves until it is unmounted.

A request is answered when it is in the log, and they are taken one by one: so a write that is behind a flush in the
log had not been answered when that flush was asked for.
"""

import dataclasses
import errno
import mmap
import os
import stat
import struct
import sys

WRITE, FLUSH, MARK = range(3)
HEADER = struct.Struct("<BIQ")
"""Kind, length of what follows, offset in the disk."""


@dataclasses.dataclass(frozen=True)
class Record:
    kind: int
    offset: int
    data: memoryview


def read_log(path):
    """All records of a log. A last one that is not complete is left out: the log may still be written."""
    with open(path, "rb") as log:
        if os.fstat(log.fileno()).st_size == 0:
            return []
        content = memoryview(mmap.mmap(log.fileno(), 0, access=mmap.ACCESS_READ))
    records, at = [], 0
    while at + HEADER.size <= len(content):
        kind, length, offset = HEADER.unpack_from(content, at)
        begin = at + HEADER.size
        at = begin + length
        if at <= len(content):
            records.append(Record(kind, offset, content[begin:at]))
    return records


def serve(image_path, log_path, mountpoint):
    import pyfuse3
    import trio

    files = {b"disk": 2, b"mark": 3}
    disk, mark = files.values()
    image = os.open(image_path, os.O_RDWR)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def record(kind, offset=0, data=b""):
        written = os.writev(log, [HEADER.pack(kind, len(data), offset), data])
        if written != HEADER.size + len(data):
            raise pyfuse3.FUSEError(errno.ENOSPC)

    class Disk(pyfuse3.Operations):
        async def getattr(self, inode, ctx=None):
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = inode
            entry.st_mode = stat.S_IFDIR | 0o700 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o600
            entry.st_size = os.fstat(image).st_size if inode == disk else 0
            entry.entry_timeout = entry.attr_timeout = 3600
            return entry

        async def lookup(self, parent, name, ctx=None):
            if name not in files:
                raise pyfuse3.FUSEError(errno.ENOENT)
            return await self.getattr(files[name])

        async def open(self, inode, flags, ctx):
            # A mark must come here when it is written, and whole.
            return pyfuse3.FileInfo(fh=inode, direct_io=inode == mark)

        async def read(self, inode, offset, size):
            return os.pread(image, size, offset)

        async def write(self, inode, offset, data):
            if inode == mark:
                record(MARK, data=data)
                return len(data)
            record(WRITE, offset, data)
            return os.pwrite(image, data, offset)

        async def fsync(self, inode, datasync):
            record(FLUSH)

        async def flush(self, inode):
            """A close, which asks nothing of a disk."""

    pyfuse3.init(Disk(), mountpoint, {"fsname=crab-logged-disk"})
    print("ready", flush=True)
    trio.run(pyfuse3.main)
    pyfuse3.close(unmount=False)


if __name__ == "__main__":
    serve(*sys.argv[1:])
