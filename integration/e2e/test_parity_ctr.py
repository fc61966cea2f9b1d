"""containerd's own client sees the same of crab as of containerd's own runc shim."""

import hashlib
import json
import os
import re
import signal
import subprocess

import pytest

from cgroups import UNIFIED, limits
from harness import CRAB, IMAGE, LIMIT, Ctr, Events, Terminal, both, ctr, pair, run, unique, until
from taskapi import RESOURCES, Shim, any_of

# For bash: CRIU cannot dump a process inside vfork(), which other shells use.
COUNTER = "i=0; while :; do i=$((i+1)); echo $i; echo $i >/count.new; mv /count.new /count; sleep 0.02; done"


@pytest.fixture(scope="module")
def shared():
    """One idle container of each runtime."""
    containers = pair("ctr")
    yield containers
    for container in containers.values():
        container.remove()


def run_once(runtime, *command, options=(), **kwargs):
    return ctr("run", "--rm", "--runtime", runtime, *options, IMAGE, unique("r"), *command, check=False, **kwargs)


# run


def test_run_gives_the_exit_code_and_both_streams():
    def scenario(runtime):
        done = run_once(runtime, "sh", "-c", "echo to stdout; echo to stderr >&2; exit 7")
        return done.rc, done.out, done.err

    assert both(scenario) == (7, "to stdout\n", "to stderr\n")


def test_run_reports_a_death_by_signal():
    assert both(lambda runtime: run_once(runtime, "sh", "-c", "sh -c 'kill -9 $$'; exit $?").rc) == 137


def test_run_of_a_command_that_is_not_there_says_so():
    def scenario(runtime):
        done = run_once(runtime, "no-such-command")
        return done.rc, '"no-such-command": executable file not found' in done.err.replace("\\", "")

    assert both(scenario) == (1, True)


def test_run_passes_stdin_to_its_end():
    data = os.urandom(5 << 20)

    def scenario(runtime):
        return run_once(runtime, "sha256sum", stdin=data).out

    assert both(scenario) == hashlib.sha256(data).hexdigest() + "  -\n"


def test_run_on_a_terminal():
    def scenario(runtime):
        # The client sets the size a moment after the start.
        sized = 'until test "$(stty size)" = "33 99"; do sleep 0.02; done'
        script = f"test -t 0 -a -t 1 -a -t 2 && {sized} && echo terminal; read x; echo got-$x; exit 5"
        argv = ["ctr", "run", "--rm", "--tty", "--runtime", runtime, IMAGE, unique("t"), "sh", "-c", script]
        with Terminal(*argv, rows=33, cols=99) as terminal:
            terminal.expect("terminal\n")
            terminal.type("hello\n")
            terminal.expect("got-hello\n")
            return terminal.finish()

    assert both(scenario) == (5, "")


def test_a_terminal_follows_its_window():
    def scenario(runtime):
        script = "trap 'test \"$(stty size)\" = \"50 132\" && exit 3' WINCH; while :; do sleep 0.02; done"
        argv = ["ctr", "run", "--rm", "--tty", "--runtime", runtime, IMAGE, unique("t"), "bash", "-c", script]
        with Terminal(*argv) as terminal:

            def followed():
                # Again and again: the client misses a change that comes before it listens.
                terminal.resize(49, 132)
                terminal.resize(50, 132)
                return terminal.process.poll() is not None

            until(followed, "the new size has arrived")
            return terminal.process.returncode

    assert both(scenario) == 3


def test_ctrl_c_interrupts_what_runs_on_a_terminal():
    def scenario(runtime):
        script = "trap 'echo caught; exit 4' INT; echo ready; while :; do sleep 0.02; done"
        argv = ["ctr", "run", "--rm", "--tty", "--runtime", runtime, IMAGE, unique("t"), "bash", "-c", script]
        with Terminal(*argv) as terminal:
            terminal.expect("ready\n")
            terminal.type("\x03")
            return terminal.finish()

    rc, out = both(scenario)
    assert (rc, "caught" in out) == (4, True)


