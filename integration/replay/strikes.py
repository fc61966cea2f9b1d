"""The blows themselves: what is killed, and when."""
from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Iterable

from clients import Client, ClientError, exec_roots, is_alive, wait_for
from constants import RECOVERY_KILL_AT_MOST_S

import process  # integration/digest, on the path by clients

#: Between two looks for something to have happened.
LOOK_S = 0.005


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def init(client: Client) -> None:
    """Every process of its pid namespace dies with it."""
    kill([client.alive()])


def tree(client: Client) -> None:
    """Each process by itself, init last."""
    first = client.alive()
    kill([pid for pid in process.members(first) if pid != first])
    kill([first])


def shim(client: Client) -> None:
    """The shim alone. containerd notices, and has what it left cleaned up."""
    pid = client.shim()
    if pid is None:
        raise ClientError(f"{client.sandbox} runs and has no shim")
    kill([pid])


def in_exec(client: Client, first: int, delay_s: float, over: threading.Event) -> None:
    """A while after a command has begun, or has ended before it was seen."""
    while not client.is_shell and not exec_roots(first) and not over.is_set():
        time.sleep(LOOK_S)
    time.sleep(delay_s)
    kill([first])


def recovery(client: Client, chance: random.Random) -> bool:
    """Begins to start the armed sandbox, and kills the shim, or what it has started, on the way.

    True: the start was over when the blow fell. Returns when all is dead, and can be started again.
    """
    with subprocess.Popen(client.start_command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, start_new_session=True) as starting:
        try:
            started: list[int] = []

            def is_under_way() -> bool:
                started[:] = _started_by(client.shim())
                return bool(started) or starting.poll() is not None

            wait_for(f"{client.sandbox}'s recovery to begin", is_under_way)
            time.sleep(chance.uniform(0, RECOVERY_KILL_AT_MOST_S))
            known = client.init_pid()
            late = known is not None
            victim = client.shim()
            kill([victim] if victim and chance.random() < 0.5 else _started_by(victim))
            if known is None:
                # A start that outlived the blow is told, or will be.
                wait_for(f"{client.sandbox}'s recovery to end", lambda: starting.poll() is not None or _is_up(client))
                known = client.init_pid()
            if known is not None:
                kill([known])
                wait_for(f"{client.sandbox} to be dead", lambda: client.init_pid() is None and not is_alive(known))
        finally:
            if client.is_shell or starting.poll() is None:
                starting.kill()
    client.clear_dead()
    return late


def _is_up(client: Client) -> bool:
    return client.init_pid() is not None


def _started_by(shim_pid: int | None) -> list[int]:
    """The runtime's programs, and all that they have started so far."""
    if shim_pid is None:
        return []
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            children.setdefault(int(process._stat(f"{entry}/stat")[4]), []).append(int(entry.name))
    found, todo = [], [shim_pid]
    while todo:
        todo += (new := children.get(todo.pop(), []))
        found += new
    return found
