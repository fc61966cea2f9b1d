"""Dumps that build upon each other: what they have, what comes back, what a pre-dump leaves, and when there are any. With
CRAB_TURNS=10 (`make soak`) the chain has ten turns, the heap 64 MiB, and what takes minutes is tried, too."""

import os
import time

import pytest

from heap import PAGE, Chained

TURNS = int(os.environ.get("CRAB_TURNS", 3))
LARGE = ((64 if TURNS >= 10 else 16) << 20) // PAGE
MIDDLE = (24 << 20) // PAGE
SMALL = (4 << 20) // PAGE
TWO_PERCENT = LARGE * 2 // 100
REST = 1 << 20
ROUNDS = 5
"""In so many a choice must have been seen. What things cost is learnt from the first ones, and on a busy machine wrongly."""
at_length = pytest.mark.skipif(TURNS < 10, reason="takes minutes: CRAB_TURNS=10")


def test_a_chain_has_what_was_written_and_comes_back_whole(tmp_path, config):
    config('incremental = true\npre_dumps = "0"\n')
    with Chained(tmp_path, LARGE) as sandbox:
        first = sandbox.serve()
        assert first["action"] == "full" and first["bytes_captured"] > LARGE * PAGE, first
        lines = [sandbox.some(seed, TWO_PERCENT) for seed in range(1, TURNS + 1)]
        for line in lines:
            assert line["action"] == "full" and line["pre_dumps"] == 0, line
            # What Python, the parasite and CRIU's other images have comes to it.
            assert TWO_PERCENT * PAGE < line["bytes_captured"] < TWO_PERCENT * PAGE + REST, line
        sandbox.die()
        sandbox.restore()
        sandbox.start()
        sandbox.check()
        # The first one after a restore has everything, and the next one builds upon it.
        again = sandbox.last()
        assert again["bytes_captured"] > LARGE * PAGE, again
        after = sandbox.some(100, TWO_PERCENT)
        assert after["bytes_captured"] < TWO_PERCENT * PAGE + REST, after
        sandbox.check()


WRAPPER = """#!/bin/bash
# runc, whose dumps are counted, and what comes after a pre-dump.
case " $* " in
  *" checkpoint "*" --pre-dump "*) echo pre-dump >>LOG ;;
  *" checkpoint "*) echo dump >>LOG ;;
  *) exec runc "$@" ;;
esac
runc "$@" || exit
case " $* " in *" --pre-dump "*) AFTER ;; esac
"""
WRITES = """
server=$(pgrep -f -o 'heap = mmap') && kill -USR1 "$server"
until [ -e "/proc/$server/root/dev/shm/written" ]; do :; done
rm "/proc/$server/root/dev/shm/written"
"""
"""The server writes to one page, and says so in memory: a file of the layer would be another change."""
CLEARS = WRITES + 'echo 4 >"/proc/$server/clear_refs"\n'


@pytest.fixture
def wrapped(tmp_path, config):
    """Makes the wrapper the runtime; returns what tells its calls."""

    def make(more, after=":"):
        log, runtime = tmp_path / "calls", tmp_path / "runc-counted"
        log.write_text("")
        runtime.write_text(WRAPPER.replace("LOG", str(log)).replace("AFTER", after.strip().replace("\n", "; ")))
        runtime.chmod(0o755)
        config(f'runtime = "{runtime}"\n{more}\n')
        return lambda: log.read_text().split()

    return make


@pytest.mark.parametrize("after", [pytest.param(WRITES, id="as-it-is"), pytest.param(CLEARS, id="marks-cleared", marks=at_length)])
def test_what_is_written_after_a_pre_dump_is_in_the_dump(after, tmp_path, wrapped):
    calls = wrapped('incremental = true\npre_dumps = "1"', after)
    with Chained(tmp_path, SMALL) as sandbox:
        sandbox.serve()
        line = sandbox.some(1, 100)
        assert calls() == ["pre-dump", "dump"] * 2 and line["pre_dumps"] == 1, line
        assert "1 pre-dump(s)" in line["note"], line
        sandbox.model.pages[0] = 1002
        sandbox.die()
        sandbox.restore()
        sandbox.start()
        came_back = sandbox.say("hash") == sandbox.model.hash()
        # Somebody else who clears marks is what a chain cannot bear: so this would see a page that is lost.
        assert came_back == (after == WRITES)


class Chosen:
    """A sandbox's small change, large ones until the plan of one says what is looked for, and a small one again; its agent is
    always away for longer than any pre-dumps take."""

    def __init__(self, sandbox, said, first=":"):
        self.sandbox, self.first, self.lines = sandbox, first, [sandbox.serve()]
        self.small, self.large = [self.turn(10)], []
        while len(self.large) < ROUNDS and not (self.large and said in self.large[-1]["plan"]):
            self.large.append(self.turn(MIDDLE, self.first))
        self.small.append(self.turn(10))

    def turn(self, pages, first=":"):
        # Twice as long as the longest checkpoint: what a pre-dump adds is less than another one.
        time.sleep(2 * max(line["durable_us"] for line in self.lines) / 1e6)
        self.lines.append(self.sandbox.some(len(self.lines), pages, first))
        return self.lines[-1]

    @property
    def calls(self):
        """What the runtime must have been called for."""
        return [call for line in self.lines for call in (*["pre-dump"] * line["pre_dumps"], "dump")]


@at_length
def test_pre_dumps_come_before_a_large_dump_and_no_small_one(tmp_path, wrapped):
    calls = wrapped("incremental = true")
    with Chained(tmp_path, MIDDLE) as sandbox:
        turns = Chosen(sandbox, "full after")
        assert all(line["pre_dumps"] == 0 and "freeze it for longer" in line["plan"] for line in turns.small), turns.small
        assert turns.large[-1]["pre_dumps"] > 0, [line["plan"] for line in turns.large]
        assert calls() == turns.calls
        sandbox.check()


@at_length
def test_no_pre_dump_comes_before_a_large_dump_that_the_budget_has_too_little_for(tmp_path, wrapped):
    # The bucket never has as much as the files of a large turn alone take, which do not become smaller.
    calls = wrapped('incremental = true\nengine.rate = "2MiB/s"\nengine.burst = "1MiB"')
    with Chained(tmp_path, MIDDLE) as sandbox:
        turns = Chosen(sandbox, "too little for pre-dumps", "head -c 8388608 /dev/urandom >/noise")
        assert "too little for pre-dumps" in turns.large[-1]["plan"], [line["plan"] for line in turns.large]
        assert calls() == turns.calls == ["dump"] * len(turns.lines)
