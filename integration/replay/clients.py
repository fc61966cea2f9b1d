"""The two clients that a sandbox is driven through: containerd's `ctr` and `docker`.

Style `exec`: init does nothing, and each command is a `bash -c` of its own. Style `persistent-shell`: init is a bash,
and its client's stdin and output are the shell's (shell.py).
"""
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
from pathlib import Path
from typing import Callable

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "digest"))

import process  # noqa: E402  (integration/digest)
import shell  # noqa: E402
from constants import LIMIT_S, NO_STDIN, TIMED_OUT  # noqa: E402

#: The sandbox's init: costs no CPU, reaps orphans (bash does), ends on SIGTERM.
INIT = ["bash", "-c", "trap 'exit 0' TERM; while :; do sleep infinity & wait; done"]

#: Our exit code for a command that the sandbox's death has ended, if its client has none.
DIED = 137

#: Where containerd keeps what belongs to a task that lives.
BUNDLES = Path("/run/containerd/io.containerd.runtime.v2.task")


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

    def __init__(self, sandbox: str, image: str, runtime: str, annotations: dict[str, str], style: str = "exec",
                 cwd: str = "/"):
        self.sandbox, self.image, self.runtime, self.annotations = sandbox, image, runtime, annotations
        self.is_shell, self.cwd = style == "persistent-shell", cwd
        self.shell: shell.Shell | None = None

    @property
    @abstractmethod
    def id(self) -> str:
        """The container's id in containerd."""

    @abstractmethod
    def create_command(self) -> list[str]:
        """The client's command line that makes the sandbox and starts it; with a persistent shell it stays attached."""

    @abstractmethod
    def start_command(self) -> list[str]:
        """The same for a dead sandbox that is started again."""

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
    def remove(self) -> None:
        """Ends the sandbox and removes it."""

    def create(self) -> None:
        self._begin(self.create_command())

    def start_again(self) -> None:
        """Starts a dead sandbox again; with a persistent shell its stdin and output are attached anew."""
        self._begin(self.start_command())

    def _begin(self, command: list[str]) -> None:
        if not self.is_shell:
            call(*command)
            return
        self.shell = started = shell.Shell(command)
        wait_for(f"{self.sandbox} to run", lambda: self.init_pid() is not None or started.ended())
        if started.ended():
            raise ClientError(f"{' '.join(command)}: it has ended: {started.close().decode(errors='replace').strip()}")

    def run(self, turn: str, cwd: str, command: str, timeout_s: float) -> Outcome:
        """One command of the trace. One that the sandbox's death has ended has the code DIED, or what the client says."""
        started = time.monotonic()
        code, output = (self._fed if self.is_shell else self._executed)(turn, cwd, command, timeout_s)
        return Outcome(code, (time.monotonic() - started) * 1000, output)

    def _fed(self, _turn: str, _cwd: str, command: str, timeout_s: float) -> tuple[int, bytes]:
        assert self.shell is not None
        try:
            return self.shell.run(command, timeout_s)
        except shell.ShellEnded as error:
            return DIED, str(error).encode()
        except shell.ShellTimeout as error:
            raise ClientError(f"{self.sandbox}: {error}") from None

    def _executed(self, turn: str, cwd: str, command: str, timeout_s: float) -> tuple[int, bytes]:
        """At the time-out its process group is killed, what it left running is not."""
        init = self.alive()
        with subprocess.Popen(self.exec_command(turn, cwd, command), stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
            try:
                output = child.communicate(timeout=timeout_s)[0]
                return child.returncode, output
            except subprocess.TimeoutExpired:
                for pid in exec_roots(init):
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
                return TIMED_OUT, child.communicate(timeout=LIMIT_S)[0]

    def alive(self) -> int:
        pid = self.init_pid()
        if pid is None:
            raise ClientError(f"sandbox {self.sandbox} is not running")
        return pid

    def died(self, init: int) -> None:
        """Waits until all know that it is dead, and makes it ready to be started again. `init`: the one it had."""
        wait_for(f"{self.sandbox} to be dead", lambda: self.init_pid() is None and not is_alive(init))
        if self.shell:
            self.shell.close()
            self.shell = None
        self.clear_dead()

    def shim(self) -> int | None:
        """The shim's pid; None: there is none."""
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError, ValueError):
                words = Path("/proc", str(int(entry)), "cmdline").read_bytes().decode(errors="replace").split("\0")
                if "containerd-shim" in words[0] and self.id in words and not {"start", "delete"} & set(words):
                    return int(entry)
        return None

    def _bundle_is_gone(self) -> bool:
        return not (BUNDLES / self.namespace / self.id).exists()


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return process._stat(f"/proc/{pid}/stat")[3] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


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

    def create_command(self) -> list[str]:
        options = [word for name, value in self.annotations.items() for word in ("--annotation", f"{name}={value}")]
        how = ["--cwd", self.cwd] if self.is_shell else ["-d"]
        return ["ctr", "run", *how, "--runtime", self.runtime, *options, self.image, self.sandbox,
                *(shell.INIT if self.is_shell else INIT)]

    def start_command(self) -> list[str]:
        return ["ctr", "task", "start", *([] if self.is_shell else ["-d"]), self.sandbox]

    def exec_command(self, turn: str, cwd: str, command: str) -> list[str]:
        return ["ctr", "task", "exec", "--exec-id", f"turn-{turn}", "--cwd", cwd, self.sandbox, "bash", "-c",
                NO_STDIN + command]

    def _task(self) -> tuple[int, str] | None:
        """Its pid and status."""
        for line in call("ctr", "task", "ls").splitlines()[1:]:
            name, pid, status = line.split()[:3]
            if name == self.sandbox:
                return int(pid), status
        return None

    def init_pid(self) -> int | None:
        task = self._task()
        return task[0] if task and task[1] in ("RUNNING", "PAUSED") else None

    def clear_dead(self) -> None:
        """Its task is deleted: by us, by the client that was attached, or, after its shim's death, by containerd."""
        def is_cleared() -> bool:
            if self._task() is None:
                return self._bundle_is_gone()
            with contextlib.suppress(ClientError):
                call("ctr", "task", "delete", "-f", self.sandbox)
            return False

        wait_for(f"{self.sandbox}'s task to be deleted", is_cleared)

    def remove(self) -> None:
        if self.shell:
            self.shell.kill()
        with contextlib.suppress(ClientError):
            call("ctr", "task", "kill", "-s", "KILL", self.sandbox)
            wait_for(f"{self.sandbox} to be dead", lambda: self.init_pid() is None)
        for words in (("task", "delete", "-f"), ("container", "delete")):
            with contextlib.suppress(ClientError):
                call("ctr", *words, self.sandbox)


