#!/usr/bin/env python3
"""turns.py: what checkpoints and rollbacks cost, out of crab's own journal, each beside what is wanted.

Run in a test bed (`make bench` does). Times are medians over --rounds turns (few_files: twice as many); each line says
what was done and how the figure is counted. Nothing here compares with another runtime: containerd's own shim has no turns.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

IMAGE = "crab.test/agent:latest"
RUNTIME = "io.containerd.crab.v2"
MIB = 1 << 20
#: Seconds that the agent thinks after each turn. Whoever asks for the journal at once, again and again, takes one of the
#: machine's CPUs from what is measured.
THINK_S = 0.3
#: Wanted at most, in milliseconds or bytes.
WANTED = {
    "ten files, boundary to durable": 10.0,
    "100,000 names in the layer against 1,000": 1.3,
    "a thousand files written, boundary to durable": 150.0,
    "1 MiB appended to 1 GiB, written": 4 * MIB,
    "1 MiB appended to 1 GiB, frozen": 20.0,
    "tiny sandbox, frozen": 90.0,
    "tiny sandbox, boundary to durable": 120.0,
    "first turn of a host's only sandbox, boundary to durable": 250.0,
    "100 MB python, 1 % changed, written": 3 * MIB,
    "rollback of a tiny sandbox": 150.0,
    "rollback of files alone": 20.0,
    "look at a turn that changes nothing, one process": 1.0,
    "look at a turn that changes nothing, six processes": 1.0,
}


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Sandbox:
    """A protected container."""

    count = 0

    def __init__(self, *init: str):
        Sandbox.count += 1
        self.name, self.execs = f"turns-{Sandbox.count}", 0
        options = ("--annotation", "dev.crab.enabled=true", "--annotation", "dev.crab.keep=3")
        run("ctr", "run", "-d", "--runtime", RUNTIME, *options, IMAGE, self.name, *(init or ("sleep", "1000000")))

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        run("ctr", "task", "kill", "-s", "KILL", self.name)
        while "STOPPED" not in run("ctr", "task", "ls"):
            time.sleep(0.01)
        subprocess.run(["ctr", "task", "rm", self.name], capture_output=True)
        run("ctr", "container", "rm", self.name)

    def turn(self, script: str) -> dict[str, Any]:
        """Runs one; its line in the journal."""
        before = self.last()
        self.execs += 1
        run("ctr", "task", "exec", "--exec-id", f"e{self.execs}", self.name, "sh", "-c", script)
        time.sleep(THINK_S)
        return self.line_after(before)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in run("crab", "log", "--json", self.name).splitlines()]

    def last(self) -> int:
        return max((line["turn"] for line in self.lines()), default=0)

    def line_after(self, turn: int) -> dict[str, Any]:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            for line in self.lines():
                if line["turn"] > turn and (line["action"] == "skip" or line["durable_us"] is not None):
                    if line["missing"] or line["note"] and "not protected" in line["note"]:
                        raise SystemExit(f"{self.name}: {line['note']}")
                    return line
            time.sleep(0.005)
        raise SystemExit(f"{self.name}: no line after turn {turn} for 120 s")

    def checkpoint(self) -> dict[str, Any]:
        before = self.last()
        run("crab", "checkpoint", self.name)
        return self.line_after(before)


def median(lines: list[dict[str, Any]], key: str, scale: float = 1.0) -> float:
    return statistics.median(line[key] for line in lines) / scale


ROWS: list[dict[str, Any]] = []


def report(what: str, value: float, unit: str, more: str = "") -> None:
    wanted = WANTED[what]
    show = (lambda v: f"{v / MIB:10.2f} MiB") if unit == "bytes" else (lambda v: f"{v:10.2f} {unit:3}")
    verdict = "" if value <= wanted else "  MISSED"
    print(f"{what:56} {show(value)}  wanted at most {show(wanted).strip()}{verdict}{more}", flush=True)
    ROWS.append({"what": what, "value": value, "unit": unit, "wanted": wanted, "met": value <= wanted})


def few_files(rounds: int) -> None:
    """Ten files of a thousand or a hundred thousand, a hundred to a directory, get new contents in each turn."""
    medians = {}
    with Sandbox() as small, Sandbox() as large:
        for box, names in ((small, 1_000), (large, 100_000)):
            box.turn(f"mkdir /t; cd /t; for d in $(seq {names // 100}); do mkdir $d; done; "
                     f"python3 -c 'import itertools\n"
                     f"for d in range(1, {names // 100} + 1):\n for f in range(100): open(f\"/t/{{d}}/{{f}}\", \"w\").write(f\"{{d}} {{f}}\\n\")'")
            box.turn("true")
        script = "for d in 1 2 3 4 5; do for f in 7 8; do echo $(date +%N) $d $f >/t/$d/$f; done; done"
        turns: dict[str, list[dict[str, Any]]] = {"small": [], "large": []}
        # Twice as often as the others: they take some milliseconds, and their ratio is wanted, too.
        for _ in range(2 * rounds):
            turns["small"].append(small.turn(script))
            turns["large"].append(large.turn(script))
    for name, lines in turns.items():
        medians[name] = median(lines, "durable_us", 1e3)
        actions = {line["action"] for line in lines}
        print(f"  {name}: {sorted(actions)}, {median(lines, 'changed_files'):.0f} names changed, looked "
              f"{median(lines, 'look_us', 1e3):.1f} ms, frozen {median(lines, 'freeze_us', 1e3):.1f} ms, "
              f"written {median(lines, 'bytes_written') / 1024:.1f} KiB")
    report("ten files, boundary to durable", medians["small"], "ms")
    report("100,000 names in the layer against 1,000", medians["large"] / medians["small"], "")


MANY = """
import os, random
words = [bytes(random.randrange(97, 123) for _ in range(random.randrange(2, 9))) + b" " for _ in range(4000)]
for number in range(960):
    os.makedirs(f"/m/{number % 12}", exist_ok=True)
    with open(f"/m/{number % 12}/{number}", "wb") as file:
        file.write(b"".join(random.choices(words, k=2000)))
