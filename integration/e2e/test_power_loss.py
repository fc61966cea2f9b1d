"""A host that loses power while sandboxes take turns: each goes on from a checkpoint that is no older than the last one
that was reported, with files and memory of one moment.

The disk that the store lies on is a logged one (`integration/power`), where the store alone is tried out much harder.
CRAB_E2E_SEED repeats the choice of moments; CRAB_SOAK=1 tries more of them.
"""

import json
import os
import pathlib
import random
import shutil
import sys

import pytest

from harness import crab, run, until
from test_armed_restore import Sandbox

sys.path.append(str(pathlib.Path(__file__).parents[1] / "power"))
from crash import Replay, points  # noqa: E402
from disk import MARK  # noqa: E402
from logged import LoggedDisk, mount_loop  # noqa: E402

SEED = int(os.environ.get("CRAB_E2E_SEED", 0)) or random.SystemRandom().randrange(1, 1 << 32)
TURNS, POINTS = (40, 60) if os.environ.get("CRAB_SOAK") == "1" else (8, 6)

COUNTER = r"""
import os, socket
server = socket.socket(socket.AF_UNIX)
server.bind("\0server")
server.listen()
count = 0
print("listening", flush=True)
while True:
    client, _ = server.accept()
    with client:
        if client.recv(100) == b"count":
            count += 1
            with open("/new", "w") as file:
                file.write(f"{count}\n" * 10_000)
            os.rename("/new", "/count")
        files = {int(line) for line in open("/count")} if os.path.exists("/count") else {0}
        client.sendall(repr((count, files)).encode())
"""
"""Counts in its memory and, at the same time, in a file."""


@pytest.fixture
def memory():
    """A directory in memory, for images."""
    path = pathlib.Path("/run/power-loss")
    path.mkdir()
    yield path
    shutil.rmtree(path)


def take_turns(sandbox, disk):
    for _ in range(TURNS):
        (count, _), = sandbox.ask("count")
        line = json.loads(crab("checkpoint", "--json", sandbox.name).out)
        disk.mark(json.dumps({"count": count, "turn": line["turn"], "digest": line["checkpoint"]}))


def check(sandbox, reported):
    """What must hold of a store whose disk has lost power after these reports."""
    assert crab("verify").rc == 0
    # The journal's last lines may be lost, since no checkpoint needs them.
    lines = {line["turn"]: line["checkpoint"] for line in sandbox.turns()}
    for report in reported:
        assert lines.get(report["turn"], report["digest"]) == report["digest"], (report, lines)
    kept = [json.loads(line)["turn"] for line in crab("verify", "--json", sandbox.name).out.splitlines()]
    assert kept[-1] >= reported[-1]["turn"], (kept, reported[-1])
    sandbox.restore()
    sandbox.start()
    (count, files), = sandbox.ask("look")
    assert files == {count} and count in (reported[-1]["count"], reported[-1]["count"] + 1), (count, files, reported[-1])
    # And it goes on.
    assert sandbox.ask("count") == [(count + 1, {count + 1})]
    sandbox.turn()
    sandbox.die(with_shim=True)


def test_a_sandbox_whose_host_loses_power_goes_on_from_its_newest_checkpoint(tmp_path, memory, config):
    print(f"CRAB_E2E_SEED={SEED}")
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    with LoggedDisk(memory, "ext4", size=256 << 20) as disk:
        config(f'store = "{disk.at}/crab"\n')
        sandbox = Sandbox("ctr", tmp_path, "python3", "-uc", COUNTER, options=["--annotation", "dev.crab.keep=2"])
        with sandbox:
            until(lambda: "listening" in sandbox.output(), "it listens")
            take_turns(sandbox, disk)
            records = disk.records()
            sandbox.die(with_shim=True)
            marks = [n + 1 for n, record in enumerate(records) if record.kind == MARK and record.data[:1] == b"{"]
            config(f'store = "{crashed}/crab"\n')
            with Replay(disk.base, records, memory / "flushed") as replay:
                tried = points(replay, marks[0], marks, random.Random(SEED), POINTS)
                for point in tried:
                    replay.crash(point, memory / "crashed")
                    mount_loop(memory / "crashed", crashed)
                    try:
                        print(f"{point} of {len(records)}")
                        check(sandbox, [json.loads(bytes(records[n - 1].data)) for n in marks if n <= point.at])
                    finally:
                        until(lambda: run("umount", crashed, check=False).rc == 0, "nobody uses the store")
    assert len(tried) >= 5, "too few moments for this to say anything"
