#!/usr/bin/env python3
"""cost.py: what the inspector costs, with 0, 2 and 200 registered sandboxes, beside its limits.

Every state of the machine (empty programs, a raw_syscalls pair, the inspector with so many sandboxes) is visited between
two visits to the machine with nothing attached, in an order drawn anew each round. Times are CPU time, and of each visit the
fastest of some short batches; a figure is the ratio of the lower quartiles over all rounds, with its 95 % confidence
interval: the machine may be busy with other things, and those only ever add.

"inside" is a process in a registered cgroup, in that sandbox's own root file system; "outside" one in no sandbox, on
file systems (an overlay of its own too) of no sandbox. A figure is above its limit if the whole of its interval is.

The floor: what EMPTY programs cost on the same tracepoints. The kernel's way to a program is six calls and returns, and
where returns are guarded against speculation (Zen 2-4: "Safe RET") that is 43 ns, of which nothing here can spare any.
So an operation's limit is the one asked for, or the floor and the inspector's own share above it, whichever is more.
"""
from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import kernel
from place import Bench, Child, Place, Sandbox, sh

CHEAP = ["getppid", "pread4k", "stat", "open+close", "pipe write+read"]
MAPPING = ["mmap+munmap", "mmap+munmap shared", "mmap+store+munmap", "mmap+store+munmap shared"]
WRITE = ["pwrite4k"]
#: Shown, without a limit: what they cost hangs upon how many inodes they touch.
SHOWN = ["create+write+unlink", "socket write+read"]
#: The limits asked for: operation -> (outside, inside).
ASKED = (
    {op: (1.01, 1.01) for op in CHEAP}
    | {op: (1.03, None) for op in MAPPING}
    | {op: (1.05, 1.10) for op in WRITE}
    | {op: (1.01, 1.02) for op in ("git clone", "compileall", "tar x")}
)
#: What the inspector's own code may add to the floor, as a share of the operation.
OWN = (
    {op: 0.04 for op in MAPPING}
    | {op: 0.07 for op in WRITE}
    # A file that is made is recorded: 0.5 µs each.
    | {"tar x": 0.03, "git clone": 0.01, "compileall": 0.01}
)
#: The tracepoints of the inspector.
TRACEPOINTS = [
    "inode_set_ctime_to_ts", "ctime_ns_xchg", "ctime_xchg_skip", "writeback_mark_inode_dirty", "ma_write",
    "sched_process_fork", "sched_process_exec", "sched_process_exit", "signal_generate", "sock_send_length", "sock_recv_length",
]  # fmt: skip
#: Microseconds that a look at an idle sandbox may take, of 100 the 95th.
LOOK_LIMIT = 200
#: Bytes of kernel memory for a sandbox that does nothing, and beyond that for an epoch in which so many inodes changed.
IDLE_LIMIT, EPOCH_LIMIT, EPOCH_INODES = 192 << 10, 2 << 20, 100_000


@dataclass
class Figure:
    """Times of one thing in one state, and of the visits without it just before and after."""

    without: list[float] = field(default_factory=list)
    here: list[float] = field(default_factory=list)

    def add(self, before: float, here: float, after: float) -> None:
        self.without += [before, after]
        self.here.append(here)

    def base(self) -> float:
        return quiet(self.without)

    def ratio(self) -> float:
        return quiet(self.here) / self.base()

    def interval(self) -> tuple[float, float]:
        """Where the ratio is with 95 % confidence: drawn again from the same visits."""
        drawn = random.Random(1)
        ratios = sorted(
            quiet(drawn.choices(self.here, k=len(self.here))) / quiet(drawn.choices(self.without, k=len(self.without)))
            for _ in range(400)
        )
        return ratios[10], ratios[-11]


def quiet(times: list[float]) -> float:
    """The lower quartile: of visits to a busy machine those that were disturbed least."""
    return statistics.quantiles(times, n=4)[0] if len(times) > 1 else times[0]


class States:
    """What can be attached."""

    def __init__(self, place: Place, rootfs: dict[str, Path]):
        self.place, self.rootfs, self.children = place, rootfs, []

    def enter(self, state: str) -> None:
        if state == "empty":
            self.children = [Child([self.place.base / "empty", *TRACEPOINTS])]
            self.children[0].read()
        elif state == "raw":
            self.children = [Child([self.place.base / "empty", "sys_enter", "sys_exit"])]
            self.children[0].read()
        elif state == "0":
            # One comes and goes: nothing of it may stay.
            self.register(1)
            self.leave()
        else:
            self.register(int(state))

    def register(self, count: int) -> None:
        roots = list(self.rootfs.items())
        for n in range(count):
            name, root = roots[n] if n < len(roots) else (f"more-{n}", roots[-1][1])
            self.children.append(Sandbox(self.place.run, self.place.cgroup(name), root))
        for child in self.children:
            child.ready()

    def leave(self) -> None:
        for child in self.children:
            child.stop()
        self.children = []