"""


def many_files(rounds: int) -> None:
    """As many and as large as the largest turn of files alone among the recorded ones: 960 files of some 12 KB of text."""
    with Sandbox() as box:
        box.turn("true")
        lines = [box.turn(f"python3 -c '{MANY}'") for _ in range(rounds)]
    print(f"  looked {median(lines, 'look_us', 1e3):.0f} ms, captured {median(lines, 'bytes_captured') / MIB:.1f} MiB, "
          f"written {median(lines, 'bytes_written') / MIB:.1f} MiB; the longest took {max(line['durable_us'] for line in lines) / 1e3:.0f} ms")
    report("a thousand files written, boundary to durable", median(lines, "durable_us", 1e3), "ms")


def append(rounds: int) -> None:
    with Sandbox() as box:
        box.turn("head -c 1073741824 /dev/urandom >/big")
        lines = [box.turn("head -c 1048576 /dev/urandom >>/big") for _ in range(rounds)]
    print(f"  boundary to durable {median(lines, 'durable_us', 1e3):.0f} ms")
    report("1 MiB appended to 1 GiB, written", median(lines, "bytes_written"), "bytes")
    report("1 MiB appended to 1 GiB, frozen", median(lines, "freeze_us", 1e3), "ms")


class Floor:
    """What CRIU alone takes for the same process: `runc checkpoint --leave-running` of a container without crab, with
    the options that crab has for it. Its frozen time is what CRIU itself says, in stats-dump."""

    NAME = "turns-floor"

    def __enter__(self) -> Floor:
        run("ctr", "run", "-d", "--runtime", "io.containerd.runc.v2", IMAGE, self.NAME, "sleep", "1000000")
        self.dir = Path(tempfile.mkdtemp(prefix="floor-"))
        conf = self.dir / ".criu/default.conf"
        conf.parent.mkdir()
        conf.write_text("network-lock skip\n")
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.dir)
        run("ctr", "task", "kill", "-s", "KILL", self.NAME)
        while "STOPPED" not in run("ctr", "task", "ls"):
            time.sleep(0.01)
        subprocess.run(["ctr", "task", "rm", self.NAME], capture_output=True)
        run("ctr", "container", "rm", self.NAME)

    def dump(self) -> tuple[float, float]:
        """Milliseconds: of the call; frozen."""
        images = self.dir / "images"
        shutil.rmtree(images, ignore_errors=True)
        images.mkdir()
        words = ["runc", "--root", "/run/containerd/runc/default", "checkpoint", "--image-path", str(images),
                 "--work-path", str(images), "--leave-running", "--tcp-established", "--file-locks", self.NAME]
        begin = time.perf_counter()
        subprocess.run(words, check=True, env={**os.environ, "HOME": str(self.dir)}, capture_output=True)
        whole = (time.perf_counter() - begin) * 1000
        return whole, criu_frozen(images / "stats-dump")


def criu_frozen(stats: Path) -> float:
    """Freezing and frozen time in ms out of CRIU's images/stats.proto: two magic numbers, a length, stats_entry{dump=1}."""
    def fields(data: bytes) -> dict[int, Any]:
        at, found = 0, {}
        def varint() -> int:
            nonlocal at
            value = shift = 0
            while True:
                byte = data[at]
                at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
                if byte < 128:
                    return value
        while at < len(data):
            key = varint()
            if key & 7 == 2:
                size = varint()
                found[key >> 3], at = data[at:at + size], at + size
            else:
                found[key >> 3] = varint()
        return found
    dump = fields(fields(stats.read_bytes()[12:])[1])
    return (dump[1] + dump[2]) / 1000


