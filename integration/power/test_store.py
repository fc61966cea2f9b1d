"""A store on a disk that loses power, at any moment: whatever was reported as durable is there and whole, nothing is
there by half, and it goes on.

CRAB_E2E_SEED repeats a run's choices; its times are never the same, so a failed test keeps the log (`kept`).
CRAB_SOAK=1 makes the runs longer, and tries more power losses of each.
"""

import json
import os
import pathlib
import random
import shutil
import subprocess
import threading
import time

import pytest

from crash import Replay, points
from disk import MARK
from logged import LIMIT, LoggedDisk, mount_loop, run
from model import compare, expect

SOAK = os.environ.get("CRAB_SOAK") == "1"
SEED = int(os.environ.get("CRAB_E2E_SEED", 0)) or random.SystemRandom().randrange(1, 1 << 32)
STEPS, POINTS = (250, 600) if SOAK else (60, 42)
DRIVER = pathlib.Path("/src/target", os.environ.get("CRAB_PROFILE", "release"), "examples/store")
CONFIG = pathlib.Path("/etc/crab/config.toml")
KEPT = pathlib.Path("/src/target/power-loss")


class Driver:
    """The process that writes the store."""

    def __init__(self, root):
        self.process = subprocess.Popen([DRIVER, "drive", root], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        assert line, f"the driver has ended: {self.process.wait(LIMIT)}"
        return json.loads(line)

    def __call__(self, order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Neighbour:
    """Somebody else who syncs a file on the same file system, again and again: each time its journal is written with
    whatever everybody has changed by then, so that states become durable for which nobody has asked."""

    def __init__(self, path):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._on, self._over = threading.Event(), False
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self):
        while self._on.wait() and not self._over:
            os.pwrite(self._file, os.urandom(100), 0)
            os.fsync(self._file)

    def set(self, is_on):
        self._on.set() if is_on else self._on.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._over = True
        self._on.set()
        self._thread.join()
        os.close(self._file)


def choose(rng, sandboxes, number):
    """What to do next: an order that makes sense."""
    id = rng.choice("ab")
    sandbox = sandboxes.get(id)
    turns = sorted(sandbox.turns) if sandbox else []
    order = {"sandbox": id, "turn": number}
    weights = {"checkpoint": 12, "append": 4}
    if turns:
        weights |= {"retain": 5, "collect": 2, "name": 2, "arm": 3, "litter": 1, "close": 2, "remove": 2}
        weights["disarm"] = 0 if sandbox.armed == {None} else 6
    order["do"] = rng.choices(*zip(*weights.items()))[0]
    match order["do"]:
        case "checkpoint":
            order |= {"seed": rng.randrange(1 << 60), "how": rng.choice(["whole", "delta", "delta", "files"])}
        case "append":
            order["now"] = rng.random() < 0.5
        case "retain":
            order["keep"] = rng.randrange(1, 4)
        case "name":
            order |= {"name": rng.choice("xy"), "turn": rng.choice(turns)}
        case "arm" | "litter":
            order["turn"] = rng.choice(turns)
        case "disarm":
            del order["turn"]
    return order


def work(disk, rng):
    """Has a store on the disk be written for a while, with marks in the log of what was begun and what reported."""
    with Driver(disk.at / "crab") as driver, Neighbour(disk.at / "neighbour") as neighbour:
        for number in range(1, STEPS + 1):
            records = disk.records()
            order = choose(rng, expect(records, len(records)), number)
            neighbour.set(rng.random() < 0.3)
            disk.mark(json.dumps({"begin": order}))
            answer = driver(order)
            disk.mark(json.dumps({"done": order, "answer": answer}))


def look(verb, root):
    """What the driver sees in a store; its error if it does not come to its end."""
    done = subprocess.run([DRIVER, verb, root], capture_output=True, text=True, timeout=LIMIT)
    return (json.loads(done.stdout), []) if done.returncode == 0 else ({}, [f"{verb}: {done.stderr[-1000:]}"])


def examine(image, at, sandboxes):
    """What is wrong with a store on a disk that has lost power."""
    mount_loop(image, at)
    try:
        seen, wrong = look("check", at / "crab")
        wrong += compare(sandboxes, seen) if not wrong else []
        # Without a store it is an error to ask about it; whether one should be there was looked at.
        if (at / "crab").exists():
            verified = subprocess.run(["crab", "verify"], capture_output=True, text=True, timeout=LIMIT)
            wrong += [f"crab verify: {verified.stdout[-1000:]}{verified.stderr}"] if verified.returncode else []
        seen, failed = look("mend", at / "crab")
        return wrong + failed + [f"afterwards, {id}: {fault}" for id in seen for fault in seen[id]["faults"]]
    finally:
        run("umount", at)


@pytest.fixture
def crashed(tmp_path):
    """Where a disk is mounted that has lost power; `crab` looks for its store there."""
    at = tmp_path / "crashed"
    at.mkdir()
    CONFIG.parent.mkdir(exist_ok=True)
    CONFIG.write_text(f'store = "{at}/crab"\n')
    yield at
    CONFIG.unlink()


@pytest.fixture
def memory():
    """A directory in memory, for images."""
    path = pathlib.Path("/run/power-loss")
    path.mkdir()
    yield path
    shutil.rmtree(path)


def keep(disk, failures):
    """Keeps what is needed to look at a failure again; returns where."""
    kept = KEPT / f"{disk.fs}-{SEED}"
    kept.mkdir(parents=True, exist_ok=True)
    run("cp", "--sparse=always", disk.base, disk.log, kept)
    (kept / "failures").write_text("".join(f"{point}: {wrong}\n" for point, wrong in failures))
    return kept


@pytest.mark.parametrize("fs, direct", [("ext4", False), ("xfs", True), ("btrfs", False)])
def test_whatever_was_reported_survives_and_nothing_is_there_by_half(fs, direct, tmp_path, memory, crashed):
    print(f"CRAB_E2E_SEED={SEED}")
    rng = random.Random(f"{SEED} {fs}")
    begin = time.monotonic()
    with LoggedDisk(memory, fs, direct) as disk:
        work(disk, rng)
        records = disk.records()
    worked = time.monotonic() - begin
    first = next(n for n, record in enumerate(records) if record.kind == MARK)
    reports = [n + 1 for n, record in enumerate(records) if record.kind == MARK and bytes(record.data).startswith(b'{"done"')]
    failures = []
    with Replay(disk.base, records, memory / "flushed") as replay:
        tried = points(replay, first, reports, rng, POINTS)
        for point in tried:
            replay.crash(point, memory / "crashed")
            wrong = examine(memory / "crashed", crashed, expect(records, point.at))
            failures += [(point, wrong)] if wrong else []
    took = time.monotonic() - begin - worked
    print(f"{fs}: {len(reports)} steps, {len(records)} records, {len(replay.flushes)} flushes in {worked:.1f} s; "
          f"{len(tried)} power losses in {took:.1f} s, {len(failures)} with something wrong")
    assert not failures, f"kept in {keep(disk, failures)}: {failures[:5]}"
