"""On a stock kernel, with cgroup v2 alone: what it offers, and crab's main road on it."""

import json
import os
import pathlib

import pytest

from harness import crab, run
from test_armed_restore import ASK, SEED, SERVER, Sandbox

SMALL_SERVER = SERVER.replace("64 << 20", "1 << 20")
"""An emulated machine hashes, dumps and compresses at a tenth of the speed."""


def test_the_kernel_is_a_distributions_with_all_that_this_hosts_may_lack():
    assert os.uname().release.endswith("-cloud-amd64")
    have = pathlib.Path("/sys/fs/cgroup/cgroup.controllers").read_text().split()
    assert {"cpu", "cpuset", "io", "memory", "pids"} <= set(have)
    assert set(pathlib.Path("/sys/fs/cgroup/cgroup.subtree_control").read_text().split()) == set(have)
    assert "CRIU" not in run("criu", "check", "--feature", "mem_dirty_track").err
    assert pathlib.Path("/sys/kernel/btf/overlay").exists()
    # What fentry attaches to, and the tracepoints that this kernel is too old for.
    traced = pathlib.Path("/sys/kernel/tracing/available_filter_functions").read_text()
    assert "\ninode_set_ctime_current\n" in traced
    assert not pathlib.Path("/sys/kernel/tracing/events/timestamp").exists()


SERVE = """nohup setpriv --reuid=1000 --regid=1000 --clear-groups python3 -c "$1" &
until grep -q @server /proc/net/unix; do sleep 0.1; done"""
"""Leaves a server of another user running, which CRIU can dump only with CAP_SYS_RESOURCE."""


@pytest.mark.parametrize("client, runtime", [("ctr", "runc"), ("ctr", "crun"), ("docker", "runc")])
def test_a_server_of_another_user_comes_back_with_its_memory(client, runtime, tmp_path, config):
    config(f'runtime = "{runtime}"\n')
    with Sandbox(client, tmp_path) as sandbox:
        sandbox.exec("sh", "-c", SERVE, "sh", SMALL_SERVER)
        was, _ = sandbox.ask("hash", "next")
        turn = sandbox.settled()
        following = sandbox.ask("next")
        sandbox.die()
        sandbox.restore(f"@{turn}")
        sandbox.start()
        assert sandbox.ask("hash", "next") == [was, *following]
        assert sandbox.sh("stat -c %u /proc/$(pgrep -f ^python3)") == "1000\n"
        if client == "ctr":
            assert sandbox.container.cgroup("memory").is_relative_to("/sys/fs/cgroup/default")
        else:
            crab("rollback", f"{sandbox.name}@{turn}")
            assert sandbox.ask("hash", "next") == [was, *following]


STORE = """python3 -c 'import mmap, os
fd = os.open("/mapped", os.O_RDWR)
with mmap.mmap(fd, 4096) as its: its[:6] = b"stored"'"""
"""The file is there and captured before: the store is all that changes it."""


def test_the_inspector_tells_turns_apart_by_functions_of_the_kernel(tmp_path, config):
    config('runtime = "crun"\n')  # in less time; what is looked at is the kernel
    with Sandbox("ctr", tmp_path) as sandbox:
        sandbox.sh("head -c 4096 /dev/zero >/mapped")
        sandbox.settled("none")
        for command in "touch /new", STORE, "rm /new", "chmod 600 /mapped":
            sandbox.sh(command)
            turn = sandbox.settled()
            line = sandbox.turns()[-1]
            assert (line["turn"], line["action"]) == (turn, "files"), (command, line)
        sandbox.sh("true")
        sandbox.settled("none")
        sandbox.die()
        sandbox.restore(f"@{turn}")
        sandbox.start()
        assert sandbox.sh("head -c 6 /mapped; stat -c %a /mapped; test -e /new || echo gone") == "stored600\ngone\n"
