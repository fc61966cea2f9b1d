"""What power losses may leave of a logged disk.

A disk that loses power has every write that it had been told before the last flush that it finished. Of those since
then it has any: none, all, some of them, and of one perhaps some of its sectors.

    crash.py BASE LOG AT SURVIVORS SEED IMAGE

makes the image of one power loss again, as a failed test names it.
"""

import bisect
import dataclasses
import itertools
import os
import random
import subprocess
import sys

from disk import FLUSH, WRITE, read_log

SECTORS = (512, 4096)


@dataclasses.dataclass(frozen=True, order=True)
class Point:
    """A power loss."""

    at: int
    """So many records of the log had been answered."""
    survivors: str
    """Of the writes since the last flush: "none" or "some"."""
    seed: int = 0
    """Says which."""


class Replay:
    """A disk that is told what a log says. `path` is its image."""

    def __init__(self, base, records, path):
        self.records = records
        self.flushes = [n for n, record in enumerate(records) if record.kind == FLUSH]
        self.path, self._done = path, 0
        _copy(base, path)
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def advance(self, to):
        """Does all writes of the first `to` records. Never backwards."""
        assert to >= self._done
        for record in self.records[self._done : to]:
            if record.kind == WRITE:
                _write(self._fd, record.offset, record.data)
        self._done = to

    def last_flush(self, at):
        """The number of the last flush of the first `at` records."""
        return self.flushes[bisect.bisect_left(self.flushes, at) - 1] if at > self.flushes[0] else 0

    def crash(self, point, path):
        """Writes the image of a power loss to `path`. Points must come in order."""
        flushed = self.last_flush(point.at)
        self.advance(flushed)
        _copy(self.path, path)
        if point.survivors == "none":
            return
        rng = random.Random(point.seed)
        chance = rng.choice([0.1, 0.5, 0.9])
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        for record in self.records[flushed : point.at]:
            if record.kind == WRITE and rng.random() < chance:
                for offset, data in _torn(record, rng) if rng.random() < 0.3 else [(record.offset, record.data)]:
                    _write(fd, offset, data)
        os.close(fd)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self._fd)


def _torn(record, rng):
    """Some sectors of a write: its beginning, its end, or any."""
    size = rng.choice(SECTORS)
    sectors = [(record.offset + at, record.data[at : at + size]) for at in range(0, len(record.data), size)]
    cut = rng.randrange(len(sectors) + 1)
    return rng.choice([sectors[:cut], sectors[cut:], [sector for sector in sectors if rng.random() < 0.5]])


def _write(fd, offset, data):
    while data:
        written = os.pwrite(fd, data, offset)
        offset, data = offset + written, data[written:]


def _copy(source, to):
    subprocess.run(["cp", "--sparse=always", source, to], check=True)


def points(replay, first, reports, rng, count=None):
    """Power losses to try, in order: `count` of them, or every one that can tell more than its neighbours.

    `first`: the record to begin with. `reports`: the records behind which somebody has been told that something is
    durable. A power loss just then that takes every write that was not flushed asks most of whoever forgets to flush; one
    just before the next flush is done, of whoever has begun something meanwhile; and one that leaves some of these writes,
    of whoever relies on their order.
    """
    reported = [Point(at, "none") for at in reports]
    flushed = [Point(at, "none") for at in replay.flushes if at > first]
    some, begin = [], first
    for flush in replay.flushes:
        if flush - begin > 1:
            some.append(Point(rng.randrange(begin + 1, flush) + 1, "some", rng.randrange(1 << 32)))
        begin = max(begin, flush)
    all = (reported, flushed, some)
    if count is not None:
        all = [rng.sample(some, min(len(some), count // 3)) for some in all]
    return sorted(itertools.chain(*all))


if __name__ == "__main__":
    base, log, at, survivors, seed, image = sys.argv[1:]
    with Replay(base, read_log(log), f"{image}.flushed") as replay:
        replay.crash(Point(int(at), survivors, int(seed)), image)
    os.unlink(f"{image}.flushed")
