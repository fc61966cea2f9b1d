"""Docker sees the same of crab as of containerd's own runc shim."""

import hashlib
import json
import os
import re
import subprocess
import time

import pytest

from cgroups import UNIFIED, limits
from harness import IMAGE, LIMIT, Docker, Terminal, both, docker, docker_start_from, pair, until

# For bash: CRIU cannot dump a process inside vfork(), which other shells use.
COUNTER = "i=0; while :; do i=$((i+1)); echo $i; echo $i >/count.new; mv /count.new /count; sleep 0.02; done"
NO_NETWORK = ("--network", "none")


@pytest.fixture(scope="module")
def shared():
    """One idle container of each runtime."""
    containers = pair("docker")
    yield containers
    for container in containers.values():
        container.remove()


def run_once(runtime, *command, options=(), **kwargs):
    return docker("run", "--rm", "--runtime", runtime, *NO_NETWORK, *options, IMAGE, *command, check=False, **kwargs)


# run


def test_run_gives_the_exit_code_and_both_streams():
    def scenario(runtime):
        done = run_once(runtime, "sh", "-c", "echo to stdout; echo to stderr >&2; exit 7")
        return done.rc, done.out, done.err

    assert both(scenario) == (7, "to stdout\n", "to stderr\n")


def test_run_passes_stdin_to_its_end():
    data = os.urandom(5 << 20)
    out = both(lambda runtime: run_once(runtime, "sha256sum", options=["-i"], stdin=data).out)
    assert out == hashlib.sha256(data).hexdigest() + "  -\n"


def test_run_of_a_command_that_is_not_there_says_so():
    def scenario(runtime):
        done = run_once(runtime, "no-such-command")
        return done.rc, '"no-such-command": executable file not found' in done.err.replace("\\", "")

    assert both(scenario) == (127, True)


def test_run_on_a_terminal():
    def scenario(runtime):
        script = "test -t 0 -a -t 1 -a -t 2 && echo terminal; stty size; read x; echo got-$x; exit 5"
        with Terminal("docker", "run", "--rm", "-it", "--runtime", runtime, *NO_NETWORK, IMAGE, "sh", "-c", script) as terminal:
            terminal.expect("terminal\n")
            terminal.type("hello\n")
            terminal.expect("got-hello\n")
            return terminal.finish()

    assert both(scenario) == (5, "")


def test_run_with_options_of_every_day(open_dir):
    (open_dir / "file").write_text("from the host\n")
    script = """
        echo "$A"; pwd; id -u; id -g; hostname; cat /mnt/file; findmnt -no FSTYPE,SIZE /scratch; echo kept >/scratch/x && cat /scratch/x
        cat /volume/x 2>&1; touch /x 2>&1; touch /mnt/x 2>&1; ulimit -n; cat /proc/self/oom_score_adj; cat /etc/hosts | grep -c localhost
        cat /proc/1/comm; df --output=size -B1 /dev/shm | tail -1
    """

    def scenario(runtime):
        options = ["-e", "A=b c", "-w", "/usr", "--user", "1000:1000", "--read-only", "--hostname", "sandbox", "--tmpfs", "/scratch:size=1m",
                   "-v", f"{open_dir}:/mnt:ro", "-v", "/volume", "--ulimit", "nofile=333", "--oom-score-adj", "100", "--shm-size", "2m"]
        done = run_once(runtime, "sh", "-c", script, options=options)
        return done.rc, done.out, done.err

    rc, out, err = both(scenario)
    assert (rc, err) == (0, "") and out.startswith("b c\n/usr\n1000\n1000\nsandbox\nfrom the host\ntmpfs"), out
    assert out.count("Read-only file system") == 2


def test_run_with_an_init_process():
    def scenario(runtime):
        done = run_once(runtime, "sh", "-c", "cat /proc/1/comm; exit 3", options=["--init"])
        return done.rc, done.out

    assert both(scenario) == (3, "docker-init\n")


