"""Drivers that come and go at once, two builds on one host, and a sandbox that changes too much."""

import concurrent.futures
import subprocess
import sys
import time

DRIVERS, SECONDS = 6, 5
MANY = 100_000

TOUCH = """
import os, sys
open(sys.argv[1], "w").write("0")
for i in range(int(sys.argv[3])):
    os.close(os.open(f"{sys.argv[2]}/many{i}", os.O_CREAT | os.O_WRONLY))
"""


def touch(sandbox, count):
    """Opens or makes so many files, inside."""
    inside = sandbox.cgroup / "inner/cgroup.procs"
    subprocess.run([sys.executable, "-SEc", TOUCH, inside, sandbox.rootfs, str(count)], check=True)


def test_joins_race_the_last_leave(bed, builds):
    """Each one that says `ready` sees the next write of its sandbox, and none of the others', whoever leaves meanwhile."""
    build = builds[0]
    sandboxes = [bed.sandbox() for _ in range(DRIVERS)]
    end = time.monotonic() + SECONDS

    def come_and_go(sandbox):
        times = 0
        while time.monotonic() < end:
            watcher = bed.watcher(build, sandbox).ready()
            written = sandbox.write()
            doubt, found = watcher.inodes()
            assert written <= found <= sandbox.inodes
            assert watcher.inodes("cut")[1] <= sandbox.inodes
            watcher.ask("durable")
            if times % 2:
                watcher.sees()
            bed.note()
            assert watcher.leave() == 0
            times += 1
        return times

    with concurrent.futures.ThreadPoolExecutor(DRIVERS) as pool:
        times = list(pool.map(come_and_go, sandboxes))
    assert min(times) >= 2, times
    bed.nothing_is_left(build)


def test_two_builds_do_not_mix(bed, builds):
    """Each has maps of its own; the last of one takes nothing from the other."""
    old, new = builds
    pair = [bed.sandbox(), bed.sandbox()]
    of_old = bed.watcher(old, pair[0]).ready()
    of_new = bed.watcher(new, pair[1]).ready()
    bed.note()
    assert old.is_loaded() and new.is_loaded()
    assert len([p for p in bed.bpffs.iterdir() if p.is_dir()]) == 2
    of_old.sees()
    of_new.sees()
    assert of_old.leave() == 0
    assert len([p for p in bed.bpffs.iterdir() if p.is_dir()]) == 1
    bed.note()
    of_new.sees()
    # And the other way round, with a sandbox that both have watched.
    of_old = bed.watcher(old, pair[0]).ready()
    bed.note()
    of_old.sees()
    assert of_new.leave() == 0
    of_old.sees()
    # An upgrade in which nobody starts the old build again: the new one's last shim removes both.
    of_old.kill()
    of_new = bed.watcher(new, pair[1]).ready()
    of_new.sees()
    bed.note()
    assert of_new.leave() == 0
    bed.nothing_is_left(old, new)


def test_too_many_changes_are_only_their_sandboxs(bed, builds):
    """Doubt for whom it concerns, for one epoch; the next has more room."""
    loud, quiet = bed.sandbox(), bed.sandbox()
    of_loud, of_quiet = (bed.watcher(builds[0], sandbox).ready() for sandbox in (loud, quiet))
    for watcher in (of_loud, of_quiet):
        watcher.sees()
        watcher.ask("cut")
        watcher.ask("durable")
    touch(loud, MANY)
    assert "room" in of_loud.inodes()[0]
    written = quiet.write()
    doubt, found = of_quiet.inodes()
    assert doubt is None
    assert written <= found <= quiet.inodes
    # What was in doubt stays so until a cut is durable, and not longer.
    assert "room" in of_loud.inodes("cut")[0]
    assert "room" in of_loud.inodes()[0]
    of_loud.ask("durable")
    assert of_loud.inodes() == (None, set())
    for entry in loud.upper.glob("many*"):
        loud.inodes.add(entry.stat().st_ino)
    loud.run("for i in 0 1 2 3 4 5 6 7 8 9; do for j in 0 1 2 3 4 5 6 7 8 9; do for k in 0 1 2 3 4 5 6 7 8 9; do "
             "for l in 0 1 2 3 4 5 6 7 8 9; do : > many$((i+1))$j$k$l; done; done; done; done")  # fmt: skip
    doubt, found = of_loud.inodes()
    assert doubt is None
    assert len(found) == 10_000 and found <= loud.inodes
    bed.note()
    assert of_loud.leave() == 0
    of_quiet.sees()
    assert of_quiet.leave() == 0
    bed.nothing_is_left(builds[0])
