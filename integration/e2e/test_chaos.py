"""Shims that die at any moment leave nothing; many busy containers lose nothing.

The random numbers are seeded; CRAB_E2E_SEED repeats a run.
"""

import os
import pathlib
import random
import re
import shutil
import signal
import statistics
import subprocess
import threading
import time

from harness import (
    BUNDLES, CRAB, IMAGE, LIMIT, Ctr, alive, ctr, daemon_pid, listening, run, shim_pid, together, unique, until,
)  # fmt: skip
from taskapi import PROCESS, Shim, any_of

QUICK = os.environ.get("CRAB_E2E_QUICK") == "1"
SEED = int(os.environ.get("CRAB_E2E_SEED", 0)) or random.SystemRandom().randrange(1, 1 << 32)
LOG = pathlib.Path("/var/log/bed/containerd.log")
RUN, STORE = (pathlib.Path(at, "default") for at in ("/run/crab/s", "/var/lib/crab"))
CYCLES = 60 if QUICK else 300


def open_files(daemon):
    return sorted(os.readlink(f) for f in pathlib.Path(f"/proc/{daemon_pid(daemon)}/fd").iterdir() if f.is_symlink())


def kinds(files):
    """How many of each kind; numbers of pipes and sockets say nothing."""
    counted = {}
    for file in files:
        kind = file.split(":")[0]
        counted[kind] = counted.get(kind, 0) + 1
    return counted


def network_namespaces():
    return set(run("lsns", "-nrt", "net", "-o", "NS", check=False).out.split())


def cycle(rng):
    """One container's life, cut short; what each step comes to does not matter, only that it ends.

    Returns whether its shim was killed, and how many seconds all took.
    """
    start = time.monotonic()
    id = unique("chaos")
    doomed, moment = rng.random() < 0.8, rng.uniform(0, 0.4)
    steps = [
        ["ctr", "run", "--detach", "--runtime", CRAB, IMAGE, id, "sh", "-c", "echo begun; sleep 1000 & sleep 1000"],
        rng.choice([
            ["ctr", "task", "kill", "-s", "TERM", id],
            ["ctr", "task", "pause", id],
            ["ctr", "task", "exec", "--exec-id", "x", id, "sh", "-c", "sleep 0.05; echo x"],
            ["ctr", "task", "exec", "--exec-id", "y", id, "sh", "-c", "sleep 1000 & sleep 0.05"],
        ]),
        rng.choice([["ctr", "task", "kill", "-s", "KILL", id], ["ctr", "task", "delete", "--force", id], ["true"]]),
    ]  # fmt: skip
    over = threading.Event()
    killed = threading.Event()

    def kill_shim():
        pid = until(lambda: shim_pid(id) or over.is_set(), "a shim, or the end")
        time.sleep(moment)  # its length is what is tried out; nothing is waited for
        if pid is not True and alive(pid):
            os.kill(pid, signal.SIGKILL)
            killed.set()

    killer = threading.Thread(target=kill_shim if doomed else lambda: None)
    killer.start()
    for step in steps:
        run(*step, check=False, limit=2 * LIMIT)
    over.set()
    killer.join()

    def gone():
        """containerd may still be cleaning up itself."""
        ctr("task", "delete", "--force", id, check=False, limit=2 * LIMIT)
        done = ctr("container", "delete", id, check=False)
        return done.rc == 0 or "not found" in done.err

    until(gone, f"{id} is deleted")
    return killed.is_set(), time.monotonic() - start


def test_shims_that_die_at_random_moments_leave_nothing():
    print(f"CRAB_E2E_SEED={SEED}")
    files, netns = kinds(open_files("containerd")), network_namespaces()
    sockets = set(pathlib.Path("/run/containerd/s").glob("*"))
    rngs = [random.Random(f"{SEED} {n}") for n in range(CYCLES)]
    killed, took = zip(*together([lambda r=r: cycle(r) for r in rngs], workers=6))
    cost = {fate: statistics.median(t for t, k in zip(took, killed) if k == fate) for fate in (True, False)}
    print(f"{CYCLES} cycles, {sum(killed)} shims killed, seconds with and without: {cost[True]:.2f}, {cost[False]:.2f}")
    assert sum(killed) > CYCLES / 4, "too few shims were killed for this to say anything"
    # A death that each time costs one of containerd's limits, 5 s or more, would show.
    assert cost[True] < 3 * cost[False]

    def as_before():
        now = kinds(open_files("containerd"))
        # containerd keeps some connections and database files open as it likes; a leak would be one for each cycle.
        more = {kind: count - files.get(kind, 0) for kind, count in now.items()}
        return all(count < max(10, CYCLES / 10) for count in more.values()) and network_namespaces() <= netns

    until(as_before, "containerd's files and the network namespaces are as before")
    for bundle in (BUNDLES / "default").glob("chaos*"):
        print(f"left: {bundle.name}")
        for line in LOG.read_text(errors="replace").splitlines():
            if re.search(rf"\b{bundle.name}\b", line):
                print(line[:600])

    # A shim that dies before containerd has connected to it, or in a Create: containerd may remove the bundle and ask nobody
    # to clean up. The end of any other shim does.
    with Ctr(CRAB):
        pass

    def orphans():
        return [s for s in pathlib.Path("/run/containerd/s").glob("*") if s not in sockets and not listening(s.name)]

    until(lambda: not orphans(), "the sockets of killed shims are gone")
    left = pathlib.Path("/run/crab/s/default").glob("chaos*")
    assert [path.name for path in left] == []


