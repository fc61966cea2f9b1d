"""One run of one trace in one sandbox, turn by turn."""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import random
import statistics
import time
from collections import Counter
from typing import Any

import crab as crabs
import final
import plan as plans
import trace as traces
from clients import Client, ClientError, Outcome
from constants import EXEC_KILL_UNKNOWN_MS, PATIENCE
from faults import Boundary, Faults, boundary
from hooks import Hooks
from judge import Fault
from together import Together

#: A command that a session needs before its first turn, so that it does not depend on the machine's speed. tb-tmux
#: kills tmux's last session and makes a new one in the same breath: the server is about to end then, and the new client
#: fails when it meets it (without crab in 17 of 400 times on a busy machine).
FIRST = {"tb-tmux": "echo 'set -s exit-empty off' >~/.tmux.conf"}


class Replay:
    """One run of one trace."""

    def __init__(self, args: argparse.Namespace, trace: traces.Trace, client: Client, together: Together, copy: int = 0,
                 mark: str = ""):
        self.args, self.trace, self.client, self.together, self.mark = args, trace, client, together, mark
        self.crab = None if args.no_crab else crabs.Crab(client)
        self.plan: plans.Plan = dict.fromkeys(sorted(args.kill_at), "init")
        if args.faults:
            self.plan = plans.draw([turn.number for turn in trace.turns], args.faults, args.fault_kinds, args.seed, copy)
        if self.crab:
            chance = random.Random(f"{args.seed}/{copy}/moments")
            self.dies = Faults(client, self.crab, together, chance, args.keep)
        self.turns: list[dict[str, Any]] = []
        self.faults: list[Fault] = []
        self.digested: set[int] = set()
        self.final: dict[str, Any] | None = None
        self.none_seen = 0
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        print(f"{self.mark}{text}", flush=True)

    def run(self) -> None:
        if first := FIRST.get(self.trace.name):
            self.client.run("first", "/", first, timeout_s=60 * PATIENCE)
            if self.crab:
                self.crab.line_after(0)
        followers = [turn.number for turn in self.trace.turns[1:]] + [None]
        before: Boundary | None = None
        for turn, after in zip(self.trace.turns, followers, strict=True):
            time.sleep(turn.think_s(self.args.think, self.args.think_cap))
            before = self.one(turn, before, after is not None and self.plan.get(after) == "exec")
        if self.args.final:
            self.final = final.of_sandbox(self.client.alive())

    def one(self, turn: traces.Turn, before: Boundary | None, dies_in_next: bool) -> Boundary | None:
        """before: the end of the turn before, if the sandbox is to die in the middle of this one. Returns the end of this
        one, if it is to die in the next."""
        kind = self.plan.get(turn.number)
        is_digested = bool(kind or dies_in_next) and self.crab is not None
        hooks = Hooks(self.client) if is_digested else None
        with hooks.installed() if hooks else contextlib.nullcontext():
            outcome, line = self.turn(turn, hooks, before if kind == "exec" else None)
            self.report(turn, outcome, line)
            at = None
            if hooks and line and (dies_in_next or kind != "exec"):
                self.digested.add(turn.number)
                if crabs.is_unprotected(line):
                    raise ClientError(f"turn {turn.number} is not protected: {line['note']}")
                at = boundary(self.client, hooks, turn.number, line)
            if hooks and at and kind and kind != "exec":
                self.tell(self.dies.at_rest(kind, hooks, at))
        if not hooks and line and crabs.is_none(line):
            self.none_seen += 1
            if self.none_seen in self.args.kill_none:
                # In the turn itself nothing was frozen, so hooks had nothing to see.
                hooks = Hooks(self.client)
                with hooks.installed():
                    self.tell(self.dies.at_rest("init", hooks, boundary(self.client, hooks, turn.number, line)))
        return at if dies_in_next else None

    def turn(self, turn: traces.Turn, hooks: Hooks | None, before: Boundary | None) -> tuple[Outcome, crabs.Line | None]:
        """A command, and what crab made of the turn. before: the sandbox dies in the middle of it, and goes back to there;
        the command is then issued again, as the agent's framework would do."""
        known = self.crab.last_turn() if self.crab else 0
        if before and hooks:
            exec_ms = EXEC_KILL_UNKNOWN_MS if turn.exec_ms is None else turn.exec_ms
            fault, outcome = self.dies.in_exec(lambda: self.execute(turn), exec_ms, hooks, before, turn.number)
            self.tell([fault])
            if not fault.reissued:
                return outcome, self.crab.kept_after(known) if self.crab else None
            known = self.crab.last_turn() if self.crab else 0
        outcome = self.execute(turn)
        if self.crab is None:
            return outcome, None
        return outcome, self.crab.turn() if self.client.is_shell else self.crab.line_after(known)

    def execute(self, turn: traces.Turn) -> Outcome:
        return self.client.run(str(turn.number), self.trace.cwd, turn.command, turn.timeout_s * PATIENCE)

    def report(self, turn: traces.Turn, outcome: Outcome, line: crabs.Line | None) -> None:
        self.turns.append({
            "turn": turn.number, "code": outcome.code, "recorded": turn.recorded, "expected": turn.expected,
            "ms": round(outcome.ms, 1), "output_bytes": len(outcome.output),
            "output_sha256": hashlib.sha256(outcome.output).hexdigest(), "crab": line})
        mark = "" if turn.expected in (None, outcome.code) else f" (expected {turn.expected})"
        self.say(f"turn {turn.number:3}  exit {outcome.code}{mark}  {outcome.ms:8.1f} ms  {describe(line)}")
        if mark and self.args.verbose:
            self.say(outcome.output[-2000:].decode(errors="replace"))

    def tell(self, faults: list[Fault]) -> None:
        self.faults += faults
        for fault in faults:
            where = "which was none" if fault.after_none else "from its checkpoint"
            late = ", too late" if fault.late else ""
            again = f"; the turn after turn {fault.turn} is issued again" if fault.reissued else ""
            self.say(f"turn {fault.turn:3}  killed ({fault.kind}{late}), {where}: restored in {fault.restore_ms:.0f} ms, "
                     f"{fault.mode}: {len(fault.exact)} of {fault.processes} processes equal, "
                     f"{len(fault.ran_on)} ran and moved no data, "
                     f"{'all else equal' if fault.is_equal else 'UNEQUAL: ' + ', '.join(fault.unequal[:5])}{again}")
            shown = 4 if fault.is_equal else 20
            for difference in fault.differences[:shown]:
                self.say(f"          {difference}")
            if len(fault.differences) > shown:
                self.say(f"          and {len(fault.differences) - shown} more")

    def summary(self) -> dict[str, Any]:
        lines = [turn["crab"] for turn in self.turns if turn["crab"]]
        return {
            "trace": self.trace.name, "client": self.args.client, "runtime": self.args.runtime,
            "turns": len(self.turns), "turns_in_trace": len(self.trace.turns),
            "codes_recorded": sum(turn["recorded"] is not None for turn in self.turns),
            "codes_as_recorded": sum(turn["recorded"] is not None and turn["code"] == turn["recorded"]
                                     for turn in self.turns),
            "codes_not_as_expected": [turn["turn"] for turn in self.turns
                                      if turn["expected"] not in (None, turn["code"])],
            "faults": len(self.faults), "restores_equal": sum(fault.is_equal for fault in self.faults),
            "restores_exact": sum(fault.mode == "exact" for fault in self.faults),
            "restores_cut": sum(fault.mode == "cut" for fault in self.faults),
            "style": self.trace.style, "sandbox": self.client.sandbox, "plan": self.plan,
            "fault_kinds": dict(Counter(fault.kind for fault in self.faults)),
            "faults_late": sum(fault.late for fault in self.faults),
            "reissued": sum(fault.reissued for fault in self.faults),
            "faults_after_none": sum(fault.after_none for fault in self.faults),
            "actions": dict(Counter(map(action, lines))),
            "saved": self.saved(lines),
            "look_us_median": round(statistics.median(looks)) if (looks := [line["look_us"] for line in lines]) else 0,
            "look_us_max": max((line["look_us"] for line in lines), default=0),
            "bytes_captured": sum(line.get("bytes_captured") or 0 for line in lines),
            "bytes_written": sum(line.get("bytes_written") or 0 for line in lines),
            "freeze_us_max": max((line.get("freeze_us") or 0 for line in lines), default=0),
            "exposed_us_sum": sum(line.get("exposed_us") or 0 for line in lines),
            "exec_ms_sum": round(sum(turn["ms"] for turn in self.turns), 1),
            "wall_s": round(time.monotonic() - self.started, 1),
        }

    def saved(self, lines: list[crabs.Line]) -> dict[str, Any]:
        """What the turns that were none would have taken as checkpoints: each as many bytes as the one before it, and
        as long a freeze as the median. (Where a digest is taken in the freeze, it isn't crab's own.)"""
        full = [line for line in lines if line["checkpoint"]]
        freezes = [turn["crab"]["freeze_us"] for turn in self.turns
                   if turn["crab"] in full and turn["turn"] not in self.digested]
        size, total = 0, 0
        for line in lines:
            if line["checkpoint"]:
                size = line["bytes_written"]
            elif crabs.is_none(line):
                total += size
        none = sum(map(crabs.is_none, lines))
        return {"none": none, "bytes": total, "freeze_us": round(none * statistics.median(freezes)) if freezes else 0}

    def is_good(self) -> bool:
        lines = [turn["crab"] for turn in self.turns if turn["crab"]]
        return (not any(map(crabs.is_unprotected, lines))
                and sum(map(crabs.is_none, lines)) >= self.args.least_none
                and len(self.turns) == len(self.trace.turns) and all(fault.is_equal for fault in self.faults)
                and (self.crab is None or len(lines) == len(self.turns))
                and (self.crab is None or len(self.faults) == self.planned_recoveries())
                and not self.summary()["codes_not_as_expected"])

    def planned_recoveries(self) -> int:
        return len(self.plan) + list(self.plan.values()).count("twice") + len(self.args.kill_none)


def action(line: crabs.Line) -> str:
    """What crab did in a turn, in one word."""
    if crabs.is_none(line):
        return "none"
    return "unprotected" if crabs.is_unprotected(line) else line["action"]


def describe(line: crabs.Line | None) -> str:
    """The same in a few words: what had changed, what was done about it."""
    if line is None:
        return ""
    text = action(line)
    if text != "none":
        text = f"{text:5} ({','.join(line['effects']) or 'asked for'})"
    if line["checkpoint"]:
        text += (f" {line['changed_files']} files, {line['bytes_written'] / 1e6:.2f} MB, "
                 f"frozen {line['freeze_us'] / 1e3:.0f} ms, durable {line['durable_us'] / 1e3:.0f} ms,")
    text += f" looked {line['look_us'] / 1e3:.1f} ms"
    if line["exposed_us"]:
        text += f", exposed {line['exposed_us'] / 1e3:.0f} ms"
    return text + (f"  [{line['note']}]" if line["note"] else "")
