"""What the command line of replay.py means."""
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import replay  # noqa: E402

NEEDED = ["--trace", "t.jsonl", "--image", "i", "--client", "ctr"]


def test_annotations_are_added_to_those_of_crab():
    args = replay.parse([*NEEDED, "--annotation", "dev.crab.a=1", "--annotation", "b=x=y"])
    assert replay.annotations(args) == {"dev.crab.enabled": "true", "dev.crab.a": "1", "b": "x=y"}
    assert replay.annotations(replay.parse([*NEEDED, "--no-crab"])) == {}


@pytest.mark.parametrize("wrong", ["key", "=value", ""])
def test_what_is_no_annotation_is_refused(wrong):
    with pytest.raises(SystemExit):
        replay.parse([*NEEDED, "--annotation", wrong])
