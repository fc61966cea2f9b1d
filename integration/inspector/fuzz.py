#!/usr/bin/env python3
"""Differential fuzzing: random turns, and after each the inspector's verdict beside an independent digest of the tree.

A third of the turns changes something, a third only reads, a third changes things and takes that back. Operations run
in several processes at once, some in a descendant cgroup, some outside of the sandbox, some in forked children and
threads; mappings outlive turns; pages are written back, dropped and reclaimed meanwhile; captures fail.

What must hold: everything that differs between two digests (integration/digest/tree.py, the definition of equality)
is among the inspector's candidates, and among its changes, if the driver can tell those. A violation is a false
negative and ends the run with all that is needed to see it again. A turn called changed whose digests are equal is a
false positive; those are counted.

  fuzz.py [--turns N] [--seed S] [--chapter N] [--fs ext4,tmpfs] [--driver BINARY] [--without PROBE]
"""
from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../digest"))
import tree  # noqa: E402

import fuzz_ops  # noqa: E402
from driver import DriverError, Inode, Report  # noqa: E402
from filesystems import available  # noqa: E402
from fuzz_ops import Order  # noqa: E402
from stage import Stage  # noqa: E402
from syscalls import private_mounts, syncfs  # noqa: E402

#: Workers by index: three inside, of which the last sits in a descendant cgroup, and one outside.
INSIDE, OUTSIDE = 3, 3

#: Turns until sandbox and inspector are made anew: a file that an outsider has mapped counts as changed for ever, so
#: that in the end nothing could be missed.
CHAPTER = 100

#: Of turns: one in so many has an outsider in it; drops the kernel's caches; has its capture fail; is not captured.
ONE_IN_OUTSIDE, ONE_IN_DROP, ONE_IN_FAILED, ONE_IN_SKIPPED = 10, 200, 10, 5


@dataclass
class Tally:
    """What one file system's turns came to."""
    fs: str
    seed: int
    turns: int = 0
    changed: int = 0
    doubts: int = 0
    #: Turns without a net change that had candidates, or changes.
    idle_candidates: int = 0
    false_positives: int = 0
    verdicts: bool = False
    worked: int = 0
    orders: int = 0
    seconds: float = 0
    #: The first false negative: what was missed, and how to see it again.
    failure: str = ""
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Name:
    """What a name of the tree stands for. Names of one inode share all of this."""
    entry: tree.Entry
    inode: Inode
    #: All names of the inode.
    group: frozenset[str]


def snapshot(merged: str) -> dict[str, Name]:
    """The digested tree, its hard links resolved: each name with what it stands for."""
    scan = tree.scan_directory(merged)
    groups: dict[str, set[str]] = {}
    for path, entry in scan.tree.items():
        groups.setdefault(entry["to"] if entry["type"] == "link" else path, set()).add(path)
    inodes = {path: inode for inode, path in scan.inodes.items()}
    return {path: Name(scan.tree[first], inodes.get(first, (0, 0)), frozenset(group))
            for first, group in groups.items() for path in group}


Snapshot = dict[str, Name]


def same(one: Name | None, other: Name | None) -> bool:
    """By the definition of equality: inode numbers are no part of a state."""
    return one is other or bool(one and other and one.entry == other.entry and one.group == other.group)