EXECS = """
import os, sys, threading, time
for _ in range(8):
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
os.execv(sys.executable, [sys.executable, "-Sc", os.environ["EXECS"]])
"""


def test_a_shim_that_dies_while_its_container_cannot_finish_freezing_leaves_nothing():
    """A thread whose execve waits for the others' end, and they are frozen already: a v1 freezer stays FREEZING until it is
    thawed, and runc 1.1 waits for ever to hear what a container is. `runc init` is such a program, just after the start."""
    with Ctr(CRAB, "sh", "-c", "while :; do python3 -Sc \"$EXECS\"; done", options=["--env", f"EXECS={EXECS}"]) as container:
        freezer = container.cgroup("freezer") / "freezer.state"

        def stuck():
            freezer.write_text("FROZEN")
            end = time.monotonic() + 0.05
            while time.monotonic() < end:
                if freezer.read_text() == "FROZEN\n":
                    freezer.write_text("THAWED")
                    return False
                time.sleep(0.001)
            return True

        until(stuck, "it cannot freeze", 60)
        start = time.monotonic()
        os.kill(container.shim, signal.SIGKILL)
        until(lambda: container.status is None and not container.bundle.exists(), "containerd has cleaned up")
        assert not freezer.exists()
        assert time.monotonic() - start < 4, "containerd gives a clean-up 5 s"


HEAP = "import os, time; heap = [os.urandom(1 << 20) for _ in range(100)]; open('/ready', 'w'); time.sleep(1000)"


def test_a_shim_that_dies_in_a_dump_leaves_nothing():
    """CRIU goes on without it, and freezes the sandbox again when it fails."""
    print(f"CRAB_E2E_SEED={SEED}")
    rng = random.Random(SEED)
    opt_in = ["--annotation", "dev.crab.enabled=true"]
    for _ in range(2 if QUICK else 6):
        with Ctr(CRAB, "python3", "-c", HEAP, options=opt_in, name="dump") as container:
            until(lambda: container.sh("[ ! -e /ready ] || echo y"), "it has its memory")
            log, shim = RUN / container.id / "criu-turn-work" / "dump.log", container.shim
            until(lambda: not log.exists(), "the dumps of these turns are over")
            client = subprocess.Popen(["crab", "checkpoint", container.id], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            until(lambda: log.exists() or client.poll() is not None, "CRIU dumps")
            time.sleep(rng.uniform(0, 0.15))  # its length is what is tried out; nothing is waited for
            os.kill(shim, signal.SIGKILL)
            client.communicate()
            until(lambda: container.status is None and not container.bundle.exists(), "containerd has cleaned up")
        shutil.rmtree(STORE / container.id)


CONTAINERS, SECONDS = (10, 4) if QUICK else (50, 20)


def busy(container, directory, deadline, rng):
    """Execs one after the other; returns (how many, what went wrong)."""
    wrong, count = [], 0
    with Shim.of(container) as shim:
        # Two at least, however slow the machine: who starves waits longer than Shim's limit.
        while time.monotonic() < deadline or count < 2:
            count += 1
            id, code = f"b{count}", rng.randrange(256)
            token = "".join(rng.choices("abcdefgh", k=rng.choice([10, 100, 5000])))
            path = directory / f"{container.id}-{id}"
            os.mkfifo(path)
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            args = ["sh", "-c", f"echo {token}; exit {code}"]
            process = any_of(PROCESS, {"args": args, "cwd": "/", "env": ["PATH=/usr/bin:/bin"], "user": {"uid": 0, "gid": 0}})
            shim.call("Exec", {1: container.id, 2: id, 5: str(path), 7: process})
            shim.call("Start", {1: container.id, 2: id})
            seen = shim.call("Wait", {1: container.id, 2: id}).get(1, 0)
            shim.call("Delete", {1: container.id, 2: id})
            data = b""
            while more := os.read(fd, 65536):
                data += more
            os.close(fd)
            path.unlink()
            if seen != code or data != token.encode() + b"\n":
                wrong.append((container.id, id, code, seen, len(token), len(data)))
    return count, wrong


def test_many_busy_containers_lose_no_end_and_no_byte(tmp_path):
    print(f"CRAB_E2E_SEED={SEED}")
    containers = []
    try:
        together([lambda: containers.append(Ctr(CRAB, name="busy")) for _ in range(CONTAINERS)], workers=6)
        deadline = time.monotonic() + SECONDS
        jobs = [lambda c=c: busy(c, tmp_path, deadline, random.Random(f"{SEED} {c.id}")) for c in containers]
        results = together(jobs, workers=CONTAINERS)
    finally:
        together([c.remove for c in containers], workers=6)
    print(f"{sum(count for count, _ in results)} execs in {CONTAINERS} containers")
    assert [w for _, wrong in results for w in wrong] == []
