#!/usr/bin/env python3
"""replay.py: replays a recorded agent in a sandbox, and lets the sandbox die and come back on the way.

  replay.py --trace /traces/tb-tmux.jsonl --image crab.test/tb-tmux:latest --client ctr --kill-at 12,19

Each command is a fresh `bash -c`, in the recorded order, after the recorded think time. At a --kill-at turn: wait
until the turn's checkpoint is durable, kill -9 the sandbox's init, restore, compare the state before and after
(integration/digest, docs/state.md), go on. Runs as root in the test bed. Exit: 0 all equal and all exit codes as
expected, 1 not, 2 wrong usage or a trace that cannot be replayed.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import crab as crabs  # noqa: E402
import trace as traces  # noqa: E402
from clients import CLIENTS, Client, ClientError, Outcome  # noqa: E402
from faults import Fault, Hooks, crash_and_restore  # noqa: E402

STOCK_RUNTIME = "io.containerd.runc.v2"


class Replay:
    """One run of one trace."""

    def __init__(self, args: argparse.Namespace, trace: traces.Trace, client: Client):
        self.args, self.trace, self.client = args, trace, client
        self.crab = None if args.no_crab else crabs.Crab(client)
        self.turns: list[dict[str, Any]] = []
        self.faults: list[Fault] = []
        self.started = time.monotonic()

    def run(self) -> None:
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
            if hooks and self.crab and line:
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
        """Where the turn was not a full checkpoint, one is asked for: a fault is to find processes in it."""
        assert self.crab is not None
        if line["action"] != "full":
            known = line["turn"]
            self.crab.checkpoint()
            with contextlib.suppress(ClientError):
                self.crab.line_after(known)
        fault = crash_and_restore(self.client, self.crab, hooks, turn.number, self.args.keep)
        self.faults.append(fault)
        print(f"turn {turn.number:3}  killed, restored in {fault.restore_ms:.0f} ms, {fault.mode}: "
              f"{len(fault.exact)} of {fault.processes} processes equal, {len(fault.ran_on)} ran on, "
              f"{'all else equal' if fault.is_equal else 'UNEQUAL'}", flush=True)
        for difference in fault.differences[:20] if not fault.is_equal else []:
            print(f"          {difference}", flush=True)

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
            "restores_exact": sum(fault.is_equal and fault.mode == "exact" for fault in self.faults),
            "actions": {action: sum(line["action"] == action for line in lines)
                        for action in ("skip", "files", "full")},
            "bytes_captured": sum(line.get("bytes_captured") or 0 for line in lines),
            "bytes_written": sum(line.get("bytes_written") or 0 for line in lines),
            "freeze_us_max": max((line.get("freeze_us") or 0 for line in lines), default=0),
            "exposed_us_sum": sum(line.get("exposed_us") or 0 for line in lines),
            "exec_ms_sum": round(sum(turn["ms"] for turn in self.turns), 1),
            "wall_s": round(time.monotonic() - self.started, 1),
        }

    def is_good(self) -> bool:
        return (len(self.turns) == len(self.trace.turns) and all(fault.is_equal for fault in self.faults)
                and (self.crab is None or len(self.faults) == len(self.args.kill_at))
                and not self.summary()["codes_not_as_expected"])


def describe(line: crabs.Line | None) -> str:
    """What crab did in a turn, in a few words."""
    if line is None:
        return ""
    effects = ",".join(line.get("effects") or ()) or "nothing"
    text = f"{line['action']:5} ({effects})"
    if line["action"] != "skip":
        text += (f" {line.get('changed_files') or 0} files, {(line.get('bytes_written') or 0) / 1e6:.2f} MB, "
                 f"frozen {(line.get('freeze_us') or 0) / 1e3:.0f} ms, durable {(line.get('durable_us') or 0) / 1e3:.0f} ms")
    if line.get("exposed_us"):
        text += f", exposed {line['exposed_us'] / 1e3:.0f} ms"
    return text + (f"  [{line['note']}]" if line.get("note") else "")


def in_words(summary: dict[str, Any]) -> str:
    """The summary for people."""
    return (f"{'good' if summary['good'] else 'NOT GOOD'}: {summary['turns']} turns in {summary['wall_s']} s, "
            f"{summary['codes_as_recorded']} of {summary['codes_recorded']} exit codes as recorded, "
            f"{summary['faults']} crashes, {summary['restores_equal']} restores equal "
            f"({summary['restores_exact']} to the byte, nothing run in between), "
            f"{summary['bytes_written'] / 1e6:.1f} MB of checkpoints"
            + (f", unexpected exit codes in turns {summary['codes_not_as_expected']}"
               if summary["codes_not_as_expected"] else ""))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--image", required=True)
    parser.add_argument("--client", choices=sorted(CLIENTS), required=True)
    parser.add_argument("--runtime", help=f"default: {crabs.RUNTIME}; with --no-crab {STOCK_RUNTIME}")
    parser.add_argument("--think", type=float, default=1.0, metavar="FACTOR", help="of the recorded think times; 0: none")
    parser.add_argument("--think-cap", type=float, default=60.0, metavar="SECONDS", help="no pause is longer")
    parser.add_argument("--kill-at", type=lambda text: {int(word) for word in text.split(",")}, default=set(),
                        metavar="TURN[,TURN…]")
    parser.add_argument("--no-crab", action="store_true", help="only replay, to compare with")
    parser.add_argument("--sandbox", default=f"replay-{os.getpid()}", metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the digests of every fault there")
    parser.add_argument("--brief", action="store_true", help="end with a sentence instead of an object")
    parser.add_argument("--verbose", action="store_true", help="show the output of commands that fail unexpectedly")
    args = parser.parse_args(arguments)
    args.runtime = args.runtime or (STOCK_RUNTIME if args.no_crab else crabs.RUNTIME)
    if args.no_crab and args.kill_at:
        parser.error("--kill-at needs crab")
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
    client = CLIENTS[args.client](args.sandbox, args.image, args.runtime, {} if args.no_crab else crabs.ANNOTATIONS)
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
