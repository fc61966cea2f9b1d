"""`crab rollback` takes a running sandbox back in place, and its client sees the same container all the time."""

import contextlib
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

from cgroups import cgroup_of, cpu_time, is_frozen, unified_of
from harness import CRAB, LIMIT, Events, Terminal, alive, crab, ctr, docker, together, unique, until
from taskapi import Shim
from test_armed_restore import ASK, OPT_IN, SEED, SERVER, Sandbox, both_clients

sys.path.insert(0, "/src/integration/digest")
import container as sandbox_container  # noqa: E402
import digest  # noqa: E402
import process  # noqa: E402
import tree  # noqa: E402
from diff import differences  # noqa: E402

QUICK = os.environ.get("CRAB_E2E_QUICK") == "1"
CHAOS_SEED = int(os.environ.get("CRAB_E2E_SEED", 0)) or random.SystemRandom().randrange(1, 1 << 32)


def rollback(sandbox, which, **kwargs):
    return crab("rollback", "--json", f"{sandbox.name}@{which}", **kwargs)


@both_clients
def test_memory_and_the_next_random_number_go_back_and_output_goes_on(kind, tmp_path):
    expected = random.Random(SEED)
    with Sandbox(kind, tmp_path) as sandbox:
        sandbox.exec("sh", "-c", 'nohup python3 -c "$1" & :', "sh", SERVER)
        until(lambda: sandbox.exec("python3", "-c", ASK, "hash", check=False).rc == 0, "it serves")
        digest_of_memory, first = sandbox.ask("hash", "next")
        assert first == expected.random()
        turn = sandbox.turn()
        second = expected.random()
        sandbox.ask("next")
        for _ in range(2):
            seen = len(sandbox.output())
            report = json.loads(rollback(sandbox, turn).out)
            assert report["to"] == turn and report["checkpoint"].startswith("blake3:")
            assert set(report["steps_us"]) == {"verify", "journal", "freeze", "kill", "files", "restore"}
            assert sandbox.ask("next", "hash") == [second, digest_of_memory]
            until(lambda: re.search(r"answered \d+\n", sandbox.output()[seen:]), "its output goes on")


@both_clients
def test_files_go_back(kind, tmp_path):
    look = "cat /d/kept /d/doomed; readlink /d/link; stat -c %a /d/kept; ls /d; ls -d /etc/skel; ls /usr/bin/tac 2>&1"
    then = "one\nx\nkept\n640\ndoomed\nkept\nlink\n/etc/skel\nls: cannot access '/usr/bin/tac': No such file or directory\n"
    with Sandbox(kind, tmp_path) as sandbox:
        sandbox.sh("mkdir /d; echo one >/d/kept; echo x >/d/doomed; ln -s kept /d/link; chmod 640 /d/kept; rm /usr/bin/tac")
        turn = sandbox.turn()
        sandbox.sh("echo two >/d/kept; rm /d/doomed; touch /d/new; ln -sf new /d/link; mkdir /usr/bin/tac; rm -r /etc/skel")
        after = sandbox.turn()
        rollback(sandbox, turn)
        assert sandbox.sh(look, check=False) == then
        # What was left behind is another way, and can be gone back to as well.
        rollback(sandbox, after)
        assert sandbox.sh("cat /d/kept; ls /d; ls -d /etc/skel 2>&1", check=False) == (
            "two\nkept\nlink\nnew\nls: cannot access '/etc/skel': No such file or directory\n")
        rollback(sandbox, turn)
        assert sandbox.sh(look, check=False) == then