# exec


def test_exec_gives_the_exit_code_and_both_streams(shared):
    def scenario(runtime):
        done = shared[runtime].exec("sh", "-c", "echo to stdout; echo to stderr >&2; exit 3", check=False)
        return done.rc, done.out, done.err

    assert both(scenario) == (3, "to stdout\n", "to stderr\n")


def test_exec_options(shared):
    def scenario(runtime):
        return shared[runtime].exec(
            "sh", "-c", 'pwd; id -u; id -g; echo "$A"; cat', options=["-i", "-w", "/usr/bin", "-u", "1234:5678", "-e", "A=b c"], stdin="in"
        ).out

    assert both(scenario) == "/usr/bin\n1234\n5678\nb c\nin"


def test_exec_on_a_terminal(shared):
    def scenario(runtime):
        argv = ["docker", "exec", "-it", shared[runtime].name, "sh", "-c", "test -t 0 && echo terminal; read x; stty size; echo got-$x; exit 6"]
        with Terminal(*argv) as terminal:
            terminal.expect("terminal\n")

            def resized():
                # Again and again: Docker's client misses a change that comes before it listens.
                terminal.resize(39, 100)
                terminal.resize(40, 100)
                return "40 100" in shared[runtime].sh("for t in /dev/pts/[0-9]*; do stty -F $t size; done")

            until(resized, "the new size")
            terminal.type("hello\n")
            terminal.expect("40 100\ngot-hello\n")
            return terminal.finish()

    assert both(scenario) == (6, "")


def test_exec_detached(shared):
    def scenario(runtime):
        container = shared[runtime]
        docker("exec", "--detach", container.name, "sh", "-c", "sleep 0.1; echo done >/detached")
        return until(lambda: container.exec("cat", "/detached", check=False).out, "the exec did its work")

    assert both(scenario) == "done\n"


def test_exec_of_a_command_that_is_not_there_says_so(shared):
    def scenario(runtime):
        done = shared[runtime].exec("no-such-command", check=False)
        return done.rc, '"no-such-command": executable file not found' in (done.out + done.err).replace("\\", "")

    assert both(scenario) == (126, True)


# what runs


def test_stats(shared):
    def scenario(runtime):
        done = shared[runtime]("stats", options=["--no-stream", "--format", "{{json .}}"])
        stats = json.loads(done.out)
        used, limit = re.match(r"([\d.]+\w+) / ([\d.]+\w+)", stats["MemUsage"]).groups()
        return sorted(stats), stats["PIDs"], limit, bool(re.match(r"[1-9]", used)), stats["NetIO"]

    keys, pids, _, used, _ = both(scenario)
    assert (pids, used) == ("1", True) and "CPUPerc" in keys


def test_top(shared):
    def scenario(runtime):
        out = shared[runtime]("top", "-eo", "pid,args").out
        return re.sub(r"\d+", "N", out)

    assert "sleep infinity" in both(scenario)


def test_update(shared):
    def scenario(runtime):
        container = shared[runtime]
        container("update", options=["--memory", "96m", "--memory-swap", "96m", "--pids-limit", "33", "--cpus", "0.7", "--cpu-shares", "512"])
        return limits(container.pid)

    is_so = both(scenario)
    # How a runtime makes a weight of shares is its own affair, and the same with both shims.
    share = {"weight": is_so["weight"]} if UNIFIED else {"shares": 512}
    assert is_so == {"memory": 96 << 20, "pids": "33", "quota": 70000, "period": 100000} | share


def test_copy_in_and_out(shared, tmp_path):
    data = os.urandom(1 << 20)
    (tmp_path / "in").write_bytes(data)

    def scenario(runtime):
        name = shared[runtime].name
        docker("cp", tmp_path / "in", f"{name}:/copied")
        inside = shared[runtime].exec("sha256sum", "/copied").out
        docker("cp", f"{name}:/copied", tmp_path / name)
        return inside, (tmp_path / name).read_bytes() == data

    assert both(scenario) == (hashlib.sha256(data).hexdigest() + "  /copied\n", True)


