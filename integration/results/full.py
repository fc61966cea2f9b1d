"""Mode full: after each turn CRIU's image of all processes and the files that have changed, with no crab in it.

The image is dumped into memory, then each of its files is compressed by itself and written, and so is each file of the
writable layer whose ctime is newer than the last time. Nothing is compared and nothing is shared between two turns.
"""
from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Sequence

import settings
from clients import Client, ClientError

#: Where the Go shim's runc keeps its containers.
RUNC_ROOT = Path("/run/containerd/runc")
DUMP = ("runc", "--root")
OPTIONS = ("--leave-running", "--file-locks", "--ext-unix-sk", "--tcp-established")


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libzstd.so.1")
    for name in ("ZSTD_compressBound", "ZSTD_compress"):
        getattr(library, name).restype = ctypes.c_size_t
    library.ZSTD_compressBound.argtypes = [ctypes.c_size_t]
    library.ZSTD_compress.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
    return library


def compress(data: bytes) -> bytes:
    """One zstd frame, of the level that crab's packs have."""
    library = _library()
    room = library.ZSTD_compressBound(len(data))
    buffer = ctypes.create_string_buffer(room)
    size = library.ZSTD_compress(buffer, room, data, len(data), settings.ZSTD_LEVEL)
    if size > room:
        raise ClientError(f"zstd could not compress {len(data)} bytes")
    return buffer.raw[:size]


def upper(init: int) -> Path:
    """The writable layer's directory of the sandbox with this init."""
    for line in Path(f"/proc/{init}/mountinfo").read_text().splitlines():
        words = line.split()
        if words[4] == "/":
            for option in words[-1].split(","):
                if option.startswith("upperdir=/"):
                    return Path(option.removeprefix("upperdir="))
    raise ClientError(f"the root of init {init} has no writable layer on overlayfs")


class Keeper:
    """Keeps everything after each turn, below `store`."""

    def __init__(self, client: Client, store: Path):
        self.client, self.store, self.number, self.newest = client, store, 0, 0
        self.took_ms: list[float] = []
        self.bytes: list[int] = []
        #: How many of these are the changed files.
        self.file_bytes: list[int] = []
        #: Of each turn all that it keeps, not compressed; of a file its contents by themselves, beside its name and attributes.
        self.kept: list[list[bytes]] = []

    def __call__(self, _turn: object) -> None:
        begun = time.monotonic()
        self.number += 1
        with tempfile.TemporaryDirectory(dir="/run") as scratch:
            image = Path(scratch, "image")
            image.mkdir()
            self._dump(image, Path(scratch, "work"))
            newest = time.time_ns()
            images, files = [path.read_bytes() for path in sorted(image.iterdir())], self._changed()
            with open(self.store / f"turn-{self.number}", "wb") as out:
                for data in images:
                    out.write(compress(data))
                image_bytes = out.tell()
                for head, contents in files:
                    out.write(compress(head + contents))
                self.file_bytes.append(out.tell() - image_bytes)
                self.kept.append(images + [part for file in files for part in file])
                out.flush()
                os.fsync(out.fileno())
                self.bytes.append(out.tell())
            self.newest = newest
        self.took_ms.append((time.monotonic() - begun) * 1000)

    def _dump(self, image: Path, work: Path) -> None:
        done = subprocess.run([*DUMP, RUNC_ROOT / self.client.namespace, "checkpoint", *OPTIONS, "--image-path", image,
                               "--work-path", work, self.client.id], capture_output=True, text=True)
        if done.returncode:
            log = work / "dump.log"
            tail = log.read_text(errors="replace")[-600:] if log.exists() else ""
            raise ClientError(f"mode full: dump {self.number} of {self.client.id}: {done.stderr.strip()} {tail}")

    def _changed(self) -> list[tuple[bytes, bytes]]:
        """Of what was changed since the last time the name with the attributes, and a file's contents or a link's target."""
        found, top = [], upper(self.client.alive())
        for directory, directories, files in os.walk(top):
            for name in (*directories, *files):
                path = os.path.join(directory, name)
                status = os.lstat(path)
                if status.st_ctime_ns <= self.newest:
                    continue
                head, contents = os.path.relpath(path, top).encode(errors="surrogateescape") + repr(tuple(status)).encode(), b""
                if stat.S_ISREG(status.st_mode):
                    with open(path, "rb") as file:
                        contents = file.read()
                elif stat.S_ISLNK(status.st_mode):
                    contents = os.readlink(os.fsencode(path))
                found.append((head, contents))
        return found


def unseen_bytes(kept: Sequence[Sequence[bytes]]) -> list[int]:
    """For each turn the pages that none before it had, compressed together: what is left to keep for whoever stores each page
    once, and knows of nothing smaller. Without whatever says where they belong."""
    seen = {hashlib.blake2b(bytes(settings.PAGE)).digest()}
    found = []
    for turn in kept:
        fresh = []
        for data in turn:
            for at in range(0, len(data), settings.PAGE):
                page = data[at:at + settings.PAGE]
                name = hashlib.blake2b(page).digest()
                if name not in seen:
                    seen.add(name)
                    fresh.append(page)
        found.append(len(compress(b"".join(fresh))))
    return found


def clear(directory: Path) -> None:
    """Removes what is in a directory."""
    for entry in os.scandir(directory):
        shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