def test_run_with_options_of_every_day(open_dir):
    (open_dir / "file").write_text("from the host\n")

    def scenario(runtime):
        options = ["--env", "A=b c", "--cwd", "/usr", "--user", "1000:1000", "--read-only", "--hostname", "sandbox",
                   "--mount", f"type=bind,src={open_dir},dst=/mnt,options=rbind:ro"]
        script = 'echo "$A"; pwd; id -u; id -g; hostname; cat /mnt/file; touch /x 2>&1; touch /mnt/x 2>&1'
        done = run_once(runtime, "sh", "-c", script, options=options)
        return done.rc, done.out.splitlines()[:6], done.out.count("Read-only file system"), done.err

    result = both(scenario)
    assert result == (1, ["b c", "/usr", "1000", "1000", "sandbox", "from the host"], 2, "")


# exec


def test_exec_gives_the_exit_code_and_both_streams(shared):
    def scenario(runtime):
        done = shared[runtime].exec("sh", "-c", "echo to stdout; echo to stderr >&2; exit 3", check=False)
        return done.rc, done.out, done.err

    assert both(scenario) == (3, "to stdout\n", "to stderr\n")


def test_exec_options(shared):
    def scenario(runtime):
        options = ["--cwd", "/usr/bin", "--user", "1234:5678"]
        return shared[runtime].exec("sh", "-c", "pwd; id -u; id -g", options=options).out

    assert both(scenario) == "/usr/bin\n1234\n5678\n"


def test_exec_passes_stdin_to_its_end(shared):
    data = os.urandom(1 << 20)
    out = both(lambda runtime: shared[runtime].exec("sha256sum", stdin=data).out)
    assert out == hashlib.sha256(data).hexdigest() + "  -\n"


def test_exec_on_a_terminal(shared):
    def scenario(runtime):
        # Not before the client has set the size: of a process that has ended runc.v2 refuses that, aloud.
        sized = 'until test "$(stty size)" = "24 80"; do sleep 0.02; done'
        argv = shared[runtime].exec_argv("sh", "-c", f"{sized}; test -t 0 && echo terminal; cat; exit 6", options=["--tty"])
        with Terminal(*argv, rows=24, cols=80) as terminal:
            terminal.expect("terminal\n")
            terminal.type("echoed\n\x04")
            return terminal.finish()

    assert both(scenario) == (6, "echoed\nechoed\n")


@pytest.mark.parametrize("name", ["TERM", "KILL", "USR1", "HUP"])
def test_exec_can_be_signalled(shared, name):
    exec_id = unique("signalled")

    def scenario(runtime):
        container = shared[runtime]
        with container.start_exec("sh", "-c", "echo up; exec sleep 1000", exec_id=exec_id) as client:
            assert client.stdout.readline() == b"up\n"
            until(lambda: "sleep 1000" in run("ps", "-eo", "args").out, "sleep runs")
            container.kill(name, options=["--exec-id", exec_id])
            client.stdin.close()
            return client.wait(LIMIT)

    assert both(scenario) == 128 + signal.Signals[f"SIG{name}"]


def test_exec_of_a_command_that_is_not_there_says_so(shared):
    def scenario(runtime):
        done = shared[runtime].exec("no-such-command", check=False)
        return done.rc, '"no-such-command": executable file not found' in done.err.replace("\\", "")

    assert both(scenario) == (1, True)


def test_exec_in_a_directory_that_is_not_there_says_so(shared):
    def scenario(runtime):
        done = shared[runtime].exec("true", options=["--cwd", "/no/such"], check=False)
        return done.rc, "/no/such" in done.err and "no such file or directory" in done.err

    assert both(scenario) == (1, True)


# pause, ps, metrics, update


def test_pause_stops_and_resume_goes_on():
    def scenario(runtime):
        with Ctr(runtime, "bash", "-c", COUNTER) as container:
            count = until(lambda: container.exec("cat", "/count", check=False).out, "the counter counts")
            ctr("task", "pause", container.id)
            pid, status = container.status
            refused = container.exec("true", check=False)
            again = ctr("task", "pause", container.id, check=False)
            seen = os.stat(f"/proc/{pid}/root/count").st_mtime_ns
            ctr("task", "resume", container.id)
            until(lambda: os.stat(f"/proc/{pid}/root/count").st_mtime_ns != seen, "the counter goes on")
            resumed = ctr("task", "resume", container.id, check=False)
            return (int(count) > 0, status, refused.rc, "paused" in refused.err, again.rc, container.status[1],
                    resumed.rc, container.sh("echo alive"))

    assert both(scenario) == (True, "PAUSED", 1, True, 1, "RUNNING", 1, "alive\n")