def test_pause_and_unpause(shared):
    def scenario(runtime):
        container = shared[runtime]
        container("pause")
        status = container.state["Status"], container.state["Paused"]
        refused = container.exec("true", check=False)
        container("unpause")
        return status, refused.rc, "paused" in refused.err, container.state["Status"], container.sh("echo alive")

    assert both(scenario) == (("paused", True), 1, True, "running", "alive\n")


def test_inspect_shows_the_same_state(shared):
    def scenario(runtime):
        state = shared[runtime].state
        return {k: v for k, v in state.items() if k not in ("Pid", "StartedAt")}, state["Pid"] > 0

    assert both(scenario)[0]["Status"] == "running"


def test_logs_follow_to_the_end():
    def scenario(runtime):
        script = "for i in $(seq 200); do echo line $i; echo error $i >&2; done; until test -e /go; do sleep 0.02; done; echo last"
        with Docker(runtime, "sh", "-c", script) as container:
            follower = subprocess.Popen(["docker", "logs", "-f", container.name], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            lines = [follower.stdout.readline() for _ in range(200)]
            container.exec("touch", "/go", check=False)  # the container's end may be faster than its own report
            rest, errors = follower.communicate(timeout=LIMIT)
            return lines[-1], rest, len(errors.splitlines()), follower.returncode

    assert both(scenario) == (b"line 200\n", b"last\n", 200, 0)


# ends and starts


def test_stop_lets_the_container_clean_up_and_start_begins_again():
    def scenario(runtime):
        script = "echo started; trap 'echo cleaning up; exit 5' TERM; touch /ready; while :; do sleep 0.02; done"
        with Docker(runtime, "bash", "-c", script) as container:
            until(lambda: container.exec("test", "-e", "/ready", check=False).rc == 0, "the trap is set")
            container.exec("rm", "/ready")
            container("stop")
            stopped = container.state["Status"], container.state["ExitCode"], container.logs()
            container("start")
            until(lambda: container.exec("test", "-e", "/ready", check=False).rc == 0, "the trap is set again")
            container.exec("rm", "/ready")
            container("restart")
            until(lambda: container.exec("test", "-e", "/ready", check=False).rc == 0, "the trap is set a third time")
            docker("kill", "-s", "TERM", container.name)
            waited = container("wait").out
            return stopped, waited, container.logs()

    assert both(scenario) == (("exited", 5, "started\ncleaning up\n"), "5\n", "started\ncleaning up\n" * 3)


def test_stop_kills_what_does_not_listen():
    def scenario(runtime):
        with Docker(runtime, "sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.02; done") as container:
            until(lambda: container.logs() == "up\n", "the trap is set")
            container("stop", options=["--time", "1"])
            return container.state["ExitCode"]

    assert both(scenario) == 137


def test_kill_and_wait_and_rm():
    def scenario(runtime):
        with Docker(runtime) as container:
            waiting = subprocess.Popen(["docker", "wait", container.name], stdout=subprocess.PIPE)
            container("kill")
            code = waiting.communicate(timeout=LIMIT)[0]
            removed = container("rm").rc
            again = container("rm", check=False).rc
        with Docker(runtime, "sleep", "infinity") as container:
            forced = container("rm", options=["-f"]).rc
            return code, removed, again, forced

    assert both(scenario) == (b"137\n", 0, 1, 0)


def test_create_and_start_attached():
    def scenario(runtime):
        with Docker(runtime, "sh", "-c", "cat; exit 4", verb="create", options=["-i"]) as container:
            created = container.state["Status"]
            done = docker("start", "-a", "-i", container.name, stdin="through\n", check=False)
            return created, done.rc, done.out

    assert both(scenario) == ("created", 4, "through\n")


def test_a_container_out_of_memory_says_so():
    def scenario(runtime):
        hungry = "until test -e /go; do sleep 0.02; done; exec python3 -c 'x = bytearray(200 << 20)'"
        with Docker(runtime, "sh", "-c", hungry, options=["--memory", "64m", "--memory-swap", "64m"]) as container:
            # Not before the start has been answered: from then on the shim watches.
            container.exec("touch", "/go", check=False)  # the container's end may be faster than its own report
            code = container("wait").out
            # Docker hears of it in an event of its own, which may come after the one of the exit.
            until(lambda: container.state["OOMKilled"], "Docker knows why")
            return code, container.state["OOMKilled"]

    assert both(scenario) == ("137\n", True)


def test_events_come_in_the_same_order():
    def seen(since, container):
        argv = ["events", "--since", str(since), "--until", str(time.time()), "--filter", f"container={container.id}"]
        return docker(*argv, "--format", "{{json .}}").out

    def scenario(runtime):
        since = time.time()
        with Docker(runtime) as container:
            container.exec("sh", "-c", "exit 3", check=False)
            # The client may know of the end before Docker has written the event.
            until(lambda: "exec_die" in seen(since, container), "the exec's end is an event")
            container("pause")
            container("unpause")
            container("kill")
            container("wait")
            container("rm")
            out = seen(since, container)
        events = [json.loads(line) for line in out.splitlines()]
        return [(e["Action"], e["Actor"]["Attributes"].get("exitCode")) for e in events]

    assert [action.split(":")[0] for action, _ in both(scenario)] == [
        "create", "start", "exec_create", "exec_start", "exec_die", "pause", "unpause", "kill", "die", "destroy",
    ]  # fmt: skip


def test_a_restart_policy_starts_again():
    def scenario(runtime):
        options = ["--restart", "on-failure:2"]
        with Docker(runtime, "sh", "-c", "echo up; exit 3", options=options) as container:
            until(lambda: container.logs() == "up\n" * 3 and container.state["Status"] == "exited", "three tries")
            return container.state["ExitCode"], container.inspect()["RestartCount"]

    assert both(scenario) == (3, 2)


# checkpoint and restore


def test_a_checkpoint_stops_the_container_and_start_goes_on():
    def scenario(runtime):
        with Docker(runtime, "bash", "-c", COUNTER) as container:
            until(lambda: int(container.logs().split()[-1:][0] if container.logs() else 0) > 5, "the counter counts")
            docker("checkpoint", "create", container.name, "one")
            until(lambda: container.state["Status"] == "exited", "the container stopped")
            names = docker("checkpoint", "ls", container.name).out.split("\n")[1]
            stopped_at = int(container.logs().split()[-1])
            docker_start_from("one", container.name)
            until(lambda: int(container.logs().split()[-1]) > stopped_at + 5, "the counter goes on")
            lines = [int(n) for n in container.logs().split()]
            in_order = lines == sorted(lines) and lines.count(1) == 1
            docker("checkpoint", "rm", container.name, "one")
            return names.strip(), in_order, container.sh("echo alive")

    assert both(scenario) == ("one", True, "alive\n")


def test_a_checkpoint_can_leave_the_container_running(config):
    config("checkpoint_stops = false\n")  # see docs/differences.md

    def scenario(runtime):
        with Docker(runtime, "bash", "-c", COUNTER) as container:
            until(lambda: "5" in container.logs().split(), "the counter counts")
            docker("checkpoint", "create", "--leave-running", container.name, "one")
            was = int(container.logs().split()[-1])
            until(lambda: int(container.logs().split()[-1]) > was, "the counter goes on")
            lines = [int(n) for n in container.logs().split()]
            return container.state["Status"], lines == list(range(1, len(lines) + 1))

    assert both(scenario) == ("running", True)
