"""No write falls between two epochs, however it meets a cut.

Two writers that never pause, each on its own CPU, while epochs are cut without a freeze. Each write notes the time right
before and right after it, in memory outside of the sandbox; the times of an order to cut (S) and of its answer (R) are
taken by the same clock. Let S[k], R[k] be those of cut k, and d the last cut before k that was made durable.

What is checked, and why that is all:

1. A write that lies within R[d]..S[k] is in report k. Its event came after cut d had ended the epoch before, and before
   cut k ended this one: of the epochs between no other report tells, so if it is not in this one it is lost.
2. A write that overlaps cut k (begins before R[k], ends after S[k]) is in report k or in report k + 1: its event may be
   on either side of the exchange of the maps, or remembered by the CPU from just before it.
3. What is in report k was written at some time in S[d]..R[k]: epochs are cut, not only added to. Together with 2: every
   write is in exactly one of two neighbouring epochs, or in both.

1 bites on *hot* files, a few that are written all the time: a CPU remembers those, so that an entry that outlives its
epoch hides every write of the next one. 2 and 3 bite on *cold* files, each written once in many epochs, so that no other
write of the same file stands in for a lost one; some of them are new. Some cuts are not made durable: their epochs have
to be in the next report as well.
"""

import bisect
import collections
import itertools
import mmap
import os
import random
import signal
import struct
import time
import traceback

import kernel_objects
import pytest
import watcher

ROTATIONS, SECONDS = 500, 12
"""So many, or as many as fit: a cut waits for the kernel, and on a busy machine for its turn."""
HOT, COLD = 8, 512
"""Files of each writer."""
PLACES = 64
"""CRAB_RECENT: a CPU remembers an inode at its number modulo this, until another one takes the place; and once more at
that number ^ the overlay's device, for what is done through it."""
EACH = 16
"""Every so many writes one is to a cold file; the first time round it is made by that."""
HOT_ROOM, COLD_ROOM = 1 << 20, 1 << 13
"""Writes that are noted of one file, at most."""


class Log:
    """When one file was written, by one writer, in order: nanoseconds of CLOCK_MONOTONIC."""

    def __init__(self, words):
        half = len(words) // 2
        self.begins, self.ends = words[:half], words[half:]
        self.count = 0


def shared(sizes):
    """Zeros that a child shares, in pieces of so many words of 64 bits; memory is taken where they are used."""
    words = memoryview(mmap.mmap(-1, 8 * sum(sizes))).cast("Q")
    for size in sizes:
        yield words[:size]
        words = words[size:]


class Writer:
    """A process on one CPU. `files`: (inode, Log) of each, once it has ended."""

    def __init__(self, sandbox, name, cpu, inside):
        self.sandbox, self.name, self.cpu, self.inside = sandbox, name, cpu, inside
        self.counts, *logs = shared([HOT + COLD] + [2 * HOT_ROOM] * HOT + [2 * COLD_ROOM] * COLD)
        self.logs = [Log(words) for words in logs]
        for i in range(HOT):
            os.close(self.make(self.path(i)))
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                self.write()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def path(self, i):
        return self.sandbox.rootfs / f"{self.name}-{i}"

    def write(self):
        running = [True]
        signal.signal(signal.SIGTERM, lambda *_: running.clear())
        if self.inside:
            self.sandbox.enter()
        os.sched_setaffinity(0, {self.cpu})
        hot = [self.open(i) for i in range(HOT)]
        for i in itertools.chain(range(HOT, HOT + COLD), itertools.cycle(self.harmless(hot))):
            if not running:
                return
            for number in range(1, EACH):
                self.put(number % HOT, hot[number % HOT])
            self.put(i, self.open(i) if self.counts[i] else None)

    def harmless(self, hot):
        """The cold files for which no hot one is forgotten; those that are only made take any place."""
        via = self.sandbox.rootfs.stat().st_dev
        places = {(os.fstat(fd).st_ino ^ os.minor(overlay)) % PLACES for fd in hot for overlay in (0, via)}
        for i in range(HOT, HOT + COLD):
            if self.path(i).stat().st_ino % PLACES not in places:
                yield i

    def make(self, path):
        """A file, or an outsider's directory, open."""
        if self.inside:
            return os.open(path, os.O_WRONLY | os.O_CREAT)
        path.mkdir()
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def open(self, i):
        return os.open(self.path(i), os.O_RDWR if self.inside else os.O_RDONLY | os.O_DIRECTORY)

    def put(self, i, fd):
        """Writes to a file; also makes it, if `fd` is None. Only hot ones stay open."""
        log, slot = self.logs[i], self.counts[i]
        path = self.path(i) if fd is None else None
        log.begins[slot] = time.monotonic_ns()
        if fd is None:
            fd = self.make(path)
        if self.inside:
            os.pwrite(fd, b"%d" % slot, 0)
        else:
            os.fchmod(fd, 0o700 | slot & 0o77)
        log.ends[slot] = time.monotonic_ns()
        self.counts[i] = slot + 1
        if i >= HOT:
            os.close(fd)

    def stop(self):
        """The logs by inode: of the hot files, and of the cold ones."""
        os.kill(self.pid, signal.SIGTERM)
        pid, self.pid = self.pid, None
        assert os.waitpid(pid, 0)[1] == 0, "there was room for all"
        logs = []
        for i, log in enumerate(self.logs):
            log.count = self.counts[i]
            if log.count:
                logs.append(((self.sandbox.upper / f"{self.name}-{i}").stat().st_ino, log))
        return dict(logs[:HOT]), dict(logs[HOT:])

    def close(self):
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


