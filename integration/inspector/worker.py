"""Runs effects by name. A process of its own, in or outside the sandbox's cgroup; JSON lines in and out.

It lives as long as the suite runs on one file system: no fork for an effect, except where that is the effect.
"""
from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, field
from typing import Any, Iterator

import effects
import fuzz_ops
from effects import Place


@dataclass
class Running:
    """An effect between its set-up and its cleaning."""
    place: Place
    steps: Iterator[None]
    mates: list[Iterator[None]] = field(default_factory=list)


#: The clock that file times are taken from (linux/time.h).
_CLOCK_REALTIME_COARSE = 5


def _tick() -> int:
    return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)


def _wait_for_a_new_tick() -> None:
    now = _tick()
    while _tick() == now:
        pass


class Server:
    """The commands, each a method: its arguments are the request's, its result the answer."""

    def __init__(self) -> None:
        self._table = effects.table()
        self._running: dict[str, Running] = {}
        self._names: dict[str, Any] = {}
        self._fuzz: fuzz_ops.Operations | None = None

    def python(self, code: str) -> dict[str, Any]:
        """Runs a piece of code; what it defines stays. Answers its variable `answer`."""
        self._names.pop("answer", None)
        exec(code, self._names)  # noqa: S102
        return {"answer": self._names.get("answer")}

    def fuzz(self, orders: list[list[Any]]) -> dict[str, Any]:
        """Runs the fuzzer's operations, in the current directory. Answers how many of them worked."""
        if self._fuzz is None:
            self._fuzz = fuzz_ops.Operations()
        return {"worked": self._fuzz.run(orders)}

    def furnish(self, place: dict[str, str]) -> dict[str, Any]:
        effects.furnish(Place(**place))
        return {}

    def prepare(self, name: str, place: dict[str, str]) -> dict[str, Any]:
        """The effect's set-up. Answers the targets that have no name."""
        at = Place(**place)
        steps = self._table[name].run(at)
        next(steps)
        self._running[at.directory] = Running(at, steps)
        return {"nameless": [os.fstat(fd).st_ino for fd in at.nameless], "elsewhere": at.elsewhere}

    def dirty(self, place: dict[str, str], targets: list[str], mate: str = "") -> dict[str, Any]:
        """Changes the targets, at the beginning of a clock tick, so that they are dirty already when the effect comes.

        mate: another effect that is done last, in the same place. No target is looked at afterwards: that would make
        the kernel give the next change a time of its own.
        """
        running = self._running.setdefault(place["directory"], Running(Place(**place), iter(())))
        steps = None
        if mate:
            steps = self._table[mate].run(Place(**place))
            next(steps)
            running.mates.append(steps)
        with contextlib.ExitStack() as stack:
            acts = [_spoiler(path, stack) for path in targets]
            _wait_for_a_new_tick()
            began = _tick()
            for act in acts:
                act()
            for fd in running.place.nameless:
                os.pwrite(fd, b"d", 0)
            if steps:
                next(steps, None)
            return {"tick": began}

    def do(self, directory: str) -> dict[str, Any]:
        """The effect itself."""
        try:
            next(self._running[directory].steps, None)
        except OSError as error:
            return {"errno": error.errno, "tick": _tick()}
        return {"tick": _tick()}

    def clean(self, directory: str) -> dict[str, Any]:
        running = self._running.pop(directory, None)
        for steps in (running.steps, *reversed(running.mates)) if running else ():
            with contextlib.suppress(OSError):  # closes what a refused effect left open, as far as it can
                next(steps, None)
            if hasattr(steps, "close"):
                steps.close()
        return {}


def _spoiler(path: str, stack: contextlib.ExitStack) -> Any:
    """What makes the file dirty without changing what it is."""
    mode = os.lstat(path).st_mode
    if stat.S_ISREG(mode):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        old = os.pread(fd, 1, 0) or b"x"
        return lambda: (os.fchmod(fd, stat.S_IMODE(mode)), os.pwrite(fd, old, 0))
    if stat.S_ISDIR(mode):
        return lambda: (os.mkdir(f"{path}/.spoil"), os.rmdir(f"{path}/.spoil"))
    return lambda: os.utime(path, follow_symlinks=False)


class Worker:
    """The suite's side. `cgroup_procs`: the file that takes the worker into its cgroup; "" leaves it outside."""

    def __init__(self, cgroup_procs: str = ""):
        self._process = subprocess.Popen([sys.executable, "-B", os.path.abspath(__file__)], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, bufsize=0)
        self.pid = self._process.pid
        if cgroup_procs:
            with open(cgroup_procs, "w") as procs:
                procs.write(str(self.pid))
        assert self._process.stdout
        self._answers = os.fdopen(os.dup(self._process.stdout.fileno()), "rb")

    def begin(self, do: str, **arguments: Any) -> None:
        """Half of ask(): others can be asked before the answer is fetched."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps([do, arguments]).encode() + b"\n")

    def finish(self, what: str = "a request") -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise ChildProcessError(f"the worker died at {what}: code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise ChildProcessError(f"{what}: {answer['failed']}")
        return answer

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.begin(do, **arguments)
        return self.finish(f"{do} {arguments}")

    def python(self, code: str) -> Any:
        """Has it run a piece of code (Server.python)."""
        return self.ask("python", code=textwrap.dedent(code))["answer"]

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._answers.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve() -> None:
    server = Server()
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # nothing that an effect prints may look like an answer
    for line in sys.stdin.buffer:
        do, arguments = json.loads(line)
        try:
            answer = getattr(server, do)(**arguments)
        except Exception as error:  # noqa: BLE001: told to the suite, which fails with it
            answer = {"failed": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    sys.modules.setdefault("worker", sys.modules[__name__])
    _serve()
