"""A file system on a logged disk (`disk.py`), mounted."""

import contextlib
import os
import pathlib
import subprocess
import sys
import time

from disk import read_log

MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-b", "4096", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f", "--mixed"],
}
SIZE = {"ext4": 64 << 20, "xfs": 300 << 20, "btrfs": 128 << 20}
"""Bytes, unless somebody needs more. The smallest XFS that mkfs makes."""
LIMIT = 120.0
"""Seconds that anything waited for may take: only a failure waits so long."""


def run(*args):
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, (done.args, done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


def until(condition, what):
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, f"in vain: {what}"
        time.sleep(0.005)


def mount_loop(file, at, options="", direct=False):
    """Mounts a file. The loop device goes with the mount, whoever ends it."""
    device = run("losetup", "--find", "--show", f"--direct-io={'on' if direct else 'off'}", file).strip()
    try:
        run("mount", *(["-o", options] if options else []), device, at)
    finally:
        # In use it stays until it no longer is.
        run("losetup", "--detach", device)
    return device


class LoggedDisk:
    """`at` is the mounted file system, `log` its disk's log, `base` the disk as it was at the log's beginning."""

    def __init__(self, directory, fs, direct=False, size=None):
        self.fs = fs
        self.base, self.image, self.log = (pathlib.Path(directory, name) for name in ("base", "image", "log"))
        self.fuse, self.at = (pathlib.Path(directory, name) for name in ("fuse", "at"))
        with open(self.base, "wb") as base:
            base.truncate(size or SIZE[fs])
        run(*MKFS[fs], self.base)
        run("cp", "--sparse=always", self.base, self.image)
        with contextlib.ExitStack() as undo:
            self._serve(undo)
            self.at.mkdir()
            mount_loop(self.fuse / "disk", self.at, direct=direct)
            undo.callback(run, "umount", self.at)
            self._mark = os.open(self.fuse / "mark", os.O_WRONLY | os.O_CLOEXEC)
            undo.callback(os.close, self._mark)
            self._undo = undo.pop_all()
        # Until here the disk may hold half of what mounting writes, which no journal covers.
        directory = os.open(self.at, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        self.mark("mounted")

    def _serve(self, undo):
        self.fuse.mkdir()
        argv = [sys.executable, pathlib.Path(__file__).with_name("disk.py"), self.image, self.log, self.fuse]
        server = subprocess.Popen(argv, stdout=subprocess.PIPE)
        undo.callback(server.stdout.close)
        undo.callback(server.wait, LIMIT)
        undo.callback(self._unmount, server)
        assert server.stdout.readline() == b"ready\n", "the logged disk does not come up"

    def _unmount(self, server):
        """The loop device lets go of it a moment after it was unmounted itself."""
        gone = lambda: server.poll() is not None  # noqa: E731
        until(lambda: gone() or not subprocess.run(["umount", self.fuse], capture_output=True).returncode, "umount")

    def mark(self, text):
        os.write(self._mark, text.encode())

    def records(self):
        return read_log(self.log)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._undo.close()