def tiny(rounds: int) -> None:
    """Beside CRIU alone, turn about."""
    with Sandbox() as box, Floor() as floor:
        box.checkpoint()
        floor.dump()
        lines, alone = [], []
        for _ in range(rounds):
            lines.append(box.checkpoint())
            alone.append(floor.dump())
    print(f"  written {median(lines, 'bytes_written') / 1024:.1f} KiB")
    whole, frozen = (statistics.median(times) for times in zip(*alone))
    least = min(line["freeze_us"] for line in lines) / 1000, min(frozen for _, frozen in alone)
    print(f"  CRIU alone: frozen {frozen:.1f} ms, runc's call {whole:.1f} ms; the least of each: crab {least[0]:.1f}, CRIU {least[1]:.1f} ms frozen")
    report("tiny sandbox, frozen", median(lines, "freeze_us", 1e3), "ms")
    report("tiny sandbox, boundary to durable", median(lines, "durable_us", 1e3), "ms")


def first(rounds: int) -> None:
    """The first command comes as soon as it can. No other sandbox is there, so that this one's shim loads the inspector."""
    lines = []
    for _ in range(rounds):
        with Sandbox() as box:
            lines.append(box.turn("true"))
    print(f"  frozen {median(lines, 'freeze_us', 1e3):.1f} ms; the longest took {max(line['durable_us'] for line in lines) / 1e3:.0f} ms")
    report("first turn of a host's only sandbox, boundary to durable", median(lines, "durable_us", 1e3), "ms")


PYTHON = """
import os, signal, time
pages = 100_000_000 // 4096
memory = bytearray(os.urandom(pages * 4096))
def change(*_):
    first = os.urandom(1)[0] * 90 * 4096
    for page in range(pages // 100):
        memory[first + page * 4096] ^= 255
signal.signal(signal.SIGUSR1, change)
open("/ready", "w").close()
while True:
    signal.pause()
"""


def python(rounds: int) -> None:
    with Sandbox("python3", "-c", PYTHON) as box:
        box.turn("until [ -e /ready ]; do sleep 0.1; done")
        lines = [box.turn("kill -USR1 1; sleep 0.2") for _ in range(rounds)]
        if {line["action"] for line in lines} != {"full"}:
            raise SystemExit("the python process was not dumped")
    print(f"  frozen {median(lines, 'freeze_us', 1e3):.0f} ms, boundary to durable {median(lines, 'durable_us', 1e3):.0f} ms")
    report("100 MB python, 1 % changed, written", median(lines, "bytes_written"), "bytes")


def rollback(rounds: int) -> None:
    with Sandbox() as box:
        times, steps = [], []
        for _ in range(rounds):
            line = box.checkpoint()
            box.turn("echo $$ >/x; sleep 1000 >/dev/null 2>&1 &")
            begin = time.perf_counter()
            steps.append(json.loads(run("crab", "rollback", "--json", f"{box.name}@{line['turn']}")))
            times.append((time.perf_counter() - begin) * 1000)
    print(f"  of the last: {steps[-1]}")
    report("rollback of a tiny sandbox", statistics.median(times), "ms")


def rollback_files(rounds: int) -> None:
    """Ten files of 10 KB each, other bytes, between two turns with nothing but an idle init."""
    write = "mkdir -p /d; for i in 0 1 2 3 4 5 6 7 8 9; do head -c 10000 /dev/urandom >/d/$i; done"
    with Sandbox() as box:
        box.checkpoint()
        reports = []
        for _ in range(rounds):
            turn = box.turn(write)["turn"]
            box.turn(write)
            reports.append(json.loads(run("crab", "rollback", "--json", f"{box.name}@{turn}")))
        if any("kill" in its["steps_us"] for its in reports):
            raise SystemExit("processes were replaced")
    print(f"  of the last: {reports[-1]}")
    report("rollback of files alone", statistics.median(its["total_us"] for its in reports) / 1000, "ms")


#: Four that sleep, a server that waits for its first client, and who has started them.
SIX = """
import subprocess
for _ in range(4):
    subprocess.Popen(["sleep", "1000000"])
subprocess.run(["python3", "-c", "import socket; socket.create_server(('', 7077)).accept()"])
"""


def look(rounds: int) -> None:
    """Turns that only read, in a sandbox with one process and in one with six, none of which runs."""
    for what, init in (("one process", ()), ("six processes", ("python3", "-c", SIX))):
        with Sandbox(*init) as box:
            time.sleep(3)
            box.turn("true")
            lines = [box.turn("cat /etc/hostname /etc/os-release") for _ in range(2 * rounds)]
        if any(line["action"] != "skip" for line in lines):
            raise SystemExit(f"{what}: {[line['note'] for line in lines if line['action'] != 'skip']}")
        report(f"look at a turn that changes nothing, {what}", median(lines, "look_us", 1e3), "ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", help="names of measures, with commas: few_files, many_files, append, tiny, first, python, rollback, rollback_files, look")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"kernel {os.uname().release}; {os.cpu_count()} cpus; load {os.getloadavg()[0]:.1f}; medians of {args.rounds}, of few_files and look twice as many", flush=True)
    measures = {measure.__name__: measure for measure in (few_files, many_files, append, tiny, first, python, rollback, rollback_files, look)}
    for name in args.only.split(",") if args.only else measures:
        measures[name](args.rounds)
    if args.json:
        args.json.write_text(json.dumps(ROWS, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