class Turns:
    """The turns on one file system."""

    def __init__(self, tally: Tally, chapter: int, stage: Stage):
        self.rng = random.Random(f"{tally.seed}/{tally.fs}/{chapter}")
        self.chapter = chapter
        self.number = 0
        self.stage = stage
        self.tally = tally
        last = stage.worker()
        child = stage.cgroup.child("deeper")
        last.python(f"with open({child!r} + '/cgroup.procs', 'w') as procs: procs.write('0')")
        self.workers = [stage.inside, stage.worker(), last, stage.outside]
        self.workers[0].ask("fuzz", orders=fuzz_ops.furnish())
        self.tally.verdicts = self._can_tell_changes()
        self.stage.driver.ask("capture") if self.tally.verdicts else stage.turn_ends()
        self.before = self._digest()
        self.history: list[Any] = []

    def _can_tell_changes(self) -> bool:
        try:
            self.stage.driver.changes()
        except DriverError as error:
            if "no order" not in str(error):
                raise
            return False
        return True

    def _digest(self) -> Snapshot:
        return snapshot(self.stage.layer.merged)

    def _plan(self) -> list[list[list[Order]]]:
        """Some phases; in each, what every worker does, at the same time."""
        kind = self.rng.choices(["change", "read", "undone"], (35, 30, 35))[0]
        make = {"change": fuzz_ops.change, "read": fuzz_ops.read, "undone": fuzz_ops.undone}[kind]
        active = [w for w in range(INSIDE) if self.rng.random() < 0.5] or [0]
        if self.rng.randrange(ONE_IN_OUTSIDE) == 0:
            active.append(OUTSIDE)
        if kind == "undone":  # side by side, one would restore what the other has just made
            active = active[:1]
        phases = []
        for _ in range(self.rng.randint(1, 2)):
            phase: list[list[Order]] = [[] for _ in self.workers]
            for worker in active:
                phase[worker] = [(fuzz_ops.read if self.rng.random() < 0.3 else make)(self.rng)
                                 for _ in range(self.rng.randint(1, 3))]
            phases.append(phase)
        return phases

    def _run(self, phases: list[list[list[Order]]]) -> None:
        for phase in phases:
            busy = [(worker, orders) for worker, orders in zip(self.workers, phase) if orders]
            for worker, orders in busy:
                worker.begin("fuzz", orders=orders)
            for worker, orders in busy:
                self.tally.worked += worker.finish(f"{orders}")["worked"]
                self.tally.orders += len(orders)

    def _drop_caches(self) -> None:
        syncfs(self.stage.layer.upper)
        with open("/proc/sys/vm/drop_caches", "w") as drop:
            drop.write("3")

    def turn(self) -> bool:
        """One turn; False after a false negative."""
        self.number += 1
        phases = self._plan()
        self.history.append(phases)
        self._run(phases)
        if self.rng.randrange(ONE_IN_DROP) == 0:
            self._drop_caches()
        self.stage.cgroup.freeze()
        try:
            held = self._judge()
        finally:
            self.stage.cgroup.thaw()
        self.tally.turns += 1
        return held

    def _judge(self) -> bool:
        driver, tally = self.stage.driver, self.tally
        verdict = driver.changes() if tally.verdicts else None
        report = driver.look()
        after = self._digest()
        differing = {p for p in self.before.keys() | after.keys() if not same(self.before.get(p), after.get(p))}
        tally.changed += bool(differing)
        tally.doubts += report.doubt is not None
        missed = [p for p in differing if not self._is_candidate(p, report, after)]
        if verdict is not None and verdict["doubt"] is None:
            missed += [f"{p} (verdict)" for p in differing if not self._is_named(p, verdict, after)]
        if missed:
            tally.failure = self._explain(missed, after, report, verdict)
            return False
        if not differing:
            tally.idle_candidates += bool(report.inodes)
            said = bool(verdict and (verdict["changes"] or verdict["doubt"] is not None))
            tally.false_positives += said
            if said and verdict and len(tally.examples) < 5:
                tally.examples.append(f"chapter {self.chapter}, turn {self.number}: {json.dumps(verdict['changes'][:3])}")
        self._capture(after, bool(differing))
        return True

    def _capture(self, after: Snapshot, changed: bool) -> None:
        driver = self.stage.driver
        if self.rng.randrange(ONE_IN_SKIPPED) == 0:
            return
        if self.rng.randrange(ONE_IN_FAILED) == 0:
            driver.cut()
            driver.failed()
            return
        if self.tally.verdicts:
            driver.capture()
        else:
            driver.cut()
            driver.durable()
        self.before = after
        self.history.clear()

    def _upper_inode(self, path: str) -> Inode | None:
        try:
            st = os.lstat(f"{self.stage.layer.upper}{path}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        return st.st_dev, st.st_ino

    def _is_candidate(self, path: str, report: Report, after: Snapshot) -> bool:
        """The inode must be; or, for a name that came or went, the directory that it came into or went from.

        That may be further up, where a whole directory came or went.
        """
        if report.doubt is not None or self._upper_inode(path) in report.inodes:
            return True
        while not self._stayed(path, after):
            path = os.path.dirname(path)
            if self._upper_inode(path) in report.inodes:
                return True
        return any(self._is_candidate(other, report, after) for other in self._linked(path, after))

    def _stayed(self, path: str, after: Snapshot) -> bool:
        """The name stands for the same inode as before."""
        old, new = self.before.get(path), after.get(path)
        return path == "/" or bool(old and new and old.inode == new.inode)

    def _linked(self, path: str, after: Snapshot) -> list[str]:
        """If nothing is new of a name but that it has another name more or less: that other one."""
        old, new = self.before.get(path), after.get(path)
        if not old or not new or old.entry != new.entry:
            return []
        return [p for p in old.group ^ new.group if p != path and not self._stayed(p, after)]

    def _is_named(self, path: str, verdict: dict[str, Any], after: Snapshot) -> bool:
        """By its own name, a directory above, or another name of the same file."""
        named = {"/" + change["path"].strip("/") for change in verdict["changes"]}
        above = path
        while above not in named and above != "/":
            above = os.path.dirname(above)
        if above in named:
            return True
        others = {p for one in (self.before.get(path), after.get(path)) if one for p in one.group}
        return bool(others & named)

    def _explain(self, missed: list[str], after: Snapshot, report: Report, verdict: dict[str, Any] | None) -> str:
        tally = self.tally
        lines = [f"FALSE NEGATIVE on {tally.fs}, seed {tally.seed}, chapter {self.chapter}, turn {self.number}: "
                 f"fuzz.py --fs {tally.fs} --seed {tally.seed} --chapter {self.chapter} --turns {self.number}"]
        for path in missed:
            bare = path.removesuffix(" (verdict)")
            lines += [f"  {path} {self._upper_inode(bare)}", f"    before {self.before.get(bare)}",
                      f"    after  {after.get(bare)}"]
        lines.append(f"  candidates {sorted((i[1], sorted(how)) for i, how in report.inodes.items())}")
        lines.append(f"  verdict {verdict}")
        lines.append("  since the last capture, per turn, phase and worker:")
        lines += [f"    {json.dumps(phases)}" for phases in self.history]
        return "\n".join(lines)


def run_on(fs: str, turns: int, seed: int, binary: str = "", without: tuple[str, ...] = (), chapter: int = 0) -> Tally:
    """`chapter`: the one to begin with."""
    tally = Tally(fs, seed)
    while tally.turns < turns and not tally.failure:
        with Stage(fs, binary, fuzz_ops.furnish_lower, f"fuzz-{fs}", without) as stage:
            run = Turns(tally, chapter, stage)
            began = time.monotonic()
            for _ in range(min(CHAPTER, turns - tally.turns)):
                if not run.turn():
                    break
            tally.seconds += time.monotonic() - began
        chapter += 1
    return tally


def run_all(systems: list[str], turns_each: int, seed: int, binary: str = "",
            without: tuple[str, ...] = (), chapter: int = 0) -> list[Tally]:
    """Side by side. Wants mounts of its own: syscalls.private_mounts."""
    with ProcessPoolExecutor(len(systems), multiprocessing.get_context("fork")) as pool:
        jobs = [pool.submit(run_on, fs, turns_each, seed, binary, without, chapter) for fs in systems]
        return [job.result() for job in jobs]


def summary(tallies: list[Tally]) -> str:
    lines = []
    for t in tallies:
        idle = t.turns - t.changed
        lines.append(
            f"{t.fs:6} {t.turns:6} turns, {t.changed} with a net change, {idle} without; false negatives "
            f"{int(bool(t.failure))}; candidates in {t.idle_candidates} idle turns, false positives "
            + (f"{t.false_positives} ({100 * t.false_positives / max(idle, 1):.2f} %)" if t.verdicts else "not told")
            + f"; in doubt {t.doubts}; {t.worked} of {t.orders} operations worked; "
              f"{1000 * t.seconds / max(t.turns, 1):.1f} ms a turn")
        lines += [f"         {example}" for example in t.examples]
    changed, idle = sum(t.changed for t in tallies), sum(t.turns - t.changed for t in tallies)
    negative, positive = sum(bool(t.failure) for t in tallies), sum(t.false_positives for t in tallies)
    rate = f"{100 * positive / max(idle, 1):.3f} % of {idle}" if all(t.verdicts for t in tallies) else "not told"
    lines.append(f"seed {tallies[0].seed}: false negatives {100 * negative / max(changed, 1):.3f} % of {changed}, "
                 f"false positives {rate}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--turns", type=int, default=200, help="of all file systems together")
    parser.add_argument("--chapter", type=int, default=0, help="the chapter to begin with, to see a failure again")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--fs", default="")
    parser.add_argument("--driver", default="")
    parser.add_argument("--without", action="append", default=[], help="leave a probe out; may be repeated")
    args = parser.parse_args()
    systems = args.fs.split(",") if args.fs else available()
    private_mounts()
    print(f"seed {args.seed}", flush=True)
    tallies = run_all(systems, -(-args.turns // len(systems)), args.seed, args.driver,
                      tuple(args.without), args.chapter)
    print(summary(tallies))
    failures = [t.failure for t in tallies if t.failure]
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
