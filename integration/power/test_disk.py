"""The logged disk tells the truth: what the tests of power loss stand upon."""

import os
import random

import pytest

from crash import Replay
from disk import FLUSH, MARK, WRITE
from logged import MKFS, LoggedDisk

CASES = [(fs, direct) for fs in MKFS for direct in (False, True)]


def write(path, content, sync):
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    os.write(file, content)
    if sync:
        os.fdatasync(file)
    os.close(file)


@pytest.mark.parametrize("fs, direct", CASES)
def test_a_sync_is_a_flush_behind_its_data(fs, direct, tmp_path):
    content = random.Random(1).randbytes(40_000)
    with LoggedDisk(tmp_path, fs, direct) as disk:
        write(disk.at / "synced", content, True)
        disk.mark("synced")
        write(disk.at / "not synced", content[::-1], False)
        disk.mark("written")
        records = disk.records()
    synced = next(n for n, r in enumerate(records) if r.kind == MARK and r.data == b"synced")
    data = [n for n, r in enumerate(records) if r.kind == WRITE and content[4096:8192] in bytes(r.data)]
    assert data, "the data did not come to the disk"
    assert any(r.kind == FLUSH for r in records[data[0] : synced]), "its sync was no flush"
    written = next(n for n, r in enumerate(records) if r.kind == MARK and r.data == b"written")
    assert not any(r.kind == FLUSH for r in records[synced:written]), "a flush that nobody asked for"


@pytest.mark.parametrize("fs, direct", CASES)
def test_nothing_bypasses_the_log(fs, direct, tmp_path):
    rng = random.Random(2)
    with LoggedDisk(tmp_path, fs, direct) as disk:
        for n in range(60):
            write(disk.at / f"{n % 25}", rng.randbytes(rng.randrange(200_000)), n % 3 == 0)
            if n % 7 == 0:
                (disk.at / f"{n % 25}").unlink()
    # Unmounted, so all of it is there.
    replayed = tmp_path / "replayed"
    with Replay(disk.base, disk.records(), replayed) as replay:
        replay.advance(len(replay.records))
    assert replayed.read_bytes() == disk.image.read_bytes()
