"""Reading a recorded trace (docs/traces.md)."""
from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

from constants import DEFAULT_TIMEOUT_S

STYLES = ("exec", "persistent-shell")


class Unsupported(Exception):
    """A trace that this replayer cannot replay."""


@dataclass(frozen=True)
class Turn:
    """One command of the agent.

    think_ms: what the agent's model took before it; None if unknown. exec_ms: what the command took in the recording.
    recorded: exit code in the recording.
    expected: exit code of our own plain replay, where the image is not the recording's; else the recorded one.
    """
    number: int
    command: str
    think_ms: int | None
    timeout_s: float
    recorded: int | None
    expected: int | None
    exec_ms: int | None = None

    def think_s(self, factor: float, cap_s: float) -> float:
        return min(cap_s, factor * (self.think_ms or 0) / 1000)


@dataclass(frozen=True)
class Trace:
    name: str
    cwd: str
    style: str
    turns: tuple[Turn, ...]


def load(path: Path) -> Trace:
    """Reads NAME.jsonl, and NAME.replay.json beside it if it is there."""
    with open(path) as file:
        header, *lines = [json.loads(line) for line in file if line.strip()]
    if header.get("style") not in STYLES:
        raise Unsupported(f"{path}: style {header.get('style')!r} is none of {', '.join(STYLES)}")
    plain = _plain_replay(path.with_suffix("").with_suffix(".replay.json"))
    turns = tuple(Turn(line["turn"], line["command"], line.get("think_ms"), line.get("timeout_s") or DEFAULT_TIMEOUT_S,
                       line.get("recorded_rc"), plain.get(line["turn"], line.get("recorded_rc")), line.get("exec_ms"))
                  for line in lines)
    return Trace(header["trace"], header["cwd"], header["style"], turns)


def with_drawn_thinking(trace: Trace, path: Path, seed: str) -> Trace:
    """Every think time is drawn from those recorded in this trace, or, if it has none, in all of its directory."""
    pool = _recorded_thinking(path) or [ms for other in sorted(path.parent.glob("*.jsonl"))
                                        for ms in _recorded_thinking(other)]
    if not pool:
        raise Unsupported(f"{path}: there is no recorded think time in it or beside it to draw from")
    chance = random.Random(seed)
    return replace(trace, turns=tuple(replace(turn, think_ms=chance.choice(pool)) for turn in trace.turns))


def _recorded_thinking(path: Path) -> list[int]:
    with open(path) as file:
        _, *lines = [json.loads(line) for line in file if line.strip()]
    return [line["think_ms"] for line in lines if line.get("think_ms") is not None]


def _plain_replay(path: Path) -> dict[int, int]:
    """Turn → exit code; 124 where the plain replay ran into the time-out."""
    if not path.exists():
        return {}
    with open(path) as file:
        return {turn["turn"]: 124 if turn.get("timed_out") else turn["rc"] for turn in json.load(file)["turns"]}
