"""A new version takes the place of the program while sandboxes run: their shims, which are the old one, go on.

The other build is made from this one: a copy of the program whose programs for the kernel are others (one name in them, which
nothing reads), so that their maps and pins are, and whose engine has a file of another name, as it has with another format. What is
to differ besides (a call that a shim does not know) a shim that says so shows in test_cli.py.
"""

import json
import os
import pathlib
import shutil

import pytest

from harness import crab, run, until
from test_inspector import Watched

PROGRAM = pathlib.Path("/usr/local/bin/containerd-shim-crab-v2")
RUN = pathlib.Path("/run/crab")
PINS, OUR_ENGINE, OTHER_ENGINE = RUN / "bpf", RUN / "engine.v1", RUN / "engine.w1"
ELF, EM_BPF = b"\x7fELF\x02\x01\x01", 247
"""Of a file for 64 bits with the low byte first; who executes it."""
COUNTER = """
import os, signal
count = 0
def add(*_):
    global count
    count += 1
    with open("/count.new", "w") as file:
        file.write(str(count))
    os.replace("/count.new", "/count")
signal.signal(signal.SIGUSR1, add)
open("/ready", "w").write(str(os.getpid()))
while True:
    signal.pause()
"""


def replaced_once(program, old, new):
    assert len(old) == len(new) and program.count(old) == 1, (old, program.count(old))
    return program.replace(old, new)


def other_build(program):
    at = -1
    while True:
        at = program.index(ELF, at + 1)
        if int.from_bytes(program[at + 18:at + 20], "little") == EM_BPF:
            break
    name = program.index(b"inspector.bpf.c\0", at)
    program = program[:name] + b"inspector.old.c" + program[name + 15:]
    return replaced_once(program, b"engine.v", b"engine.w")


def install(program):
    """As a package manager does: who runs keeps the former file."""
    new = PROGRAM.with_suffix(".new")
    new.write_bytes(program)
    new.chmod(0o755)
    os.replace(new, PROGRAM)


@pytest.fixture
def upgrade():
    """The other build is installed; calling this installs ours."""
    ours = PROGRAM.read_bytes()
    install(other_build(ours))
    yield lambda: install(ours)
    install(ours)
    OTHER_ENGINE.unlink(missing_ok=True)


def builds():
    """The builds that have programs in the kernel."""
    return {entry.name for entry in PINS.iterdir() if entry.is_dir()} if PINS.exists() else set()


def count(sandbox):
    """Sends its process a signal; returns how many it has had, by its own account."""
    before = sandbox.sh("cat /count 2>/dev/null || true")
    sandbox.sh("kill -USR1 $(cat /ready)")
    return int(until(lambda: sandbox.sh(f'now=$(cat /count 2>/dev/null); test "$now" = "{before}" || echo $now'), "it has counted"))


def kept(sandbox):
    """A checkpoint with processes; its turn."""
    line = json.loads(crab("checkpoint", "--json", sandbox.name).out)
    assert line["action"] == "full" and line["checkpoint"], line
    return line["turn"]


def takes_turns(sandbox):
    """Each kind of turn is taken as what it is."""
    kept(sandbox)
    files = sandbox.turn_of("sh", "-c", "echo text >/file")
    assert files["action"] == "files" and files["checkpoint"], files
    full = sandbox.turn_of("sh", "-c", "kill -USR1 $(cat /ready); while ! test -e /count; do sleep 0.02; done; rm /count")
    assert full["action"] == "full" and full["checkpoint"], full
    return full["turn"]


def test_a_shim_whose_program_was_replaced_goes_on_taking_checkpoints(tmp_path):
    with Watched(tmp_path) as sandbox:
        new = PROGRAM.with_suffix(".new")
        shutil.copy2(PROGRAM, new)
        os.replace(new, PROGRAM)
        line = sandbox.turn_of("sh", "-c", "sleep 1000 >/dev/null 2>&1 &")
        assert line["action"] == "full" and line["checkpoint"], line


def test_two_builds_side_by_side(tmp_path, upgrade):
    with Watched(tmp_path) as old:
        old.background(COUNTER)
        kept(old)
        [theirs] = builds()
        upgrade()
        with Watched(tmp_path) as new:
            new.background(COUNTER)
            kept(new)
            # Pins, and budgets, side by side.
            assert builds() > {theirs} and len(builds()) == 2, builds()
            assert OUR_ENGINE.exists() and OTHER_ENGINE.exists()
            [warning] = json.loads(crab("engine", "--json").out)["warnings"]
            assert "another version of crab runs beside" in warning and OTHER_ENGINE.name in warning, warning
            for sandbox in (old, new):
                takes_turns(sandbox)
            shown = {line["id"]: line for line in map(json.loads, crab("ps", "--json").out.splitlines())}
            assert [shown[one.container.id]["status"] for one in (old, new)] == ["yes", "yes"], shown
            # A newer command, and the sandbox's own shim.
            for sandbox in (old, new):
                before = count(sandbox)
                turn = kept(sandbox)
                assert count(sandbox) == before + 1
                crab("rollback", f"{sandbox.name}@{turn}")
                assert count(sandbox) == before + 1, "memory and file are those of the checkpoint"
                takes_turns(sandbox)
            [ours] = builds() - {theirs}
        # The last shim of the newer build has gone; what is the older one's stays.
        until(lambda: builds() == {theirs}, f"the programs of {ours} are removed")
        assert OTHER_ENGINE.name in crab("engine").out
        takes_turns(old)


def test_a_checkpoint_of_an_older_build_is_restored_under_a_newer_one(tmp_path, upgrade):
    with Watched(tmp_path) as sandbox:
        sandbox.background(COUNTER)
        seen = count(sandbox)
        turn = kept(sandbox)
        [theirs] = builds()
        count(sandbox)
        upgrade()
        sandbox.die()
        until(lambda: not builds(), "the programs of the older build are removed with its last shim")
        crab("restore", f"{sandbox.name}@{turn}")
        sandbox.container.restart()
        assert count(sandbox) == seen + 1
        assert builds() and theirs not in builds()
        takes_turns(sandbox)
        run("crab", "verify", sandbox.name)


def test_each_verb_of_a_newer_crab_on_a_sandbox_of_an_older_shim(tmp_path, upgrade):
    with Watched(tmp_path) as sandbox:
        sandbox.background(COUNTER)
        first = kept(sandbox)
        upgrade()
        sandbox.turn_of("sh", "-c", "echo text >/file")
        name = sandbox.name
        last = kept(sandbox)
        for argv in (["ps"], ["log", name], ["show", name], ["diff", f"{name}@{first}", f"@{last}"], ["turn", name], ["checkpoint", name],
                     ["checkpoint", "--prove", name], ["rollback", f"{name}@{last}"], ["verify", name], ["gc", name], ["engine"]):
            done = crab(*argv)
            assert done.out and not done.err, done
        refused = crab("restore", f"{name}@{last}", check=False)
        assert refused.rc == 1 and "is running" in refused.err and "crab rollback" in refused.err and refused.err.count("\n") == 1, refused
