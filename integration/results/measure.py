#!/usr/bin/env python3
"""measure.py: one trace in every mode, one after the other, in a test bed; what was seen goes to OUT as JSON.

    measure.py [--quick] [--think FACTOR] [--only PART] TRACE.jsonl OUT

OUT/runs/TRACE.N.json for each run (mode, turns, crab's journal and its lines from before the first turn, bytes that the store's block device was asked to write),
OUT/recover/TRACE.json for the crashes, OUT/machine.json. `integration/results/run` calls it.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import player
import recover
import settings
import trace as traces
from clients import Client, ClientError, call
from crab import Crab
from full import Keeper, unseen_bytes
from logged import mount_loop

CONFIG = Path("/etc/crab/config.toml")
SECTOR = 512
#: In /sys/block/NAME/stat.
SECTORS_WRITTEN = 6


@contextlib.contextmanager
def store_disk() -> Iterator[tuple[Path, Path]]:
    """An ext4 of its own on a loop device: where it is mounted, and the device's counters."""
    with tempfile.TemporaryDirectory() as scratch:
        image, at = Path(scratch, "disk"), Path(scratch, "mnt")
        with open(image, "wb") as file:
            file.truncate(settings.STORE_DISK)
        call("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(image))
        at.mkdir()
        device = mount_loop(image, at)
        at.chmod(0o700)
        try:
            yield at, Path("/sys/block", Path(device).name, "stat")
        finally:
            call("umount", str(at))


def written(stat: Path) -> int:
    return int(stat.read_text().split()[SECTORS_WRITTEN]) * SECTOR


@contextlib.contextmanager
def configured(store: Path, mode: str) -> Iterator[None]:
    text = f'store = "{store}"\n'
    if mode == "no engine":
        text += f"engine.dumps = {settings.NO_LIMIT_ON_DUMPS}\n"
    else:
        text += f'engine.rate = "{settings.ENGINE_RATE}"\nengine.burst = "{settings.ENGINE_BURST}"\n'
    CONFIG.parent.mkdir(exist_ok=True)
    CONFIG.write_text(text)
    try:
        yield
    finally:
        CONFIG.unlink()


def boundary(client: Client) -> Callable[[traces.Turn], None]:
    """The end of a shell's turn, as whoever runs the agent tells it."""
    crab = Crab(client)

    def after(_turn: traces.Turn) -> None:
        crab.turn()

    return after


def one_run(trace: traces.Trace, mode: str, factor: float, number: int) -> dict[str, Any]:
    """One run of the whole trace."""
    protected = mode not in ("none", "full")
    options = {"skip_unchanged": "false"} if mode == "full in crab" else {}
    client = player.sandbox(trace, f"run-{os.getpid()}-{number}", protected, **options)
    with store_disk() as (store, stat), configured(store, mode):
        call("sync", "-f", str(store))
        before = written(stat)
        keeper = Keeper(client, store) if mode == "full" else None
        after = boundary(client) if protected and client.is_shell else keeper
        try:
            client.create()
            execs = player.begin(client, trace)
            begun = time.monotonic()
            turns = player.play(client, trace, trace.turns, factor, after)
            wall_s = time.monotonic() - begun
            lines = player.settled(Crab(client), execs + len(turns)) if protected else []
            begin, journal = lines[:execs], lines[execs:]
            call("sync", "-f", str(store))
            bytes_written = written(stat) - before
        finally:
            client.remove()
    if client.is_shell:
        # Nothing holds the next command but its framework, which waits for `crab turn`.
        for line, after_it in zip(journal, turns[1:]):
            line["exposed_us"] = round(after_it["held_ms"] * 1000)
    run = {"trace": trace.name, "mode": mode, "factor": factor, "turns": turns, "begin": begin, "journal": journal, "wall_s": wall_s,
           "device_bytes": bytes_written, "load": os.getloadavg()[0], "build": build()}
    return run | ({"kept_ms": keeper.took_ms, "kept_bytes": keeper.bytes, "kept_file_bytes": keeper.file_bytes,
                   "unseen_bytes": unseen_bytes(keeper.kept)} if keeper else {})


def build() -> str:
    """What tells the shim from that of another build: parts of the results can be measured at different times (`--only`, `--traces`)."""
    shim = shutil.which("containerd-shim-crab-v2")
    return hashlib.sha256(Path(shim).read_bytes()).hexdigest()[:12] if shim else ""


def machine() -> dict[str, Any]:
    """What was measured on."""
    model = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]
    first = lambda *words: subprocess.run(words, capture_output=True, text=True).stdout.splitlines()[:1]  # noqa: E731
    memory = Path("/proc/meminfo").read_text().split()[1]
    return {"kernel": platform.release(), "cpu": model[0] if model else platform.machine(), "cpus": os.cpu_count(),
            "memory_kb": int(memory), "containerd": first("containerd", "--version"), "runc": first("runc", "--version"),
            "criu": [f"CRIU {line}" for line in first("criu", "--version")], "crab": first("crab", "--version"), "date": time.strftime("%Y-%m-%d"),
            "profile": os.environ.get("CRAB_PROFILE", "release")}


