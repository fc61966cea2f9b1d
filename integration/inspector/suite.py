#!/usr/bin/env python3
"""The soundness suite: whatever a sandbox does to a file, the inspector must report the inode.

Every effect (effects.py) is done on every file system, in every variant:
  fresh  on inodes that were written back and not touched since
  later  on inodes dirtied in the turn before, more than a clock tick ago, nothing written back
  dirty  on inodes dirtied just before the cut, the effect within the same clock tick
  after  as dirty, but what came just before was another effect, in the same place
A target that is not reported is a miss; an inode of the layer reported for something that changed nothing is an
alarm. Both are failures.

  suite.py [--fs ext4,tmpfs] [--variant fresh] [--only PATTERN] [--without PROBE] [--driver BINARY]
           [--update-docs | --check-docs] [-v]
"""
from __future__ import annotations

import argparse
import fnmatch
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Iterator, Sequence

import coverage_table
import effects
from driver import Driver, Inode, Report
from effects import Effect
from filesystems import Layer, available
from sandbox import Cgroup
from syscalls import private_mounts, syncfs
from worker import Worker

VARIANTS = ("fresh", "later", "dirty", "after")

#: How often an effect is tried until it falls into the same tick as what came before.
ATTEMPTS = 3

#: Microseconds. A cut that takes longer leaves no room for an effect in the same tick of 4 ms: no use to try again.
SHORT_US = 3000

#: Seconds, longer than a clock tick of any configuration.
TICK = 0.012

#: How many failures are printed.
SHOWN = 40

#: The directory of all effects' directories.
ROOM = "w"


@dataclass
class Outcome:
    """Of one effect on one file system in one variant, all attempts together."""
    fs: str
    effect: Effect
    variant: str
    #: Names of targets that were not reported.
    missed: set[str] = field(default_factory=set)
    #: Inodes of the layer reported without cause, and why they were.
    alarms: dict[Inode, list[str]] = field(default_factory=dict)
    #: What else is wrong: another errno than expected, a doubt.
    wrong: set[str] = field(default_factory=set)
    refused: int = 0
    same_tick: bool = False
    how: set[str] = field(default_factory=set)
    targets: int = 0
    took_us: float = 0
    #: What came just before, in the last attempt.
    mate: str = ""

    @property
    def bad(self) -> bool:
        return bool(self.missed or self.alarms or self.wrong)

    def __str__(self) -> str:
        parts = [f"{self.fs} {self.effect.name} ({' '.join(filter(None, (self.variant, self.mate)))})"]
        parts += [f"MISSED {' '.join(sorted(self.missed))}"] if self.missed else []
        parts += [f"{len(self.alarms)} ALARMS, such as {sorted(self.alarms.items())[:4]}"] if self.alarms else []
        return ": ".join(parts + sorted(self.wrong))


class Run:
    """The suite on one file system."""

    def __init__(self, layer: Layer, cgroup: Cgroup, driver: Driver, inside: Worker, outside: Worker):
        self.layer, self.cgroup, self.driver, self.inside, self.outside = layer, cgroup, driver, inside, outside
        self.device = layer.device
        #: Inodes that an outsider has mapped. They are reported for ever: nobody tells when that ends.
        self.held: set[Inode] = set()

    def _place(self, directory: str) -> dict[str, str]:
        merged = self.layer.merged
        return {"directory": f"{merged}/{ROOM}/{directory}", "volume": f"{merged}/volume", "shm": f"{merged}/dev/shm",
                "cgroup": self.cgroup.path, "fs": self.layer.fs, "upper": f"{self.layer.upper}/{ROOM}/{directory}"}

    def batch(self, chosen: list[Effect], variant: str) -> Iterator[Outcome]:
        """Variants fresh and later: everything is set up first, and then it is left to rest together."""
        # Mappings that are there in every turn would hide alarms, so what must be silent comes on its own.
        for part in ([e for e in chosen if e.read_only], [e for e in chosen if not e.read_only]):
            cases = [Case(self, effect, variant, 0) for effect in part]
            for case in cases:
                case.prepare()
            if variant == "later":
                for case in cases:
                    case.dirty()
            else:
                syncfs(self.layer.upper)
            time.sleep(TICK)
            self.driver.cut()
            self.driver.durable()
            for case in cases:
                case.act()
                yield case.outcome

    def one_by_one(self, chosen: list[Effect], variant: str) -> Iterator[Outcome]:
        """Variants dirty and after: the turn before is a hair's breadth away."""
        gentle = [e for e in chosen if e.gentle and not e.outside and not e.refused]
        for number, effect in enumerate(chosen):
            outcome = None
            for attempt in range(ATTEMPTS):
                case = Case(self, effect, variant, attempt, outcome)
                outcome = case.outcome
                case.prepare()
                mate = _mate(effect, number + attempt, gentle) if variant == "after" else ""
                outcome.mate = mate
                case.dirty(mate)
                self.driver.cut()
                self.driver.durable()
                case.act()
                if outcome.same_tick or outcome.took_us > SHORT_US:
                    break
            assert outcome
            yield outcome


