"""The table of effects: everything a sandbox can do to a file, one by one.

An effect is a generator function with two or three parts, run by a worker inside the sandbox:

    @effect(". +new")
    def creat(t):
        ...                     # set-up: happens in an earlier turn
        yield
        os.close(os.open(...))  # the effect itself
        yield                   # optional; then cleaning up, after the verdict

`targets`, separated by blanks, are the inodes that must be reported, by their names in the effect's directory
(`t / name`); "." is the directory. "+name" is looked up in the writable layer after the effect, all others before
it. "volume:name" and "shm:name" lie in the mounts of that name instead.

What each directory holds beforehand is written in `furnish`.
"""
from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from typing import Callable, Iterator

FILE_SYSTEMS = ("ext4", "xfs", "btrfs", "tmpfs")

#: Bytes of the file `file` in every effect's directory: whole pages, more than one file system block.
FILE_SIZE = 16384


@dataclass(frozen=True)
class Effect:
    name: str
    run: Callable[["Place"], Iterator[None]]
    targets: tuple[str, ...]
    #: Changes nothing: nothing of the layer may be reported.
    read_only: bool = False
    #: Changes nothing, but may be reported (and, `targets`, must be).
    conservative: bool = False
    #: Which errno (by name) which file systems answer instead.
    refused: dict[str, str] = field(default_factory=dict)
    #: Works on what lies in the lower layer.
    lower: bool = False
    #: Done by a process outside of the sandbox's cgroup.
    outside: bool = False
    #: Leaves everything as other effects want to find it: may be followed by any other in the same directory.
    gentle: bool = False
    #: May be reported again in the next turn: it keeps a ring or a context for asynchronous I/O open until it is
    #: cleaned up; or it changes the upper inode's times behind overlay's back, which notices when somebody reads.
    lingers: bool = False
    #: Its inodes are reported for ever: nobody tells when an outsider's mapping ends.
    holds: bool = False
    #: Too slow, or too much of a disturbance, to be done in more than the first variant.
    once: bool = False
    #: Writes to a file system internal to the kernel: its inode or a flag of this name must be reported.
    flag: str = ""

    @property
    def errno_on(self) -> dict[str, int]:
        return {fs: getattr(errno, name) for fs, name in self.refused.items()}


def errno_name(number: int) -> str:
    """Of the two names of EOPNOTSUPP the kernel's."""
    return "EOPNOTSUPP" if number == errno.EOPNOTSUPP else errno.errorcode.get(number, str(number))


EFFECTS: dict[str, Effect] = {}


def everywhere(name: str) -> dict[str, str]:
    return dict.fromkeys(FILE_SYSTEMS, name)


def only(*supported: str, otherwise: str = "EOPNOTSUPP") -> dict[str, str]:
    return {fs: otherwise for fs in FILE_SYSTEMS if fs not in supported}


def effect(targets: str = "", **options: object) -> Callable[[Callable[["Place"], Iterator[None]]], Callable[["Place"], Iterator[None]]]:
    """Registers a function under its own name."""
    def register(run: Callable[["Place"], Iterator[None]]) -> Callable[["Place"], Iterator[None]]:
        name = run.__name__
        if name in EFFECTS:
            raise ValueError(f"two effects are called {name}")
        EFFECTS[name] = Effect(name, run, tuple(targets.split()), **options)  # type: ignore[arg-type]
        return run
    return register


@dataclass
class Place:
    """Where one effect happens, and what it wants known."""
    directory: str
    volume: str
    shm: str
    cgroup: str
    fs: str
    #: The directory in the writable layer itself, for what only the host can do.
    upper: str
    #: (descriptor) of targets that have no name: they must be reported, too.
    nameless: list[int] = field(default_factory=list)
    #: (device, inode number) of such targets that lie outside of the writable layer.
    elsewhere: list[tuple[int, int]] = field(default_factory=list)

    def __truediv__(self, name: str) -> str:
        return locate(name, self.directory, self.volume, self.shm)

    def open(self, name: str = "file", flags: int = os.O_RDWR) -> int:
        return os.open(self / name, flags | os.O_CLOEXEC, 0o644)

    def write(self, name: str, data: bytes = b"new", flags: int = os.O_RDWR | os.O_CREAT) -> None:
        fd = self.open(name, flags)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)


def locate(name: str, directory: str, volume: str, shm: str) -> str:
    """The path of a target."""
    name = name.removeprefix("+")
    for prefix, place in (("volume:", volume), ("shm:", shm)):
        if name.startswith(prefix):
            return os.path.normpath(os.path.join(place, os.path.basename(directory), name.removeprefix(prefix)))
    return os.path.normpath(os.path.join(directory, name))


def _content(name: str, size: int) -> bytes:
    return (name.encode() + b" was here\n") * (size // (len(name) + 10) + 1)


def _file(path: str, size: int) -> None:
    with open(path, "wb") as out:
        out.write(_content(os.path.basename(path), size)[:size])


def furnish_lower(directory: str) -> None:
    """What the lower layer holds for an effect that wants it."""
    os.mkdir(directory)
    _file(f"{directory}/lf", 8192)
    os.symlink("lf", f"{directory}/lsym")
    os.mkdir(f"{directory}/s")
    for name in ("x", "y"):
        _file(f"{directory}/s/{name}", 100)
    os.mkdir(f"{directory}/s/deep")
    _file(f"{directory}/s/deep/z", 100)


def furnish(place: Place) -> None:
    """What every effect's directory holds in the writable layer. Through the merged view, by the worker."""
    here = place.directory
    os.makedirs(here, exist_ok=True)
    _file(f"{here}/file", FILE_SIZE)
    os.setxattr(f"{here}/file", "user.old", b"value")
    for name in ("g", "h"):
        _file(f"{here}/{name}", 4096)
    os.symlink("g", f"{here}/sym")
    os.mkdir(f"{here}/empty")
    os.mkdir(f"{here}/sub")
    _file(f"{here}/sub/y", 100)
    for mount in (place.volume, place.shm):
        os.mkdir(f"{mount}/{os.path.basename(here)}")
        _file(f"{mount}/{os.path.basename(here)}/file", 4096)


def table() -> dict[str, Effect]:
    """All effects, in order."""
    import effects_data, effects_lower, effects_map, effects_meta, effects_names, effects_readonly  # noqa: F401, E401
    return EFFECTS
