"""Writable layers to test on: each file system fresh, on a loop device, with an overlay on top.

All mounts are made in this process's own mount namespace (`syscalls.private_mounts`), and the images have no name
as soon as they are mounted: whatever happens to us, nothing stays behind.
"""
from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from types import TracebackType

from effects import FILE_SYSTEMS  # noqa: F401 (its users look for it here, too)
from syscalls import MNT_DETACH, MS_BIND, mount, umount

#: Sparse. XFS makes none below 300 MB, btrfs none below 109.
IMAGE_SIZE = 320 << 20

_MKFS = {"ext4": ("mkfs.ext4", "-q", "-F", "-b", "4096"), "xfs": ("mkfs.xfs", "-q", "-f"), "btrfs": ("mkfs.btrfs", "-q", "-f")}
_NOT_ON_DISK = {"tmpfs", "ramfs", "overlay"}


def available() -> list[str]:
    """The file systems that can be made here: kernel and tool are there."""
    with open("/proc/filesystems") as listing:
        known = {line.split()[-1] for line in listing}
    return [fs for fs in FILE_SYSTEMS if fs in known and (fs == "tmpfs" or shutil.which(_MKFS[fs][0]))]


def _file_system_of(path: str) -> str:
    """The type of the file system that holds `path`."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            before, after = line.split(" - ", 1)
            if before.split()[2] == wanted:
                return after.split()[0]
    return "unknown"


def disk_directory() -> str:
    """Where the images lie: on a disk if there is one, so that writeback is real."""
    candidates = [tempfile.gettempdir(), "/var/tmp", "/tmp"]
    return next((c for c in candidates if os.path.isdir(c) and _file_system_of(c) not in _NOT_ON_DISK), candidates[0])


class Layer:
    """A file system with lower, upper and work directories, a volume, and the overlay of them.

    Fill `lower` first, then call `join`. Directories:
    merged: the sandbox's root; merged/volume: `volume` bound into it; merged/dev/shm: a tmpfs.
    """

    def __init__(self, fs: str, options: str = ""):
        self.fs = fs
        self.base = tempfile.mkdtemp(prefix=f"crab-inspector-{fs}-", dir=disk_directory())
        self._mounted: list[str] = []
        try:
            self._make(f"{self.base}/fs", options)
        except BaseException:
            self.close()
            raise

    def _make(self, at: str, options: str) -> None:
        os.mkdir(at)
        if self.fs == "tmpfs":
            mount("tmpfs", at, "tmpfs", data="size=512m")
            self._mounted.append(at)
        else:
            image = f"{self.base}/image"
            with open(image, "wb") as out:
                out.truncate(IMAGE_SIZE)
            try:
                subprocess.run([*_MKFS[self.fs], image], check=True, stdout=subprocess.DEVNULL)
                subprocess.run(["mount", "-t", self.fs, "-o", ",".join(filter(None, ("loop", options))), image, at],
                               check=True)
                self._mounted.append(at)
            finally:
                os.unlink(image)
        for name in ("lower", "upper", "work", "volume", "merged"):
            os.mkdir(f"{at}/{name}")
            setattr(self, name, f"{at}/{name}")
        os.makedirs(f"{self.lower}/dev/shm")
        os.mkdir(f"{self.lower}/volume")

    lower: str
    upper: str
    work: str
    volume: str
    merged: str

    def join(self, options: str = "") -> None:
        """Mounts the overlay and what lies on it."""
        layers = f"lowerdir={self.lower},upperdir={self.upper},workdir={self.work}"
        mount("overlay", self.merged, "overlay", data=",".join(filter(None, (layers, options))))
        self._mounted.append(self.merged)
        mount(self.volume, f"{self.merged}/volume", flags=MS_BIND)
        self._mounted.append(f"{self.merged}/volume")
        mount("tmpfs", f"{self.merged}/dev/shm", "tmpfs", data="size=64m")
        self._mounted.append(f"{self.merged}/dev/shm")

    @property
    def device(self) -> int:
        """st_dev of what lies in the writable layer."""
        return os.stat(self.upper).st_dev

    def close(self) -> None:
        while self._mounted:
            umount(self._mounted.pop(), MNT_DETACH)
        shutil.rmtree(self.base, ignore_errors=True)

    def __enter__(self) -> "Layer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
