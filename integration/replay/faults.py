"""One fault: the sandbox dies after a turn, crab brings it back, and the two states are compared."""
from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Iterator

from clients import Client, ClientError, wait_for
from crab import Crab, Line, is_none

import digest  # integration/digest, on the path by clients
import process
from diff import Difference, differences

#: Where crab looks for programs to run in a freeze; arguments: namespace, id, host pid of init.
HOOKS = Path("/etc/crab/hooks")
#: Where hook_digest.sh leaves its digests, and for which sandboxes it makes any. Same layout as in the script.
RESULTS = Path("/run/crab-replay")
HOOK = Path(__file__).resolve().with_name("hook_digest.sh")
MOMENTS = ("frozen", "restored")

#: What a process that merely ran may have changed (the consistent-cut rule, D6): its memory, and where it is.
#: Not what it has open, nor how far it has read or written: that rule acquits nobody who moved data.
#: The mask of blocked signals is for a while that of the call in which a thread waits (sigsuspend, ppoll).
CUT_LOST = ("pages", "mappings")
CUT_LOST_OF_THREADS = ("sp", "pc", "SigBlk")
#: How the journal names those that this rule has acquitted: host pids, and names as Rust quotes them.
ACQUITTED = re.compile(r'(?:ran and moved no data|settled after the thaw): ((?:\d+ "(?:[^"\\]|\\.)*"(?:, )?)+)')
ONE_ACQUITTED = re.compile(r'(\d+) "(?:[^"\\]|\\.)*"')
#: At most this many differences are kept for the report.
KEPT = 200


@dataclass
class Fault:
    """The outcome. Times in milliseconds.

    mode: "exact": everything is equal. "cut": after a turn that crab called `none` or `files`, processes that the journal
    names as having run without moving data came back as they were at the last dump: these are `ran_on`, and `differences`
    says in what. "unequal": not as promised.
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


class Hooks:
    """Installs hook_digest.sh for as long as one fault takes, so that other turns' freezes stay short."""

    def __init__(self, client: Client):
        self.results = RESULTS / client.namespace / client.id

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        shutil.rmtree(self.results, ignore_errors=True)
        self.results.mkdir(parents=True, mode=0o700)
        HOOKS.mkdir(parents=True, exist_ok=True)
        try:
            for moment in MOMENTS:
                with contextlib.suppress(FileNotFoundError):
                    (HOOKS / moment).unlink()
                os.symlink(HOOK, HOOKS / moment)
            yield
        finally:
            shutil.rmtree(self.results, ignore_errors=True)
            for moment in MOMENTS:
                with contextlib.suppress(FileNotFoundError):
                    (HOOKS / moment).unlink()
            with contextlib.suppress(OSError):  # somebody else has hooks there
                HOOKS.rmdir()

    def result(self, moment: str) -> dict[str, Any] | None:
        path = self.results / f"{moment}.json"
        return digest.load(str(path)) if path.exists() else None

    def log(self, moment: str) -> str:
        """What hook_digest.sh said, for people."""
        with contextlib.suppress(OSError):
            return (self.results / f"{moment}.log").read_text(errors="replace")[-500:] or "it said nothing"
        return "it was not run"


def acquitted(note: str | None) -> set[int]:
    """Host pids that the journal's note names as having run without moving data."""
    found: set[int] = set()
    for names in ACQUITTED.findall(note or ""):
        found.update(int(pid) for pid in ONE_ACQUITTED.findall(names))
    return found


def of_cut(hooks: Hooks, moment: str) -> dict[str, Any]:
    """What the hook saw in crab's own freeze. Without it nothing would be proved."""
    found = hooks.result(moment)
    if found is None:
        raise ClientError(f"crab's {moment!r} hook left no digest: {hooks.log(moment)}")
    return found


def crash_and_restore(client: Client, crab: Crab, hooks: Hooks, turn: int, line: Line, keep: Path | None) -> Fault:
    """The fault itself. `line`: the turn in crab's journal, durable, and taken with the hooks installed.

    A turn that was none has no cut, so its digest is taken here, at its boundary, in a freeze of our own: what is
    restored is an older checkpoint, and must be equal to this. keep: a directory for both digests as JSON.
    What is restored after a turn of files alone has older processes, too, and the digest of its own cut.
    """
    old = client.alive()
    may_differ: set[str] = set()
    if is_none(line) or line["action"] == "files":
        inner = process.members(old)
        may_differ = {str(inner[pid]) for pid in acquitted(line["note"]) if pid in inner}
    if is_none(line):
        if hooks.result("frozen") is not None:
            raise ClientError(f"turn {turn} is none in the journal, and yet a checkpoint was taken")
        before = digest.sandbox(old, freeze=True)
    else:
        before = of_cut(hooks, "frozen")
    started = time.monotonic()
    client.crash()
    killed = time.monotonic()
    crab.arm()
    client.start_again()
    wait_for("the restored init", lambda: client.init_pid() not in (None, old))
    ended = time.monotonic()
    after = of_cut(hooks, "restored")
    if keep:
        digest.save(before, str(keep / f"turn-{turn}-before.json"))
        digest.save(after, str(keep / f"turn-{turn}-after.json"))
    fault = judge(turn, before, after, is_none(line), may_differ)
    fault.digest_ms = [round((d["observed"]["ended_s"] - d["observed"]["started_s"]) * 1000) for d in (before, after)]
    fault.kill_ms, fault.restore_ms = (killed - started) * 1000, (ended - killed) * 1000
    return fault


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
