"""The inspector is killed at every step of load, join, register, rotate, retire and leave, and nobody else notices.

The programs are the host's, so a shim that dies must neither take them from the others nor leave them for ever.
"""

import itertools
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
from watcher import CHECKOUT, Died, Refused

LOAD = ["mounted", "loaded", "maps", "attached", "linked", "linked:6", "pinned", "renamed"]
"""In the loader, which is a child: the driver lives on and says so."""
JOIN = ["sweeping", "claimed", "put", "overlay", "registered"]
ROTATE = ["put:2", "next", "ended", "cut"]
RETIRE = ["put:3", "retired"]
LEAVE = ["unregistering", "unregistered", "left", "removing", "unmounting"]
LAST = ["removing", "unmounting"]
"""Only the last one that leaves does that."""
ROUNDS, SECONDS, DEATHS = 30, 6, 3
"""The deaths at random moments: so many lives, or as many as fit; but so many deaths, however busy the machine is."""


def test_every_step_has_its_death():
    source = "".join(p.read_text() for p in (CHECKOUT / "src/inspector").glob("*.rs"))
    named = set(re.findall(r'failpoint\("(\w+)"\)', source))
    assert named == {step.split(":")[0] for step in LOAD + JOIN + ROTATE + RETIRE + LEAVE}


def die(bed, build, sandbox, step):
    """A driver that dies at this step."""
    if step == "sweeping":
        # Only who died before is swept.
        first = bed.watcher(build, sandbox).ready()
        bed.note()
        first.kill()
    victim = bed.watcher(build, sandbox, die_at=step)
    if step in LOAD:
        with pytest.raises(Refused):
            victim.ready()
        assert victim.end() == 1
        return
    if step not in JOIN:
        victim.ready()
        victim.sees() if step in LEAVE else sandbox.write()
        bed.note()
        orders = ["cut"] if step in ROTATE else ["cut", "durable"] if step in RETIRE else ["quit"]
        victim.send(*orders)
        if step in RETIRE:
            victim.answer()
    with pytest.raises(Died) as died:
        victim.answer()
    assert died.value.code == -signal.SIGKILL
    victim.end()


@pytest.mark.parametrize("step", LOAD + JOIN + ROTATE + RETIRE + LEAVE)
def test_the_next_one_works_after_a_death_at(step, bed, builds):
    build = builds[0]
    sandbox = bed.sandbox()
    die(bed, build, sandbox, step)
    # A shim that is started again watches the same sandbox.
    following = bed.watcher(build, sandbox).ready()
    following.sees()
    bed.note()
    assert following.leave() == 0
    bed.nothing_is_left(build)


@pytest.mark.parametrize("step", LOAD + JOIN + ROTATE + RETIRE + [s for s in LEAVE if s not in LAST])
def test_those_beside_go_on_after_a_death_at(step, bed, builds):
    # Programs are loaded beside others only if those are of another build.
    build, beside = (builds[0], builds[1]) if step in LOAD else (builds[0], builds[0])
    bystander = bed.watcher(beside, bed.sandbox()).ready()
    bystander.sees()
    bed.note()
    die(bed, build, bed.sandbox(), step)
    bystander.sees()
    bed.note()
    # The last one takes also what the dead one has left, of whatever build.
    assert bystander.leave() == 0
    bed.nothing_is_left(*builds)


