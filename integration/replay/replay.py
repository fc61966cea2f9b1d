#!/usr/bin/env python3
"""replay.py: replays a recorded agent in a sandbox, and lets the sandbox die and come back on the way.

  replay.py --trace /traces/tb-tmux.jsonl --image crab.test/tb-tmux:latest --client ctr --kill-at 12,19

Each command is a fresh `bash -c`, in the recorded order, after the recorded think time. At a --kill-at turn: wait
until the turn is protected (its checkpoint is durable, or it changed nothing), kill -9 the sandbox's init, restore,
compare the state before and after (integration/digest, docs/state.md), go on. Runs as root in the test bed.
Exit: 0 all equal and all exit codes as expected, 1 not, 2 wrong usage or a trace that cannot be replayed.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import crab as crabs  # noqa: E402
import trace as traces  # noqa: E402
from clients import CLIENTS, Client, ClientError, Outcome  # noqa: E402
from faults import Fault, Hooks, crash_and_restore  # noqa: E402

STOCK_RUNTIME = "io.containerd.runc.v2"

#: A command that a session needs before its first turn, so that it does not depend on the machine's speed. tb-tmux
#: kills tmux's last session and makes a new one in the same breath: the server is about to end then, and the new client
#: fails when it meets it (without crab in 17 of 400 times on a busy machine).
FIRST = {"tb-tmux": "echo 'set -s exit-empty off' >~/.tmux.conf"}


class Replay:
    """One run of one trace."""

    def __init__(self, args: argparse.Namespace, trace: traces.Trace, client: Client):
        self.args, self.trace, self.client = args, trace, client
        self.crab = None if args.no_crab else crabs.Crab(client)
        self.turns: list[dict[str, Any]] = []
        self.faults: list[Fault] = []
        self.none_seen = 0
        self.started = time.monotonic()

    def run(self) -> None:
        if first := FIRST.get(self.trace.name):
            self.client.run("first", "/", first, timeout_s=60)
            if self.crab:
                self.crab.line_after(0)
        for turn in self.trace.turns:
            time.sleep(turn.think_s(self.args.think, self.args.think_cap))
            self.one(turn)

    def one(self, turn: traces.Turn) -> None:
        kills = turn.number in self.args.kill_at
        hooks = Hooks(self.client) if kills else None
        with hooks.installed() if hooks else contextlib.nullcontext():
            known = self.crab.last_turn() if self.crab else 0
            outcome = self.client.run(str(turn.number), self.trace.cwd, turn.command, turn.timeout_s)
            line = self.crab.line_after(known) if self.crab else None
            self.report(turn, outcome, line)
            if hooks and line:
                self.fault(turn, hooks, line)
        if not hooks and line and crabs.is_none(line):
            self.none_seen += 1
            if self.none_seen in self.args.kill_none:
                # In the turn itself nothing was frozen, so hooks had nothing to see.
                hooks = Hooks(self.client)
                with hooks.installed():
                    self.fault(turn, hooks, line)

    def report(self, turn: traces.Turn, outcome: Outcome, line: crabs.Line | None) -> None:
        self.turns.append({
            "turn": turn.number, "code": outcome.code, "recorded": turn.recorded, "expected": turn.expected,
            "ms": round(outcome.ms, 1), "output_bytes": len(outcome.output),
            "output_sha256": hashlib.sha256(outcome.output).hexdigest(), "crab": line})
        mark = "" if turn.expected in (None, outcome.code) else f" (expected {turn.expected})"
        print(f"turn {turn.number:3}  exit {outcome.code}{mark}  {outcome.ms:8.1f} ms  {describe(line)}", flush=True)
        if mark and self.args.verbose:
            sys.stdout.buffer.write(outcome.output[-2000:])

    def fault(self, turn: traces.Turn, hooks: Hooks, line: crabs.Line) -> None:
        assert self.crab is not None
        if crabs.is_unprotected(line):
            raise ClientError(f"turn {turn.number} is not protected: {line['note']}")
        fault = crash_and_restore(self.client, self.crab, hooks, turn.number, line, self.args.keep)
        self.faults.append(fault)
        where = "which was none" if fault.after_none else "from its checkpoint"
        print(f"turn {turn.number:3}  killed, {where}: restored in {fault.restore_ms:.0f} ms, {fault.mode}: "
              f"{len(fault.exact)} of {fault.processes} processes equal, {len(fault.ran_on)} ran and moved no data, "
              f"{'all else equal' if fault.is_equal else 'UNEQUAL: ' + ', '.join(fault.unequal[:5])}", flush=True)
        shown = 4 if fault.is_equal else 20
        for difference in fault.differences[:shown]:
            print(f"          {difference}", flush=True)
        if len(fault.differences) > shown:
            print(f"          and {len(fault.differences) - shown} more", flush=True)

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
                   if turn["crab"] in full and turn["turn"] not in self.args.kill_at]
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
                and (self.crab is None or len(self.faults) == len(self.args.kill_at) + len(self.args.kill_none))
                and not self.summary()["codes_not_as_expected"])


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


def in_words(summary: dict[str, Any]) -> str:
    """The summary for people."""
    return (f"{'good' if summary['good'] else 'NOT GOOD'}: {summary['turns']} turns in {summary['wall_s']} s, "
            f"{summary['codes_as_recorded']} of {summary['codes_recorded']} exit codes as recorded, "
            f"{summary['faults']} crashes, {summary['restores_equal']} restores equal "
            f"({summary['restores_exact']} to the byte, {summary['restores_cut']} but for processes that ran and "
            f"moved no data; {summary['faults_after_none']} after a turn that was none), "
            f"{summary['bytes_written'] / 1e6:.1f} MB of checkpoints"
            + (f"; {summary['saved']['none']} turns were none, which saved about "
               f"{summary['saved']['bytes'] / 1e6:.1f} MB and {summary['saved']['freeze_us'] / 1e6:.2f} s frozen, at "
               f"{summary['look_us_median'] / 1e3:.1f} ms a look" if summary["saved"]["none"] else "")
            + (f", unexpected exit codes in turns {summary['codes_not_as_expected']}"
               if summary["codes_not_as_expected"] else ""))


def numbers(text: str) -> set[int]:
    """`1,2`; empty for none."""
    return {int(word) for word in text.split(",") if word}


def annotation(text: str) -> tuple[str, str]:
    """`KEY=VALUE`."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def annotations(args: argparse.Namespace) -> dict[str, str]:
    """What the sandbox is annotated with. Without crab nothing but what was asked for."""
    return ({} if args.no_crab else crabs.ANNOTATIONS) | dict(args.annotation)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--image", required=True)
    parser.add_argument("--client", choices=sorted(CLIENTS), required=True)
    parser.add_argument("--runtime", help=f"default: {crabs.RUNTIME}; with --no-crab {STOCK_RUNTIME}")
    parser.add_argument("--think", type=float, default=1.0, metavar="FACTOR", help="of the recorded think times; 0: none")
    parser.add_argument("--think-cap", type=float, default=60.0, metavar="SECONDS", help="no pause is longer")
    parser.add_argument("--kill-at", type=numbers, default=set(), metavar="TURN[,TURN…]")
    parser.add_argument("--least-none", type=int, default=0, metavar="N", help="so many turns must have been none")
    parser.add_argument("--kill-none", type=numbers, default=set(), metavar="N[,N…]",
                        help="also after the Nth turn that was none and is not in --kill-at; there must be as many")
    parser.add_argument("--no-crab", action="store_true", help="only replay, to compare with")
    parser.add_argument("--annotation", action="append", default=[], type=annotation, metavar="KEY=VALUE",
                        help="of the sandbox, besides those that put it under crab; may be given several times")
    parser.add_argument("--sandbox", default=f"replay-{os.getpid()}", metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the digests of every fault there")
    parser.add_argument("--brief", action="store_true", help="end with a sentence instead of an object")
    parser.add_argument("--verbose", action="store_true", help="show the output of commands that fail unexpectedly")
    args = parser.parse_args(arguments)
    args.runtime = args.runtime or (STOCK_RUNTIME if args.no_crab else crabs.RUNTIME)
    if args.no_crab and (args.kill_at or args.kill_none or args.least_none):
        parser.error("--kill-at, --kill-none and --least-none need crab")
    return args


def main() -> int:
    args = parse(sys.argv[1:])
    try:
        trace = traces.load(args.trace)
    except traces.Unsupported as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2
    unknown = args.kill_at - {turn.number for turn in trace.turns}
    if unknown:
        print(f"replay: --kill-at: the trace has no turn {', '.join(map(str, sorted(unknown)))}", file=sys.stderr)
        return 2
    client = CLIENTS[args.client](args.sandbox, args.image, args.runtime, annotations(args))
    replay = Replay(args, trace, client)
    failure = None
    try:
        client.create()
        replay.run()
    except ClientError as error:
        failure = str(error)
        print(f"replay: {failure}", file=sys.stderr)
    finally:
        client.remove()
    summary = replay.summary() | {"failure": failure, "good": replay.is_good() and failure is None}
    print(in_words(summary) if args.brief else json.dumps(summary, indent=1))
    if args.json:
        args.json.write_text(json.dumps({"summary": summary, "turns": replay.turns,
                                         "faults": [fault.as_json() for fault in replay.faults]}, indent=1) + "\n")
    return 0 if summary["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
