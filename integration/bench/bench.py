#!/usr/bin/env python3
"""bench.py: crab's shim beside containerd's own, in one run on one machine.

Every measure alternates between the two runtimes, so that whatever else the machine does hits both. Reported are the
median of each and the ratio crab/runc, with the interquartile range of the ratios of neighbouring pairs.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

#: What is compared: the name in the table, and containerd's.
RUNTIMES = {"runc": "io.containerd.runc.v2", "crab": "io.containerd.crab.v2"}
#: containerd 1.7's clients send no options to a runtime that they don't know; so that both leave it running.
CONFIG = "checkpoint_stops = false\n"
IMAGE = "crab.test/agent:latest"
#: Wanted: crab at most this much of runc: no slower, and a third of the memory.
WANTED = {"time": 1.0, "memory": 1 / 3}


def ctr(*words: str) -> str:
    done = subprocess.run(["ctr", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"ctr {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Box:
    """One idle container."""

    def __init__(self, runtime: str, name: str):
        self.name, self.count = name, 0
        ctr("run", "-d", "--runtime", RUNTIMES[runtime], IMAGE, name, "sleep", "1000000")

    def shim(self) -> int:
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0].startswith(b"/usr") and b"containerd-shim" in words[0] and self.name.encode() in words:
                return int(entry.name)
        raise SystemExit(f"no shim for {self.name}")

    def exec(self) -> None:
        self.count += 1
        ctr("task", "exec", "--exec-id", f"e{self.count}", self.name, "true")

    def checkpoint(self) -> None:
        """Through the task API, with an image path of our own: what the shim does, without containerd's tar."""
        image = Path(f"/tmp/bench-{self.name}")
        shutil.rmtree(image, ignore_errors=True)
        image.mkdir()
        bundle = Path("/run/containerd/io.containerd.runtime.v2.task/default") / self.name
        with taskapi.Shim((bundle / "address").read_text()) as shim:
            # As containerd's client does it; options: leave running.
            shim.call("Pause", {1: self.name})
            shim.call("Checkpoint", {1: self.name, 2: str(image), 3: {1: "containerd.runc.v1.CheckpointOptions"}})
            shim.call("Resume", {1: self.name})

    def remove(self) -> None:
        ctr("task", "kill", "-s", "KILL", self.name)
        for _ in range(500):
            if "STOPPED" in ctr("task", "ls"):
                break
            time.sleep(0.01)
        subprocess.run(["ctr", "task", "rm", self.name], capture_output=True)
        ctr("container", "rm", self.name)


def timed(action: Callable[[], object]) -> float:
    """Milliseconds."""
    begin = time.perf_counter()
    action()
    return (time.perf_counter() - begin) * 1000


def compare(what: str, rounds: int, action: Callable[[str], Callable[[], object]]) -> dict[str, object]:
    """Alternates, the first of each being a warm-up."""
    samples: dict[str, list[float]] = {name: [] for name in RUNTIMES}
    for index in range(rounds + 1):
        for name in RUNTIMES if index % 2 else reversed(RUNTIMES):
            took = timed(action(name))
            if index:
                samples[name].append(took)
    ratios = [crab / runc for crab, runc in zip(samples["crab"], samples["runc"])]
    low, _, high = statistics.quantiles(ratios, n=4)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {"what": what, "unit": "ms", **medians, "ratio": medians["crab"] / medians["runc"], "iqr": [low, high],
            "wanted": WANTED["time"], "rounds": rounds}


def memory(count: int) -> list[dict[str, object]]:
    """Resident and proportional memory (KiB) and threads of `count` idle shims of each kind, medians."""
    seen: dict[str, dict[str, float]] = {}
    for name in RUNTIMES:
        boxes = [Box(name, f"idle-{name}-{index}") for index in range(count)]
        for box in boxes[:2]:
            box.exec()
        time.sleep(1)
        rows = []
        for box in boxes:
            proc = Path("/proc") / str(box.shim())
            status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
            rollup = dict(line.split(":", 1) for line in (proc / "smaps_rollup").read_text().splitlines()[1:])
            rows.append((int(status["VmRSS"].split()[0]), int(rollup["Pss"].split()[0]), int(status["Threads"])))
        seen[name] = dict(zip(("resident", "proportional", "threads"), map(statistics.median, zip(*rows))))
        for box in boxes:
            box.remove()
    return [{"what": f"{what} of {count} idle shims", "unit": "" if what == "threads" else "KiB",
             **{name: seen[name][what] for name in RUNTIMES}, "ratio": seen["crab"][what] / seen["runc"][what],
             "wanted": None if what == "threads" else WANTED["memory"]} for what in seen["crab"]]


def show(row: dict[str, object]) -> None:
    iqr = row.get("iqr")
    spread = f"  (pairs {iqr[0]:.2f} to {iqr[1]:.2f})" if iqr else ""  # type: ignore[index]
    wanted = f"  wanted at most {row['wanted']:.2f}" if row["wanted"] else ""
    print(f"{row['what']:40} runc {row['runc']:9.1f}  crab {row['crab']:9.1f} {row['unit']:3}  "
          f"ratio {row['ratio']:.2f}{spread}{wanted}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--shims", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    Path("/etc/crab").mkdir(exist_ok=True)
    Path("/etc/crab/config.toml").write_text(CONFIG)
    print(f"baseline: {RUNTIMES['runc']}; kernel {os.uname().release}; {os.cpu_count()} cpus; "
          f"load {os.getloadavg()[0]:.1f}; wanted: {WANTED}", flush=True)
    names = iter(range(1_000_000))

    def run(runtime: str) -> Callable[[], object]:
        return lambda: ctr("run", "--rm", "--runtime", RUNTIMES[runtime], IMAGE, f"run-{next(names)}", "true")

    boxes = {name: Box(name, f"box-{name}") for name in RUNTIMES}
    rows = [compare("run --rm true", args.rounds, run),
            compare("exec true", args.rounds, lambda name: boxes[name].exec),
            compare("checkpoint, left running", args.rounds, lambda name: boxes[name].checkpoint)]
    for box in boxes.values():
        box.remove()
    for row in rows:
        show(row)
    for row in memory(args.shims):
        rows.append(row)
        show(row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "e2e"))
    import taskapi
    sys.exit(main())
