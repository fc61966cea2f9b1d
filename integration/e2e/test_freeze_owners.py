"""A freeze has owners (D7b): what crab holds is no client's PAUSED, and what a client has paused stays so."""

import json
import shutil
import threading
import time

from cgroups import freeze, is_frozen
from equality import HOOKS
from harness import BUNDLES, LIMIT, alive, crab, run, until
from taskapi import Shim
from test_armed_restore import Sandbox, both_clients

RUNNING = 2
"""Of the task API's states."""
POLL = 0.005
HOOK = """#!/bin/sh
: >{dir}/frozen
until [ -e {dir}/go ]; do sleep 0.01; done
"""


BUSY = "memory = bytearray(b'x' * (128 << 20))\nwhile True: memory[0] = memory[0] + 1 & 255"
"""Never the same twice, and CRIU needs a while for it."""
MOMENTS = 8


class Checkpoint:
    """One that is taken meanwhile, and stops in its freeze until `go`."""

    def __init__(self, sandbox, directory):
        self.directory = directory
        HOOKS.mkdir(parents=True, exist_ok=True)
        hook = HOOKS / "frozen"
        hook.write_text(HOOK.format(dir=directory))
        hook.chmod(0o755)
        self.thread = threading.Thread(target=self.take, args=(sandbox.name,))
        self.done = None

    def take(self, name):
        self.done = crab("checkpoint", "--json", name, check=False)

    def __enter__(self):
        self.thread.start()
        until(lambda: (self.directory / "frozen").exists() or self.done, "it stands still")
        assert self.done is None, self.done
        return self

    def go(self):
        (self.directory / "go").touch()
        self.thread.join()
        return json.loads(self.done.out)

    def __exit__(self, *_):
        self.go()
        shutil.rmtree(HOOKS)


@both_clients
def test_a_freeze_by_crab_is_never_seen_as_paused(kind, tmp_path):
    seen, over = set(), threading.Event()
    with Sandbox(kind, tmp_path) as sandbox:
        bundle = BUNDLES / ("default" if kind == "ctr" else "moby") / sandbox.container.id

        def poll():
            with Shim((bundle / "address").read_text()) as shim:
                while not over.wait(POLL):
                    seen.add(shim.call("State", {1: sandbox.container.id})[4])

        poller = threading.Thread(target=poll)
        poller.start()
        try:
            for _ in range(3):
                crab("checkpoint", sandbox.name)
            with Checkpoint(sandbox, tmp_path) as checkpoint:
                assert is_frozen(sandbox.init)
                if kind == "docker":
                    assert sandbox.container.state["Status"] == "running"
                else:
                    assert sandbox.container.status[1] == "RUNNING"
                assert checkpoint.go()["checkpoint"]
        finally:
            over.set()
            poller.join()
        assert seen == {RUNNING}


@both_clients
def test_a_pause_during_a_checkpoint_stays(kind, tmp_path):
    with Sandbox(kind, tmp_path) as sandbox:
        client, name = (["docker"], sandbox.container.name) if kind == "docker" else (["ctr", "task"], sandbox.container.id)
        with Checkpoint(sandbox, tmp_path) as checkpoint:
            run(*client, "pause", name)
            assert checkpoint.go()["checkpoint"]
        assert is_frozen(sandbox.init)
        paused = sandbox.container.state["Status"] if kind == "docker" else sandbox.container.status[1]
        assert paused.lower() == "paused"
        run(*client, "unpause" if kind == "docker" else "resume", name)
        assert not is_frozen(sandbox.init)
        assert sandbox.sh("echo alive") == "alive\n"


