#!/usr/bin/env python3
"""replay.py: replays a recorded agent in a sandbox, and lets the sandbox die and come back on the way.

  replay.py --trace /traces/tb-tmux.jsonl --image crab.test/tb-tmux:latest --client ctr --kill-at 12,19

  replay.py --trace /src/integration/traces/crab-h11-chunked.jsonl --client docker --copies 3 --faults 5 --seed 7

Each command is a fresh `bash -c`, or the next line of one bash (docs/traces.md), in the recorded order, after the
recorded think time. Where the sandbox is to die (--kill-at, --faults; constants.KINDS): wait until the turn is protected
(its checkpoint is durable, or it changed nothing), let it die, restore it, compare the state before and after
(integration/digest, docs/state.md), go on. Runs as root in the test bed.
Exit: 0 all equal and all exit codes as expected, 1 not, 2 wrong usage or a trace that cannot be replayed.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import constants  # noqa: E402
import crab as crabs  # noqa: E402
import trace as traces  # noqa: E402
from clients import CLIENTS, ClientError  # noqa: E402
from session import Replay  # noqa: E402
from together import Together  # noqa: E402

STOCK_RUNTIME = "io.containerd.runc.v2"


def in_words(summary: dict[str, Any]) -> str:
    """The summary for people."""
    return (f"{'good' if summary['good'] else 'NOT GOOD'}: {summary['turns']} turns in {summary['wall_s']} s, "
            f"{summary['codes_as_recorded']} of {summary['codes_recorded']} exit codes as recorded, "
            f"{summary['faults']} crashes ({', '.join(f'{n} {kind}' for kind, n in summary['fault_kinds'].items()) or 'none'}), {summary['restores_equal']} restores equal "
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


def kinds(text: str) -> list[str]:
    """`init,shim`."""
    found = [word for word in text.split(",") if word]
    if not found or set(found) - set(constants.KINDS):
        raise argparse.ArgumentTypeError(f"{text!r} is not of {', '.join(constants.KINDS)}")
    return found


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
    parser.add_argument("--trace", type=Path, required=True, action="append", help="several: side by side in one bed")
    parser.add_argument("--image", action="append", default=[], help="one for each trace; default: crab.test/TRACE:latest")
    parser.add_argument("--copies", type=int, default=1, metavar="N", help="of each trace, side by side")
    parser.add_argument("--client", choices=sorted(CLIENTS), required=True)
    parser.add_argument("--runtime", help=f"default: {crabs.RUNTIME}; with --no-crab {STOCK_RUNTIME}")
    parser.add_argument("--think", type=float, default=1.0, metavar="FACTOR", help="of the recorded think times; 0: none")
    parser.add_argument("--think-drawn", type=int, metavar="SEED",
                        help="draw think times from those recorded in the trace, or, if it has none, in its directory")
    parser.add_argument("--think-cap", type=float, default=constants.THINK_CAP_S, metavar="SECONDS", help="no pause is longer")
    parser.add_argument("--kill-at", type=numbers, default=set(), metavar="TURN[,TURN…]")
    parser.add_argument("--least-none", type=int, default=0, metavar="N", help="so many turns must have been none")
    parser.add_argument("--kill-none", type=numbers, default=set(), metavar="N[,N…]",
                        help="also after the Nth turn that was none and is not in --kill-at; there must be as many")
    parser.add_argument("--faults", type=int, default=0, metavar="N", help="die N times, at turns drawn from --seed")
    parser.add_argument("--fault-kinds", type=kinds, default=list(constants.KINDS), metavar="KIND[,KIND…]",
                        help=f"of {', '.join(constants.KINDS)}; default: all")
    parser.add_argument("--seed", type=int, default=1, help="of the faults")
    parser.add_argument("--no-crab", action="store_true", help="only replay, to compare with")
    parser.add_argument("--annotation", action="append", default=[], type=annotation, metavar="KEY=VALUE",
                        help="of the sandbox, besides those that put it under crab; may be given several times")
    parser.add_argument("--sandbox", default=f"replay-{os.getpid()}", metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--final", type=Path, metavar="OUT", help="the end's files and processes, for final.py; with several "
                        "sandboxes one each, OUT's name with -1, -2, …")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the digests of every fault there")
    parser.add_argument("--brief", action="store_true", help="end with a sentence instead of an object")
    parser.add_argument("--verbose", action="store_true", help="show the output of commands that fail unexpectedly")
    args = parser.parse_args(arguments)
    args.runtime = args.runtime or (STOCK_RUNTIME if args.no_crab else crabs.RUNTIME)
    if args.no_crab and (args.kill_at or args.kill_none or args.least_none or args.faults):
        parser.error("--kill-at, --kill-none, --least-none and --faults need crab")
    if args.faults and (args.kill_at or args.kill_none):
        parser.error("--faults draws its turns itself, without --kill-at and --kill-none")
    if args.image and len(args.image) != len(args.trace):
        parser.error("give as many --image as --trace, or none")
    if args.copies < 1:
        parser.error("--copies: at least one")
    return args


class Refused(Exception):
    """A replay that makes no sense."""


def prepare(args: argparse.Namespace) -> list[Replay]:
    """One for each sandbox."""
    found = []
    for number, path in enumerate(args.trace):
        for _ in range(args.copies):
            trace = traces.load(path)
            if args.think_drawn is not None:
                trace = traces.with_drawn_thinking(trace, path, f"{args.think_drawn}/{len(found)}")
            unknown = args.kill_at - {turn.number for turn in trace.turns}
            if unknown:
                raise Refused(f"--kill-at: the trace has no turn {', '.join(map(str, sorted(unknown)))}")
            found.append((trace, args.image[number] if args.image else f"crab.test/{trace.name}:latest"))
    many = len(found) > 1
    clients = [CLIENTS[args.client](f"{args.sandbox}-{copy + 1}" if many else args.sandbox, image, args.runtime,
                                    annotations(args), trace.style, trace.cwd)
               for copy, (trace, image) in enumerate(found)]
    together = Together(clients)
    try:
        return [Replay(args, trace, client, together, copy, f"{copy + 1}: " if many else "")
                for copy, ((trace, _), client) in enumerate(zip(found, clients, strict=True))]
    except ValueError as error:
        raise Refused(str(error)) from None


def play(replay: Replay, together: Together, results: dict[Replay, dict[str, Any]]) -> None:
    """One sandbox from its beginning to its end; its summary is then in `results`."""
    failure = None
    try:
        replay.client.create()
        replay.run()
    except (ClientError, OSError) as error:
        failure = str(error)
        print(f"replay: {replay.mark}{failure}", file=sys.stderr, flush=True)
    finally:
        if failure is not None or len(replay.turns) < len(replay.trace.turns):
            together.give_up()
        replay.client.remove()
    results[replay] = replay.summary() | {"failure": failure, "good": replay.is_good() and failure is None,
                                          "constants": constants.as_json()}


def write(args: argparse.Namespace, replays: list[Replay], results: dict[Replay, dict[str, Any]]) -> None:
    runs = [{"summary": results[replay], "turns": replay.turns, "faults": [fault.as_json() for fault in replay.faults]}
            for replay in replays]
    if args.json:
        whole = runs[0] if len(runs) == 1 else {"runs": runs}
        args.json.write_text(json.dumps(whole, indent=1) + "\n")
    if args.final:
        for number, replay in enumerate(replays, start=1):
            if replay.final is None:
                continue  # it has failed
            path = args.final.with_stem(f"{args.final.stem}-{number}") if len(replays) > 1 else args.final
            path.write_text(json.dumps(replay.final, indent=1, sort_keys=True) + "\n")


def main() -> int:
    args = parse(sys.argv[1:])
    try:
        replays = prepare(args)
    except (traces.Unsupported, Refused) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2
    together = replays[0].together
    results: dict[Replay, dict[str, Any]] = {}
    threads = [threading.Thread(target=play, args=(replay, together, results)) for replay in replays]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(results) < len(replays):
        return 1  # a thread has died, and said why
    for replay in replays:
        summary = results[replay]
        print(replay.mark + in_words(summary) if args.brief else json.dumps(summary, indent=1))
    write(args, replays, results)
    return 0 if all(summary["good"] for summary in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