class Docker(Client):
    """Docker. A sandbox has no network, since the bed has no bridge."""

    namespace = "moby"
    _id: str | None = None

    @property
    def id(self) -> str:
        self._id = self._id or self._inspect()["Id"]
        return self._id

    def _inspect(self) -> dict:
        return json.loads(call("docker", "inspect", self.sandbox))[0]

    def create_command(self) -> list[str]:
        options = [word for name, value in self.annotations.items() for word in ("--annotation", f"{name}={value}")]
        how = ["-i", "-w", self.cwd] if self.is_shell else ["-d"]
        return ["docker", "run", *how, "--name", self.sandbox, "--runtime", self.runtime, "--network", "none", *options,
                self.image, *(shell.INIT if self.is_shell else INIT)]

    def start_command(self) -> list[str]:
        return ["docker", "start", *(["-a", "-i"] if self.is_shell else []), self.sandbox]

    def exec_command(self, turn: str, cwd: str, command: str) -> list[str]:
        return ["docker", "exec", "-w", cwd, self.sandbox, "bash", "-c", command]

    def init_pid(self) -> int | None:
        try:
            state = self._inspect()["State"]
        except ClientError as error:
            if "No such object" not in str(error):
                raise
            return None  # not made yet
        return state["Pid"] if state["Running"] else None

    def clear_dead(self) -> None:
        """Docker deletes the task itself."""
        wait_for(f"{self.sandbox}'s task to be deleted", self._bundle_is_gone)

    def remove(self) -> None:
        if self.shell:
            self.shell.kill()
        with contextlib.suppress(ClientError):
            call("docker", "rm", "-f", self.sandbox)


CLIENTS: dict[str, type[Client]] = {"ctr": Ctr, "docker": Docker}
