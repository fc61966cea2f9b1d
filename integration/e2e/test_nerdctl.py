"""nerdctl: run, exec, logs (its default log driver is a binary:// URI), checkpoints."""

import shutil

import pytest

from harness import CRAB, IMAGE, run, unique, until

pytestmark = pytest.mark.skipif(not shutil.which("nerdctl"), reason="no nerdctl in this bed")


@pytest.fixture
def sandbox():
    name = unique("n")
    script = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done"
    run("nerdctl", "run", "-d", "--name", name, "--runtime", CRAB, "--net", "none", IMAGE, "sh", "-c", script)
    yield name
    run("nerdctl", "rm", "-f", name)


def count(name):
    lines = run("nerdctl", "logs", name).out.split()
    return int(lines[-1]) if lines else -1


def test_exec_and_logs(sandbox):
    assert run("nerdctl", "exec", sandbox, "echo", "hi").out == "hi\n"
    until(lambda: count(sandbox) > 3, "the log grows")


def test_a_checkpoint_is_listed_restored_and_removed(sandbox):
    until(lambda: count(sandbox) > 3, "the log grows")
    run("nerdctl", "checkpoint", "create", sandbox, "one")
    assert "one" in run("nerdctl", "checkpoint", "ls", sandbox).out
    stopped_at = count(sandbox)
    run("nerdctl", "start", "--checkpoint", "one", sandbox)
    until(lambda: count(sandbox) > stopped_at + 3, "it goes on counting")
    run("nerdctl", "checkpoint", "rm", sandbox, "one")
    assert "one" not in run("nerdctl", "checkpoint", "ls", sandbox).out
