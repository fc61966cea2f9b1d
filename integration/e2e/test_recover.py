"""With `recover = "last"` a sandbox that dies goes on from its last checkpoint, and its client sees the same container."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess

from harness import CRAB, LIMIT, Events, Terminal, crab, ctr, unique, until
from test_armed_restore import ASK, OPT_IN, SEED, SERVER, Sandbox, both_clients

RECOVER = ("--annotation", "dev.crab.recover=last")
SMALL = SERVER.replace("64 << 20", "1 << 20")


def recoveries(name, number=None):
    """The journal's lines of recoveries that are over. One is written before it begins, too."""
    lines = [json.loads(line) for line in crab("log", "--json", name).out.splitlines()]
    lines = [line for line in lines if line["trigger"] == "recovery" and line["ended_at"] != line["started_at"]]
    return len(lines) == number and lines if number else lines


def crash(box):
    """init is killed by nobody that its client knows of; returns when it runs again."""
    before, count = box.init, len(recoveries(box.name))
    os.kill(before, signal.SIGKILL)
    line = until(lambda: recoveries(box.name, count + 1), "it comes back")[-1]
    until(lambda: box.shown["pid"] not in (0, before), "another init")
    return line


@both_clients
def test_memory_goes_back_output_goes_on_and_the_client_sees_the_same_container(kind, tmp_path):
    expected = random.Random(SEED)
    with Sandbox(kind, tmp_path, options=RECOVER) as box:
        box.sh("echo one >/file")
        box.exec("sh", "-c", 'nohup python3 -c "$1" & :', "sh", SMALL)
        until(lambda: box.exec("python3", "-c", ASK, "hash", check=False).rc == 0, "it serves")
        memory, first = box.ask("hash", "next")
        assert first == expected.random()
        box.turn()
        seen = box.container.inspect() if kind == "docker" else box.container.status
        for _ in range(2):
            # Written from outside, so in no turn.
            pathlib.Path(f"/proc/{box.init}/root/file").write_text("lost\n")
            length, turn = len(box.output()), box.turns()[-1]["turn"]
            line = crash(box)
            assert line["checkpoint"] and "signal 9" in line["note"] and f"from turn {turn} to turn" in line["note"], line
            assert box.ask("next", "hash") == [expected.random(), memory]
            assert box.sh("cat /file") == "one\n"
            until(lambda: re.search(r"answered \d+\n", box.output()[length:]), "its output goes on")
            now = box.container.inspect() if kind == "docker" else box.container.status
            assert now == seen, "Pid, StartedAt, RestartCount and all else"
            box.turn()
        assert " back " in crab("log", box.name).out
        # A client's end of it is one.
        if kind == "docker":
            box.container("stop", options=["--time", "1"])
            assert (box.container.state["Status"], box.container.state["ExitCode"]) == ("exited", 137)
        else:
            box.container.kill()
            box.container.stopped()


def test_who_runs_out_of_memory_goes_on_with_what_had_room(tmp_path):
    hog = "import os, time\nwhile not os.path.exists('/grow'): time.sleep(0.05)\nm = bytearray(1 << 30)\nfor i in range(0, 1 << 30, 4096): m[i] = 1\n"
    limits = ("--memory", "64m", "--memory-swap", "64m")
    with Sandbox("docker", tmp_path, "python3", "-c", hog, options=[*RECOVER, *limits]) as box:
        waiting = subprocess.Popen(["docker", "wait", box.name], stdout=subprocess.DEVNULL)
        try:
            turn, before = box.turn(), box.init
            # From outside, so in no turn.
            pathlib.Path(f"/proc/{before}/root/grow").touch()
            lines = until(lambda: recoveries(box.name), "it comes back")
            assert "signal 9" in lines[0]["note"] and f"to turn {turn}" in lines[0]["note"], lines
            until(lambda: box.init not in (0, before), "another init")
            # What made it grow is not there any more.
            assert box.container.exec("ls", "/grow", check=False).rc != 0
            assert box.container.state["Running"] and waiting.poll() is None
        finally:
            box.container.remove()
            waiting.wait(LIMIT)


