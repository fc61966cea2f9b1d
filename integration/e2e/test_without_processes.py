"""Checkpoints without processes, where these cannot be kept (D9b, D9c, D12): the files of the turn, in one cut, and what
is missing and why. A start boots on them. Files are compared by the digest that shares no code with crab.
"""

import json
import os
import pathlib
import sys

from harness import LIMIT, crab, docker, until
from test_armed_restore import Sandbox, both_clients
from test_poison import CANNOT, start

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "digest"))

import container  # noqa: E402
import tree  # noqa: E402

BOOTED = ("sh", "-c", "echo booted; exec sleep infinity")
# Also under Docker, whose seccomp profile refuses io_uring and the like.
WORDS, POISON = CANNOT["a deleted file with another name"]


def files(pid):
    """The root's tree of a sandbox whose files nobody changes, as the digest sees it."""
    points = frozenset(mount.point for mount in container.mounts(pid))
    root = os.open(f"/proc/{pid}/root", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return tree.Scan(root, points).tree
    finally:
        os.close(root)


def difference(before, after):
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def last(box):
    """The journal's line of the newest exec."""

    def settled():
        lines = [line for line in box.turns() if line["trigger"] == "exec"]
        return len(lines) == box.execs and lines[-1]

    return until(settled, "a line for each exec")


def turn(box, script):
    box.sh(script)
    return last(box)


def lacks(line, words=WORDS, missing=("processes",)):
    """Whether a turn has a checkpoint without processes that says so."""
    assert line["action"] == "files" and line["checkpoint"] and line["missing"] == list(missing), line
    assert line["note"].startswith("without processes: ") and words in line["note"], line
    return line["turn"]


def shown(box):
    return next(json.loads(line) for line in crab("ps", "--json").out.splitlines() if f'"{box.container.id}"' in line)


CHANGES = r"""
mkdir -p /made/deep && echo new >/made/deep/file && ln /made/deep/file /made/linked && ln -s nowhere /made/link
echo changed >/etc/issue && chmod 600 /etc/issue && rm -r /etc/skel && rm /usr/bin/tac && mkdir /usr/bin/tac
mv /etc/services /etc/services.moved && mkfifo /made/fifo && truncate -s 1M /made/sparse && touch -d @77 /made/old
python3 -c 'import os; os.setxattr("/made/old", "user.note", b"text")'
"""


@both_clients
def test_a_sandbox_with_a_process_that_cannot_be_kept_boots_on_the_files_of_its_last_turn(kind, tmp_path):
    with Sandbox(kind, tmp_path, *BOOTED) as box:
        whole = turn(box, "echo before >/file; nohup sleep 12345 >/dev/null 2>&1 </dev/null &")
        assert whole["action"] == "full" and whole["missing"] == [], whole
        start(box, POISON)
        first = last(box)
        assert lacks(first) and "files" in first["effects"], first
        line = turn(box, CHANGES)
        number = lacks(line)
        print(f"\n  frozen {line['freeze_us']} us, durable {line['durable_us']} us, {line['bytes_captured']} bytes captured, {line['bytes_written']} written")
        # It stood still for as long as it took to see that the processes cannot be kept.
        assert 0 < line["freeze_us"] < line["durable_us"], line
        # Of the files what differs, as ever.
        assert 10 < line["changed_files"] < 40 and line["bytes_captured"] < 2 << 20, line
        assert "without processes: " in crab("log", box.name).out
        state = shown(box)
        assert (state["turn"], state["checkpoint"], state["kind"]) == (number, number, "files"), state
        assert WORDS in state["notes"][0] and "without processes: process" in crab("ps").out
        before = files(box.container.pid)
        # From outside, so in no turn.
        pathlib.Path(f"/proc/{box.container.pid}/root/after-the-checkpoint").write_text("x")
        box.die()

        assert crab("verify", f"{box.name}@{number}").out.endswith(f"@{number}  ok, without processes\n")
        said = box.restore().out
        assert f"boots on the files of turn {number}, without processes: " in said and WORDS in said, said
        assert f"newest turn with processes is {whole['turn']}: crab restore" in said, said
        armed = json.loads(box.restore(options=["--json"]).out)
        assert (armed["armed"], armed["kind"], armed["with_processes"]) == (number, "files", whole["turn"]), armed
        box.start()
        until(lambda: box.output() == "booted\nbooted\n", "it boots")
        assert difference(before, files(box.container.pid)) == []
        assert box.sh("pgrep -c -x sleep; pgrep -c python3; true") == "1\n0\n", "the processes of a boot, and no other"

        # It is protected as ever, and what was left behind can be gone back to with its processes.
        line = until(lambda: box.turns()[-1]["turn"] > number and box.turns()[-1], "its turns go on")
        assert line["action"] == "full" and line["missing"] == [], line
        box.die()
        assert "restores turn" in box.restore(f"@{whole['turn']}").out
        box.start()
        assert box.sh("pgrep -f 'sleep 1234[5]' >/dev/null && cat /file && ls -d /made 2>&1", check=False).startswith("before\n")
        assert box.output() == "booted\nbooted\n"


def test_it_is_made_anew_when_files_change_and_whole_when_the_cause_is_gone(tmp_path):
    with Sandbox("ctr", tmp_path) as box:
        start(box, POISON)
        number = lacks(last(box))
        # What only reads leaves it as it was, so old turns are not pushed out by equal ones.
        for _ in range(6):
            line = turn(box, "cat /ready")
            assert (line["action"], line["effects"], line["checkpoint"]) == ("skip", [], None), line
            assert "no file changed" in line["note"] and WORDS in line["note"], line
        assert (shown(box)["turn"], shown(box)["checkpoint"]) == (line["turn"], number)
        assert lacks(turn(box, "echo one >/file")) == line["turn"] + 1
        # What is captured is what differs, also after many turns that could not be whole.
        for n in range(6):
            line = turn(box, f"echo {n} >/file")
            assert lacks(line) and line["changed_files"] == 1, line
        line = turn(box, "kill -9 $(cat /ready)")
        assert line["action"] == "full" and line["missing"] == [], line
        # Its files were known, too. (CRIU makes a name in / for a moment.)
        assert line["changed_files"] <= 1, line
        before = files(box.container.pid)
        box.die()
        assert "restores turn" in box.restore().out
        box.start()
        assert difference(before, files(box.container.pid)) == []


def test_the_newest_turn_with_processes_stays_whatever_comes_after_it(tmp_path):
    with Sandbox("ctr", tmp_path, options=["--annotation", "dev.crab.keep=2"]) as box:
        whole = turn(box, "nohup sleep 12345 >/dev/null 2>&1 </dev/null & echo then >/file")["turn"]
        start(box, POISON)
        for n in range(4):
            line = turn(box, f"echo {n} >/file")

        def kept():
            # One may go while it is looked at: they go when the gate is open.
            lines = crab("verify", "--json", box.name, check=False).out.splitlines()
            return {one["turn"]: one["kind"] for one in map(json.loads, lines) if "turn" in one}

        until(lambda: kept() == {whole: "full", line["turn"] - 1: "files", line["turn"]: "files"}, "old ones go")
        box.die()
        box.restore(f"@{whole}")
        box.start()
        assert box.sh("cat /file; pgrep -x sleep | wc -l") == "then\n2\n"


def test_a_boundary_with_a_live_exec_keeps_the_files_and_names_it(tmp_path):
    with Sandbox("ctr", tmp_path, options=["--annotation", "dev.crab.not_turns=sleep *"]) as box:
        turn(box, "echo one >/file")
        with box.container.start_exec("sleep", "1000", exec_id="watcher") as client:
            try:
                until(lambda: box.exec("pgrep", "-x", "sleep", check=False).out.count("\n") == 2, "it runs")
                line = turn(box, "echo two >/file")
                number = lacks(line, "live execs (watcher;")
            finally:
                box.container.kill(options=["--exec-id", "watcher"])
                client.communicate(timeout=LIMIT)
        assert shown(box)["checkpoint"] == number
        line = turn(box, "echo three >/file")
        assert line["action"] == "full", line
        box.die()
        box.restore(f"@{number}")
        box.start()
        assert box.sh("cat /file") == "two\n"


COUNTER = """
if os.fork() == 0:
    one, two = (os.open(name, os.O_WRONLY | os.O_CREAT) for name in ("/one", "/two"))
    n = 0
    while True:
        n += 1
        for fd in (one, two): os.pwrite(fd, b"%10d" % n, 0)
"""
"""Writes a number into two files, one after the other, without a pause."""


def test_the_files_are_those_of_one_moment(tmp_path):
    with Sandbox("ctr", tmp_path) as box:
        start(box, POISON + COUNTER)
        lacks(last(box))
        for _ in range(3):
            line = turn(box, "echo >>/turns")
            number = lacks(line)
            assert line["freeze_us"] > 0, line
        written = int(box.sh("cat /one"))
        box.die()
        box.restore(f"@{number}")
        box.start()
        one, two = map(int, box.sh("cat /one /two; echo").split())
        assert two <= one <= two + 1 and one < written, (one, two, written)


def test_a_stopped_process_keeps_the_files(tmp_path):
    """On which CRIU hangs, with a freezer of cgroup v1; and one that runs all the time, so that all is frozen."""
    with Sandbox("ctr", tmp_path) as box:
        box.sh("nohup sleep 12345 >/dev/null 2>&1 </dev/null & kill -STOP $!; echo $! >/stopped")
        line = turn(box, "nohup sh -c 'while :; do :; done' >/dev/null 2>&1 </dev/null & echo one >/file")
        if pathlib.Path("/sys/fs/cgroup/freezer").exists():
            assert lacks(line, "stopped processes") and line["freeze_us"] > 0, line
            line = turn(box, "kill -CONT $(cat /stopped)")
        assert line["action"] == "full" and line["missing"] == [], line


def test_files_in_memory_are_named_as_missing(tmp_path):
    with Sandbox("ctr", tmp_path) as box:
        start(box, POISON)
        assert lacks(last(box))
        line = turn(box, "echo x >/dev/shm/file; mkdir /run/only-a-directory; echo y >/file")
        assert lacks(line, missing=("processes", "tmpfs")), line
        assert 'without the files of the tmpfs at "/dev/shm"' in line["note"] and '"/run"' not in line["note"], line


def test_whoever_asks_gets_processes_or_an_error_unless_files_will_do(tmp_path):
    with Sandbox("ctr", tmp_path) as box:
        start(box, POISON)
        lacks(last(box))
        count = len(box.turns())
        said = crab("checkpoint", box.name, check=False)
        assert said.rc == 1 and WORDS in said.err and "crab checkpoint --or-files" in said.err, said
        line = json.loads(crab("checkpoint", "--or-files", "--json", "--name", "files", box.name).out)
        assert lacks(line) == box.turns()[-1]["turn"] and len(box.turns()) == count + 2, box.turns()
        said = crab("checkpoint", "--or-files", "--prove", "--json", box.name, check=False)
        line = json.loads(said.out)
        assert said.rc == 1 and line["proved"] is False and lacks(line), said
        assert "is kept" in said.err and "there is nothing to prove" in said.err, said
        box.sh("kill -9 $(cat /ready)")
        line = json.loads(crab("checkpoint", "--or-files", "--json", box.name).out)
        assert line["action"] == "full" and line["missing"] == [], line
        box.die()
        assert "boots on the files" in box.restore("@files").out


@both_clients
def test_a_running_sandbox_does_not_go_back_to_it_and_is_told_the_way(kind, tmp_path):
    with Sandbox(kind, tmp_path) as box:
        whole = turn(box, "echo one >/file")["turn"]
        start(box, POISON)
        number = lacks(turn(box, "echo two >/file"))
        turn(box, "echo three >/file")
        said = crab("rollback", f"{box.name}@{number}", check=False)
        for words in (WORDS, "nothing was touched", f"@{number} --start"):
            assert said.rc == 1 and words in said.err, (words, said)
        assert box.sh("kill -0 $(cat /ready) && cat /file") == "three\n"
        crab("rollback", f"{box.name}@{whole}")
        assert box.sh("cat /file; pgrep -c python3; true") == "one\n0\n"
        # What that error says works: from any client's container, also under Docker's name.
        box.die()
        command = said.err[said.err.index("crab restore"):].split("--start")[0].split()[1:]
        crab(*command, "--start")
        assert box.sh("cat /file") == "two\n"


def test_a_client_that_asks_for_processes_is_not_lied_to(tmp_path):
    with Sandbox("docker", tmp_path) as box:
        start(box, POISON)
        assert lacks(last(box))
        said = docker("checkpoint", "create", "--leave-running", box.name, "cp", check=False)
        assert said.rc != 0 and WORDS in said.err, said
        assert box.sh("kill -0 $(cat /ready) && echo alive") == "alive\n"
