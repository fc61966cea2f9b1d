"""The differences from containerd's own runc shim, as docs/differences.md lists them. One test for each."""

import os
import pathlib
import re
import signal
import time

import pytest

from harness import CRAB, LIMIT, RUNC, Ctr, Docker, Events, ctr, docker, together, unique, until
from taskapi import Refused, Shim, encode

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs/differences.md"
SERVER = "until test -e /go; do sleep 0.02; done; i=0; while :; do i=$((i+1)); echo tick $i; echo $i >/ticks; sleep 0.02; done"


def scenarios(scenario):
    """What comes out under runc.v2 and under crab."""
    return together([lambda r=r: scenario(r) for r in (RUNC, CRAB)])


@pytest.fixture
def document():
    return DOCUMENT.read_text()


def test_every_difference_has_a_test(document):
    named = set(re.findall(r"`(test_\w+)`", document))
    here = {name for name in globals() if name.startswith("test_")} - {"test_every_difference_has_a_test"}
    assert named == here


def test_a_checkpoint_without_options_stops_the_container_unless_configured(config):
    """--leave-running cannot be seen; with checkpoint_stops = false nothing stops."""

    def scenario(runtime):
        with Docker(runtime) as one, Ctr(runtime) as two:
            docker("checkpoint", "create", "--leave-running", one.name, "one")
            ctr("images", "rm", ctr("task", "checkpoint", two.id).out.strip())
            return one.state["Status"], two.status[1]

    assert scenarios(scenario) == [("running", "RUNNING"), ("exited", "STOPPED")]
    config("checkpoint_stops = false\n")

    def stopping(runtime):
        with Docker(runtime) as container:
            docker("checkpoint", "create", container.name, "one")
            return container.state["Status"]

    assert scenarios(stopping) == ["exited", "running"]


def test_the_image_path_of_ctr_task_checkpoint_is_not_used(config, tmp_path):
    config("checkpoint_stops = false\n")

    def scenario(runtime):
        directory = tmp_path / runtime
        with Ctr(runtime) as container:
            ctr("task", "checkpoint", "--image-path", directory / "image", "--work-path", directory / "work", container.id)
            images = [name for name in ctr("images", "ls", "-q").out.split() if f"checkpoint/{container.id}:" in name]
            for name in images:
                ctr("images", "rm", "--sync", name)
            return (directory / "image/inventory.img").exists(), len(images)

    assert scenarios(scenario) == [(True, 0), (False, 1)]


def test_the_image_path_of_the_options_is_used_when_containerd_passes_them_on(tmp_path):
    with Ctr(CRAB) as container, Shim.of(container) as shim:
        options = {8: f"{tmp_path}/image"}  # CheckpointOptions.image_path
        shim.call("Checkpoint", {1: container.id, 2: f"{tmp_path}/other", 3: {1: "containerd.runc.v1.CheckpointOptions", 2: encode(options)}})
        assert (tmp_path / "image/inventory.img").exists() and not (tmp_path / "other").exists()


def test_a_background_process_survives_the_end_of_its_exec(tmp_path):
    """runc.v2: it dies of SIGPIPE as soon as it writes."""

    def scenario(runtime):
        log = tmp_path / runtime
        with Ctr(runtime, output=log) as container:
            container.detached("sh", "-c", SERVER)
            container.exec("touch", "/go")

            def dead():
                return container.exec("pgrep", "--full", "^sh -c until", check=False).rc == 1 and "dead"

            def counting():
                return int(container.exec("cat", "/ticks", check=False).out or 0) > 20 and "counting"

            fate = until(lambda: dead() or counting(), "it counts, or is dead")
            return fate, log.exists() and "tick 20\n" in log.read_text()

    assert scenarios(scenario) == [("dead", False), ("counting", True)]


def test_a_process_without_stdin_reads_an_empty_pipe():
    """runc.v2: /dev/null."""

    def scenario(runtime):
        with Docker(runtime) as container:
            script = "readlink /proc/self/fd/0 /proc/1/fd/0 | sed 's/:.*//'; cat; echo end"
            return docker("exec", container.name, "sh", "-c", script).out

    assert scenarios(scenario) == ["/dev/null\n/dev/null\nend\n", "pipe\npipe\nend\n"]


def test_an_exec_does_not_wait_for_a_silent_process_that_it_leaves_behind():
    def scenario(runtime):
        with Ctr(runtime) as container:

            def took():
                start = time.monotonic()
                container.detached("sleep", "1000")
                return time.monotonic() - start

            # runc.v2 waits for two seconds. Whoever waits does so every time; a busy machine does not.
            return min(took() for _ in range(1 if runtime == RUNC else 3))

    theirs, ours = scenarios(scenario)
    assert theirs >= 2 and ours < theirs - 1


def test_a_live_exec_fails_a_checkpoint(tmp_path):
    """runc.v2: succeeds, and the image lacks the exec."""

    def scenario(runtime):
        with Ctr(runtime) as container, container.start_exec("sh", "-c", "echo up; exec sleep 1000", exec_id="shell") as client:
            assert client.stdout.readline() == b"up\n"
            with Shim.of(container) as shim:
                try:
                    options = {1: "containerd.runc.v1.CheckpointOptions", 2: b""}
                    shim.call("Checkpoint", {1: container.id, 2: str(tmp_path / runtime), 3: options})
                    result = "done"
                except Refused as e:
                    result = e.kind, "shell" in e.message
            assert container.sh("echo alive") == "alive\n"
            container.kill(options=["--exec-id", "shell"])
            client.communicate(timeout=LIMIT)
            return result

    assert scenarios(scenario) == ["done", ("failed precondition", True)]


def test_a_checkpoint_is_an_event():
    def scenario(runtime):
        with Events() as events, Ctr(runtime) as container:
            image = unique("checkpoint.test/") + ":latest"
            ctr("container", "checkpoint", "--task", container.id, image)
            ctr("images", "rm", "--sync", image)
            container.kill()
            events.wait_for(container.id, "/tasks/exit")
            return [topic for topic, _ in events.of(container.id) if topic == "/tasks/checkpointed"]

    assert scenarios(scenario) == [[], ["/tasks/checkpointed"]]


def test_refusals_have_containerds_error_codes():
    """runc.v2: "unknown" for most."""

    def scenario(runtime):
        kinds = []
        with Ctr(runtime) as container, Shim.of(container) as shim:
            for method, fields in (("Resume", {}), ("Start", {}), ("Delete", {}), ("Kill", {3: 99})):
                with pytest.raises(Refused) as e:
                    shim.call(method, {1: container.id, **fields})
                kinds.append(e.value.kind)
        return kinds

    theirs, ours = scenarios(scenario)
    assert ours == ["failed precondition"] * 3 + ["invalid argument"]
    assert theirs == ["unknown"] * 4


def test_a_killed_shim_leaves_no_socket():
    """runc.v2: leaves one in /run/containerd/s for each."""

    def scenario(runtime):
        with Ctr(runtime) as container:
            socket = pathlib.Path((container.bundle / "address").read_text().removeprefix("unix://"))
            os.kill(container.shim, signal.SIGKILL)
            until(lambda: container.status is None and not container.bundle.exists(), "containerd has cleaned up")
            return socket.exists()

    assert scenarios(scenario) == [True, False]
