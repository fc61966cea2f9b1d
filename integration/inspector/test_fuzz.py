"""A short run of the differential fuzzer, and proof that it finds what it is there to find."""
from __future__ import annotations

import os
import random

import pytest

import fuzz
from filesystems import available

FAKE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fake_driver.py")

#: FUZZ_SEED, or another one each time: a failure prints it.
SEED = int(os.environ.get("FUZZ_SEED", random.SystemRandom().randrange(1 << 32)))

#: Of all file systems together.
TURNS = int(os.environ.get("FUZZ_TURNS", 200))


def test_random_turns_have_no_false_negative() -> None:
    tallies = fuzz.run_all(available(), -(-TURNS // len(available())), SEED)
    print(fuzz.summary(tallies))
    assert not any(t.failure for t in tallies), "\n".join(t.failure for t in tallies)
    assert sum(t.changed for t in tallies) > TURNS / 6, "hardly anything was changed"
    assert sum(t.turns - t.changed for t in tallies) > TURNS / 6, "hardly a turn was without a net change"


def test_a_missing_probe_is_found_out() -> None:
    tallies = fuzz.run_all(available(), 150, 3, without=("inode_set_ctime_to_ts",))
    assert any(t.failure for t in tallies)


def test_a_blind_inspector_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LIE", "silent")
    tally = fuzz.run_on("tmpfs", 50, 1, FAKE)
    assert "(verdict)" in tally.failure and "--seed 1" in tally.failure


def test_a_verdict_of_change_where_there_is_none_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LIE", "everything")
    tally = fuzz.run_on("tmpfs", 30, 1, FAKE)
    assert not tally.failure
    assert tally.false_positives == tally.turns - tally.changed > 0


def test_a_seed_plans_the_same_turns_again() -> None:
    plans = []
    for _ in range(2):
        turns = fuzz.Turns.__new__(fuzz.Turns)
        turns.rng, turns.workers = random.Random("7/ext4"), [None] * 4  # type: ignore[list-item]
        plans.append([turns._plan() for _ in range(20)])
    assert plans[0] == plans[1]
