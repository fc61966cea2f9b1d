"""Client of the cargo example `inspector`, which drives crab's own inspector (driver.rs): JSON lines in and out."""
from __future__ import annotations

import json
import os
import selectors
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from types import TracebackType
from typing import Any

#: (device, inode number) as stat shows them.
Inode = tuple[int, int]

#: Seconds for one answer. An emulated machine is ten times slower.
PATIENCE = float(os.environ.get("CRAB_E2E_LIMIT", 30))


class DriverError(Exception):
    """The driver refused, died, or answered nothing."""


@dataclass(frozen=True)
class Report:
    """What changed. `doubt`: why everything must count as changed. `took_us`: microseconds inside the driver."""
    doubt: str | None
    inodes: dict[Inode, frozenset[str]]
    flags: frozenset[str]
    took_us: float

    def has(self, inode: Inode) -> bool:
        return self.doubt is not None or inode in self.inodes


def default_binary() -> str:
    """CRAB_INSPECTOR, or what cargo built last."""
    if named := os.environ.get("CRAB_INSPECTOR"):
        return named
    checkout = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    target = os.environ.get("CARGO_TARGET_DIR", f"{checkout}/target")
    built = [path for profile in ("release", "debug") if os.path.exists(path := f"{target}/{profile}/examples/inspector")]
    if not built:
        raise DriverError("there is no driver: cargo build --example inspector, or name one in CRAB_INSPECTOR")
    return max(built, key=os.path.getmtime)


class Driver:
    """`without`: probes to leave out. `upper`: the writable layer, if it is not to be found from the mount."""

    def __init__(self, cgroup: str, rootfs: str, upper: str = "", without: tuple[str, ...] = (), binary: str = ""):
        self._run = tempfile.mkdtemp(prefix="crab-inspector-run-")
        command = [binary or default_binary(), "--run", self._run, "--cgroup", cgroup, "--rootfs", rootfs]
        command += ["--upper", upper] if upper else []
        for probe in without:
            command += ["--without", probe]
        self._errors = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                                             bufsize=0)
        except BaseException:
            self._errors.close()
            shutil.rmtree(self._run, ignore_errors=True)
            raise
        assert self._process.stdout
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        self._buffer = b""
        try:
            self.ready = self._answer()
        except BaseException:
            self.close()
            raise

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        while b"\n" not in self._buffer:
            if not self._selector.select(PATIENCE):
                raise DriverError(f"no answer within {PATIENCE:g} s. {self._said()}")
            chunk = os.read(self._process.stdout.fileno(), 1 << 20)
            if not chunk:
                raise DriverError(f"ended with code {self._process.wait()}. {self._said()}")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise DriverError(answer["error"])
        return answer

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-2000:].decode(errors="replace")

    def ask(self, do: str) -> dict[str, Any]:
        assert self._process.stdin
        try:
            self._process.stdin.write(f'{{"do":"{do}"}}\n'.encode())
        except BrokenPipeError:
            pass  # the answer says why
        return self._answer()

    def _report(self, do: str) -> Report:
        answer = self.ask(do)
        inodes: dict[Inode, frozenset[str]] = {}
        for one in answer["inodes"]:
            major, minor = map(int, one["dev"].split(":"))
            inodes[os.makedev(major, minor), one["ino"]] = frozenset(one.get("how", ()))
        return Report(answer.get("doubt"), inodes, frozenset(answer.get("flags", ())), answer.get("us", 0))

    def look(self) -> Report:
        return self._report("look")

    def cut(self) -> Report:
        return self._report("cut")

    def durable(self) -> None:
        self.ask("durable")

    def failed(self) -> None:
        self.ask("failed")

    def changes(self) -> dict[str, Any]:
        return self.ask("changes")

    def capture(self) -> dict[str, Any]:
        return self.ask("capture")

    def close(self) -> None:
        try:
            if self._process.poll() is None:
                assert self._process.stdin
                try:
                    self._process.stdin.write(b'{"do":"quit"}\n')
                    self._process.stdin.close()
                except BrokenPipeError:
                    pass
                try:
                    self._process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    self._process.wait()
        finally:
            self._selector.close()
            self._errors.close()
            shutil.rmtree(self._run, ignore_errors=True)

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