def micro(place: Place, args: argparse.Namespace) -> dict:
    rootfs = {"tmpfs": place.overlay("tmpfs", "in"), "ext4": place.overlay("ext4", "in")}
    binary = place.base / "bench"

    def bench(directory: Path, cgroup: str | None) -> Bench:
        return Bench(directory, place.cgroup(cgroup) if cgroup else None, binary)

    work = {
        ("outside", "ext4"): (bench(place.directory("ext4", "out"), None), CHEAP + MAPPING + WRITE + SHOWN),
        ("outside", "overlay/tmpfs"): (bench(place.overlay("tmpfs", "out"), None), WRITE),
        ("outside", "overlay/ext4"): (bench(place.overlay("ext4", "out"), None), WRITE),
        ("inside", "ext4"): (bench(place.directory("ext4", "in"), "ext4"), WRITE),
        ("inside", "overlay/tmpfs"): (bench(rootfs["tmpfs"], "tmpfs"), WRITE),
        ("inside", "overlay/ext4"): (bench(rootfs["ext4"], "ext4"), CHEAP + MAPPING + WRITE + SHOWN),
    }

    def visit() -> dict:
        return {(op, *where): b.ns(op, args.batches, args.microseconds) for where, (b, ops) in work.items() for op in ops}

    figures = interleave(States(place, rootfs), ["empty", "raw", "0", "2", str(args.many)], args.rounds, visit)
    for b, _ in work.values():
        b.stop()
    return figures


