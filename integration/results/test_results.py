"""The figures, the report and the plan, on made-up runs."""
from __future__ import annotations

import os
import random
import sys
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import figures as f  # noqa: E402
import recover  # noqa: E402
import report  # noqa: E402
import settings  # noqa: E402

import full  # noqa: E402  (integration/results/full.py needs clients, on the path by recover)


def line(action: str, durable: int | None = None, exposed: int = 0, effects: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    return {"action": action, "effects": list(effects), "checkpoint": "c" if durable is not None else None, "bytes_written": 100, "changed_files": 3,
            "durable_us": durable, "exposed_us": exposed, "look_us": 500} | more


def run(mode: str, times: list[float], trace: str = "tb-tmux", factor: float = 1.0, **more: Any) -> dict[str, Any]:
    turns = [{"turn": n, "code": 0, "expected": 0, "ms": time, "held_ms": 0.0} for n, time in enumerate(times, 1)]
    return {"mode": mode, "trace": trace, "factor": factor, "turns": turns, "journal": [], "device_bytes": 0, "wall_s": 100.0,
            "load": 0.0, "kept_bytes": [400, 600], "kept_file_bytes": [0, 300]} | more


def recovery(equal: int, asked: int, chat: tuple[bool, bool], files: tuple[bool, bool]) -> dict[str, Any]:
    def of(pair: tuple[bool, bool]) -> list[dict[str, Any]]:
        return [{"turn": 3, "files_equal": pair[0], "processes_equal": pair[1], "wrong_codes": [] if pair[0] else [4]}]
    faults = [{"turn": n, "equal": n < equal, "mode": "exact", "unequal": []} for n in range(asked)]
    return {"trace": "tb-tmux", "turns": [3], "crab": {"asked": asked, "planned": asked, "faults": faults, "wrong_codes": []},
            "chat": of(chat), "files": of(files)}


def data(**more: Any) -> dict[str, Any]:
    journal = [line("skip"), line("files", 10_000), line("full", 200_000, 0, ("memory",)), line("skip")]
    return {"machine": {"cpu": "a CPU", "cpus": 2, "memory_kb": 8_000_000, "kernel": "6.18", "date": "2026-01-01",
                        "profile": "release", "quick": False, "think": None},
            "missing": [], "failed": [], "remarks": [],
            "runs": [run("none", [100.0, 200.0]), run("crab", [101.0, 202.0], journal=journal, device_bytes=4_000_000, wall_s=100.5),
                     run("full", [100.0, 200.0], device_bytes=100_000_000)],
            "recoveries": [recovery(5, 5, (False, False), (True, False))]} | more


def test_a_quantile_is_a_value_that_was_seen():
    assert [f.quantile([4, 1, 3, 2], q) for q in (0.0, 0.25, 0.5, 0.51, 0.99, 1.0)] == [1, 1, 2, 3, 4, 4]
    assert f.quantile([], 0.5) is None


def test_execs_are_paired_by_turn_and_their_repetitions_averaged():
    runs = [run("none", [100.0, 200.0]), run("crab", [110.0, 200.0]), run("none", [120.0, 200.0]), run("crab", [130.0]),
            run("crab", [9.0], trace="without-a-partner"), run("crab", [9.0], factor=0.5)]
    assert f.exec_pairs(runs, "crab") == [(110.0, 120.0), (200.0, 200.0)]
    assert f.ratio(f.exec_pairs(runs, "crab")) == 320 / 310


def test_what_an_exec_was_held_counts_and_a_time_out_of_all_does_not():
    runs = [run("none", [100.0, 60_000.0, 60_000.0]), run("crab", [100.0, 60_000.0, 70_000.0])]
    for one in runs:
        one["turns"][1]["code"] = settings.TIMED_OUT
    runs[1]["turns"][2]["code"] = settings.TIMED_OUT
    runs[1]["turns"][0]["held_ms"] = 30.0
    assert f.exec_pairs(runs, "crab") == [(100.0, 130.0), (60_000.0, 70_000.0)]
    assert settings.TIMED_OUT == report.replaying.TIMED_OUT


def test_the_interval_is_the_same_each_time_and_holds_the_ratio():
    pairs = [(100.0, 100.0 + n) for n in range(-10, 20)]
    low, high = f.interval(pairs)
    assert (low, high) == f.interval(pairs)
    assert low < f.ratio(pairs) < high
    assert f.interval([(100.0, 102.0)] * 9) == (1.02, 1.02)


def test_a_turn_that_was_not_kept_is_none_of_the_kinds():
    assert f.kind(line("skip")) == "nothing"
    assert f.kind(line("skip", effects=("files",))) == "unprotected"
    assert f.kind(line("full", None, effects=("memory",))) == "unprotected"
    assert f.kind(line("full", 5)) == "processes"
    # Files without the processes, then nothing new of these files, then neither.
    assert f.kind(line("files", 5, missing=["processes"])) == "unprotected"
    assert f.kind(line("skip", note="no file changed; without processes: ptraced")) == "unprotected"
    assert f.kind(line("skip", note="not protected: no space")) == "unprotected"


def test_bytes_are_compared_at_the_factor_that_mode_full_has():
    runs = [run("full", [], factor=0.2, device_bytes=100), run("crab", [], factor=0.2, device_bytes=10),
            run("crab", [], factor=0.2, device_bytes=20), run("crab", [], factor=1.0, device_bytes=99)]
    assert f.traffic(runs) == {"tb-tmux": (100, 15)}
    assert f.down(f.traffic(runs).values()) == 0.85


def test_client_time_is_of_runs_with_the_recorded_think_times_only():
    runs = [run("none", [], factor=0.2, wall_s=1.0), run("crab", [], factor=0.2, wall_s=9.0), run("none", []), run("crab", [], wall_s=101.0)]
    assert f.client_time(runs) == {"tb-tmux": (100.0, 101.0)}


def test_what_is_as_wanted_says_nothing_more():
    text = report.main_table(data())
    assert "falls short" not in text
    for cell in ("5 of 5 (100 %)", "down by 96.0 %", "+0.50 %, 1 traces", "1.010 (95 % interval", "0.50 ms", "files 10 ms / 10 ms",
                 "processes 200 ms / 200 ms", "chat: state equal 0 of 1 (0 %)", "50 %: tb-tmux 50 %"):
        assert cell in text, cell


def test_what_falls_short_is_written_as_such():
    bad = data(recoveries=[recovery(4, 5, (False, False), (False, False))])
    bad["runs"] = [run("none", [100.0]), run("full", [100.0], device_bytes=10), run("crab", [120.0], wall_s=102.0, device_bytes=9, journal=[
        line("files", 30_000, 50_000, look_us=2_000, bytes_captured=7_000_000, freeze_us=0),
        line("full", 300_000, 50_000, look_us=2_000, bytes_captured=9_000_000, freeze_us=200_000)])]
    text = report.main_table(bad)
    for name in ("recovery correctness", "bytes against", "client time", "sum of exec times", "look at a turn", "checkpoint p50", "exposed delay"):
        row = next(row for row in text.splitlines() if row.startswith(f"| {name}"))
        assert "falls short" in row, row
    assert "unequal: tb-tmux, init after turn 4" in text
    assert "processes 50 ms / 50 ms: **falls short**" in text
    assert "captured 3 files and 7.0 MB at the median, 3 files and 7.0 MB at the most, to be read, hashed, compressed and synced; " in text
    assert "compressed and synced; they were frozen for 200 ms at the median" in text
    assert [line["changed_files"] for line in f.slow_lines(bad["runs"], "files", 29)] == [3] and f.slow_lines(bad["runs"], "files", 30) == []


def test_of_crabs_bytes_the_packs_and_the_first_checkpoint_are_told_apart():
    runs = [run("crab", [], device_bytes=800, journal=[line("full", 5, bytes_written=300), line("files", 5), line("skip", bytes_written=0)])]
    assert (f.stored_share(runs), f.first_share(runs)) == (0.5, 0.75)
    assert f.file_share([run("full", [])]) == 0.3 and f.file_share(runs) is None
    assert f.durable_ms(runs, "processes") == [0.005] and f.durable_ms(runs, "processes", but_first=True) == []
    # The first one was taken before the first turn.
    runs[0]["begin"] = [line("full", 5, bytes_written=400)]
    assert (f.stored_share(runs), f.first_share(runs)) == (1.0, 0.5)
    assert f.durable_ms(runs, "processes", but_first=True) == [0.005]


def test_a_page_is_unseen_once_and_zeros_never():
    rng = random.Random(1)
    first, second, short = (rng.randbytes(size) for size in (settings.PAGE, settings.PAGE, 100))
    kept = [[first + bytes(settings.PAGE) + first], [first], [short, second + first]]
    found = full.unseen_bytes(kept)
    # Noise does not compress: what zstd adds is a few bytes.
    assert [round(size, -2) for size in found] == [round(settings.PAGE, -2), 0, round(settings.PAGE + 100, -2)]
    assert full.unseen_bytes([[bytes(2 * settings.PAGE)]]) == full.unseen_bytes([[]])
    runs = [run("full", [], kept_bytes=[100, 100], unseen_bytes=[80, 20]), run("crab", [])]
    assert f.unseen_share(runs) == 0.5 and f.unseen_share([run("crab", [])]) is None
    # 300 bytes at the device, of which 100 are unseen; crab writes 150.
    runs = [run("full", [], unseen_bytes=[60, 40], device_bytes=300), run("crab", [], device_bytes=150)]
    assert f.saved_of_savable(runs) == 0.75 and f.saved_of_savable([]) is None


def test_what_was_not_measured_is_missing():
    crashed = [name for name in settings.TRACES if name not in settings.NOT_CRASHED]
    assert report.missing(settings.TRACES, [*crashed, *settings.RECOVERED_IN_VM], quick=False) == []
    assert report.missing(settings.TRACES[1:], crashed, quick=False) == [settings.TRACES[0], *settings.RECOVERED_IN_VM]
    assert report.missing(settings.TRACES, [*crashed[1:], *settings.RECOVERED_IN_VM], quick=False) == [f"recoveries of {crashed[0]}"]
    assert report.missing(settings.TRACES, [], quick=True) == [
        f"recoveries of {name}" for name in settings.QUICK_TRACES if name not in settings.NOT_CRASHED_QUICKLY]


def test_runs_of_another_build_are_named():
    run = lambda trace, **more: {"trace": trace} | more  # noqa: E731
    assert report.builds([run("a"), run("b")]) == ""
    assert report.builds([run("a", build="1"), run("b", build="1")]) == ""
    assert report.builds([run("a"), run("a"), run("b", build="1"), run("c", build="0"), run("d", build="1"), run("e", build="1")]) == (
        "The runs of a, c are of another build of crab than the others.")


def test_what_a_file_is_called_does_not_hide_that_its_pages_are_known(tmp_path, monkeypatch):
    """Mode full keeps it again under another name; whoever stores pages has them."""
    contents = random.Random(2).randbytes(3 * settings.PAGE)
    monkeypatch.setattr(full, "upper", lambda _init: tmp_path)
    keeper = full.Keeper(SimpleNamespace(alive=lambda: 1), tmp_path)
    (tmp_path / "a").write_bytes(contents)
    (head, kept), = keeper._changed()
    assert head.startswith(b"a") and kept == contents
    (tmp_path / "a").rename(tmp_path / "another-name")
    again = keeper._changed()
    first, second = full.unseen_bytes([[head, kept], [part for file in again for part in file]])
    assert first > 3 * settings.PAGE and second < 400


def test_a_run_that_ended_early_or_lost_a_turn_is_told():
    summary = {"failure": None, "turns": 3, "turns_in_trace": 3, "plan": {"1": "init", "2": "twice"}, "codes_not_as_expected": []}
    kept, lost = line("files", 5, trigger="exec"), line("files", 5, trigger="exec", missing=["processes"])
    turns = [{"turn": 1, "crab": kept}, {"turn": 2, "crab": lost}, {"turn": 3, "crab": None}]
    result = {"summary": summary, "turns": turns[:1], "faults": []}
    assert recover.why_bad(result) is None
    assert recover.why_bad(result | {"turns": turns}) == "not protected: turns 2"
    assert recover.why_bad(result | {"summary": summary | {"turns": 2}}) == "ended after 2 of 3 turns"
    assert recover.why_bad(result | {"summary": summary | {"failure": "it hangs"}}) == "it hangs"
    told = recover.told(result)
    assert (told["asked"], told["planned"], told["failure"]) == (3, 2, None)


def test_a_run_without_an_end_does_not_end_as_others(tmp_path):
    paths = [tmp_path / f"{name}.final" for name in ("crashed", "first", "second")]
    paths[1].write_text("{}")
    end = recover.at_the_end(*paths)
    assert end["equal"] is False and end["unequal"] == ["the run crashed has no end", "the run second has no end"]


def test_a_recovery_in_the_virtual_machine_counts():
    replayed = {"summary": {"plan": {"14": "twice", "3": "exec"}, "codes_not_as_expected": [], "failure": "it hangs", "turns": 9, "turns_in_trace": 20},
                "turns": [],
                "faults": [{"turn": 3, "kind": "exec", "equal": True, "mode": "exact", "unequal": []}]}
    one = recover.in_vm("tb-nginx", replayed)
    assert (one["turns"], one["crab"]["asked"]) == ([3, 14], 3)
    assert "2 faults were not come to" in report.row_recovered(data(recoveries=[one]))[-1]
    table = report.recovery_table(data(recoveries=[one]))
    assert "| tb-nginx | exec 3 | 1 of 3 (33 %) | not measured | none | — | — | — |" in table
    assert "it hangs" in report.row_recovered(data(recoveries=[one]))[-1]


def test_a_crash_that_was_not_come_to_is_no_success():
    one = recovery(3, 3, (True, True), (True, True))
    one["crab"]["asked"] = 5
    one["crab"]["faults"][0] |= {"mode": "cut", "late": True}
    cell = report.row_recovered(data(recoveries=[one]))[-1]
    assert "(2 exactly, 1 but for processes that ran and moved no data; 1 faults came late)" in cell
    assert "3 of 5" in cell and "2 faults were not come to" in cell


def test_another_end_than_without_faults_falls_short():
    one = recovery(1, 1, (True, True), (True, True))
    one["crab"]["end"] = {"equal": True, "unequal": [], "paths": 9, "excluded": ["path /x"]}
    cell = report.row_recovered(data(recoveries=[one]))[-1]
    assert "without faults: 1 of 1" in cell and "falls short" not in cell
    assert "equal: 9 paths but 1" in report.recovery_table(data(recoveries=[one]))
    one["crab"]["failure"] = "ended after 2 of 3 turns"
    assert "falls short**: tb-tmux: ended after 2 of 3 turns" in report.row_recovered(data(recoveries=[one]))[-1]
    one["crab"] |= {"failure": None, "wrong_codes": [7]}
    assert "| equal: 9 paths but 1 | 7 |" in report.recovery_table(data(recoveries=[one]))
    one["crab"]["end"] |= {"equal": False, "unequal": ["/a: 1 -> 2"]}
    cell = report.row_recovered(data(recoveries=[one]))[-1]
    assert "without faults: 0 of 1" in cell and "falls short**: another end: tb-tmux" in cell


def test_a_report_of_nothing_claims_nothing():
    text = report.main_table(data(runs=[], recoveries=[]))
    assert text.count("not measured") >= 5 and "falls short" not in text


def test_the_page_holds_every_constant_and_marks_a_trial():
    page = report.page(data())
    for module in (settings, report.replaying):
        assert all(f"`{name}`" in page for name in vars(module) if name.isupper())
    assert "A trial run" not in page
    trial = data(missing=["swe-django-16612"])
    trial["machine"] |= {"profile": "debug", "quick": True}
    page = report.page(trial)
    assert "**A trial run (debug binaries, `--quick`: " in page and ", without swe-django-16612): its figures are no results.**" in page
    trial["machine"]["profile"] = "release"
    page = report.page(trial)
    assert "**A short run (`--quick`: " in page and "; without swe-django-16612).**" in page and "trial" not in page
    assert "Somebody compiled beside it." in report.page(data(remarks=["Somebody compiled beside it."]))
    assert "A trial run (failed: no disk)" in report.page(data(failed=["no disk"]))


def test_plots_are_well_formed_whatever_there_is_to_draw():
    for some in (data(), data(runs=[], recoveries=[])):
        for text in report.plots(some).values():
            ElementTree.fromstring(text)


def test_the_modes_take_turns():
    assert settings.plan("tb-tmux", None, quick=True) == [("none", 1.0, 0), ("crab", 1.0, 0), ("full", 1.0, 0)]
    full = settings.plan("swe-requests-5414", None, quick=False)
    assert [mode for mode, factor, _ in full if mode in ("none", "crab") and factor == settings.FACTOR] == ["none", "crab", "crab", "none"][:2 * settings.ROUNDS]
    assert full[-2:] == [("none", 1.0, 0), ("crab", 1.0, 0)]
    assert {mode for mode, _, _ in full} == set(settings.MODES)


def test_the_readme_has_the_table_of_results_only():
    readme = "# crab\n" + "old\n".join(report.MARKS) + "more\n"
    assert report.in_readme(readme, data()) == f"# crab\n{report.MARKS[0]}{report.main_table(data()).replace('](engine', '](docs/engine')}{report.MARKS[1]}more\n"
    short = data()
    short["machine"]["quick"] = True
    assert f"{report.MARKS[0]}**A short run (" in report.in_readme(readme, short)
    trial = data()
    trial["machine"]["profile"] = "debug"
    assert report.in_readme(readme, trial) == readme
    assert report.in_readme("# no marks\n", data()) == "# no marks\n"
