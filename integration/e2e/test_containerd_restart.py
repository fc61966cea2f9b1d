"""containerd comes and goes; containers stay, and their ends are told."""

import os
import signal

import pytest

from harness import (
    CRAB, RUNTIMES, Ctr, Docker, Events, alive, both, docker, start_containerd, stop_containerd, until,
)  # fmt: skip
from taskapi import PROCESS, Shim, any_of

COUNTER = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done"


@pytest.fixture
def containerd():
    """Stops and starts containerd; it runs again at the end of the test, whatever happens."""

    class Daemon:
        argv = None

        def stop(self):
            self.argv = stop_containerd()

        def start(self):
            start_containerd(self.argv)
            self.argv = None

    daemon = Daemon()
    yield daemon
    if daemon.argv:
        daemon.start()
    # dockerd connects again in its own time.
    until(lambda: docker("run", "--rm", "--network", "none", "crab.test/agent:latest", "true", check=False).rc == 0, "Docker works again")


EXITS = "until test -e /go; do sleep 0.02; done; exit 11"


def test_containers_survive_a_restart_of_containerd(containerd, tmp_path):
    logs = {runtime: tmp_path / f"{runtime}.log" for runtime in RUNTIMES}
    containers = {runtime: Ctr(runtime, "sh", "-c", COUNTER, output=logs[runtime]) for runtime in RUNTIMES}
    container = containers[CRAB]
    try:
        with Shim.of(container) as shim:
            args = ["sh", "-c", EXITS]
            process = {"args": args, "cwd": "/", "env": ["PATH=/usr/bin:/bin"], "user": {"uid": 0, "gid": 0}}
            shim.call("Exec", {1: container.id, 2: "over", 7: any_of(PROCESS, process)})
            shim.call("Start", {1: container.id, 2: "over"})
            before = {runtime: container.status for runtime, container in containers.items()}
            shims = {runtime: container.shim for runtime, container in containers.items()}
            containerd.stop()
            (container.bundle / "rootfs/go").touch()
            assert shim.call("Wait", {1: container.id, 2: "over"})[1] == 11, "the shim works on its own"
            lines = {runtime: len(log.read_text()) for runtime, log in logs.items()}
            until(lambda: all(len(log.read_text()) > lines[r] + 20 for r, log in logs.items()), "output flows without containerd")
            containerd.start()
            shim.call("Delete", {1: container.id, 2: "over"})
        for runtime, container in containers.items():
            assert (container.status, container.shim) == (before[runtime], shims[runtime])
            assert container.sh("echo alive") == "alive\n"
            counted = [int(n) for n in logs[runtime].read_text().split("\n")[:-1]]
            assert counted == list(range(1, len(counted) + 1)), "no output lost"
            container.kill()
            container.stopped()
            assert container.delete_task() == 137
    finally:
        for container in containers.values():
            container.remove()


def test_a_container_that_ends_in_containerds_absence_is_cleaned_up_after_it(containerd):
    """containerd 1.7 takes tasks whose processes are gone when it starts for leaked, and deletes them."""
    containers = {runtime: Ctr(runtime, "sh", "-c", EXITS) for runtime in RUNTIMES}
    try:
        pids, shims = zip(*[(container.pid, container.shim) for container in containers.values()])
        containerd.stop()
        for pid in pids:
            with open(f"/proc/{pid}/root/go", "w"):
                pass
            until(lambda: not alive(pid), "the container's end")
        assert all(map(alive, shims))
        containerd.start()
        for container in containers.values():
            until(lambda: container.status is None, "containerd has cleaned up")
            assert not container.bundle.exists()
        until(lambda: not any(map(alive, shims)), "the shims have ended")
        for container in containers.values():
            container.restart()
            container.stopped()
            assert container.delete_task() == 11, "its files, with /go among them, are still there"
    finally:
        for container in containers.values():
            container.remove()


def test_a_docker_container_survives_a_restart_of_containerd(containerd):
    with Docker(CRAB, "sh", "-c", COUNTER) as container:
        until(lambda: len(container.logs().split()) > 5, "it counts")
        containerd.stop()
        containerd.start()
        until(lambda: container.exec("true", check=False).rc == 0, "exec works again")
        was = len(container.logs().split())
        until(lambda: len(container.logs().split()) > was, "it goes on counting")
        counted = [int(n) for n in container.logs().split()]
        assert counted == list(range(1, len(counted) + 1)), "no output lost"


def test_a_killed_shim_leaves_nothing_of_its_container():
    def scenario(runtime):
        with Events() as events, Ctr(runtime, "sh", "-c", "sleep 1000 & sleep 1000 & wait") as container:
            container.detached("sleep", "1000")
            pid, shim = container.pid, container.shim
            os.kill(shim, signal.SIGKILL)
            events.wait_for(container.id, "/tasks/delete")
            until(lambda: not alive(pid) and container.status is None and not container.bundle.exists(), "containerd has cleaned up")
            exits = [m["exit_status"] for topic, m in events.of(container.id) if topic == "/tasks/exit" and m["id"] == container.id]
            container.restart()
            assert container.sh("echo alive") == "alive\n"
            return exits

    assert both(scenario) == [137]


def test_docker_notices_a_killed_shim_and_starts_again():
    def scenario(runtime):
        with Docker(runtime) as container:
            os.kill(container.shim, signal.SIGKILL)
            until(lambda: container.state["Status"] == "exited", "Docker knows")
            code = container.state["ExitCode"]
            container("start")
            return code, container.sh("echo alive")

    assert both(scenario) == (137, "alive\n")


def test_a_killed_init_ends_its_container_and_shim():
    def scenario(runtime):
        with Docker(runtime) as container:
            shim = container.shim
            os.kill(container.pid, signal.SIGKILL)
            until(lambda: container.state["Status"] == "exited" and not alive(shim), "the container has ended")
            return container.state["ExitCode"]

    assert both(scenario) == 137