def test_a_paused_container_can_be_killed():
    def scenario(runtime):
        with Ctr(runtime) as container:
            ctr("task", "pause", container.id)
            container.kill()
            container.stopped()
            return container.delete_task()

    assert both(scenario) == 137


def test_ps_shows_every_process(shared):
    def scenario(runtime):
        container = shared[runtime]
        exec_id = unique("shown")
        with container.start_exec("sh", "-c", "sleep 1000 & echo up; wait", exec_id=exec_id) as client:
            assert client.stdout.readline() == b"up\n"
            table = ctr("task", "ps", container.id).out.replace(exec_id, "EXEC")
            # It may still be the shell that is to become sleep.
            until(lambda: container.exec("pkill", "--exact", "--full", "sleep 1000", check=False).rc == 0, "sleep is killed")
            client.communicate(timeout=LIMIT)
        # The columns are as wide as the longest pid.
        return sorted(re.sub(r"\d+ +", "N ", re.sub(" +", " ", line)) for line in table.splitlines())

    lines = both(scenario)
    assert len(lines) == 4 and sum("EXEC" in line for line in lines) == 1


def keys(value, at=""):
    """The paths of all keys; lists count as one element."""
    if isinstance(value, dict):
        return {path for key, inner in value.items() for path in keys(inner, f"{at}/{key}")} or {at}
    if isinstance(value, list):
        return {path for inner in value for path in keys(inner, f"{at}/*")} or {at}
    return {at}


BUSY = """
import mmap, os, signal
memory = os.urandom(32 << 20)
with open("/file", "wb+") as file:
    file.write(memory[:1 << 20]); file.flush()
    mapped = mmap.mmap(file.fileno(), 0); mapped[0]
    open("/ready", "w").close()
    signal.pause()
"""


def test_metrics_have_the_same_keys_and_plausible_values():
    def scenario(runtime):
        with Ctr(runtime, "python3", "-c", BUSY) as container:
            until(lambda: container.exec("test", "-e", "/ready", check=False).rc == 0, "memory is used")
            metrics = json.loads(ctr("task", "metrics", "--format", "json", container.id).out)
            # A counter that is zero is not shown: these depend on what the disk, the kernel's reclaim and its huge pages did,
            # and on how long somebody had waited for them.
            vague = re.compile("blkio|/io/|file|maj_?fault|dirty|writeback|pg_out|active|throttling|huge|thp|psi")
            memory, cpu = metrics["memory"], metrics["cpu"]
            if UNIFIED:
                used, anonymous, cpu_ns = memory["usage"], memory["anon"], cpu["usage_usec"] * 1000
            else:
                used, anonymous, cpu_ns = memory["usage"]["usage"], memory["total_rss"], cpu["usage"]["total"]
                assert len(cpu["usage"]["per_cpu"]) == os.cpu_count()
            return metrics["pids"]["current"], {k for k in keys(metrics) if not vague.search(k)}, {
                "memory": 32 << 20 < used < 100 << 20,
                "anonymous": 32 << 20 < anonymous < 80 << 20,
                "cpu": 10**6 < cpu_ns < 10**11,
            }

    pids, _, plausible = both(scenario)
    assert pids == 1
    assert plausible == {"memory": True, "anonymous": True, "cpu": True}


def test_limits_of_run_and_update_reach_the_cgroup():
    def scenario(runtime):
        options = ["--memory-limit", str(64 << 20), "--cpus", "0.5"]
        with Ctr(runtime, options=options) as container, Shim.of(container) as shim:
            before = limits(container.pid)
            resources = {"memory": {"limit": 96 << 20}, "pids": {"limit": 33},
                         "cpu": {"quota": 70000, "period": 100000, "shares": 512}}
            shim.call("Update", {1: container.id, 2: any_of(RESOURCES, resources)})
            return before, limits(container.pid), container.sh("echo alive")

    before, after, alive = both(scenario)
    assert (before["memory"], before["quota"], before["period"]) == (64 << 20, 50000, 100000)
    # How a runtime makes a weight of shares is its own affair, and the same with both shims.
    share = {"weight": after["weight"]} if UNIFIED else {"shares": 512}
    assert after == {"memory": 96 << 20, "pids": "33", "quota": 70000, "period": 100000} | share
    assert not UNIFIED or before["weight"] != after["weight"]
    assert alive == "alive\n"


