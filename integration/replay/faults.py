"""One fault: the sandbox dies, crab brings it back, and what came back is compared with what it was."""
from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

import strikes
from clients import Client, ClientError, Outcome, wait_for
from constants import EXEC_KILL_AT_MOST_MS
from crab import Crab, Line, is_none
from hooks import Hooks, of_cut
from judge import Fault, acquitted, judge
from together import Together

import digest  # integration/digest, on the path by clients
import process


@dataclass
class Boundary:
    """A turn's end to which the sandbox may be taken back. `known`: the turn's number in crab's journal.

    may_differ: processes (pids in the sandbox) that may come back without what they did without moving data.
    """
    turn: int
    known: int
    after_none: bool
    before: dict[str, Any]
    inner: dict[int, int]
    may_differ: set[str] = field(default_factory=set)

    def acquit(self, line: Line) -> None:
        """A line of the journal after which what is restored may have older processes than files."""
        if is_none(line) or line["action"] == "files":
            self.may_differ |= {str(self.inner[pid]) for pid in acquitted(line["note"]) if pid in self.inner}


def boundary(client: Client, hooks: Hooks, turn: int, line: Line) -> Boundary:
    """What the sandbox is now, after a turn that was taken with the hooks installed and is durable.

    A turn that was none has no cut, so its digest is taken here, at its boundary, in a freeze of our own: what is
    restored is an older checkpoint, and must be equal to this.
    What is restored after a turn of files alone has older processes, too, and the digest of its own cut.
    """
    init = client.alive()
    inner = process.members(init)
    if is_none(line):
        if hooks.result("frozen") is not None:
            raise ClientError(f"turn {turn} is none in the journal, and yet a checkpoint was taken")
        before = digest.sandbox(init, freeze=True)
    else:
        before = of_cut(hooks, "frozen")
    found = Boundary(turn, line["turn"], is_none(line), before, inner)
    found.acquit(line)
    return found


class Faults:
    """Lets one sandbox die in the ways of constants.KINDS. keep: a directory for the digests as JSON.

    Each method returns one Fault for each recovery that was compared. `chance` decides on moments and victims.
    """

    def __init__(self, client: Client, crab: Crab, together: Together, chance: random.Random, keep: Path | None):
        self.client, self.crab, self.together, self.chance, self.keep = client, crab, together, chance, keep

    def at_rest(self, kind: str, hooks: Hooks, at: Boundary) -> list[Fault]:
        """Between two turns."""
        if kind == "twice":
            return [self._once("init", kind, hooks, at), self._once("init", kind, hooks, at)]
        return [self._once(kind, kind, hooks, at)]

    def _once(self, way: str, kind: str, hooks: Hooks, at: Boundary) -> Fault:
        old, started, late = self.client.alive(), time.monotonic(), False
        if way == "containerd":
            self.together.strike()
        else:
            {"tree": strikes.tree, "shim": strikes.shim}.get(way, strikes.init)(self.client)
        self.client.died(old)
        killed = time.monotonic()
        if way == "recovery":
            late = self._recovery_dies()
        fault = self._recover(old, hooks, at)
        fault.kind, fault.late = kind, late
        fault.kill_ms, fault.restore_ms = (killed - started) * 1000, (time.monotonic() - killed) * 1000
        return fault

    def _recovery_dies(self) -> bool:
        """A recovery that is killed on its way. True: it was over by then, and what it had restored was killed."""
        self.crab.arm()
        return strikes.recovery(self.client, self.chance)

    def _recover(self, old: int, hooks: Hooks, at: Boundary) -> Fault:
        """With crab's own commands, and then it is compared."""
        hooks.forget("restored")
        self.crab.arm()
        self.client.start_again()
        wait_for("the restored init", lambda: self.client.init_pid() not in (None, old))
        after = of_cut(hooks, "restored")
        if self.keep:
            digest.save(at.before, str(self.keep / f"{self.client.sandbox}-turn-{at.turn}-before.json"))
            digest.save(after, str(self.keep / f"{self.client.sandbox}-turn-{at.turn}-after.json"))
        fault = judge(at.turn, at.before, after, at.after_none, at.may_differ)
        fault.digest_ms = [round((d["observed"]["ended_s"] - d["observed"]["started_s"]) * 1000)
                           for d in (at.before, after)]
        return fault

    def in_exec(self, run: Callable[[], Outcome], exec_ms: float, hooks: Hooks, at: Boundary,
                turn: int) -> tuple[Fault, Outcome]:
        """In the middle of a command that `run` runs. It goes back to the end of the turn before it (`at`).

        If crab had already kept the turn (the command was over when it died), it goes back to that, and the command must
        not be issued again.
        """
        old, started = self.client.alive(), time.monotonic()
        delay = self.chance.uniform(0, min(exec_ms, EXEC_KILL_AT_MOST_MS)) / 1000
        over = threading.Event()
        striker = threading.Thread(target=strikes.in_exec, args=(self.client, old, delay, over))
        striker.start()
        try:
            outcome = run()
        finally:
            over.set()
            striker.join()
        self.client.died(old)
        killed = time.monotonic()
        kept = self.crab.kept_after(at.known)
        if kept:
            at = self._reached(at, kept, hooks, turn)
        fault = self._recover(old, hooks, at)
        fault.kind, fault.late, fault.reissued = "exec", bool(kept), not kept
        fault.kill_ms, fault.restore_ms = (killed - started) * 1000, (time.monotonic() - killed) * 1000
        return fault, outcome

    @staticmethod
    def _reached(at: Boundary, kept: Line, hooks: Hooks, turn: int) -> Boundary:
        """The end of the turn in which it died. One that was none ended as the one before it did."""
        if is_none(kept):
            at.turn, at.after_none = turn, True
        else:
            at = Boundary(turn, kept["turn"], False, of_cut(hooks, "frozen"), at.inner)
        at.acquit(kept)
        return at