@pytest.mark.parametrize("company", ["alone", "beside another"])
def test_a_death_at_any_moment(company, bed, builds):
    """Between the steps, too: at random moments of a whole life, with the loader or without it."""
    chance = random.Random(f"crab {company}")
    build = builds[0]
    orders = ["look", "cut", "durable"] * 8 + ["quit"]

    def life():
        watcher = bed.watcher(build, sandbox)
        watcher.send(*orders)
        return watcher

    def goes_on_after(sandbox):
        following = bed.watcher(build, sandbox).ready()
        following.sees()
        bed.note()
        assert following.leave() == 0

    bystander = None
    if company != "alone":
        bystander = bed.watcher(build, bed.sandbox()).ready()
    sandbox = bed.sandbox()
    begin = time.monotonic()
    assert life().end() == 0
    whole = time.monotonic() - begin
    killed = 0

    def goes_on(_):
        return killed < DEATHS or time.monotonic() < begin + SECONDS

    for turn in itertools.takewhile(goes_on, range(ROUNDS)):
        born, victim = time.monotonic(), life()
        try:
            victim.process.wait(chance.uniform(0, whole))
            whole = time.monotonic() - born
        except subprocess.TimeoutExpired:
            bed.census.note(bed.bpffs, victim.pid)
            victim.kill(family=chance.random() < 0.5)
            killed += 1
        if bystander and turn % 5 == 0:
            bystander.sees()
        if turn % 10 == 0:
            goes_on_after(sandbox)
    assert killed >= DEATHS, "the moments are spread over its life"
    # Whatever the last one has left, if it was killed.
    goes_on_after(sandbox)
    if bystander:
        bystander.sees()
        assert bystander.leave() == 0
    bed.nothing_is_left(build)


def test_who_takes_over_a_dead_ones_place_takes_nothing_else(bed, builds):
    """The sandbox of a shim that was killed runs on; its changes are not those of the next one in that slot."""
    abandoned, sandbox = bed.sandbox(), bed.sandbox()
    dead = bed.watcher(builds[0], abandoned).ready()
    dead.sees()
    bed.note()
    dead.kill()
    following = bed.watcher(builds[0], sandbox).ready()
    following.sees()
    abandoned.write()
    assert following.inodes()[1] <= sandbox.inodes
    assert following.leave() == 0
    bed.nothing_is_left(builds[0])


@pytest.mark.parametrize("how", ["removed", "unmounted"])
def test_without_the_pins_all_go_on(how, bed, builds):
    """They are only where shims meet."""
    build = builds[0]
    first = bed.watcher(build, bed.sandbox()).ready()
    bed.note()
    if how == "removed":
        for directory in bed.bpffs.iterdir():
            if directory.is_dir():
                shutil.rmtree(directory)
    else:
        subprocess.run(["umount", bed.bpffs], check=True)
    first.sees()
    second = bed.watcher(build, bed.sandbox()).ready()
    bed.note()
    second.sees()
    first.sees()
    assert first.leave() == 0
    second.sees()
    assert second.leave() == 0
    bed.nothing_is_left(build)


def test_a_sandbox_is_watched_once(bed, builds):
    """What it does is recorded once: a second shim is refused, and takes nothing from the first."""
    sandbox = bed.sandbox()
    first = bed.watcher(builds[0], sandbox).ready()
    second = bed.watcher(builds[0], sandbox)
    with pytest.raises(Refused, match="watched already"):
        second.ready()
    assert second.end() == 1
    first.sees()
    bed.note()
    assert first.leave() == 0
    bed.nothing_is_left(builds[0])


def below_a_file(bed):
    bed.run.write_text("")


def read_only(bed):
    bed.run.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "crab-life", bed.run], check=True)


def no_rights(bed):
    bed.run.mkdir()


@pytest.mark.parametrize("why", [below_a_file, read_only, no_rights])
def test_without_a_bpffs_there_is_a_reason(why, bed, builds):
    why(bed)
    # Programs may be loaded without CAP_SYS_ADMIN, mounts may not.
    prefix = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"] if why is no_rights else []
    try:
        watcher = bed.watcher(builds[0], bed.sandbox(), prefix=prefix)
        with pytest.raises(Refused) as refused:
            watcher.ready()
        assert watcher.end() == 1
        assert str(bed.run) in str(refused.value)
        assert re.search("os error|EPERM|EROFS|ENOTDIR|denied|permitted", str(refused.value))
        assert not builds[0].is_loaded()
    finally:
        subprocess.run(["umount", "-q", bed.run], check=False)
        if bed.run.is_file():
            bed.run.unlink()
