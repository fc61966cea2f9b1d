"""What the command line of replay.py means."""
import json
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import replay  # noqa: E402
import trace as traces  # noqa: E402

NEEDED = ["--trace", "t.jsonl", "--image", "i", "--client", "ctr"]


def test_annotations_are_added_to_those_of_crab():
    args = replay.parse([*NEEDED, "--annotation", "dev.crab.a=1", "--annotation", "b=x=y"])
    assert replay.annotations(args) == {"dev.crab.enabled": "true", "dev.crab.a": "1", "b": "x=y"}
    assert replay.annotations(replay.parse([*NEEDED, "--no-crab"])) == {}


@pytest.mark.parametrize("wrong", ["key", "=value", ""])
def test_what_is_no_annotation_is_refused(wrong):
    with pytest.raises(SystemExit):
        replay.parse([*NEEDED, "--annotation", wrong])


@pytest.mark.parametrize("wrong", [["--fault-kinds", "earthquake"], ["--fault-kinds", ""], ["--copies", "0"],
                                   ["--faults", "2", "--no-crab"], ["--faults", "2", "--kill-at", "3"],
                                   ["--trace", "another.jsonl"]], ids=str)
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(SystemExit):
        replay.parse([*NEEDED, *wrong])


HEADER = {"trace": "t", "style": "exec", "cwd": "/"}


def written(path, *thinking):
    turns = [{"turn": n, "command": "true", "think_ms": ms} for n, ms in enumerate(thinking, start=1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in [HEADER, *turns]))
    return path


def test_thinking_is_drawn_from_the_trace_or_else_from_its_directory(tmp_path):
    own, none = written(tmp_path / "a.jsonl", 1, 2, None, 3), written(tmp_path / "b.jsonl", *[None] * 20)

    def drawn(path, seed):
        return [turn.think_ms for turn in traces.with_drawn_thinking(traces.load(path), path, seed).turns]

    assert set(drawn(none, "1")) <= {1, 2, 3} and drawn(none, "1") == drawn(none, "1") != drawn(none, "2")
    written(tmp_path / "c.jsonl", 50)
    assert set(drawn(own, "1")) <= {1, 2, 3}, "its own come first"
    assert 50 in drawn(none, "3")
    own.unlink(), (tmp_path / "c.jsonl").unlink()
    with pytest.raises(traces.Unsupported):
        drawn(none, "1")
