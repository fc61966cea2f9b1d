"""After a crash, `crab restore` arms a container, and its next start goes on where the checkpoint was taken."""

import fcntl
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess

import pytest

from harness import CRAB, IMAGE, LIMIT, Ctr, Docker, alive, crab, ctr, unique, until

OPT_IN = ("--annotation", "dev.crab.enabled=true")
SEED = 20240428

SERVER = f"""
import hashlib, os, random, socket
memory = os.urandom(64 << 20)
generator = random.Random({SEED})
server = socket.socket(socket.AF_UNIX)
server.bind("\\0server")
server.listen()
count = 0
print("listening", flush=True)
while True:
    client, _ = server.accept()
    with client:
        word = client.recv(100)
        count += 1
        client.sendall(repr({{b"hash": lambda: hashlib.sha256(memory).hexdigest(), b"next": generator.random}}[word]()).encode())
        print("answered", count, flush=True)
"""
ASK = """
import socket, sys
for word in sys.argv[1:]:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("\\0server")
        client.sendall(word.encode())
        print(client.recv(1000).decode())
"""


class Sandbox:
    """An opted-in container of either client, and how it dies and comes back."""

    def __init__(self, kind, directory, *command, options=(), image=IMAGE):
        self.kind, self.log_file, self.execs = kind, directory / unique("log"), 0
        if kind == "ctr":
            self.container = Ctr(CRAB, *command, options=[*OPT_IN, *options], output=self.log_file, image=image)
        else:
            self.container = Docker(CRAB, *command, options=[*OPT_IN, *options], image=image)
        self.name = self.container.id if kind == "ctr" else self.container.name

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.container.remove()
        shutil.rmtree(pathlib.Path("/var/lib/crab", "default" if self.kind == "ctr" else "moby", self.container.id), ignore_errors=True)

    def exec(self, *command, **kwargs):
        self.execs += 1
        return self.container.exec(*command, **kwargs)

    def sh(self, script, **kwargs):
        self.execs += 1
        return self.container.sh(script, **kwargs)

    def ask(self, *words):
        return [eval(line) for line in self.exec("python3", "-c", ASK, *words).out.splitlines()]

    def output(self):
        if self.kind == "docker":
            return self.container.logs()
        return self.log_file.read_text() if self.log_file.exists() else ""

    def turns(self):
        return [json.loads(line) for line in crab("log", "--json", self.name).out.splitlines()]

    def turn(self):
        """The number of the last turn, once all that have begun are durable."""
        line = json.loads(crab("checkpoint", "--json", self.name).out)
        assert line["checkpoint"], line
        return line["turn"]

    @property
    def shown(self):
        """The line of `crab ps`."""
        lines = [json.loads(line) for line in crab("ps", "--json").out.splitlines()]
        return next(line for line in lines if line["id"] == self.container.id)

    @property
    def init(self):
        """The pid of its init. After a rollback that is another one than its client knows."""
        return self.shown["pid"]

    def die(self, with_shim=False):
        pid, shim = self.init, self.container.shim
        if with_shim:
            os.kill(shim, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        until(lambda: not alive(pid), "init is dead")
        if self.kind == "docker":
            until(lambda: self.container.state["Status"] == "exited", "Docker knows")
        elif with_shim:
            until(lambda: self.container.status is None and not self.container.bundle.exists(), "containerd has cleaned up")
        else:
            self.container.stopped()
            self.container.delete_task()

    def settled(self, wanted=None):
        """Waits for the last exec's turn; returns its number. `wanted="none"`: repeats a command that only reads until
        its turn was one that changed nothing, as it may not be while other sandboxes' dumps disturb it."""
        def is_none(line):
            return line["action"] == "skip" and not line["effects"]

        def last():
            lines = self.turns()
            return lines and len(lines) == self.execs and (lines[-1]["checkpoint"] or is_none(lines[-1])) and lines[-1]

        for _ in range(10):
            line = until(last, "the turn is protected")
            if not wanted or is_none(line):
                return line["turn"]
            self.sh("true")
        raise AssertionError(f"never none: {self.turns()}")

    def restore(self, which="", options=(), **kwargs):
        return crab("restore", *options, self.name + which, **kwargs)

    def start(self):
        if self.kind == "docker":
            self.container("start")
        else:
            ctr("task", "start", "--detach", "--log-uri", f"file://{self.log_file}", self.container.id)


both_clients = pytest.mark.parametrize("kind", ["ctr", "docker"])


@pytest.mark.parametrize("with_shim", [False, True], ids=["init", "shim-and-init"])
@both_clients
def test_a_process_goes_on_as_if_nothing_had_happened(kind, with_shim, tmp_path):
    expected = random.Random(SEED)
    with Sandbox(kind, tmp_path) as sandbox:
        sandbox.exec("sh", "-c", 'nohup python3 -c "$1" & :', "sh", SERVER)
        until(lambda: sandbox.exec("python3", "-c", ASK, "hash", check=False).rc == 0, "it serves")
        digest, first = sandbox.ask("hash", "next")
        assert first == expected.random()
        sandbox.turn()
        sandbox.die(with_shim)
        sandbox.restore()
        sandbox.start()
        seen = len(sandbox.output())
        assert sandbox.ask("next", "hash") == [expected.random(), digest]
        until(lambda: re.search(r"answered \d+\n", sandbox.output()[seen:]), "its output goes on")
        assert sandbox.ask("next") == [expected.random()]


@both_clients
def test_a_background_server_of_any_kind_goes_on_and_its_output_arrives(kind, tmp_path):
    counter = "until test -e /go; do sleep 0.02; done; i=0; while :; do i=$((i+1)); echo tick $i; echo $i >/count; sleep 0.02; done"
    with Sandbox(kind, tmp_path) as sandbox:
        sandbox.exec("sh", "-c", 'nohup sh -c "$1" & :', "sh", counter)
        sandbox.exec("touch", "/go")

        def ticks():
            return [int(n) for n in re.findall(r"tick (\d+)\n", sandbox.output())]

        until(lambda: len(ticks()) > 5, "its output comes")
        sandbox.turn()
        sandbox.die()
        died_at = ticks()[-1]
        sandbox.restore()
        sandbox.start()
        until(lambda: ticks()[-1] > died_at + 10, "its output goes on")
        # What it wrote between the checkpoint and its death it writes again; nothing is left out.
        assert all(after <= before + 1 for before, after in zip(ticks(), ticks()[1:])), "no gap"
        assert sum(after <= before for before, after in zip(ticks(), ticks()[1:])) <= 1, "it went back once"


@both_clients
def test_files_are_as_they_were(kind, tmp_path):
    with Sandbox(kind, tmp_path) as sandbox:
        sandbox.sh("mkdir /d; echo one >/d/kept; echo x >/d/doomed; ln -s kept /d/link; chmod 640 /d/kept; rm /etc/hostname.old 2>/dev/null; rm /usr/bin/tac")
        turn = sandbox.turn()
        sandbox.sh("echo two >/d/kept; rm /d/doomed; touch /d/new; ln -sf new /d/link; mkdir /usr/bin/tac; rm -r /etc/skel")
        sandbox.turn()
        sandbox.die()
        sandbox.restore(f"@{turn}")
        sandbox.start()
        assert sandbox.sh("cat /d/kept /d/doomed; readlink /d/link; stat -c %a /d/kept; ls /d; ls -d /etc/skel; ls /usr/bin/tac 2>&1", check=False) == (
            "one\nx\nkept\n640\ndoomed\nkept\nlink\n/etc/skel\nls: cannot access '/usr/bin/tac': No such file or directory\n"
        )


@both_clients
def test_what_was_written_after_the_last_checkpoint_is_gone(kind, tmp_path):
    with Sandbox(kind, tmp_path) as sandbox:
        sandbox.sh("echo before >/file")
        sandbox.turn()
        # From outside, and so in no turn.
        pathlib.Path(f"/proc/{sandbox.container.pid}/root/file").write_text("after\n")
        sandbox.die()
        sandbox.restore()
        sandbox.start()
        assert sandbox.sh("cat /file") == "before\n"


@both_clients
def test_a_restored_sandbox_takes_turns_dies_and_is_restored_again(kind, tmp_path):
    with Sandbox(kind, tmp_path) as sandbox:
        for life in range(3):
            sandbox.sh(f"echo {life} >>/lives")
            sandbox.turn()
            sandbox.die()
            sandbox.restore()
            sandbox.start()
        assert sandbox.sh("cat /lives") == "0\n1\n2\n"
        numbers = [turn["turn"] for turn in sandbox.turns()]
        assert numbers == sorted(set(numbers))


def test_only_the_next_start_restores(tmp_path):
    with Sandbox("docker", tmp_path, "sh", "-c", "echo booted; exec sleep infinity") as sandbox:
        until(lambda: sandbox.output() == "booted\n", "it boots")
        sandbox.turn()
        sandbox.die()
        sandbox.restore()
        sandbox.start()
        assert sandbox.sh("echo alive") == "alive\n"
        assert sandbox.output() == "booted\n"
        sandbox.container("restart", options=["--time", "0"])
        until(lambda: sandbox.output() == "booted\nbooted\n", "it boots")


def lock_of(sandbox):
    """Held by the one who writes the sandbox's checkpoints: its shim, `crab gc`, `crab restore`."""
    return pathlib.Path(f"/var/lib/crab/moby/{sandbox.container.id}/lock")


def test_a_start_waits_for_whoever_else_writes_its_checkpoints(tmp_path):
    with Sandbox("docker", tmp_path, "sh", "-c", "echo booted; exec sleep infinity") as sandbox:
        until(lambda: sandbox.output() == "booted\n", "it boots")
        sandbox.turn()
        sandbox.die()
        sandbox.restore()
        with subprocess.Popen(["flock", lock_of(sandbox), "sleep", "2"]) as other:
            until(lambda: subprocess.run(["flock", "-n", lock_of(sandbox), "true"]).returncode, "it is locked")
            sandbox.start()
            assert other.wait(LIMIT) == 0
        # Taken off, and protected.
        assert not lock_of(sandbox).with_name("armed").exists()
        sandbox.turn()
        assert sandbox.output() == "booted\n"


def test_an_armed_start_is_not_done_if_it_would_be_done_again(tmp_path):
    """Nobody could take the arming off, and a later start would go back over all that came since."""
    with Sandbox("docker", tmp_path, "sh", "-c", "echo booted; exec sleep infinity") as sandbox:
        until(lambda: sandbox.output() == "booted\n", "it boots")
        sandbox.turn()
        sandbox.die()
        sandbox.restore()
        with open(lock_of(sandbox)) as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            done = sandbox.container("start", check=False)
            assert done.rc and "written by another process" in done.err and "stays armed" in done.err, done
        sandbox.start()
        assert sandbox.sh("echo alive") == "alive\n"
        assert sandbox.output() == "booted\n" and not lock_of(sandbox).with_name("armed").exists()


def test_an_armed_restore_can_be_taken_back(tmp_path):
    with Sandbox("docker", tmp_path, "sh", "-c", "echo booted; exec sleep infinity") as sandbox:
        until(lambda: sandbox.output() == "booted\n", "it boots")
        sandbox.turn()
        sandbox.die()
        sandbox.restore()
        crab("restore", sandbox.name, "--cancel")
        sandbox.start()
        until(lambda: sandbox.output() == "booted\nbooted\n", "it boots")


@both_clients
def test_restore_can_start_as_well(kind, tmp_path):
    with Sandbox(kind, tmp_path) as sandbox:
        sandbox.exec("sh", "-c", "nohup sleep 12345 & :")
        sandbox.turn()
        sandbox.die()
        crab("restore", sandbox.name, "--start")
        assert "sleep 12345" in sandbox.sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")


def test_a_named_checkpoint_is_found_by_its_name(tmp_path):
    with Sandbox("ctr", tmp_path) as sandbox:
        sandbox.sh("echo one >/file")
        crab("checkpoint", sandbox.name, "--name", "good")
        sandbox.sh("echo two >/file")
        sandbox.turn()
        sandbox.die()
        assert sandbox.restore("@bad", check=False).rc == 1
        sandbox.restore("@good")
        sandbox.start()
        assert sandbox.sh("cat /file") == "one\n"


def test_every_exec_is_a_turn_and_the_log_tells_of_it(tmp_path):
    with Sandbox("ctr", tmp_path) as sandbox:
        for n in range(3):
            sandbox.sh(f"echo {n} >/file")
        sandbox.turn()
        turns = sandbox.turns()
    assert [turn["turn"] for turn in turns] == [1, 2, 3, 4]
    assert [turn["trigger"] for turn in turns] == ["exec"] * 3 + ["manual"]
    assert [turn["action"] for turn in turns] == ["full", "files", "files", "full"]
    fields = {"turn", "trigger", "effects", "action", "plan", "pre_dumps", "checkpoint", "changed_files", "bytes_captured", "bytes_written", "missing",
              "look_us", "freeze_us", "durable_us", "exposed_us", "started_at", "ended_at", "note"}  # fmt: skip
    for turn in turns:
        assert set(turn) == fields
        assert turn["checkpoint"].startswith("blake3:")
        assert (turn["action"] == "files" or turn["freeze_us"] > 0) and turn["freeze_us"] <= turn["durable_us"] < 20e6 and turn["bytes_written"] > 0


def test_old_turns_go_and_the_newest_stay(tmp_path):
    with Sandbox("ctr", tmp_path, options=["--annotation", "dev.crab.keep=2"]) as sandbox:
        for n in range(4):
            sandbox.sh(f"echo {n} >/file")
        last = sandbox.turn()
        sandbox.die()
        assert sandbox.restore("@1", check=False).rc == 1
        sandbox.restore(f"@{last - 1}")
        sandbox.start()
        assert sandbox.sh("cat /file") == "3\n"


def test_execs_wait_at_the_gate_for_the_last_turn(tmp_path):
    with Sandbox("ctr", tmp_path) as sandbox:
        for n in range(3):
            sandbox.sh(f"echo {n} >/file")
            turn = sandbox.execs
            sandbox.sh("true")
            durable = [line["turn"] for line in sandbox.turns() if line["checkpoint"]]
            assert turn in durable, "the turn before was durable when this exec ran"


# turns that changed nothing


def test_a_turn_that_changed_nothing_is_restored_from_the_checkpoint_before_it(tmp_path):
    with Sandbox("ctr", tmp_path) as sandbox:
        sandbox.sh("echo one >/file")
        sandbox.settled()
        sandbox.sh("cat /file")
        none = sandbox.settled(wanted="none")
        held = max(line["turn"] for line in sandbox.turns() if line["checkpoint"])
        # Protected up to the newest turn, though its checkpoint is an earlier one's.
        shown = next(json.loads(line) for line in crab("ps", "--json").out.splitlines() if sandbox.name in line)
        assert (shown["turn"], shown["checkpoint"]) == (none, held)
        assert re.search(rf"^ +{none} +- +none ", crab("log", sandbox.name).out, re.M)
        assert crab("verify", f"{sandbox.name}@{none}").out == f"default/{sandbox.name}@{held}  ok\n"
        sandbox.sh("echo two >/file")
        last = sandbox.turn()
        sandbox.die()
        said = sandbox.restore(f"@{none}").out
        assert f"restores turn {held}" in said and f"turn {none} changed nothing" in said, said
        assert json.loads(sandbox.restore(f"@{none}", options=["--json"]).out)["armed"] == held
        sandbox.start()
        assert sandbox.sh("cat /file") == "one\n"
        until(lambda: sandbox.turns()[-1]["turn"] > last, "the next turn has a number of its own")


def test_a_turn_that_changed_nothing_goes_with_the_checkpoint_before_it(tmp_path):
    with Sandbox("ctr", tmp_path, options=["--annotation", "dev.crab.keep=1"]) as sandbox:
        sandbox.sh("echo one >/file")
        sandbox.settled()
        sandbox.sh("cat /file")
        none = sandbox.settled(wanted="none")
        sandbox.sh("echo two >/file")
        last = sandbox.turn()
        sandbox.die()
        done = sandbox.restore(f"@{none}", check=False)
        assert done.rc == 1 and f"no checkpoint of turn {none}" in done.err and "no longer kept" in done.err, done
        assert sandbox.restore(f"@{last + 7}", check=False).rc == 1
        sandbox.restore()
        sandbox.start()
        assert sandbox.sh("cat /file") == "two\n"


# what is refused


def test_a_running_sandbox_is_not_armed(tmp_path):
    with Sandbox("ctr", tmp_path) as sandbox:
        sandbox.turn()
        done = sandbox.restore(check=False)
        assert done.rc == 1 and "running" in done.err
        assert sandbox.sh("echo alive") == "alive\n"


def test_a_broken_checkpoint_is_refused_and_an_older_one_works(tmp_path):
    with Sandbox("ctr", tmp_path) as sandbox:
        sandbox.sh("echo one >/file")
        good, bad = sandbox.turn(), sandbox.turn()
        sandbox.die()
        pack = pathlib.Path(f"/var/lib/crab/default/{sandbox.container.id}/packs/{bad}.pack")
        whole = pack.read_bytes()
        # A block that is not what it was, and then a pack that is cut short.
        for broken in (whole[:100] + bytes([whole[100] ^ 1]) + whole[101:], whole[:len(whole) // 2]):
            pack.write_bytes(broken)
            done = sandbox.restore(check=False)
            assert done.rc == 1 and pack.name in done.err and "damaged" in done.err, done
        assert crab("verify", sandbox.name, check=False).rc == 1
        sandbox.restore(f"@{good}")
        sandbox.start()
        assert sandbox.sh("cat /file") == "one\n"


def test_a_live_exec_fails_a_checkpoint_that_names_it(tmp_path):
    with Sandbox("ctr", tmp_path) as sandbox:
        with sandbox.container.start_exec("sh", "-c", "echo up; exec sleep 1000", exec_id="open") as client:
            assert client.stdout.readline() == b"up\n"
            done = crab("checkpoint", sandbox.name, check=False)
            assert done.rc == 1 and "open" in done.err, done
            sandbox.container.kill(options=["--exec-id", "open"])
            client.communicate(timeout=LIMIT)
        sandbox.turn()


def test_a_sandbox_that_has_not_opted_in_says_how_to(tmp_path):
    with Ctr(CRAB) as container:
        done = crab("checkpoint", container.id, check=False)
        assert done.rc == 1 and "dev.crab.enabled=true" in done.err
        line = next(json.loads(line) for line in crab("ps", "--json").out.splitlines() if container.id in line)
        assert line["id"] == container.id


def test_wrong_usage_is_2_and_an_unknown_sandbox_is_1():
    assert crab("fly", check=False).rc == 2
    assert crab("restore", check=False).rc == 2
    done = crab("log", "nobody", check=False)
    assert done.rc == 1 and "nobody" in done.err


def test_a_sandbox_that_shares_its_ipc_namespace_keeps_its_files_alone(tmp_path):
    # What belongs to others would come back private: a checkpoint that lies.
    with Sandbox("ctr", tmp_path, options=["--with-ns", "ipc:/proc/1/ns/ipc"]) as box:
        box.exec("true")
        said = crab("checkpoint", box.name, check=False)
        assert said.rc == 1 and "shares its IPC namespace" in said.err, said
        turn, asked = box.turns()
        assert turn["missing"] == ["processes"] and "shares its IPC namespace" in turn["note"], turn
        assert asked["checkpoint"] is None, asked
        box.die()
        assert "boots on the files" in box.restore().out
        box.start()
        assert box.sh("echo alive") == "alive\n"