def test_a_container_that_uses_too_much_memory_is_killed_and_an_event_says_so():
    def scenario(runtime):
        with Events() as events:
            hungry = "x = bytearray(200 << 20)"
            script = f"until test -e /go; do sleep 0.02; done; python3 -c '{hungry}'; exit $?"
            with Ctr(runtime, "sh", "-c", script, options=["--memory-limit", str(64 << 20)]) as c:
                # Not before the start has been answered: from then on the shim watches.
                (c.bundle / "rootfs/go").touch()
                c.stopped()
                # The two are told by different threads: the order says nothing. On cgroup v2 Go's shim begins to watch
                # in the background (cgroup2's EventChan), which may be too late in an emulated machine: of it nothing is
                # asked there.
                tells = runtime == CRAB or not UNIFIED
                for topic in ("/tasks/exit", "/tasks/oom")[:1 + tells]:
                    events.wait_for(c.id, topic)
                return c.delete_task()

    assert both(scenario) == 137


# signals and ends


@pytest.mark.parametrize("name,number", [("TERM", 15), ("USR1", 10), ("RTMIN+3", 37)])
def test_a_signal_reaches_init(name, number):
    def scenario(runtime):
        script = f"trap 'exit 42' {number}; touch /ready; while :; do sleep 0.02; done"
        with Ctr(runtime, "bash", "-c", script) as container:
            until(lambda: container.exec("test", "-e", "/ready", check=False).rc == 0, "the trap is set")
            container.kill(str(number))
            container.stopped()
            return container.delete_task()

    assert both(scenario) == 42


def test_kill_all_reaches_every_process():
    def scenario(runtime):
        script = """trap 'wait $child; echo init >>/log; exit 0' TERM
            (trap 'echo child >>/log; exit 0' TERM; touch /ready; while :; do sleep 0.02; done) & child=$!
            while :; do sleep 0.02; done"""
        with Ctr(runtime, "bash", "-c", script) as container:
            until(lambda: container.exec("test", "-e", "/ready", check=False).rc == 0, "the traps are set")
            log = container.bundle / "rootfs/log"
            container.kill("TERM", options=["--all"])
            container.stopped()
            return log.read_text().split()

    assert both(scenario) == ["child", "init"]


def test_the_end_of_init_ends_everything():
    def scenario(runtime):
        with Ctr(runtime, "sh", "-c", "until test -e /go; do sleep 0.02; done; exit 9") as container:
            with container.start_exec("sh", "-c", "echo up; exec sleep 1000") as client:
                assert client.stdout.readline() == b"up\n"
                container.exec("touch", "/go", check=False)  # it may be faster than its own report
                rc = client.wait(LIMIT)
                client.stdin.close()
            container.stopped()
            return rc, container.delete_task(), container.status

    assert both(scenario) == (137, 9, None)


def test_calls_after_the_end_are_refused_alike():
    def scenario(runtime):
        with Ctr(runtime, "true") as container:
            container.stopped()
            with Shim.of(container) as shim:
                kinds = {}
                requests = {
                    "State": {1: container.id}, "Start": {1: container.id}, "Pause": {1: container.id},
                    "Resume": {1: container.id}, "Kill": {1: container.id, 3: 15}, "Pids": {1: container.id},
                    "Delete": {1: container.id, 2: "nobody"}, "CloseIO": {1: container.id, 3: True},
                    "ResizePty": {1: container.id, 3: 1, 4: 1}, "Wait": {1: container.id},
                }
                for method, fields in requests.items():
                    try:
                        shim.call(method, fields)
                        kinds[method] = "ok"
                    except Exception as e:
                        kinds[method] = "refused"
                return kinds

    refused = both(scenario)
    assert refused["Start"] == refused["Pause"] == refused["Kill"] == refused["Delete"] == "refused"


