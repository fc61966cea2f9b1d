"""The host's budget for checkpoints: what `crab engine` shows, and that a turn waits for what the host has not got."""

import json
import re

from harness import crab
from test_inspector import Watched

MB = 1_000_000


def engine():
    return json.loads(crab("engine", "--json").out)


def test_what_turns_write_is_charged_and_shown(tmp_path):
    before = engine()
    with Watched(tmp_path) as sandbox:
        line = sandbox.turn_of("sh", "-c", "echo text >/file")
        assert line["checkpoint"], line
        after = engine()
        assert after["grants"] == before["grants"] + 1
        assert after["written_bytes"] == before["written_bytes"] + line["bytes_written"]
        assert (after["rate"], after["tokens"], after["warnings"]) == (None, None, [])
        assert after["idle"] >= 1
        # A turn that changes nothing asks for nothing.
        sandbox.settle()
        granted = engine()["grants"]
        sandbox.turn_of("true")
        assert engine()["grants"] == granted
    text = crab("engine").out
    assert re.search(r"^rate +unlimited$", text, re.M), text
    metrics = crab("engine", "--prometheus").out
    assert re.search(r"^crab_engine_grants_total \d+$", metrics, re.M), metrics
    assert re.search(r'^crab_engine_queue\{class="urgent"\} 0$', metrics, re.M), metrics


def test_the_journal_says_what_was_planned_and_what_for(tmp_path):
    with Watched(tmp_path) as sandbox:
        sandbox.settle()
        for command, plan in (
            ("true", "nothing: nothing has changed"),
            ("echo text >/file", "files: no process has changed (expected: "),
            ("sleep 1000 >/dev/null 2>&1 &", "full: processes have changed, or may have (expected: "),
        ):
            line = sandbox.turn_of("sh", "-c", command)
            assert line["plan"].startswith(plan), line
        # By hand it is a whole one, whatever has changed.
        asked = json.loads(crab("checkpoint", "--json", sandbox.name).out)
        assert asked["plan"].startswith("full: it was asked for (expected: "), asked
        assert asked["plan"] in crab("show", f"{sandbox.name}@{asked['turn']}").out


def test_a_debt_is_waited_for_and_the_journal_says_so(tmp_path, config):
    config('engine.rate = "2MB/s"\nengine.burst = "2MiB"\n')
    with Watched(tmp_path) as sandbox:
        # Random bytes do not compress: seconds of the rate, charged to whoever comes next.
        large = sandbox.turn_of("sh", "-c", f"head -c {12 * MB} /dev/urandom >/large")
        assert large["bytes_written"] > 12 * MB, large
        state = engine()
        assert state["tokens"] < 0, state
        assert "a debt" in crab("engine").out
        after = sandbox.turn_of("sh", "-c", "echo text >/small")
        assert after["checkpoint"], after
        assert "for the host's budget" in after["note"], after
