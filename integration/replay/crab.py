"""What the replayer asks of the `crab` command."""
from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

from clients import Client, ClientError, call, wait_for

#: Puts a sandbox under crab.
ANNOTATIONS = {"dev.crab.enabled": "true"}
#: The triggers of turns that a replay knows of.
BOUNDARIES = ("exec", "manual")
RUNTIME = "io.containerd.crab.v2"

Line = dict[str, Any]


class Crab:
    """crab's view of one sandbox."""

    def __init__(self, client: Client):
        self.client = client

    def _crab(self, *words: str) -> str:
        return call("crab", "-n", self.client.namespace, *words)

    def log(self) -> list[Line]:
        """The journal, one object a turn, oldest first."""
        return [json.loads(line) for line in self._crab("log", "--json", self.client.id).splitlines()]

    def last_turn(self) -> int:
        """The newest turn's number; 0 before the first."""
        return max((line["turn"] for line in self.log()), default=0)

    def turn(self) -> Line:
        """A boundary by the word of whoever runs the agent. Returns when it is durable."""
        return json.loads(self._crab("turn", "--json", self.client.id))

    def kept_after(self, turn: int) -> Line | None:
        """The newest turn after `turn`, if it can be gone back to. The sandbox is dead."""
        kept = [line for line in self.log() if line["turn"] > turn and line["trigger"] in BOUNDARIES
                and _is_settled(line) and not is_unprotected(line)]
        return kept[-1] if kept else None

    def line_after(self, turn: int) -> Line:
        """Waits for a turn after `turn` to be in the journal with its outcome, and durable if it wrote anything."""
        found: list[Line] = []

        def is_there() -> bool:
            found[:] = [line for line in self.log()
                        if line["turn"] > turn and line["trigger"] in BOUNDARIES and _is_settled(line)]
            return bool(found)

        try:
            wait_for(f"crab to finish the turn after {turn}", is_there)
        except ClientError as error:
            raise ClientError(f"{error}; the journal ends with {self.log()[-1:]}; what runs here:\n{all_tasks()}") from None
        return found[0]

    def arm(self) -> None:
        """The dead sandbox's next start goes back to its newest checkpoint."""
        self._crab("restore", self.client.id)


def all_tasks() -> str:
    """Every thread that this pid namespace shows, and where it waits: for whoever looks for a hang."""
    lines = []
    for task in sorted(Path("/proc").glob("[0-9]*/task/[0-9]*"), key=lambda path: int(path.name)):
        with contextlib.suppress(OSError):
            command = (task / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:90]
            state = re.search(r"State:\s+(\S)", (task / "status").read_text())
            stack = (task / "stack").read_text().split("\n")[:5]
            calls = " < ".join(line.split()[-1].split("+")[0] for line in stack if line)
            lines.append(f"{task.parts[2]}/{task.name} {(task / 'comm').read_text().strip()} {state and state[1]} "
                         f"{calls} | {command}")
    return "\n".join(lines)


def is_none(line: Line) -> bool:
    """Whether crab found that the turn had changed nothing. (A turn that could not be protected is no `none`.)"""
    return (line["action"] == "skip" and line["trigger"] in BOUNDARIES and line["effects"] == []
            and line["checkpoint"] is None and not (line.get("note") or "").startswith("not protected"))


def is_unprotected(line: Line) -> bool:
    """Whether the turn has changed something, and has no checkpoint, or one without processes."""
    return line["checkpoint"] is None and not is_none(line) or "processes" in line.get("missing", [])


def _is_settled(line: Line) -> bool:
    return line["action"] == "skip" or line.get("durable_us") is not None
