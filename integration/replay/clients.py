"""The two clients that a sandbox is driven through: containerd's `ctr` and `docker`."""
from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Callable

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "digest"))

import process  # noqa: E402  (integration/digest)

#: The sandbox's init: costs no CPU, reaps orphans (bash does), ends on SIGTERM.
INIT = ["bash", "-c", "trap 'exit 0' TERM; while :; do sleep infinity & wait; done"]

#: Exit code of a command that was killed by its time-out, as timeout(1) has it.
TIMED_OUT = 124

#: Seconds to wait for what should take milliseconds.
LIMIT_S = 60.0


class ClientError(Exception):
    """A client failed at something that is no command of the trace."""


@dataclass(frozen=True)
class Outcome:
    """What came of one command. ms: the client's whole call, as an agent's framework sees it."""
    code: int
    ms: float
    output: bytes


def call(*command: str) -> str:
    """Runs to the end; its standard output."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise ClientError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def wait_for(what: str, done: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > end:
            raise ClientError(f"waited {limit_s:.0f} s in vain: {what}")
        time.sleep(0.005)


class Client(ABC):
    """One sandbox, and how its client starts it, runs commands in it and finds it dead."""

    namespace: str

    def __init__(self, sandbox: str, image: str, runtime: str, annotations: dict[str, str]):
        self.sandbox, self.image, self.runtime, self.annotations = sandbox, image, runtime, annotations

    @property
    @abstractmethod
    def id(self) -> str:
        """The container's id in containerd."""

    @abstractmethod
    def create(self) -> None:
        """Makes the sandbox and starts it."""

    @abstractmethod
    def exec_command(self, turn: str, cwd: str, command: str) -> list[str]:
        """The client's command line for a fresh `bash -c`."""

    @abstractmethod
    def init_pid(self) -> int | None:
        """The init that the client knows, as a pid of the host. None: dead."""

    @abstractmethod
    def clear_dead(self) -> None:
        """What the client needs before a dead sandbox can be started again."""

    @abstractmethod
    def start_again(self) -> None:
        """Starts a dead sandbox again."""

    @abstractmethod
    def remove(self) -> None:
        """Ends the sandbox and removes it."""

    def run(self, turn: str, cwd: str, command: str, timeout_s: float) -> Outcome:
        """One command of the trace. At the time-out its process group is killed, what it left running is not."""
        init = self.alive()
        started = time.monotonic()
        with subprocess.Popen(self.exec_command(turn, cwd, command), stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
            try:
                output, code = child.communicate(timeout=timeout_s)[0], child.returncode
            except subprocess.TimeoutExpired:
                for pid in exec_roots(init):
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
                output, code = child.communicate(timeout=LIMIT_S)[0], TIMED_OUT
        return Outcome(code, (time.monotonic() - started) * 1000, output)

    def alive(self) -> int:
        pid = self.init_pid()
        if pid is None:
            raise ClientError(f"sandbox {self.sandbox} is not running")
        return pid

    def crash(self) -> None:
        """kill -9 of the init: every process of its pid namespace dies. Returns when the client knows."""
        os.kill(self.alive(), signal.SIGKILL)
        wait_for(f"{self.sandbox} to be dead", lambda: self.init_pid() is None)
        self.clear_dead()


def exec_roots(init: int) -> list[int]:
    """Host pids of live execs: in the sandbox, but started from outside. Each leads a session of its own."""
    members = process.members(init)
    found = []
    for pid in members:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if pid != init and int(process._stat(f"/proc/{pid}/stat")[4]) not in members:
                found.append(pid)
    return found


class Ctr(Client):
    """containerd's own client."""

    namespace = "default"

    @property
    def id(self) -> str:
        return self.sandbox

    def create(self) -> None:
        options = [word for name, value in self.annotations.items() for word in ("--annotation", f"{name}={value}")]
        call("ctr", "run", "-d", "--runtime", self.runtime, *options, self.image, self.sandbox, *INIT)

    def exec_command(self, turn: str, cwd: str, command: str) -> list[str]:
        return ["ctr", "task", "exec", "--exec-id", f"turn-{turn}", "--cwd", cwd, self.sandbox, "bash", "-c", command]

    def init_pid(self) -> int | None:
        for line in call("ctr", "task", "ls").splitlines()[1:]:
            name, pid, status = line.split()[:3]
            if name == self.sandbox:
                return int(pid) if status in ("RUNNING", "PAUSED") else None
        return None

    def clear_dead(self) -> None:
        call("ctr", "task", "delete", self.sandbox)

    def start_again(self) -> None:
        call("ctr", "task", "start", "-d", self.sandbox)

    def remove(self) -> None:
        with contextlib.suppress(ClientError):
            call("ctr", "task", "kill", "-s", "KILL", self.sandbox)
            wait_for(f"{self.sandbox} to be dead", lambda: self.init_pid() is None)
        for words in (("task", "delete", "-f"), ("container", "delete")):
            with contextlib.suppress(ClientError):
                call("ctr", *words, self.sandbox)


class Docker(Client):
    """Docker. A sandbox has no network, since the bed has no bridge."""

    namespace = "moby"

    @property
    def id(self) -> str:
        return self._inspect()["Id"]

    def _inspect(self) -> dict:
        return json.loads(call("docker", "inspect", self.sandbox))[0]

    def create(self) -> None:
        options = [word for name, value in self.annotations.items() for word in ("--annotation", f"{name}={value}")]
        call("docker", "run", "-d", "--name", self.sandbox, "--runtime", self.runtime, "--network", "none", *options,
             self.image, *INIT)

    def exec_command(self, turn: str, cwd: str, command: str) -> list[str]:
        return ["docker", "exec", "-w", cwd, self.sandbox, "bash", "-c", command]

    def init_pid(self) -> int | None:
        state = self._inspect()["State"]
        return state["Pid"] if state["Running"] else None

    def clear_dead(self) -> None:
        """Nothing: Docker deletes the task itself."""

    def start_again(self) -> None:
        call("docker", "start", self.sandbox)

    def remove(self) -> None:
        with contextlib.suppress(ClientError):
            call("docker", "rm", "-f", self.sandbox)


CLIENTS: dict[str, type[Client]] = {"ctr": Ctr, "docker": Docker}