Cut = collections.namedtuple("Cut", "sent received base doubt inodes")
"""`base`: the last cut that was durable before."""


def dump(driver):
    driver.ask("prepare")
    return driver.inodes("dump")


def cut_all(driver, cut):
    """Cuts so often; not each one becomes durable."""
    chance = random.Random("crab epochs")
    cuts, base = [], 0
    end = time.monotonic() + SECONDS
    for k in itertools.takewhile(lambda _: time.monotonic() < end, range(ROTATIONS)):
        sent = time.monotonic_ns()
        doubt, inodes = cut(driver)
        cuts.append(Cut(sent, time.monotonic_ns(), base, doubt, inodes))
        if k == 0 or chance.random() < 0.9:
            driver.ask("durable")
            base = k
    return cuts


def lost_in_an_epoch(cuts, logs):
    """Claim 1."""
    claims = 0
    for k, cut in enumerate(cuts[1:], 1):
        for inode, log in logs.items():
            if cut.doubt:
                continue
            # Of the writes that begin late enough this one ends first.
            first = bisect.bisect_left(log.begins, cuts[cut.base].received, 0, log.count)
            if first < log.count and log.ends[first] <= cut.sent:
                claims += 1
                if inode not in cut.inodes:
                    yield f"a write of inode {inode} between cuts {cut.base} and {k} is not in report {k}"
    assert claims > len(cuts)


def lost_at_a_cut(cuts, logs):
    """Claim 2, and 1 for each single write."""
    sent, received = [c.sent for c in cuts], [c.received for c in cuts]
    across = within = 0
    for inode, log in logs.items():
        for begin, end in zip(log.begins[: log.count], log.ends[: log.count]):
            # The cuts that it overlaps are first..last, so it counts for report `first` at the earliest.
            first, last = bisect.bisect_left(received, begin), bisect.bisect_right(sent, end) - 1
            if first == 0 or last + 1 >= len(cuts):
                continue
            across, within = (across + 1, within) if first <= last else (across, within + 1)
            reports = cuts[first : last + 2] if first <= last else [cuts[first]]
            if not any(inode in cut.inodes or cut.doubt for cut in reports):
                yield f"a write of inode {inode} is not in reports {first}..{max(last + 1, first)}"
    assert across > 100 and within > 1000, (across, within)


def never_written(cuts, logs):
    """Claim 3."""
    for k, cut in enumerate(cuts[1:], 1):
        for inode in cut.inodes & logs.keys():
            log = logs[inode]
            # Of the writes that end late enough this one begins first.
            first = bisect.bisect_left(log.ends, cuts[cut.base].sent, 0, log.count)
            if first == log.count or log.begins[first] > cut.received:
                yield f"inode {inode} is in report {k}, and was not written since cut {cut.base}"


