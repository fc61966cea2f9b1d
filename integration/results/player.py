"""A recorded session, played to its end without waiting for anything but its commands: what a client's time is."""
from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterable

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, "..", name) for name in ("replay", "digest", "power")]

import settings  # noqa: E402
import trace as traces  # noqa: E402  (integration/replay)
from clients import CLIENTS, Client, ClientError, wait_for  # noqa: E402
from crab import BOUNDARIES, RUNTIME, Crab, Line  # noqa: E402

STOCK_RUNTIME = "io.containerd.runc.v2"
#: Seconds until the last checkpoint of a run is on the disk.
SETTLED_S = 180.0


def sandbox(trace: traces.Trace, name: str, protected: bool, **annotations: str) -> Client:
    """A sandbox of the trace's image, not yet made."""
    marks = {f"dev.crab.{key}": value for key, value in annotations.items()}
    runtime = RUNTIME if protected else STOCK_RUNTIME
    return CLIENTS["ctr"](name, f"crab.test/{trace.name}:latest", runtime,
                          ({"dev.crab.enabled": "true"} if protected else {}) | marks, trace.style, trace.cwd)


def load(path: Path) -> traces.Trace:
    """A session; one without recorded think times has some drawn from the others in its directory."""
    trace = traces.load(path)
    if all(turn.think_ms is None for turn in trace.turns):
        return traces.with_drawn_thinking(trace, path, str(settings.SEED))
    return trace


def begin(client: Client, trace: traces.Trace) -> int:
    """What comes before the first turn; how many execs that were."""
    first = settings.FIRST.get(trace.name)
    if first:
        client.run("first", "/", first, timeout_s=60)
    return 1 if first else 0


def warm(trace: traces.Trace, name: str) -> None:
    """Reads all of the image once, so that the first run finds no colder page cache than those after it."""
    client = sandbox(trace, name, protected=False)
    try:
        client.create()
        client.run("warm", "/", "find / -xdev -type f -exec cat {} + >/dev/null", timeout_s=600)
    finally:
        client.remove()


def play(client: Client, trace: traces.Trace, turns: Iterable[traces.Turn], factor: float,
         after: Callable[[traces.Turn], None] | None = None) -> list[dict[str, Any]]:
    """Plays them. `after` runs at each turn's end, while the agent thinks; what it takes beyond that, the agent waits."""
    played, ended = [], time.monotonic()
    for turn in turns:
        think = turn.think_s(factor, settings.THINK_CAP_S)
        kept_ms = (time.monotonic() - ended) * 1000 if played else 0.0
        time.sleep(max(0.0, ended + think - time.monotonic()))
        outcome = client.run(str(turn.number), trace.cwd, turn.command, turn.timeout_s)
        ended = time.monotonic()
        played.append({"turn": turn.number, "code": outcome.code, "expected": turn.expected, "ms": outcome.ms,
                       "think_ms": think * 1000, "held_ms": max(0.0, kept_ms - think * 1000)})
        if after:
            after(turn)
    return played


def settled(crab: Crab, boundaries: int) -> list[Line]:
    """The journal, when all its turns have their outcome."""
    lines: list[Line] = []

    def is_done() -> bool:
        lines[:] = [line for line in crab.log() if line["trigger"] in BOUNDARIES]
        return len(lines) >= boundaries and all(
            line["action"] == "skip" or line.get("durable_us") is not None or line["checkpoint"] is None for line in lines)

    try:
        wait_for(f"{boundaries} turns of {crab.client.id} in the journal", is_done, SETTLED_S)
    except ClientError as error:
        raise ClientError(f"{error}; it has {len(lines)}: {lines[-1:]}") from None
    return lines