def _mate(effect: Effect, number: int, gentle: list[Effect]) -> str:
    """What comes just before the effect: itself, or one after the other of those that leave no traces."""
    if effect in gentle:
        return effect.name
    fitting = [e for e in gentle if not (effect.read_only and e.lingers)]
    return fitting[number % len(fitting)].name if fitting else ""


class Case:
    """One effect, once."""

    def __init__(self, run: Run, effect: Effect, variant: str, attempt: int, so_far: Outcome | None = None):
        self.run, self.effect = run, effect
        self.name = directory_name(effect, variant, attempt)
        self.place = run._place(self.name)
        self.worker = run.outside if effect.outside else run.inside
        self.outcome = so_far or Outcome(run.layer.fs, effect, variant)
        self.expected: dict[str, Inode] = {}
        self.began = -1

    def _where(self, target: str) -> str:
        """The target's path where the layer itself has it."""
        layer = self.run.layer
        return effects.locate(target, f"{layer.upper}/{ROOM}/{self.name}", layer.volume, self.place["shm"])

    def _find(self, after: bool) -> None:
        for target in self.effect.targets:
            if target.startswith("+") == after:
                try:
                    st = os.lstat(self._where(target))
                except FileNotFoundError:
                    self.outcome.wrong.add(f"target {target} is not in the layer")
                    continue
                self.expected[target] = (st.st_dev, st.st_ino)

    def prepare(self) -> None:
        self.run.inside.ask("furnish", place=self.place)
        found = self.worker.ask("prepare", name=self.effect.name, place=self.place)
        self._find(after=False)
        for ino in found["nameless"]:
            self.expected[f"nameless {ino}"] = (self.run.device, ino)
        for device, ino in found["elsewhere"]:
            self.expected[f"elsewhere {ino}"] = (device, ino)

    def dirty(self, mate: str = "") -> None:
        place = self.place
        known = [effects.locate(t, place["directory"], place["volume"], place["shm"])
                 for t in self.effect.targets or (".", "file") if not t.startswith("+")]
        # By an insider, if it can: nameless targets are known to the effect's own worker only.
        nameless = any(name.startswith("nameless") for name in self.expected)
        worker = self.worker if nameless else self.run.inside
        self.began = worker.ask("dirty", place=place, targets=known, mate=mate)["tick"]

    def act(self) -> None:
        driver, outcome = self.run.driver, self.outcome
        done = self.worker.ask("do", directory=self.place["directory"])
        report = driver.cut()
        driver.durable()
        outcome.same_tick = done["tick"] == self.began
        outcome.took_us = max(outcome.took_us, report.took_us)
        allowed = self.effect.errno_on.get(self.run.layer.fs)
        if "errno" in done:
            outcome.refused = done["errno"]
            if done["errno"] != allowed:
                outcome.wrong.add(f"failed with {effects.errno_name(done['errno'])}")
        else:
            self._find(after=True)
            self._judge(report)
        for worker in {self.worker, self.run.inside}:
            worker.ask("clean", directory=self.place["directory"])

    def _judge(self, report: Report) -> None:
        outcome = self.outcome
        if report.doubt is not None:
            outcome.wrong.add(f"in doubt: {report.doubt}")
        if self.effect.read_only:
            outcome.alarms |= {inode: sorted(how) for inode, how in report.inodes.items()
                               if inode[0] == self.run.device and inode not in self.run.held}
            return
        if self.effect.holds:
            self.run.held |= set(self.expected.values())
        outcome.targets += len(self.expected)
        for target, inode in self.expected.items():
            if inode in report.inodes:
                outcome.how |= report.inodes[inode]
            elif target.startswith("elsewhere") and self.effect.flag in report.flags:
                outcome.how.add(self.effect.flag)
            else:
                outcome.missed.add(target)


def directory_name(effect: Effect, variant: str, attempt: int) -> str:
    return f"{effect.name}.{variant}.{attempt}"


