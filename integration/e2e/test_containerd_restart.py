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


def test_containers_survive_a_restart_of_containerd(containerd, tmp_path):
    logs = {}

    def begin(runtime):
        logs[runtime] = tmp_path / f"{runtime}.log"
        return Ctr(runtime, "sh", "-c", COUNTER, output=logs[runtime])

    containers = {runtime: begin(runtime) for runtime in RUNTIMES}
    ending = {runtime: Ctr(runtime, "sh", "-c", "until test -e /go; do sleep 0.02; done; exit 11") for runtime in RUNTIMES}
    short = {runtime: Ctr(runtime) for runtime in RUNTIMES}
    try:
        shim = Shim.of(short[CRAB])
        process = any_of(PROCESS, {"args": ["sh", "-c", "until test -e /go; do sleep 0.02; done; exit 12"], "cwd": "/", "env": ["PATH=/usr/bin:/bin"], "user": {"uid": 0, "gid": 0}})
        shim.call("Exec", {1: short[CRAB].id, 2: "over", 7: process})
        shim.call("Start", {1: short[CRAB].id, 2: "over"})
        pids = {runtime: container.pid for runtime, container in ending.items()}
        before = {runtime: container.status for runtime, container in containers.items()}
        containerd.stop()
        # Ends while nobody hears.
        for runtime, pid in pids.items():
            (ending[runtime].bundle / "rootfs/go").touch()
            until(lambda: not alive(pid), "the container's end")
        (short[CRAB].bundle / "rootfs/go").touch()
        assert shim.call("Wait", {1: short[CRAB].id, 2: "over"})[1] == 12
        mark = {runtime: len(log.read_text()) for runtime, log in logs.items()}
        until(lambda: all(len(log.read_text()) > mark[runtime] + 20 for runtime, log in logs.items()), "output flows without containerd")
        containerd.start()
        shim.call("Delete", {1: short[CRAB].id, 2: "over"})
        for runtime in RUNTIMES:
            assert containers[runtime].status == before[runtime]
            assert containers[runtime].sh("echo alive") == "alive\n"
            ending[runtime].stopped()
            assert ending[runtime].delete_task() == 11, runtime
            counted = [int(n) for n in logs[runtime].read_text().split("\n")[:-1]]
            assert counted == list(range(1, len(counted) + 1)), "no output lost"
    finally:
        shim.socket.close()
        for container in (*containers.values(), *ending.values(), *short.values()):
            container.remove()


def test_an_end_in_containerds_absence_is_an_event_after_it(containerd):
    with Ctr(CRAB, "sh", "-c", "until test -e /go; do sleep 0.02; done; exit 13") as container:
        pid, shim = container.pid, container.shim
        containerd.stop()
        (container.bundle / "rootfs/go").touch()
        until(lambda: not alive(pid), "the container's end")
        containerd.start()
        assert container.shim == shim, "the shim itself has survived"
        container.stopped()
        assert container.delete_task() == 13


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
            events.wait_for(container.id, "/tasks/exit")
            until(lambda: not alive(pid) and container.status is None, "containerd has cleaned up")
            exits = [m["exit_status"] for topic, m in events.of(container.id) if topic == "/tasks/exit"]
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