@both_clients
def test_a_live_exec_ends_with_137_and_is_no_turn(kind, tmp_path):
    with Sandbox(kind, tmp_path) as sandbox:
        turn = sandbox.turn()
        argv = ["sh", "-c", "echo up; sleep 1000"]
        if kind == "ctr":
            client = sandbox.container.start_exec(*argv)
        else:
            client = subprocess.Popen(["docker", "exec", sandbox.name, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        with client:
            assert client.stdout.readline() == b"up\n"
            back = json.loads(rollback(sandbox, turn).out)["turn"]
            client.communicate(timeout=LIMIT)
            assert client.returncode == 137
        assert sandbox.turns()[-1]["turn"] == back
        sandbox.sh("echo alive")
        until(lambda: sandbox.turns()[-1]["turn"] == back + 1, "the next turn has the next number")


@both_clients
def test_turns_go_on_from_there_and_a_crash_does_too(kind, tmp_path):
    with Sandbox(kind, tmp_path) as sandbox:
        sandbox.sh("echo one >/file")
        first = sandbox.turn()
        sandbox.sh("echo two >/file")
        second = sandbox.turn()
        back = json.loads(rollback(sandbox, first).out)["turn"]
        assert back == second + 1
        line = sandbox.turns()[-1]
        assert (line["trigger"], line["action"]) == ("rollback", "skip")
        assert line["note"].startswith(f"rolled back from turn {second} to turn {first}, and its processes, too: "), line
        assert (sandbox.shown["turn"], sandbox.shown["checkpoint"]) == (back, first)
        # The rollback's own number is a state as well, and its checkpoint is that of the turn gone back to.
        assert json.loads(rollback(sandbox, back).out)["to"] == first
        # The newest state, not the newest checkpoint.
        sandbox.die()
        assert json.loads(sandbox.restore(options=["--json"]).out)["armed"] == first
        sandbox.start()
        assert sandbox.sh("cat /file") == "one\n"
        assert sandbox.turn() > back


def test_docker_sees_the_same_container(tmp_path):
    ticks = "trap : TERM; i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.05; done"
    with Sandbox("docker", tmp_path, "sh", "-c", ticks, options=["--restart", "unless-stopped"]) as sandbox:
        container = sandbox.container
        sandbox.sh("echo one >/one")
        crab("checkpoint", sandbox.name, "--name", "good")
        sandbox.sh("rm /one; echo two >/two; mkdir /new")
        sandbox.turn()
        logs = subprocess.Popen(["docker", "logs", "--follow", sandbox.name], stdout=subprocess.PIPE, text=True)
        cgroup = cgroup_of(sandbox.init, "memory")
        unified = unified_of(sandbox.init)
        inspect, ids = container.inspect(), (cgroup.stat().st_ino, unified.stat().st_ino)
        cpu = cpu_time(sandbox.init)
        for _ in range(3):
            rollback(sandbox, "good")
            assert container.inspect() == inspect, "Pid, StartedAt, RestartCount and all else"
        assert (cgroup.stat().st_ino, unified.stat().st_ino) == ids, "the cgroups are the same ones"
        assert cpu_time(sandbox.init) > cpu
        # The pid that Docker knows is nobody else's, and may be signalled.
        os.kill(inspect["State"]["Pid"], signal.SIGKILL)
        assert not alive(inspect["State"]["Pid"])

        assert sandbox.sh("cat /one; ls /two 2>&1", check=False) == "one\nls: cannot access '/two': No such file or directory\n"
        top = container("top", "-eo", "pid,args").out
        assert ticks in top and str(sandbox.init) in top
        stats = json.loads(docker("stats", "--no-stream", "--format", "{{json .}}", sandbox.name).out)
        assert int(stats["PIDs"]) >= 1 and not stats["MemUsage"].startswith("0B")
        assert docker("diff", sandbox.name).out == "A /one\n"
        docker("cp", f"{sandbox.name}:/one", tmp_path / "one")
        assert (tmp_path / "one").read_text() == "one\n"
        (tmp_path / "in").write_text("in\n")
        docker("cp", tmp_path / "in", f"{sandbox.name}:/in")
        assert sandbox.sh("cat /in") == "in\n"
        container("pause")
        container("unpause")
        docker("update", "--memory", "500m", "--memory-swap", "500m", sandbox.name)
        assert sandbox.sh("cat /in") == "in\n"
        # It was written into the container after the last turn, by docker cp; another turn has saved it.
        rollback(sandbox, sandbox.turn())
        limit = next(cgroup / name for name in ("memory.limit_in_bytes", "memory.max") if (cgroup / name).exists())
        assert int(limit.read_text()) == 500 << 20, "what docker inspect says"

        # What `docker logs -f` has shown since: ticks that go on, and went back with each rollback.
        seen = []
        def went_back():
            seen.append(logs.stdout.readline())
            numbers = [int(line.split()[1]) for line in seen]
            return sum(b <= a for a, b in zip(numbers, numbers[1:])) == 4
        until(went_back, "logs -f goes on")
        logs.kill()
        logs.wait()
        logs.stdout.close()

        container("stop", options=["--time", "1"])
        assert container.state["Status"] == "exited" and container.state["ExitCode"] == 137
        container("start")
        assert sandbox.sh("cat /one /in; ls /two 2>&1", check=False) == "one\nin\nls: cannot access '/two': No such file or directory\n"
        until(lambda: "tick 3\n" in container.logs()[-2000:], "it has booted")


def test_a_stop_after_a_rollback_is_heard(tmp_path):
    with Sandbox("docker", tmp_path, "sh", "-c", "trap 'echo bye; exit 7' TERM; while :; do sleep 0.05; done") as sandbox:
        rollback(sandbox, sandbox.turn())
        sandbox.container("stop", options=["--time", str(int(LIMIT))])
        assert sandbox.container.state["ExitCode"] == 7 and sandbox.container.logs() == "bye\n"
        # The end of the new init is that of the container, and has its policy.
        sandbox.container("start")
        assert sandbox.container.state["Running"]


def test_containerd_hears_nothing_of_it(tmp_path):
    with Sandbox("ctr", tmp_path) as sandbox, Events() as events:
        turn = sandbox.turn()
        status = sandbox.container.status
        with Shim.of(sandbox.container) as shim:
            before = shim.call("State", {1: sandbox.container.id}), shim.call("Connect", {1: sandbox.container.id})
            rollback(sandbox, turn)
            assert (shim.call("State", {1: sandbox.container.id}), shim.call("Connect", {1: sandbox.container.id})) == before
        assert sandbox.container.status == status
        sandbox.exec("true")
        events.wait_for(sandbox.container.id, "/tasks/exec-started")
        topics = [topic for topic, _ in events.of(sandbox.container.id)]
        assert "/tasks/exit" not in topics[: topics.index("/tasks/exec-added")], topics
        pids = ctr("task", "ps", sandbox.container.id).out
        assert str(sandbox.init) in pids
        sandbox.container.kill()
        sandbox.container.stopped()
        end = [message for topic, message in events.of(sandbox.container.id) if topic == "/tasks/exit" and message["id"] == sandbox.container.id]
        assert [(message["pid"], message["exit_status"]) for message in end] == [(status[0], 137)], "the pid that it knows"


@both_clients
def test_a_terminal_goes_on(kind, tmp_path):
    name = unique("tty")
    if kind == "ctr":
        argv = ["ctr", "run", "--rm", "--tty", "--runtime", CRAB, *OPT_IN, "crab.test/agent:latest", name, "sh"]
    else:
        argv = ["docker", "run", "--rm", "--interactive", "--tty", "--network", "none", "--name", name, "--runtime", CRAB, *OPT_IN,
                "crab.test/agent:latest", "sh"]  # fmt: skip
    remove = {"ctr": lambda: ctr("task", "kill", "-s", "KILL", name, check=False), "docker": lambda: docker("rm", "-f", name, check=False)}
    with Terminal(*argv) as terminal:
        try:
            terminal.type("x=then; echo $((40+2))\n")
            terminal.expect("42")
            turn = json.loads(until(lambda: crab("checkpoint", "--json", name, check=False).out, "it is protected"))["turn"]
            terminal.type("x=later; echo $((50+5))\n")
            terminal.expect("55")
            crab("rollback", f"{name}@{turn}")
            terminal.type("echo it-is-$x\n")
            terminal.expect("it-is-then")
            terminal.resize(33, 99)
            until(lambda: resized(terminal), "the size arrives")
            terminal.type("exit 5\n")
            assert terminal.finish()[0] == 5
        except BaseException:
            remove[kind]()
            terminal.finish()
            raise


def resized(terminal):
    terminal.type("stty size; echo do''ne\n")
    return b"33 99" in terminal.expect(r"(?s)(.*)done").group()


def test_stdin_goes_on(tmp_path):
    name = unique("stdin")
    argv = ["docker", "run", "--rm", "--interactive", "--network", "none", "--name", name, "--runtime", CRAB, *OPT_IN,
            "crab.test/agent:latest", "sh", "-c", "while read line; do n=$((n+1)); echo $n $line; done; echo end"]  # fmt: skip
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as client:
        def say(word):
            client.stdin.write(word + "\n")
            client.stdin.flush()
            return client.stdout.readline()
        assert say("a") == "1 a\n"
        turn = json.loads(until(lambda: crab("checkpoint", "--json", name, check=False).out, "it is protected"))["turn"]
        assert say("b") == "2 b\n"
        crab("rollback", f"{name}@{turn}")
        assert say("c") == "2 c\n"
        client.stdin.close()
        assert client.stdout.read() == "end\n"
        assert client.wait(LIMIT) == 0


def test_a_paused_sandbox_comes_back_paused(tmp_path):
    with Sandbox("docker", tmp_path, "sh", "-c", "while :; do echo tick; sleep 0.02; done") as sandbox:
        turn = sandbox.turn()
        sandbox.container("pause")
        rollback(sandbox, turn)
        assert sandbox.container.state["Status"] == "paused"
        size = len(sandbox.output())
        assert is_frozen(sandbox.init)
        assert len(sandbox.output()) == size
        sandbox.container("unpause")
        until(lambda: len(sandbox.output()) > size, "it goes on")


# what is refused, and what fails


def test_what_cannot_be_gone_back_to_is_refused_and_nothing_is_touched(tmp_path):
    with Sandbox("ctr", tmp_path) as sandbox:
        good, bad = sandbox.turn(), sandbox.turn()
        pid = sandbox.init
        pack = pathlib.Path(f"/var/lib/crab/default/{sandbox.container.id}/packs/{bad}.pack")
        os.truncate(pack, pack.stat().st_size // 2)
        for which, why in [(bad, pack.name), (99, "no checkpoint of turn 99"), ("nobody", "nobody")]:
            done = rollback(sandbox, which, check=False)
            assert done.rc == 1 and why in done.err, done
        assert crab("rollback", sandbox.name, check=False).rc == 2
        assert sandbox.init == pid
        rollback(sandbox, good)
        sandbox.die()
        done = rollback(sandbox, good, check=False)
        assert done.rc == 1 and ("not running" in done.err or "stopped" in done.err), done


@both_clients
def test_images_that_cannot_be_restored_end_it_and_an_armed_start_works(kind, tmp_path, config):
    hooks = pathlib.Path("/etc/crab/hooks")
    with Sandbox(kind, tmp_path) as sandbox:
        sandbox.sh("echo one >/file")
        turn = sandbox.turn()
        sandbox.sh("echo two >/file")
        hooks.mkdir(parents=True)
        try:
            # The last thing that can go wrong.
            (hooks / "restored").write_text("#!/bin/sh\nexit 9\n")
            (hooks / "restored").chmod(0o755)
            done = rollback(sandbox, turn, check=False)
        finally:
            (hooks / "restored").unlink()
            hooks.rmdir()
        assert done.rc == 1 and "had to be ended" in done.err and f"@{turn} --start" in done.err, done
        if kind == "docker":
            until(lambda: sandbox.container.state["Status"] == "exited", "Docker knows")
            assert sandbox.container.state["ExitCode"] == 137
        else:
            sandbox.container.stopped()
        crab("restore", f"{sandbox.name}@{turn}", "--start")
        assert sandbox.sh("cat /file") == "one\n"


MOMENTS = 10 if QUICK else 20


def one_death(kind, directory, rng, kill):
    """A rollback, and somebody who ends the sandbox in the middle of it. What each comes to does not matter; that it ends,
    and that nothing is left (which every test checks), does."""
    with Sandbox(kind, directory, "sh", "-c", "echo begun; sleep 1000 & exec sleep 1000") as sandbox:
        sandbox.exec("sh", "-c", "nohup sleep 1000 & :")
        turn = sandbox.turn()
        moment = rng.uniform(0, 0.25)

        def killer():
            time.sleep(moment)  # its length is what is tried out; nothing is waited for
            kill(sandbox)

        thread = threading.Thread(target=killer)
        thread.start()
        done = rollback(sandbox, turn, check=False)
        thread.join()
        if kind == "ctr":
            until(lambda: (sandbox.container.status or ("", "STOPPED"))[1] == "STOPPED", "it has ended")
        else:
            until(lambda: sandbox.container.state["Status"] == "exited", "it has ended")
        return done.rc


def test_death_in_the_middle_of_a_rollback_leaves_nothing(tmp_path):
    print(f"CRAB_E2E_SEED={CHAOS_SEED}")
    def shim_dies(sandbox):
        os.kill(sandbox.container.shim, signal.SIGKILL)
    ways = {
        # It may have ended by itself just before.
        "ctr": [shim_dies, lambda s: s.container.kill(check=False)],
        "docker": [shim_dies, lambda s: s.container("stop", options=["--time", "0"]), lambda s: s.container("kill")],
    }
    jobs = []
    for n in range(MOMENTS):
        rng = random.Random(f"{CHAOS_SEED} {n}")
        kind = rng.choice(list(ways))
        jobs.append(lambda kind=kind, rng=rng, way=rng.choice(ways[kind]): one_death(kind, tmp_path, rng, way))
    codes = together(jobs, workers=3)
    print(f"{MOMENTS} deaths, {codes.count(0)} after the rollback was done")


# the same state


CHANGER = r"""
import os, random, socket, threading
path = "/srv.sock"
server = socket.socket(socket.AF_UNIX)
server.bind(path)
server.listen()
state, files, held = {}, 0, []
while True:
    client, _ = server.accept()
    with client:
        rng = random.Random(int(client.recv(100)))
        for _ in range(rng.randrange(1, 4)):
            what = rng.randrange(7)
            if what == 0:
                state[rng.randrange(100)] = rng.randbytes(rng.randrange(1, 20000))
            elif what == 1 and state:
                state.pop(rng.choice(list(state)))
            elif what == 2:
                files += 1
                os.makedirs(f"/d/{files % 7}", exist_ok=True)
                with open(f"/d/{files % 7}/{files}", "wb") as f:
                    f.write(rng.randbytes(rng.randrange(20000)))
            elif what == 3 and files:
                os.system(f"rm -rf /d/{rng.randrange(7)}")
            elif what == 4 and len(held) < 20:
                f = open(f"/held{len(held)}", "w+b")
                f.write(rng.randbytes(1000)); f.flush(); f.seek(rng.randrange(1000))
                held.append(f)
            elif what == 5 and held:
                held.pop().close()
            elif what == 6:
                if os.fork() == 0:
                    os.execvp("sleep", ["sleep", "1000"])
        client.sendall(b"done")
"""


def change(sandbox, seed):
    """Has the sandbox change itself, and returns when it has. Not by an exec, which would be a turn."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"/proc/{sandbox.init}/root/srv.sock")
        client.sendall(str(seed).encode())
        assert client.recv(100) == b"done"
        # Until its end is closed, too, it has a connection to somebody outside.
        assert client.recv(100) == b""


CYCLES = int(os.environ.get("CRAB_E2E_CYCLES", 20 if QUICK else 100))
FULL = 10
"""Every so many cycles all of the sandbox is read; else what the image has in these directories is left out."""
IMAGE_DIRECTORIES = {"/usr", "/var", "/etc"}


def read(pid, full):
    """The digest of a sandbox that stands still."""
    if full:
        return digest.sandbox(pid)
    points = frozenset(mount.point for mount in sandbox_container.mounts(pid)) | IMAGE_DIRECTORIES
    root = os.open(f"/proc/{pid}/root", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        scan = tree.Scan(root, points)
        return digest.finish({"tree": scan.tree, "processes": process.processes(pid, scan.inodes, False)[0]}, {})
    finally:
        os.close(root)


def test_random_cycles_of_checkpoints_and_rollbacks_end_in_equal_states(tmp_path):
    """While the client has it paused, not one instruction lies between a dump and its digest, nor between a restore and its
    digest: they must be equal in everything."""
    print(f"CRAB_E2E_SEED={CHAOS_SEED}")
    rng = random.Random(CHAOS_SEED)
    states = {}
    sizes = []
    with Sandbox("ctr", tmp_path, "python3", "-c", CHANGER, options=["--annotation", "dev.crab.keep=8"]) as sandbox:
        until(lambda: pathlib.Path(f"/proc/{sandbox.init}/root/srv.sock").exists(), "it listens")
        shim = sandbox.container.shim
        for cycle in range(CYCLES):
            change(sandbox, rng.randrange(1 << 60))
            ctr("task", "pause", sandbox.name)
            turn = sandbox.turn()
            pid = sandbox.init
            states[turn] = {full: read(pid, full) for full in {False, cycle % FULL == 0}}
            ctr("task", "resume", sandbox.name)
            change(sandbox, rng.randrange(1 << 60))
            kept = [t for t in states if pathlib.Path(f"/var/lib/crab/default/{sandbox.name}/packs/{t}.pack").exists()]
            states = {t: states[t] for t in kept}
            back = rng.choice(kept)
            ctr("task", "pause", sandbox.name)
            rollback(sandbox, back)
            pid = sandbox.init
            for full, state in states[back].items():
                found = differences(state, read(pid, full))
                assert not found, f"cycle {cycle}, back to turn {back}: {[str(d) for d in found[:20]]}"
            ctr("task", "resume", sandbox.name)
            sizes.append((resident(shim), len(os.listdir(f"/proc/{shim}/fd")), stored(sandbox.name, kept)))
            if cycle % 100 == 99:
                print(f"after {cycle + 1} cycles: {sizes[-1]}")
        print(f"{CYCLES} cycles; the shim's MiB, its descriptors and the store's MiB for each checkpoint, after each of them: "
              f"{sizes[0]} … {sizes[CYCLES // 5]} … {sizes[-1]}")
        assert crab("verify", sandbox.name).rc == 0
    warm, later = sizes[CYCLES // 5], sizes[CYCLES // 5:]
    assert sizes[-1][0] < warm[0] + 4, sizes
    assert max(fds for _, fds, _ in later) <= warm[1] + 5, sizes
    # What is kept is bounded by what is needed, however much has come and gone.
    assert max(mib for *_, mib in later) < 4 * max(mib for *_, mib in sizes[: CYCLES // 5 + 1]), sizes


def resident(pid):
    """MiB."""
    return int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def stored(name, kept):
    """MiB of a sandbox's packs for each checkpoint that is kept."""
    total = 0
    for pack in pathlib.Path(f"/var/lib/crab/default/{name}/packs").iterdir():
        # The shim collects meanwhile.
        with contextlib.suppress(FileNotFoundError):
            total += pack.stat().st_size
    return total / len(kept) / (1 << 20)