def _furnish_lower(layer: Layer, chosen: Sequence[Effect], variants: Sequence[str]) -> None:
    room = f"{layer.lower}/{ROOM}"
    os.mkdir(room)
    os.mkdir(f"{room}/lower-only")
    for name in ("a", "b"):
        with open(f"{room}/lower-only/{name}", "w") as out:
            out.write(name * 5000)
    for effect in chosen:
        if effect.lower:
            for variant in variants:
                for attempt in range(ATTEMPTS if variant in ("dirty", "after") else 1):
                    effects.furnish_lower(f"{room}/{directory_name(effect, variant, attempt)}")


def run_on(fs: str, variants: Sequence[str] = VARIANTS, only: str = "*", without: tuple[str, ...] = (),
           binary: str = "") -> list[Outcome]:
    """All chosen effects on one file system. Wants mounts of its own: syscalls.private_mounts."""
    chosen = [e for e in effects.table().values() if any(fnmatch.fnmatch(e.name, pattern) for pattern in only.split(","))]
    outcomes: list[Outcome] = []
    with Layer(fs) as layer:
        _furnish_lower(layer, chosen, variants)
        layer.join()
        with Cgroup(fs) as cgroup, Worker(f"{cgroup.path}/cgroup.procs") as inside, Worker() as outside, \
                Driver(cgroup.path, layer.merged, layer.upper, without, binary) as driver:
            run = Run(layer, cgroup, driver, inside, outside)
            for variant in variants:
                way = run.batch if variant in ("fresh", "later") else run.one_by_one
                outcomes += way([e for e in chosen if variant == "fresh" or not e.once], variant)
    return outcomes


def run_all(file_systems: Sequence[str], variants: Sequence[str] = VARIANTS, only: str = "*",
            without: tuple[str, ...] = (), binary: str = "") -> list[Outcome]:
    """On several file systems side by side: a cut is mostly waiting for the kernel."""
    with ProcessPoolExecutor(len(file_systems), multiprocessing.get_context("fork")) as pool:
        jobs = [pool.submit(run_on, fs, variants, only, without, binary) for fs in file_systems]
        return [outcome for job in jobs for outcome in job.result()]


def summary(outcomes: list[Outcome], seconds: float) -> str:
    """Per file system and variant: what was done, what went wrong."""
    lines = [f"{'':6} {'variant':8} {'effects':>7} {'targets':>7} {'refused':>7} {'misses':>6} {'alarms':>6} {'same tick':>9}"]
    for fs in dict.fromkeys(o.fs for o in outcomes):
        for variant in dict.fromkeys(o.variant for o in outcomes):
            part = [o for o in outcomes if (o.fs, o.variant) == (fs, variant)]
            same = f"{sum(o.same_tick for o in part)}/{len(part)}" if variant in ("dirty", "after") else "-"
            lines.append(f"{fs:6} {variant:8} {len(part):7} {sum(o.targets for o in part):7} "
                         f"{sum(bool(o.refused) for o in part):7} {sum(len(o.missed) for o in part):6} "
                         f"{sum(len(o.alarms) for o in part):6} {same:>9}")
    bad = sum(o.bad for o in outcomes)
    changing = len({o.effect.name for o in outcomes if not o.effect.read_only})
    silent = len({o.effect.name for o in outcomes if o.effect.read_only})
    lines.append(f"{changing} effects and {silent} that change nothing; {bad} failures; {seconds:.1f} s")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--fs", default="", help="file systems, separated by commas; all that can be made here")
    parser.add_argument("--variant", default=",".join(VARIANTS))
    parser.add_argument("--only", default="*", help="effects whose names match one of these patterns, separated by commas")
    parser.add_argument("--without", action="append", default=[], help="leave a probe out; may be repeated")
    parser.add_argument("--driver", default="", help="the inspector's driver; else CRAB_INSPECTOR, or what cargo built")
    parser.add_argument("--update-docs", action="store_true")
    parser.add_argument("--check-docs", action="store_true")
    parser.add_argument("-v", "--verbose", action="store_true")
    args = parser.parse_args()
    private_mounts()
    began = time.monotonic()
    outcomes = run_all(args.fs.split(",") if args.fs else available(), args.variant.split(","), args.only,
                       tuple(args.without), args.driver)
    shown = [o for o in outcomes if o.bad or args.verbose]
    for outcome in shown if args.verbose else shown[:SHOWN]:
        print(outcome, "" if outcome.bad else f": {' '.join(sorted(outcome.how))}")
    if not args.verbose and len(shown) > SHOWN:
        print(f"… and {len(shown) - SHOWN} more")
    print(summary(outcomes, time.monotonic() - began))
    if any(o.bad for o in outcomes):
        return 1
    return coverage_table.handle(outcomes, args.update_docs, args.check_docs)


if __name__ == "__main__":
    sys.exit(main())