def test_events_come_in_the_same_order():
    def scenario(runtime):
        with Events() as events:
            container = Ctr(runtime, "sh", "-c", "until test -e /go; do sleep 0.02; done; exit 4")
            with container:
                container.exec("sh", "-c", "exit 3", exec_id="one", check=False)
                ctr("task", "pause", container.id)
                ctr("task", "resume", container.id)
                with container.start_exec("sh", "-c", "echo up; exec sleep 1000", exec_id="two") as client:
                    assert client.stdout.readline() == b"up\n"
                    container.kill("KILL", options=["--exec-id", "two"])
                    client.communicate(timeout=LIMIT)
                (container.bundle / "rootfs/go").touch()
                container.stopped()
            events.wait_for(container.id, "/tasks/delete")
            plain = ("exec_id", "id", "exit_status")
            return [
                (topic, {k: v.replace(container.id, "ID") if isinstance(v, str) else v for k, v in m.items() if k in plain}, sorted(m))
                for topic, m in events.of(container.id)
            ]

    topics = [(topic, m.get("exec_id") or m.get("id"), m.get("exit_status")) for topic, m, _ in both(scenario)]
    assert topics == [
        ("/tasks/create", None, None), ("/tasks/start", None, None),
        ("/tasks/exec-added", "one", None), ("/tasks/exec-started", "one", None), ("/tasks/exit", "one", 3),
        ("/tasks/paused", None, None), ("/tasks/resumed", None, None),
        ("/tasks/exec-added", "two", None), ("/tasks/exec-started", "two", None), ("/tasks/exit", "two", 137),
        ("/tasks/exit", "ID", 4), ("/tasks/delete", None, 4),
    ]  # fmt: skip


# checkpoint and restore


def remove_image(name):
    ctr("images", "rm", "--sync", name, check=False)


def test_a_checkpoint_of_ctr_leaves_the_container_running_and_can_be_restored():
    def scenario(runtime):
        image = unique("checkpoint.test/") + ":latest"
        restored_id = unique("restored")
        with Ctr(runtime, "bash", "-c", COUNTER) as container:
            until(lambda: int(container.exec("cat", "/count", check=False).out or 0) > 1, "the counter counts")
            ctr("container", "checkpoint", "--rw", "--image", "--task", container.id, image)
            was = int(container.exec("cat", "/count").out)
            until(lambda: int(container.exec("cat", "/count").out) > was, "the counter goes on")
        client = subprocess.Popen(
            ["ctr", "container", "restore", "--rw", "--live", restored_id, image], stdout=subprocess.PIPE, text=True
        )
        try:
            # ctr of 1.7 starts the restored task and leaves; what it writes goes into FIFOs that nobody reads.
            rc = client.wait(LIMIT)
            restored = Ctr.__new__(Ctr)
            restored.id, restored._execs = restored_id, iter(f"{n}" for n in range(1, 1000))
            seen = int(restored.exec("cat", "/count").out)
            until(lambda: int(restored.exec("cat", "/count").out) > seen, "the restored counter counts")
            return rc, seen > 1
        finally:
            client.kill()
            client.communicate()
            ctr("task", "delete", "--force", restored_id, check=False)
            ctr("container", "delete", restored_id, check=False)
            remove_image(image)

    assert both(scenario) == (0, True)


def test_ctr_task_checkpoint_leaves_the_container_running(config, tmp_path):
    config("checkpoint_stops = false\n")  # see docs/differences.md

    def scenario(runtime):
        with Ctr(runtime, "bash", "-c", COUNTER) as container:
            until(lambda: container.exec("test", "-s", "/count", check=False).rc == 0, "the counter counts")
            done = ctr("task", "checkpoint", container.id)
            image = done.out.strip()
            was = int(container.exec("cat", "/count").out)
            until(lambda: int(container.exec("cat", "/count").out) > was, "the counter goes on")
            remove_image(image)
            return image.replace(container.id, "ID").rsplit(":", 1)[0], container.status[1]

    name, status = both(scenario)
    assert name.startswith("containerd.io/checkpoint/ID") and status == "RUNNING"
