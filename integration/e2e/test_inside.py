"""A process inside sees the same under crab as under containerd's own runc shim.

`probe.py` runs inside and prints what it sees; every fact is compared.
"""

import json
import os
import pathlib

import pytest

from harness import IMAGE, Ctr, Docker, Terminal, both, ctr, docker, pair, unique

PROBE = pathlib.Path(__file__).with_name("probe.py").read_text()
INSIDE = ("python3", "-c", PROBE)
# Not before ctr has set the size: of a process that has ended runc.v2 refuses that, aloud.
SIZED = ("sh", "-c", 'until test "$(stty size)" = "24 200"; do sleep 0.02; done; exec "$@"', "sh", *INSIDE)
OURS = {name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")}

CTR_RUN = {
    "plain": [],
    "terminal": ["--tty"],
    "privileged": ["--privileged", "--read-only"],
    "user": ["--user", "1000:1000", "--allow-new-privs"],
    "host-network": ["--net-host", "--cap-add", "CAP_NET_ADMIN", "--cap-drop", "CAP_CHOWN"],
}
DOCKER_RUN = {
    "plain": [],
    "terminal": ["-t"],
    "privileged": ["--privileged"],
    "restricted": ["--read-only", "--user", "1000:1000", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--tmpfs", "/tmp",
                   "--pids-limit", "50", "--ulimit", "nofile=99:100"],
    "shared": ["--ipc", "host", "--pid", "host", "--uts", "host", "--cgroupns", "host", "--security-opt", "seccomp=unconfined"],
}  # fmt: skip
EXEC = {"plain": [], "terminal": ["-t"], "user": ["--user", "1234:1234"]}


def facts(output, container):
    seen = json.loads(output)
    seen["namespaces"] = {n: "shared" if OURS.get(n) == link else "private" for n, link in seen["namespaces"].items()}
    return json.loads(json.dumps(seen).replace(container, "ID").replace(container[:12], "ID"))


def is_sane(seen):
    """The comparison would also be happy with two broken containers."""
    assert seen["descriptors"].keys() == {"0", "1", "2"}, seen["descriptors"]
    assert seen["namespaces"]["mnt"] == "private"
    assert seen["mounts"][0][0] == "/" and seen["mounts"][0][4] == "overlay"
    assert seen["network"]["loopback"] == "works"


def through_terminal(argv):
    with Terminal(*argv, rows=24, cols=200) as terminal:
        rc, out = terminal.finish()
    assert rc == 0, out
    return out


@pytest.mark.parametrize("options", CTR_RUN.values(), ids=CTR_RUN)
def test_what_ctr_runs(options):
    def scenario(runtime):
        id = unique("inside")
        argv = ["run", "--rm", "--runtime", runtime, *options, IMAGE, id, *(SIZED if "--tty" in options else INSIDE)]
        return facts(through_terminal(["ctr", *argv]) if "--tty" in options else ctr(*argv).out, id)

    is_sane(both(scenario))


@pytest.mark.parametrize("options", DOCKER_RUN.values(), ids=DOCKER_RUN)
def test_what_docker_runs(options):
    def scenario(runtime):
        # -i: without it there is a pipe where runc.v2 has /dev/null (docs/differences.md).
        with Docker(runtime, *INSIDE, options=["-i", *options]) as container:
            assert container("wait").out == "0\n", docker("logs", container.name)
            return facts(container.logs(), container.id)

    is_sane(both(scenario))


@pytest.fixture(scope="module")
def shared():
    containers = {"ctr": pair("ctr"), "docker": pair("docker", options=["-i"])}
    yield containers
    for pairs in containers.values():
        for container in pairs.values():
            container.remove()


@pytest.mark.parametrize("options", EXEC.values(), ids=EXEC)
def test_what_ctr_execs(shared, options):
    def scenario(runtime):
        container: Ctr = shared["ctr"][runtime]
        if "-t" in options:
            return facts(through_terminal(container.exec_argv(*SIZED, options=options)), container.id)
        return facts(container.exec(*INSIDE, options=options).out, container.id)

    is_sane(both(scenario))


@pytest.mark.parametrize("options", EXEC.values(), ids=EXEC)
def test_what_docker_execs(shared, options):
    def scenario(runtime):
        container: Docker = shared["docker"][runtime]
        if "-t" in options:
            return facts(through_terminal(["docker", "exec", *options, container.name, *INSIDE]), container.id)
        return facts(docker("exec", "-i", *options, container.name, *INSIDE).out, container.id)

    is_sane(both(scenario))