def interleave(states: States, names: list[str], rounds: int, visit) -> dict:
    """(state, *what was measured) -> Figure"""
    figures: dict = {}
    for n in range(rounds):
        before = visit()
        for state in random.sample(names, len(names)):
            states.enter(state)
            try:
                here = visit()
            finally:
                states.leave()
            after = visit()
            for key, value in here.items():
                figures.setdefault((state, *key), Figure()).add(before[key], value, after[key])
            before = after
        print(f"\rround {n + 1}/{rounds} ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return figures


def cpu_of(words: list[object], cgroup: Path | None) -> float:
    """Seconds of CPU time of a command and all that it waits for."""
    child = subprocess.Popen(
        [str(w) for w in words],
        preexec_fn=(lambda: (cgroup / "cgroup.procs").write_text("0")) if cgroup else None,
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"cost: {words[0]}: {child.returncode}")
    return usage.ru_utime + usage.ru_stime


def source_tree(place: Place) -> Path:
    """A repository of Python's own library: some hundred files of all sizes."""
    tree = place.directory("tmpfs", "source")
    for path in sorted(Path(os.__file__).parent.glob("*.py")) + sorted((Path(os.__file__).parent / "email").glob("*.py")):
        shutil.copy(path, tree)
    git = ["git", "-C", tree, "-c", "user.name=crab", "-c", "user.email=crab@crab.test"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        sh(*git, *words)
    sh("tar", "-C", tree, "--exclude=.git", "-cf", place.plain["tmpfs"] / "tree.tar", ".")
    return tree


def workloads(place: Place, args: argparse.Namespace) -> dict:
    rootfs = {"work-ext4": place.overlay("ext4", "work")}
    outside = place.directory("ext4", "work-out")
    tree, archive = source_tree(place), place.plain["tmpfs"] / "tree.tar"
    where = {("outside", "ext4"): (outside, None), ("inside", "overlay/ext4"): (rootfs["work-ext4"], place.cgroup("work-ext4"))}
    for directory, _ in where.values():
        shutil.copytree(Path(os.__file__).parent / "email", directory / "email")

    def visit() -> dict:
        took: dict = {}
        for side, (directory, cgroup) in where.items():
            target = directory / "target"
            for op, (words, times) in {
                "git clone": (["git", "clone", "-q", "--no-hardlinks", tree, target], 3),
                "tar x": (["tar", "-C", target, "-xf", archive], 6),
                "compileall": ([sys.executable, "-m", "compileall", "-q", "-f", directory / "email"], 2),
            }.items():
                for _ in range(times):
                    shutil.rmtree(target, ignore_errors=True)
                    if op == "tar x":
                        target.mkdir()
                    seconds = cpu_of(words, cgroup)
                    took[op, *side] = min(took.get((op, *side), math.inf), seconds * 1e9)
        return took

    return interleave(States(place, rootfs), ["empty", "raw", "0", str(args.many)], args.work_rounds, visit)


def table(figures: dict) -> list[str]:
    """Prints it; returns what is above its limit."""
    print("| operation | where | file system | sandboxes | ns without | ratio | 95 % | empty programs | limit | |")
    print("|---|---|---|--:|--:|--:|---|--:|---|---|")
    above = []
    for (state, op, side, system), figure in sorted(figures.items(), key=lambda item: (item[0][1:], item[0][0])):
        if state == "empty" or state == "0" and op in SHOWN:
            continue
        ratio, (low, high) = figure.ratio(), figure.interval()
        floor = figures.get(("empty", op, side, system))
        floor_ratio = floor.ratio() if floor else 1.0
        asked = ASKED.get(op, (None, None))[side == "inside"]
        limit = asked if state.isdigit() else None
        if limit and state != "0" and op in OWN and floor and floor.interval()[0] > 1:
            limit = max(limit, floor_ratio + OWN[op])
        bad = limit is not None and low > limit
        if bad:
            above.append(f"{op}, {side}, {system}, {state} sandboxes: {ratio:.3f}, above {limit:.3f}")
        said = "" if limit is None else f"{limit:.3f}" + (f" (asked: {asked:.2f})" if limit != asked else "")
        name = "raw_syscalls" if state == "raw" else state
        print(f"| {op} | {side} | {system} | {name} | {figure.base():,.0f} | {ratio:.3f} | {low:.3f}-{high:.3f} | {floor_ratio:.3f} | {said} | {'ABOVE' if bad else ''} |")
    return above


def look(place: Place) -> list[str]:
    """An idle sandbox, with a small and a large layer."""
    above = []
    print("\n| look at an idle sandbox | p50 µs | p95 µs | limit |\n|---|--:|--:|--:|")
    for files in (100, 20_000):
        name = f"look-{files}"
        root = place.overlay("ext4", name)
        for n in range(files):
            (root / f"{n % 100}").mkdir(exist_ok=True)
            (root / f"{n % 100}" / f"{n}").write_text("x")
        sandbox = Sandbox(place.run, place.cgroup(name), root)
        sandbox.ready()
        for order in ("cut", "durable"):
            sandbox.order(order)
        took = []
        for _ in range(200):
            took.append(sandbox.order("look")["us"])
            time.sleep(0.002)
        sandbox.stop()
        took.sort()
        p50, p95 = took[len(took) // 2], took[len(took) * 95 // 100]
        print(f"| {files:,} files in its layer | {p50} | {p95} | {LOOK_LIMIT} |")
        if p95 > LOOK_LIMIT:
            above.append(f"a look with {files} files: {p95} µs")
    return above


def memory(place: Place) -> list[str]:
    root = place.overlay("tmpfs", "memory")
    states = States(place, {"memory": root})
    maps: set[int] = set()
    attached: set[int] = set()

    def taken() -> int:
        sizes: dict[int, int] = {}
        for child in states.children:
            its, programs = kernel.held_by(child.process.pid)
            sizes |= its
            attached.update(programs)
        maps.update(sizes)
        return sum(sizes.values())

    def rest() -> None:
        """As after a turn: the next epoch waits."""
        for child in states.children:
            for order in ("cut", "durable"):
                child.order(order)

    states.register(1)
    rest()
    one = taken()
    worker = Bench(root, place.cgroup("memory"), place.base / "bench")
    worker.do("create", EPOCH_INODES)
    worker.stop()
    full = taken() - one
    states.leave()
    states.register(100)
    rest()
    each = (taken() - one) // 99
    states.leave()
    print("\n| kernel memory | KiB | limit |\n|---|--:|--:|")
    print(f"| of the host, with the first sandbox | {one >> 10:,} | |")
    print(f"| of each further sandbox | {each >> 10:,} | {IDLE_LIMIT >> 10:,} |")
    print(f"| of an epoch with {EPOCH_INODES:,} changed inodes, beyond that | {full >> 10:,} | {EPOCH_LIMIT >> 10:,} |")
    above = []
    if each > IDLE_LIMIT:
        above.append(f"memory of a sandbox: {each} bytes")
    if full > EPOCH_LIMIT:
        above.append(f"memory of an epoch: {full} bytes")
    for _ in range(100):  # the kernel frees them in its own time
        stays = kernel.alive(maps, attached)
        if not any(stays):
            break
        time.sleep(0.1)
    else:
        above.append(f"stay when the last sandbox has left: maps {sorted(stays[0])}, programs {sorted(stays[1])}")
    return above


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="of the single operations")
    parser.add_argument("--work-rounds", type=int, default=8, help="of git, python and tar; 0: leave them out")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--microseconds", type=int, default=300, help="of a batch")
    parser.add_argument("--many", type=int, default=200, help="sandboxes, beside none and two")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("cost: told to stop"))
    foreign = kernel.programs()
    if foreign:
        # A second program on a tracepoint makes the way to each of them longer.
        print(f"cost: the host has tracing programs already: {sorted(set(foreign.values()))}", file=sys.stderr)
    with Place() as place:
        figures = micro(place, args)
        if args.work_rounds:
            figures |= workloads(place, args)
        above = table(figures)
        above += look(place)
        above += memory(place)
    for line in above:
        print(f"ABOVE: {line}", file=sys.stderr)
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
