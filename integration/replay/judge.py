"""Whether what was restored is what it was at a turn's end."""
from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

import clients  # noqa: F401  (puts integration/digest on the path)
from constants import CUT_LOST, CUT_LOST_OF_THREADS, KEPT
from diff import Difference, differences

#: How the journal names those that this rule has acquitted: host pids, and names as Rust quotes them.
ACQUITTED = re.compile(r'(?:ran and moved no data|settled after the thaw): ((?:\d+ "(?:[^"\\]|\\.)*"(?:, )?)+)')
ONE_ACQUITTED = re.compile(r'(\d+) "(?:[^"\\]|\\.)*"')


@dataclass
class Fault:
    """The outcome of one recovery. Times in milliseconds. kind: how the sandbox died (constants.KINDS).

    mode: "exact": everything is equal. "cut": after a turn that crab called `none` or `files`, processes that the journal
    names as having run without moving data came back as they were at the last dump: these are `ran_on`, and `differences`
    says in what. "unequal": not as promised.
    late: it was to die in the middle of something that was over by then. reissued: the turn in which it died was lost, and
    its command is issued again. turn: the one whose state was restored.
    """
    turn: int
    after_none: bool
    before: str
    after: str
    processes: int
    exact: list[str] = field(default_factory=list)
    ran_on: list[str] = field(default_factory=list)
    unequal: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    kind: str = "init"
    late: bool = False
    reissued: bool = False
    digest_ms: list[float] = field(default_factory=list)
    kill_ms: float = 0.0
    restore_ms: float = 0.0

    @property
    def is_equal(self) -> bool:
        return not self.unequal

    @property
    def mode(self) -> str:
        if self.unequal:
            return "unequal"
        return "cut" if self.ran_on else "exact"

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"equal": self.is_equal, "mode": self.mode}


def acquitted(note: str | None) -> set[int]:
    """Host pids that the journal's note names as having run without moving data."""
    found: set[int] = set()
    for names in ACQUITTED.findall(note or ""):
        found.update(int(pid) for pid in ONE_ACQUITTED.findall(names))
    return found


def judge(turn: int, before: dict[str, Any], after: dict[str, Any], after_none: bool, may_differ: set[str]) -> Fault:
    """Compares. may_differ: processes (pids in the sandbox) that may have lost what they did without moving data."""
    found = differences(before, after)
    fault = Fault(turn, after_none, before["digest"], after["digest"], len(before["state"]["processes"]),
                  differences=[str(difference) for difference in found[:KEPT]])
    changed: dict[str, list[Difference]] = {}
    for difference in found:
        if difference.process is None:
            fault.unequal.append(" ".join(difference.path))
        else:
            changed.setdefault(difference.process, []).append(difference)
    for name in before["state"]["processes"].keys() | changed.keys():
        its = changed.get(name, [])
        if not its:
            fault.exact.append(name)
        elif name in may_differ and all(map(is_lost_in_cut, its)):
            fault.ran_on.append(name)
        else:
            fault.unequal.append(f"process {name}")
    fault.unequal = fault.unequal[:KEPT]
    return fault


def is_lost_in_cut(difference: Difference) -> bool:
    """Whether a process that moved no data may differ in this from what is restored."""
    inside = difference.path[2:]
    if inside[:1] == ("threads",):
        # A thread that came or went has no third word.
        return len(inside) == 3 and inside[2] in CUT_LOST_OF_THREADS
    return inside[:1] in [(part,) for part in CUT_LOST]
