"""The soundness suite as tests, and tests of the suite itself: it fails when the inspector is blind, wholly or in part."""
from __future__ import annotations

import collections
import os
import pathlib
import re
import subprocess

import pytest

import coverage_table
import suite
from driver import default_binary
from filesystems import available
from sandbox import PREFIX, Cgroup, unified

FAKE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fake_driver.py")

#: Leaving one probe out must cost misses, in these effects, on each of these file systems. Two probes are not here,
#: since no run without them has missed anything, which proves neither needed nor superfluous: ctime_xchg_skip tells of
#: a second change within one clock tick, and no run of this suite has got an effect into the tick of the cut before it;
#: writeback_mark_inode_dirty tells of stores into mappings, and those of an earlier turn count as changed anyway.
ABLATION = {
    "inode_set_ctime_to_ts": (("ext4", "xfs", "btrfs", "tmpfs"), "*"),
    "ctime_ns_xchg": (("ext4", "xfs", "btrfs", "tmpfs"), "*"),
    "ma_write": (("tmpfs",), "mmap_*"),
}


@pytest.fixture
def driver() -> str:
    return default_binary()


def tracepoints() -> set[str]:
    """Those that the kernel describes."""
    found = re.findall(rb"\0btf_trace_(\w+)(?=\0)", pathlib.Path("/sys/kernel/btf/vmlinux").read_bytes())
    return {name.decode() for name in found}


def failures(outcomes: list[suite.Outcome]) -> str:
    return "\n".join(str(o) for o in outcomes if o.bad)


def test_the_four_file_systems_can_be_made() -> None:
    assert available() == ["ext4", "xfs", "btrfs", "tmpfs"]


def test_every_effect_is_reported_and_no_reading_is(driver: str) -> None:
    outcomes = suite.run_all(available(), binary=driver)
    assert not any(o.bad for o in outcomes), failures(outcomes)
    done = collections.Counter(o.fs for o in outcomes)
    assert min(done.values()) >= 86 + 12, done


@pytest.mark.parametrize("probe", ABLATION)
def test_without_a_probe_something_is_missed(driver: str, probe: str) -> None:
    if probe not in tracepoints():
        pytest.skip("older kernels have another set of programs")
    systems, only = ABLATION[probe]
    outcomes = suite.run_all(systems, ("fresh", "dirty"), only, (probe,), driver)
    missed = {fs: sum(len(o.missed) for o in outcomes if o.fs == fs) for fs in systems}
    print(f"without {probe}: {missed}")
    assert all(missed.values()), missed


def test_stores_are_seen_by_the_pages_that_they_dirty(driver: str) -> None:
    """By writeback_mark_inode_dirty: that it fires at all shows only here."""
    for without, seen in (((), True), (("writeback_mark_inode_dirty",), False)):
        outcome, = suite.run_on("ext4", ("fresh",), "mmap_store_after_upper_sync_file_range", without, driver)
        assert ("pages" in outcome.how) == seen


def test_a_blind_inspector_fails_every_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LIE", "silent")
    outcomes = suite.run_on("tmpfs", ("fresh",), "write*,creat*,link,RO_stat", binary=FAKE)
    assert {o.effect.name for o in outcomes if not o.bad} == {"RO_stat", "write_RWF_NOWAIT"}


def test_an_inspector_that_cries_wolf_fails_what_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LIE", "everything")
    outcomes = suite.run_on("tmpfs", ("fresh",), "write,RO_stat,RO_noop", binary=FAKE)
    assert {o.effect.name for o in outcomes if o.bad} == {"RO_stat", "RO_noop"}


def test_an_effect_that_does_not_happen_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a refused system call would look covered."""
    monkeypatch.setenv("FAKE_LIE", "everything")
    effect = suite.effects.table()["FICLONE"]
    monkeypatch.setitem(effect.refused, "tmpfs", "ENOSYS")
    outcomes = suite.run_on("tmpfs", ("fresh",), "FICLONE", binary=FAKE)
    assert [o.wrong for o in outcomes] == [{"failed with EOPNOTSUPP"}]


def test_the_table_in_the_documentation_is_written_and_checked(
        monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    document = tmp_path / "inspector.md"
    monkeypatch.setattr(coverage_table, "DOCUMENT", str(document))
    write, stat = (suite.effects.table()[name] for name in ("write", "RO_stat"))
    done = [suite.Outcome("ext4", write, "fresh"), suite.Outcome("ext4", stat, "fresh")]
    document.write_text("before\n")
    assert coverage_table.handle(done, update=True, check=False) == 1  # nowhere to put it
    document.write_text(f"before\n{coverage_table.BEGIN}\nold\n{coverage_table.END}\nafter\n")
    assert coverage_table.handle(done, update=False, check=True) == 1
    assert coverage_table.handle(done, update=True, check=False) == 0
    assert coverage_table.handle(done, update=False, check=True) == 0
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "| `write` | file | reported |" in text and "| `RO_stat` |  | silent |" in text
    done[0].missed.add("file")
    assert coverage_table.handle(done, update=False, check=True) == 1


def test_what_a_killed_run_left_behind_is_swept() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    left = f"{unified()}/{PREFIX}{child.pid}"
    os.makedirs(f"{left}/deeper")
    with Cgroup("sweeper") as cgroup:
        assert not os.path.exists(left) and os.path.exists(cgroup.path)
    assert not os.path.exists(cgroup.path)
