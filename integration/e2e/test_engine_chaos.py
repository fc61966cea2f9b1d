"""Shims killed and stopped at random moments: the others' turns go on, within the host's budget, and no store is damaged.

The random numbers are seeded; CRAB_E2E_SEED repeats a run, as far as the machine does.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import threading
import time

from harness import CRAB, Ctr, crab, together, until
from taskapi import PROCESS, Refused, Shim, any_of

SEED = int(os.environ.get("CRAB_E2E_SEED", 0)) or random.SystemRandom().randrange(1, 1 << 32)
SECONDS = float(os.environ.get("CRAB_E2E_SECONDS", 30))
SANDBOXES = 10
RATE, BURST, FILE = 1 << 20, 1 << 22, 1 << 20
DUMP = 1 << 20
"""More bytes than a dump of these processes ever is."""
OPT_IN = ["--annotation", "dev.crab.enabled=true", "--annotation", "dev.crab.keep=3"]
STORE = pathlib.Path("/var/lib/crab/default")


class Agent(threading.Thread):
    """Takes turns in a sandbox, each longer than the budget allows; when its shim is killed, in a new one."""

    def __init__(self, number, over):
        super().__init__(name=f"agent {number}")
        self.rng, self.over = random.Random(f"{SEED} {number}"), over
        self.container, self.turns, self.deaths, self.wrong = None, 0, 0, None
        self.born()

    def born(self):
        self.container = Ctr(CRAB, options=OPT_IN, name="agent")

    def bury(self):
        self.container.remove()
        shutil.rmtree(STORE / self.container.id)

    def run(self):
        try:
            while not self.over.is_set():
                self.live()
        except BaseException as e:
            self.wrong = e

    def live(self):
        """Takes turns until it is over, or its shim is dead."""
        container = self.container
        try:
            with Shim.of(container) as shim:
                while not self.over.is_set():
                    self.turn(shim, self.turns)
        except (AssertionError, ConnectionError, FileNotFoundError, Refused) as e:
            # A timeout is none of these: who starves has waited for Shim's limit.
            if container.status and container.status[1] == "RUNNING" and self.alive(container):
                raise
            self.deaths += 1
            print(f"{container.id}: {type(e).__name__} after turn {self.turns}")
            until(lambda: not container.bundle.exists(), f"containerd has cleaned up {container.id}")
            self.bury()
            self.born()

    @staticmethod
    def alive(container):
        try:
            with Shim.of(container) as shim:
                shim.call("State", {1: container.id})
            return True
        except (AssertionError, OSError, Refused):
            return False

    def turn(self, shim, number):
        what = self.rng.choices(["file", "process", "nothing"], [5, 2, 3])[0]
        script = {
            "file": f"head -c {FILE} /dev/urandom >/file{number % 8}",
            "process": "sleep 1000 </dev/null >/dev/null 2>&1 & echo $! >>/sleepers; [ $(wc -l </sleepers) -lt 4 ] "
                       "|| { kill $(cat /sleepers); rm /sleepers; }",
            "nothing": "true",
        }[what]
        id = f"t{number}"
        process = any_of(PROCESS, {"args": ["sh", "-c", script], "cwd": "/", "env": ["PATH=/usr/bin:/bin"], "user": {"uid": 0, "gid": 0}})
        shim.call("Exec", {1: self.container.id, 2: id, 7: process})
        shim.call("Start", {1: self.container.id, 2: id})
        shim.call("Wait", {1: self.container.id, 2: id})
        shim.call("Delete", {1: self.container.id, 2: id})
        self.turns += 1
        self.over.wait(self.rng.uniform(0, 0.3))


def torment(agents, rng, end):
    """Kills a shim, or stops it for a while; returns how often."""
    killed = stopped = 0
    while time.monotonic() < end:
        time.sleep(rng.uniform(0.1, 0.8))  # its length is what is tried out; nothing is waited for
        pid = rng.choice(agents).container.shim
        if not pid:
            continue
        try:
            if rng.random() < 0.25:
                os.kill(pid, signal.SIGKILL)
                killed += 1
            else:
                os.kill(pid, signal.SIGSTOP)
                time.sleep(rng.uniform(0.01, 2.5))
                os.kill(pid, signal.SIGCONT)
                stopped += 1
        except ProcessLookupError:
            pass
    return killed, stopped


def engine():
    return json.loads(crab("engine", "--json").out)


def assert_whole(container):
    """What its journal says is in its store, and the store is sound."""
    lines = [json.loads(line) for line in crab("log", "--json", container.id).out.splitlines()]
    kept = {line["turn"] for line in lines if line["checkpoint"]}
    assert kept, f"{container.id}: no turn has a checkpoint"
    done = crab("verify", container.id, check=False)
    assert done.rc == 0, done
    numbers = [line["turn"] for line in lines]
    assert numbers == sorted(set(numbers)), f"{container.id}: turns out of order, or twice: {numbers}"


def test_shims_killed_and_stopped_at_random_moments_hold_nobody_up(config):
    print(f"CRAB_E2E_SEED={SEED}")
    config(f'engine.rate = "1MiB/s"\nengine.burst = "4MiB"\nengine.dumps = 2\n')
    over, agents = threading.Event(), []
    try:
        together([lambda n=n: agents.append(Agent(n, over)) for n in range(SANDBOXES)], workers=4)
        before, begin = engine(), time.monotonic()
        for agent in agents:
            agent.start()
        killed, stopped = torment(agents, random.Random(SEED), begin + SECONDS)
        at_the_end = [agent.turns for agent in agents]
        # Nobody is held up by those that are gone: each takes two turns more.
        for agent, turns in zip(agents, at_the_end):
            until(lambda: agent.turns >= turns + 2 or agent.wrong, f"{agent.name} goes on")
        over.set()
        for agent in agents:
            agent.join()
        assert [agent.wrong for agent in agents if agent.wrong] == []
        for agent in agents:
            crab("checkpoint", agent.container.id)
        after, took = engine(), time.monotonic() - begin
        deaths = sum(agent.deaths for agent in agents)
        written, granted = (after[key] - before[key] for key in ("written_bytes", "grants"))
        print(f"{killed} shims killed, {stopped} stopped; {sum(a.turns for a in agents)} turns, {granted} checkpoints, "
              f"{written} bytes in {took:.1f} s; least turns {min(a.turns for a in agents)}")
        assert killed > 0 and stopped > 0 and deaths > 0
        assert after["members"] == [] and after["dumps"] == after["undrained"] == 0, after
        # docs/engine.md: charged is at most rate·t + burst in any window. A dump may be larger than its estimate, and is paid
        # for by those that come after it.
        assert written <= RATE * took + BURST + SANDBOXES * (DUMP + FILE)
        # There was more to write than that: the budget was what they waited for.
        assert after["waited_us"] > before["waited_us"]
        together([lambda a=a: assert_whole(a.container) for a in agents], workers=2)
    finally:
        over.set()
        for agent in agents:
            agent.join() if agent.is_alive() else None
            agent.bury()
