#!/usr/bin/env python3
"""density.py: many sandboxes on one host, whose turns and think times are those of recorded agents.

Run in a test bed (`make bench` does). Each sandbox plays one trace in a loop, from a place of its own: for each turn it waits
for as long as the agent's model did (times --factor), then runs an exec that changes what the recorded command changed:
nothing, as many files, or memory of a process that goes on. So it is the traces' rhythm and mix; the commands themselves
would need more CPUs than the host has. The store is on a file system of its own, on a loop device, whose counters say
what was written. Modes, one after the other, the same seed:

    go shim    containerd's own runc shim, without crab
    none       crab's shim, the sandboxes are not protected
    crab       with the host's budget (--rate, --burst); "crab dumps=N" with another bound on dumps at once
    no engine  without a limit
    full       a whole checkpoint after each turn, without a limit: CRIU's image, and the files that a walk finds changed

`own` is the mean of an exec as its client sees it, waits at the gate included, weighted by the mix of all turns of the run (the
modes' mixes differ a little); beside it the same in units of the first mode with this factor. `as they are` is what the full
checkpoints would take if each were compressed by itself, as an image and a copy of the files are: crab's store deduplicates
them. It is reckoned: bytes captured, times the share of a sandbox's first checkpoint that was written.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Iterator

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "e2e"), str(HERE.parent / "power")]

from harness import CONFIG, CRAB, RUNC, Ctr, crab, run, together  # noqa: E402
from logged import mount_loop  # noqa: E402
from taskapi import PROCESS, Shim, any_of  # noqa: E402

TRACES = Path(os.environ.get("TRACES", "/traces"))
OWN = HERE.parent / "traces"
MB, SECTOR = 1_000_000, 512
KINDS = ("nothing", "files", "processes")
#: Bytes of each file that is written. They do not compress.
FILE_SIZE = 4096
#: A turn that changed more files than this counts as one that changed so many.
MOST_FILES = 1000
#: Bytes of the process's memory that a turn of processes changes.
CHANGED_MEMORY = 1 << 20
#: Without the recorded replays (what each turn changed), the traces' mix: shares of files and of processes (SUMMARY of the
#: eight traces: 33 % change files, 14 % leave processes running).
MIX = (0.33, 0.14)
#: Seconds between two looks at the device's counters.
LOOK = 0.1
DAEMON = f"""
import mmap, os, signal
memory = memoryview(mmap.mmap(-1, {16 * CHANGED_MEMORY}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
random = open("/dev/urandom", "rb", buffering=0)
def fill(at):
    # In place: the bytes of os.urandom, and the copy that a bytearray makes of a slice, would be changed memory, too.
    end = at + {CHANGED_MEMORY}
    while at < end:
        at += random.readinto(memory[at:end])
def change(*_):
    fill(os.urandom(1)[0] % 16 * {CHANGED_MEMORY})
for at in range(0, {16 * CHANGED_MEMORY}, {CHANGED_MEMORY}):
    fill(at)
signal.signal(signal.SIGUSR1, change)
open("/daemon.pid", "w").write(str(os.getpid()))
while True:
    signal.pause()
"""
ENVIRONMENT = {"env": ["PATH=/usr/local/bin:/usr/bin:/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0}}


@dataclass(frozen=True)
class Turn:
    """What an agent did: how long its model took before it, in seconds; how many files it changed; whether processes."""
    think: float
    files: int
    processes: bool

    @property
    def kind(self) -> str:
        return "processes" if self.processes else "files" if self.files else "nothing"

    def script(self) -> str:
        if self.processes:
            return "kill -USR1 $(cat /daemon.pid)"
        if self.files:
            size = min(self.files, MOST_FILES) * FILE_SIZE
            return f"mkdir -p /made; head -c {size} /dev/urandom | split -b {FILE_SIZE} -a 4 - /made/f"
        return "cat /etc/passwd | wc -l >/dev/null"


def trace_turns(path: Path) -> list[Turn]:
    with open(path) as file:
        _, *lines = [json.loads(line) for line in file if line.strip()]
    replay = path.with_suffix("").with_suffix(".replay.json")
    changed = {turn["turn"]: turn for turn in json.loads(replay.read_text())["turns"]} if replay.exists() else None
    rng, turns = random.Random(path.name), []
    for line in lines:
        if line.get("think_ms") is None:
            continue
        if changed is None:
            draw = rng.random()
            files, processes = int(draw < MIX[0]) * 3, MIX[0] <= draw < sum(MIX)
        else:
            seen = changed[line["turn"]]
            files, processes = seen["files_changed"], bool(seen["alive"])
        turns.append(Turn(line["think_ms"] / 1000, files, processes))
    return turns


def traces() -> dict[str, list[Turn]]:
    """Those whose recording has think times."""
    found = {path.stem: trace_turns(path) for path in sorted([*TRACES.glob("*.jsonl"), *OWN.glob("*.jsonl")])}
    return {name: turns for name, turns in found.items() if turns}


@dataclass
class Played:
    """What one sandbox did. execs: (kind, seconds of the client's whole call)."""
    execs: list[tuple[str, float]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def execute(shim: Shim, container: Ctr, number: int, script: str) -> None:
    id = f"t{number}"
    process = any_of(PROCESS, {"args": ["sh", "-c", script], **ENVIRONMENT})
    shim.call("Exec", {1: container.id, 2: id, 7: process})
    shim.call("Start", {1: container.id, 2: id})
    code = shim.call("Wait", {1: container.id, 2: id}).get(1, 0)
    shim.call("Delete", {1: container.id, 2: id})
    if code:
        raise RuntimeError(f"{script}: exit {code}")


def play(container: Ctr, turns: list[Turn], rng: random.Random, factor: float, end: float, played: Played) -> None:
    at, number = rng.randrange(len(turns)), 0
    with Shim.of(container, limit=300) as shim:
        # Not all at once.
        time.sleep(rng.random() * turns[at].think * factor)
        while time.monotonic() < end:
            turn = turns[at % len(turns)]
            begin = time.monotonic()
            try:
                execute(shim, container, number, turn.script())
            except Exception as e:  # noqa: BLE001 (whatever it is, it is told in the report)
                played.wrong.append(f"{container.id}: {e}")
                return
            played.execs.append((turn.kind, time.monotonic() - begin))
            at, number = at + 1, number + 1
            # An agent that was to think beyond the end has had its last turn.
            time.sleep(min(turns[at % len(turns)].think * factor, max(0, end - time.monotonic())))


class Device:
    """Looks at how many bytes a block device has been asked to write: [(seconds, bytes)]."""

    def __init__(self, device: Path):
        self.stat = Path("/sys/block") / device.name / "stat"
        self.seen: list[tuple[float, int]] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.look)

    def written(self) -> int:
        return int(self.stat.read_text().split()[6]) * SECTOR

    def look(self) -> None:
        while not self.over.wait(LOOK):
            self.seen.append((time.monotonic(), self.written()))

    def __enter__(self) -> Device:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def worst(self, rate: float) -> float:
        """The most bytes beyond rate·t in any window: with it, no window has more than rate·t + that."""
        worst, lowest = 0.0, float("inf")
        for seconds, written in self.seen:
            beyond = written - rate * seconds
            lowest = min(lowest, beyond)
            worst = max(worst, beyond - lowest)
        return worst


@contextlib.contextmanager
def own_disk(size: int) -> Iterator[tuple[Path, Path]]:
    """A file system on a file, and its block device."""
    with tempfile.TemporaryDirectory() as scratch:
        image, at = Path(scratch) / "disk", Path(scratch) / "mnt"
        with open(image, "wb") as file:
            file.truncate(size)
        run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
        at.mkdir()
        device = mount_loop(image, at)
        at.chmod(0o700)
        try:
            yield at, Path(device)
        finally:
            run("umount", at)


@dataclass(frozen=True)
class Mode:
    """runtime and annotations: the sandboxes'. limited: whether the budget holds."""
    runtime: str = CRAB
    annotations: dict[str, str] = field(default_factory=dict)
    limited: bool = False
    dumps: int = 1024

    @property
    def protects(self) -> bool:
        return self.annotations.get("enabled") == "true"


MODES = {
    "go shim": Mode(RUNC),
    "none": Mode(annotations={"enabled": "false"}),
    "crab": Mode(annotations={"enabled": "true"}, limited=True, dumps=0),
    "no engine": Mode(annotations={"enabled": "true"}),
    "full": Mode(annotations={"enabled": "true", "skip_unchanged": "false"}),
}


def mode_named(name: str) -> Mode:
    name, _, dumps = name.partition(" dumps=")
    return replace(MODES[name], dumps=int(dumps)) if dumps else MODES[name]


def configure(store: Path, mode: Mode, args: argparse.Namespace) -> None:
    text = f'store = "{store}"\nkeep = 8\nengine.dumps = {mode.dumps}\n'
    if mode.limited:
        text += f'engine.rate = "{args.rate}"\nengine.burst = "{args.burst}"\n'
    CONFIG.parent.mkdir(exist_ok=True)
    CONFIG.write_text(text)


def measure(name: str, factor: float, args: argparse.Namespace) -> dict[str, Any]:
    mode = mode_named(name)
    options = [word for key, value in mode.annotations.items() for word in ("--annotation", f"dev.crab.{key}={value}")]
    played = [Played() for _ in range(args.sandboxes)]
    with own_disk(args.disk) as (store, disk):
        configure(store, mode, args)
        mixes = list(traces().values())
        start = [lambda: Ctr(mode.runtime, "sleep", "1000000", options=options, name="dense") for _ in played]
        containers = together(start, workers=6)
        try:
            with_daemon = [turns for turns in mixes if any(turn.processes for turn in turns)]
            jobs = []
            for n, container in enumerate(containers):
                turns = mixes[n % len(mixes)]
                if turns in with_daemon:
                    jobs.append(lambda c=container: c.detached("python3", "-c", DAEMON))
            together(jobs, workers=6)
            # The first checkpoint of each is its whole memory and layer: it is not what a turn costs.
            warm = {}
            if mode.protects:
                together([lambda c=c: crab("checkpoint", c.id) for c in containers], workers=2)
                warm = {c.id: len(journal(c)) for c in containers}
            time.sleep(args.settle)
            with Device(disk) as device:
                before, cpu, begin = device.written(), cpu_seconds(), time.monotonic()
                end = time.monotonic() + args.seconds
                threads = [
                    threading.Thread(target=play, args=(c, mixes[n % len(mixes)], random.Random(f"{args.seed} {n}"), factor, end, played[n]))
                    for n, c in enumerate(containers)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                # What is under way belongs to it; the kernel's own writeback comes last.
                time.sleep(args.settle)
                run("sync", "-f", store)
                written = device.written() - before
                used = (cpu_seconds() - cpu) / (time.monotonic() - begin) / (os.cpu_count() or 1)
            journals = [(warm[c.id], journal(c)) for c in containers if mode.protects]
        finally:
            together([c.remove for c in containers], workers=6)
            CONFIG.unlink()
    return summary(name, factor, args, played, journals, device, written, used)


def journal(container: Ctr) -> list[dict[str, Any]]:
    return [json.loads(line) for line in crab("log", "--json", container.id).out.splitlines()]


def cpu_seconds() -> float:
    """Of the whole host, since its start: all but idle."""
    first = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    ticks = [int(number) for number in first]
    return (sum(ticks[:8]) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def quantile(values: list[float], q: float) -> float | None:
    return sorted(values)[min(len(values) - 1, int(len(values) * q))] if values else None


def summary(mode: str, factor: float, args: argparse.Namespace, played: list[Played], journals: list[tuple[int, list[dict[str, Any]]]],
            device: Device, written: int, used: float) -> dict[str, Any]:
    """journals: of each sandbox how many lines it had before, and all of them."""
    execs = [(kind, took * 1000) for p in played for kind, took in p.execs]
    times = [took for _, took in execs]
    row: dict[str, Any] = {
        "mode": mode, "factor": factor, "turns": len(execs), "wrong": [w for p in played for w in p.wrong],
        "least turns of a sandbox": min(len(p.execs) for p in played), "written": written, "cpu": used,
        "played": {kind: sum(1 for k, _ in execs if k == kind) for kind in KINDS},
        "exec mean": {kind: statistics.fmean([took for k, took in execs if k == kind] or [0]) for kind in KINDS},
        "exec p50": quantile(times, 0.5), "exec p99": quantile(times, 0.99),
    }
    turns = [line for before, lines in journals for line in lines[before:] if line["trigger"] == "exec"]
    row["unprotected"] = sum(1 for line in turns if line["missing"] or (line["action"] != "skip" and not line["checkpoint"]))
    row["stored"] = sum(line["bytes_written"] for line in turns)
    # What was stored before it began, deduplicated, is what the last checkpoint of then holds.
    ratios = [sum(line["bytes_written"] for line in lines[:before]) / lines[before - 1]["bytes_captured"] for before, lines in journals]
    row["as they are"] = sum(line["bytes_captured"] * ratio for ratio, (before, lines) in zip(ratios, journals) for line in lines[before:])
    for action in ("files", "full"):
        of = [line for line in turns if line["action"] == action]
        exposed = [line["exposed_us"] / 1000 for line in of]
        durable = [line["durable_us"] / 1000 for line in of if line["durable_us"] is not None]
        row[action] = {
            "turns": len(of), "exposed": {q: quantile(exposed, q) for q in (0.5, 0.95, 0.99, 1.0)},
            "durable": {q: quantile(durable, q) for q in (0.5, 0.95, 1.0)},
            "frozen": quantile([line["freeze_us"] / 1000 for line in of], 0.5),
        }
    if mode_named(mode).limited:
        row["worst window beyond the rate, of the burst"] = device.worst(number(args.rate)) / number(args.burst)
    return row


def weigh(rows: list[dict[str, Any]]) -> None:
    """Adds to each how long an exec takes at the mean, of one mix of turns, and what that is for the first of its factor."""
    mix = {kind: sum(row["played"][kind] for row in rows) for kind in KINDS}
    for row in rows:
        row["own"] = sum(mix[kind] * row["exec mean"][kind] for kind in KINDS) / max(1, sum(mix.values()))
        row["own, relative"] = row["own"] / rows[0]["own"]


def number(text: str) -> int:
    for unit, factor in (("MiB", 1 << 20), ("MB", MB), ("GiB", 1 << 30)):
        if text.removesuffix("/s").endswith(unit):
            return int(float(text.removesuffix("/s").removesuffix(unit)) * factor)
    raise SystemExit(f"{text}: write MB, MiB or GiB")


def show(row: dict[str, Any]) -> None:
    ms = lambda v: "     -" if v is None else f"{v:6.0f}"  # noqa: E731
    mix = ", ".join(f"{kind} {n}" for kind, n in row["played"].items())
    print(f"{row['mode']:14} think × {row['factor']:<4} {row['turns']:5} turns ({mix}; least {row['least turns of a sandbox']:2})  "
          f"{row['written'] / MB:7.1f} MB written  cpu {row['cpu'] * 100:3.0f} %  exec p50{ms(row['exec p50'])} p99{ms(row['exec p99'])} ms")
    for action in ("files", "full"):
        of = row[action]
        if of["turns"]:
            exposed, durable = of["exposed"], of["durable"]
            print(f"    {action:5} {of['turns']:5} turns: exposed p50{ms(exposed[0.5])} p95{ms(exposed[0.95])} p99{ms(exposed[0.99])} max{ms(exposed[1.0])} ms; "
                  f"durable p50{ms(durable[0.5])} p95{ms(durable[0.95])} longest{ms(durable[1.0])} ms; frozen p50{ms(of['frozen'])} ms")
    if row["stored"]:
        print(f"    packs {row['stored'] / MB:.1f} MB; as they are {row['as they are'] / MB:.1f} MB")
    if row["unprotected"]:
        print(f"    {row['unprotected']} turns without a whole checkpoint")
    if (worst := row.get("worst window beyond the rate, of the burst")) is not None:
        print(f"    the worst window at the device: rate·t + {worst:.2f} bursts")
    for wrong in row["wrong"]:
        print(f"    WRONG: {wrong}")


def show_own(rows: list[dict[str, Any]]) -> None:
    print(f"own, think × {rows[0]['factor']}: " + "; ".join(f"{row['mode']} {row['own']:.0f} ms ({row['own, relative']:.2f})" for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sandboxes", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--settle", type=float, default=3, help="seconds before the beginning and after the end")
    parser.add_argument("--factors", default="1.0,0.1", help="of the recorded think times")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--rounds", type=int, default=1, help="how often all modes are run, one after the other")
    parser.add_argument("--rate", default="20MB/s")
    parser.add_argument("--burst", default="64MiB")
    parser.add_argument("--disk", type=int, default=8 << 30, help="bytes of the store's disk (sparse)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    every = [turn for turns in traces().values() for turn in turns]
    kinds = {kind: sum(turn.kind == kind for turn in every) / len(every) for kind in KINDS}
    print(f"kernel {os.uname().release}; {os.cpu_count()} cpus; load {os.getloadavg()[0]:.1f}; {args.sandboxes} sandboxes; {args.seconds:.0f} s a mode; "
          f"seed {args.seed}; rate {args.rate}, burst {args.burst}")
    print(f"traces: {', '.join(traces())}; {len(every)} turns: {', '.join(f'{kind} {share:.0%}' for kind, share in kinds.items())}; "
          f"think p50 {statistics.median(turn.think for turn in every):.1f} s, mean {statistics.mean(turn.think for turn in every):.1f} s")
    rows = []
    for factor in (float(f) for f in args.factors.split(",")):
        of_factor = []
        for mode in args.modes.split(",") * args.rounds:
            of_factor.append(measure(mode, factor, args))
            show(of_factor[-1])
        weigh(of_factor)
        show_own(of_factor)
        rows += of_factor
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