@pytest.mark.parametrize(("inside", "cut"), [(True, lambda driver: driver.inodes("cut")), (False, dump)], ids=["sandbox", "outsiders"])
def test_every_write_is_in_one_of_two_neighbouring_epochs(inside, cut, bed, builds):
    """A dump forgets, besides, what outsiders have done since the epoch began, and its cut has seen."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    sandbox = bed.sandbox()
    driver = bed.watcher(builds[0], sandbox).ready()
    writers = []
    try:
        for cpu in cpus[:2]:
            writers.append(Writer(sandbox, f"w{cpu}", cpu, inside))
        deadline = time.monotonic() + watcher.PATIENCE
        while not all(w.counts[HOT] for w in writers):
            assert time.monotonic() < deadline, "the writers write"
        cuts = cut_all(driver, cut)
        logs = [w.stop() for w in writers]
    finally:
        for writer in writers:
            writer.close()
    assert len(cuts) > 50
    bed.note()
    assert driver.leave() == 0
    bed.nothing_is_left(builds[0])
    doubtful = [cut.doubt for cut in cuts[1:] if cut.doubt]
    assert len(doubtful) < len(cuts) / 50, "what is in doubt proves nothing"
    wrong = []
    for hot, cold in logs:
        wrong += lost_in_an_epoch(cuts, hot)
        wrong += lost_at_a_cut(cuts, cold)
        wrong += never_written(cuts, hot | cold)
    assert not wrong, f"{len(wrong)}: {wrong[:10]}"


def test_what_outsiders_did_before_a_dump_counts_until_that_is_durable(bed, builds):
    sandbox = bed.sandbox()
    driver = bed.watcher(builds[0], sandbox).ready()
    theirs = sandbox.rootfs / "theirs"
    theirs.mkdir()
    for order in ("cut", "durable"):
        driver.ask(order)
    assert driver.inodes() == (None, set())
    inode = (sandbox.upper / "theirs").stat().st_ino

    def both():
        """Their inode, the sandbox's own, and the directory."""
        theirs.chmod(0o700)
        own = sandbox.write()
        found = driver.inodes()[1]
        assert {inode} | own <= found and inode not in own
        return own, found

    driver.ask("prepare")
    _, found = both()
    assert driver.inodes("dump") == driver.inodes() == (None, found)
    # It failed: so the next one has it, too.
    assert dump(driver) == (None, found)
    driver.ask("durable")
    assert driver.inodes() == (None, set())
    # What the sandbox itself does counts once more, and so does what comes after the cut.
    driver.ask("prepare")
    own, found = both()
    assert driver.inodes("dump") == (None, found)
    driver.ask("durable")
    left = driver.inodes()[1]
    assert own <= left <= found - {inode}
    theirs.chmod(0o750)
    assert driver.inodes() == (None, left | {inode})


SEEN_CTIME, SEEN_MAPPED, SEEN_OUTSIDE = 1 << 0, 1 << 2, 1 << 4
"""Of bpf/inspector.h."""
LATE = 1 << 40
"""Numbers from here on no inode has."""


def epochs(driver):
    """The ids of the maps in which a driver's sandbox is noted, or was."""
    held = {number for kind, number in kernel_objects.of_process(driver.pid) if kind == "map"}
    return held & kernel_objects.named("map", "epoch")


HEADER = bytes(16)
"""The key of an epoch's header: bits, and how many inodes there are."""


def header(epoch):
    value = bytearray(8)
    kernel_objects.element(kernel_objects.MAP_LOOKUP, epoch, HEADER, value)
    return struct.unpack("=II", value)


def note(epoch, sandbox, inode, bits=SEEN_CTIME):
    """As a program would that looked the epoch up some time ago. Other programs must not do so just now."""
    device = os.major(sandbox.device) << 20 | os.minor(sandbox.device)
    value = bytearray(struct.pack("=II", bits, 0))
    kernel_objects.element(kernel_objects.MAP_UPDATE, epoch, struct.pack("=QII", inode, device, 0), value)
    if inode >= LATE:
        flags, count = header(epoch)
        value = bytearray(struct.pack("=II", flags, count + 1))
        kernel_objects.element(kernel_objects.MAP_UPDATE, epoch, HEADER, value)


def after_a_cut(bed, builds):
    """A sandbox and its driver, which has cut; the ended epoch, and what is in it."""
    sandbox = bed.sandbox()
    driver = bed.watcher(builds[0], sandbox).ready()
    for order in ("cut", "durable"):
        driver.ask(order)
    sandbox.write()
    written = driver.inodes()[1]
    (ended,) = (epoch for epoch in epochs(driver) if header(epoch)[1])
    assert driver.inodes("cut") == (None, written)
    return sandbox, driver, ended, written


def test_what_is_noted_after_the_cut_counts_until_the_next_one(bed, builds):
    sandbox, driver, ended, written = after_a_cut(bed, builds)
    note(ended, sandbox, LATE)
    driver.ask("durable")
    assert driver.inodes() == driver.inodes("cut") == (None, written | {LATE})
    driver.ask("durable")
    assert driver.inodes() == (None, set())
    assert ended not in epochs(driver)


def test_what_is_noted_in_the_place_of_an_ended_epoch_counts(bed, builds):
    """A program may find the next epoch where it looks for one before the last."""
    sandbox, driver, ended, _ = after_a_cut(bed, builds)
    former = epochs(driver)
    driver.ask("durable")
    (following,) = epochs(driver) - former
    note(following, sandbox, LATE)
    assert driver.inodes() == driver.inodes("cut") == (None, {LATE})


def test_a_mapping_of_an_outsider_that_is_noted_late_is_carried_for_ever(bed, builds):
    sandbox, driver, ended, written = after_a_cut(bed, builds)
    mapped = min(written)
    note(ended, sandbox, mapped, SEEN_CTIME | SEEN_MAPPED | SEEN_OUTSIDE)
    for _ in range(3):
        driver.ask("durable")
        assert mapped in driver.inodes()[1]
        driver.ask("cut")