@both_clients
def test_a_pause_while_criu_dumps_holds_nobody_up(kind, tmp_path):
    """CRIU thaws what it dumps, and hangs on a process that somebody freezes meanwhile."""
    with Sandbox(kind, tmp_path, "python3", "-c", BUSY) as sandbox:
        docker = kind == "docker"
        client, name = (["docker"], sandbox.container.name) if docker else (["ctr", "task"], sandbox.container.id)
        # Twice: the first one of a sandbox takes longer.
        for _ in range(2):
            begin = time.monotonic()
            sandbox.turn()
            takes = time.monotonic() - begin
        for moment in range(MOMENTS):
            before = len(sandbox.turns())
            checkpoint = threading.Thread(target=sandbox.turn)
            checkpoint.start()
            time.sleep(takes * moment / MOMENTS)
            run(*client, "pause", name)
            # If it came before the freeze, CRIU has thawed it for a while.
            until(lambda: is_frozen(sandbox.init), "paused")
            run(*client, "unpause" if docker else "resume", name)
            checkpoint.join()
            assert not is_frozen(sandbox.init)
            lines = sandbox.turns()
            assert len(lines) == before + 1 and lines[-1]["action"] == "full", lines[-1]


def test_whom_the_host_freezes_under_criu_lives_on(tmp_path):
    """Somebody who asks nobody: CRIU hangs until its limit, and would take with it whom it works on."""
    with Sandbox("ctr", tmp_path, "python3", "-c", BUSY, options=["--annotation", "dev.crab.dump_timeout=10s"]) as sandbox:
        init = sandbox.init
        hung = 0
        for _ in range(5):
            checkpoint = threading.Thread(target=lambda: crab("checkpoint", sandbox.name, check=False))
            checkpoint.start()
            # First crab freezes, then CRIU thaws.
            for state in (True, False):
                while is_frozen(init) != state and checkpoint.is_alive():
                    pass
            freeze(init, True)
            begin = time.monotonic()
            checkpoint.join()
            hung += time.monotonic() - begin > 5
            freeze(init, False)
            assert sandbox.init == init and alive(init)
            if hung:
                break
        assert hung, "CRIU was not met at work"
        assert sandbox.sh("echo alive") == "alive\n"
        sandbox.turn()


def checkpointed_or_stopped(sandbox):
    """Takes a checkpoint at once: whether it was of processes, too, or one of them was found stopped."""
    begin = time.monotonic()
    done = crab("checkpoint", "--json", sandbox.name, check=False)
    took = time.monotonic() - begin
    assert took < LIMIT / 2, f"{took} s: {done}"
    assert done.rc == 0 and json.loads(done.out)["checkpoint"] or "has stopped processes" in done.err, done
    return done.rc == 0


@both_clients
def test_a_stop_while_criu_dumps_holds_nobody_up(kind, tmp_path):
    """CRIU hangs on whoever is stopped, too."""
    with Sandbox(kind, tmp_path, "python3", "-c", BUSY) as sandbox:
        client, name = (["docker"], sandbox.container.name) if kind == "docker" else (["ctr", "task"], sandbox.name)
        for _ in range(2):
            begin = time.monotonic()
            sandbox.turn()
            takes = time.monotonic() - begin
        done = []
        for moment in range(MOMENTS):
            checkpoint = threading.Thread(target=lambda: done.append(checkpointed_or_stopped(sandbox)))
            checkpoint.start()
            time.sleep(takes * moment / MOMENTS)
            run(*client, "kill", "-s", "STOP", name)
            checkpoint.join()
            run(*client, "kill", "-s", "CONT", name)
        # On a slow machine each of them may have come before the freeze.
        assert len(done) == MOMENTS, done
        sandbox.turn()
        assert sandbox.turns()[-1]["action"] == "full"


def test_whoever_is_stopped_again_and_again_is_dumped_in_between_or_named(tmp_path):
    script = "while :; do :; done & while :; do kill -STOP $!; sleep 0.005; kill -CONT $!; sleep 0.005; done"
    with Sandbox("ctr", tmp_path, "sh", "-c", script) as sandbox:
        done = [checkpointed_or_stopped(sandbox) for _ in range(3 * MOMENTS)]
        assert any(done), done