def failed(out: Path, what: str) -> None:
    """The rest goes on without it; the report says so."""
    print(f"FAILED: {what}")
    with open(out / "failed", "a") as file:
        file.write(" ".join(what.split()) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--think", type=float, metavar="FACTOR")
    parser.add_argument("--only", choices=("runs", "crab", "baselines"), help="the runs, or whose recoveries")
    parser.add_argument("trace", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    trace = player.load(args.trace)
    for name in ("runs", "recover"):
        (args.out / name).mkdir(exist_ok=True)
    (args.out / "machine.json").write_text(json.dumps(machine() | {"quick": args.quick, "think": args.think}, indent=1) + "\n")
    plan = settings.plan(trace.name, args.think, args.quick) if args.only in (None, "runs") else []
    if plan:
        player.warm(trace, f"warm-{os.getpid()}")
    for number, (mode, factor, round_) in enumerate(plan):
        try:
            run = one_run(trace, mode, factor, number) | {"round": round_}
        except ClientError as error:
            failed(args.out, f"{trace.name} in mode {mode}: {error}")
            continue
        (args.out / "runs" / f"{trace.name}.{number}.json").write_text(json.dumps(run) + "\n")
        wrong = [turn["turn"] for turn in run["turns"] if turn["expected"] not in (None, turn["code"])]
        print(f"{trace.name:18} {mode:13} think × {factor:<4} {run['wall_s']:7.1f} s, execs "
              f"{sum(turn['ms'] for turn in run['turns']) / 1000:6.1f} s, {run['device_bytes'] / 1e6:7.2f} MB at the device"
              + (f"; unexpected exit codes in turns {wrong}" if wrong else ""))
    not_crashed = trace.name in settings.NOT_CRASHED or args.quick and trace.name in settings.NOT_CRASHED_QUICKLY
    if args.only != "runs" and not not_crashed:
        let_it_crash(trace, args)
    return 0


def let_it_crash(trace: traces.Trace, args: argparse.Namespace) -> None:
    """All recoveries, or a part beside what is there of an earlier time."""
    result = args.out / "recover" / f"{trace.name}.json"
    try:
        found = recover.recoveries(trace, args.trace, settings.LEAST_FACTOR.get(trace.name, 0.0), args.quick, args.only)
    except ClientError as error:
        failed(args.out, f"{trace.name}, recoveries: {error}")
        return
    if args.only and result.exists():
        found = json.loads(result.read_text()) | found
    found = {"crab": recover.NONE_OF_CRAB, "chat": [], "files": []} | found
    result.write_text(json.dumps(found) + "\n")
    print(f"{trace.name:18} crab {sum(bool(f['equal']) for f in found['crab']['faults'])} of {found['crab']['asked']} equal; "
          + "; ".join(f"{kind} {sum(r['files_equal'] and r['processes_equal'] for r in found[kind])} equal"
                      for kind in ("chat", "files")))


if __name__ == "__main__":
    sys.exit(main())
