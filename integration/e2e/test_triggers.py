"""What ends a turn besides the end of its last exec: `crab turn`, and the timer."""

import contextlib
import json
import time

from harness import LIMIT, crab, unique, until
from test_armed_restore import Sandbox, both_clients


@contextlib.contextmanager
def a_long_exec(box, script):
    """An exec that works until it is told to go."""
    with box.container.start_exec("bash", "-c", f"{script}; until [ -e /go ]; do sleep 0.05; done") as client:
        try:
            yield client
        finally:
            box.container.exec("touch", "/go", check=False)
            client.communicate(timeout=LIMIT)


def turn(box):
    return json.loads(crab("turn", "--json", box.name).out)


def none(line):
    return line["action"] == "skip" and line["effects"] == [] and line["checkpoint"] is None


@both_clients
def test_crab_turn_is_a_turn_like_the_end_of_an_exec(kind, tmp_path):
    work = "echo $$ >/init; until [ -e /go ]; do sleep 0.05; done; echo made >/made; while :; do sleep 1000; done"
    with Sandbox(kind, tmp_path, "bash", "-c", work) as box:
        first = until(lambda: (line := turn(box))["checkpoint"] and line, "the first turn is whole")
        assert (first["trigger"], first["action"]) == ("manual", "full"), first
        # What init has not done has no checkpoint; `crab checkpoint` always makes one.
        box.sh("touch /go")
        until(lambda: box.container.exec("ls", "/made", check=False).rc == 0, "init works")
        line = until(lambda: none(line := turn(box)) and line, "nothing has changed any more")
        count = len(box.turns())
        assert box.turns()[-1] == line and line["turn"] == count
        assert json.loads(crab("checkpoint", "--json", box.name).out)["action"] == "full"
        # It is the newest turn that is protected, by the checkpoint before it.
        until(lambda: none(turn(box)), "nothing has changed")
        assert box.shown["turn"] == box.turns()[-1]["turn"] > box.shown["checkpoint"]
        said = crab("turn", box.name).out
        assert " none " in said or " full " in said, said
        box.die()
        assert crab("turn", box.name, check=False).rc == 1
        box.restore(f"@{box.turns()[-1]['turn']}")
        box.start()
        assert box.sh("cat /made") == "made\n"


def test_crab_turn_in_the_middle_of_an_exec_keeps_its_files(tmp_path):
    with Sandbox("ctr", tmp_path) as box, a_long_exec(box, "echo one >/file; echo x >/ready"):
        until(lambda: box.container.exec("cat", "/file", "/ready", check=False).out == "one\nx\n", "it works")
        line = turn(box)
        assert line["trigger"] == "manual" and line["action"] == "files" and line["missing"] == ["processes"], line
        assert "live execs" in line["note"], line
    said = crab("turn", unique("nobody"), check=False)
    assert said.rc == 1 and "no sandbox" in said.err and said.out == "", said


def test_the_timer_keeps_what_execs_do_not_end(tmp_path):
    work = "n=0; while [ $n -lt 3 ]; do n=$((n+1)); echo $n >/made; sleep 1; done; exec sleep infinity"
    with Sandbox("ctr", tmp_path, "bash", "-c", work, options=["--annotation", "dev.crab.timer=1s"]) as box:
        # No exec at all: init works for itself.
        until(lambda: [line for line in box.turns() if line["action"] == "full"], "a checkpoint")
        assert {line["trigger"] for line in box.turns()} == {"timer"}
        with a_long_exec(box, "echo long >/file"):
            def kept():
                lines = box.turns()
                return next((line for line in lines if line["missing"] == ["processes"]), None)

            line = until(kept, "the files of a live exec")
            assert line["trigger"] == "timer" and "live execs" in line["note"], line
        until(lambda: box.turns()[-1]["action"] == "full", "whole again")
        assert all(line["checkpoint"] for line in box.turns() if line["trigger"] == "timer"), box.turns()


def test_a_timer_that_finds_nothing_leaves_no_trace(tmp_path):
    with Sandbox("ctr", tmp_path, options=["--annotation", "dev.crab.timer=1s"]) as box:
        box.sh("echo >/file")
        until(lambda: box.turns() and box.turns()[-1]["checkpoint"], "the first turn")
        # It looks three times or so meanwhile.
        end = time.monotonic() + 3.5
        while time.monotonic() < end:
            time.sleep(0.2)
        assert not [line for line in box.turns() if line["trigger"] == "timer" and none(line)]
        # Their numbers were not used up.
        box.sh("echo again >/file")
        lines = until(lambda: (lines := box.turns())[-1]["trigger"] == "exec" and lines, "a turn")
        assert [line["turn"] for line in lines] == list(range(1, len(lines) + 1))
