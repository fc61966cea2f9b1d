"""Reading a recorded trace (docs/traces.md)."""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

#: Seconds that a command may take where the trace does not say.
DEFAULT_TIMEOUT_S = 120


class Unsupported(Exception):
    """A trace that this replayer cannot replay."""


@dataclass(frozen=True)
class Turn:
    """One command of the agent.

    think_ms: what the agent's model took before it; None if unknown. recorded: exit code in the recording.
    expected: exit code of our own plain replay, where the image is not the recording's; else the recorded one.
    """
    number: int
    command: str
    think_ms: int | None
    timeout_s: float
    recorded: int | None
    expected: int | None

    def think_s(self, factor: float, cap_s: float) -> float:
        return min(cap_s, factor * (self.think_ms or 0) / 1000)


@dataclass(frozen=True)
class Trace:
    name: str
    cwd: str
    turns: tuple[Turn, ...]


def load(path: Path) -> Trace:
    """Reads NAME.jsonl, and NAME.replay.json beside it if it is there."""
    with open(path) as file:
        header, *lines = [json.loads(line) for line in file if line.strip()]
    if header.get("style") != "exec":
        raise Unsupported(f"{path}: style {header.get('style')!r} is not supported yet, only 'exec'")
    plain = _plain_replay(path.with_suffix("").with_suffix(".replay.json"))
    turns = tuple(Turn(line["turn"], line["command"], line.get("think_ms"), line.get("timeout_s") or DEFAULT_TIMEOUT_S,
                       line.get("recorded_rc"), plain.get(line["turn"], line.get("recorded_rc"))) for line in lines)
    return Trace(header["trace"], header["cwd"], turns)


def _plain_replay(path: Path) -> dict[int, int]:
    """Turn → exit code; 124 where the plain replay ran into the time-out."""
    if not path.exists():
        return {}
    with open(path) as file:
        return {turn["turn"]: 124 if turn.get("timed_out") else turn["rc"] for turn in json.load(file)["turns"]}