def test_a_live_exec_ends_with_137_and_containerd_hears_of_nothing_else(tmp_path):
    with Sandbox("ctr", tmp_path, options=RECOVER) as box, Events() as events:
        box.turn()
        with box.container.start_exec("sh", "-c", "echo up; sleep 1000") as client:
            assert client.stdout.readline() == b"up\n"
            crash(box)
            client.communicate(timeout=LIMIT)
            assert client.returncode == 137
        assert box.sh("echo alive") == "alive\n"
        box.container.kill()
        box.container.stopped()
        ends = [m for topic, m in events.of(box.container.id) if topic == "/tasks/exit" and m["id"] == box.container.id]
        assert len(ends) == 1 and ends[0]["exit_status"] == 137, ends


def test_who_dies_again_and_again_is_told_and_the_next_start_goes_on_from_there(tmp_path):
    ill = tmp_path / "volume" / "ill"
    ill.parent.mkdir()
    work = "echo booted; until [ -e /volume/ill ]; do sleep 0.05; done; exit 3"
    mount = ("--mount", f"type=bind,src={ill.parent},dst=/volume,options=rbind:rw")
    with Sandbox("ctr", tmp_path, "bash", "-c", work, options=[*RECOVER, *mount]) as box:
        turn = box.turn()
        ill.touch()
        box.container.stopped()
        notes = [line["note"] for line in recoveries(box.name)]
        assert len(notes) == 3 and all("exit code 3" in note for note in notes), notes
        assert box.container.delete_task() == 3
        ill.unlink()
        box.start()
        assert box.turn() > turn and box.output() == "booted\n", "it has not booted again"
        # Whoever does not want that says so.
        box.die(with_shim=True)
        crab("restore", "--cancel", box.name)
        box.start()
        until(lambda: box.output() == "booted\nbooted\n", "it boots")


def test_the_next_start_goes_on_when_the_shim_has_died_too(tmp_path):
    with Sandbox("docker", tmp_path, options=RECOVER) as box:
        box.exec("sh", "-c", 'nohup python3 -c "$1" & :', "sh", SMALL)
        until(lambda: box.exec("python3", "-c", ASK, "hash", check=False).rc == 0, "it serves")
        (memory,) = box.ask("hash")
        turn = box.turn()
        box.die(with_shim=True)
        box.start()
        assert box.ask("hash") == [memory]
        assert box.turn() > turn
        # Ended by its client, it boots.
        box.container("stop", options=["--time", "1"])
        box.start()
        assert box.container.exec("pgrep", "python3", check=False).out == ""


def test_a_terminal_goes_on(tmp_path):
    name = unique("tty")
    argv = ["ctr", "run", "--rm", "--tty", "--runtime", CRAB, *OPT_IN, *RECOVER, "crab.test/agent:latest", name, "sh"]
    with Terminal(*argv) as terminal:
        try:
            terminal.type("x=then; echo $((40+2))\n")
            terminal.expect("42")
            until(lambda: crab("checkpoint", "--json", name, check=False).out, "it is protected")
            terminal.type("x=later; echo $((50+5))\n")
            terminal.expect("55")
            lines = [json.loads(line) for line in crab("ps", "--json").out.splitlines()]
            pid = next(line["pid"] for line in lines if line["id"] == name)
            os.kill(pid, signal.SIGKILL)
            until(lambda: recoveries(name), "it comes back")
            terminal.type("echo it-is-$x\n")
            terminal.expect("it-is-then")
            terminal.type("exit 0\n")
            assert terminal.finish()[0] == 0
        except BaseException:
            ctr("task", "kill", "-s", "KILL", name, check=False)
            terminal.finish()
            raise
