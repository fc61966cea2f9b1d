"""What a turn adds to the store, what goes from it again, and what is removed on request."""

import json
import pathlib

from harness import crab, until
from test_armed_restore import SERVER, Sandbox


def gc(*options):
    return [json.loads(line) for line in crab("gc", "--json", *options).out.splitlines()]


def store_of(sandbox):
    return pathlib.Path("/var/lib/crab/default", sandbox.container.id)


def test_a_turn_writes_what_it_has_changed(tmp_path):
    with Sandbox("ctr", tmp_path, "python3", "-uc", SERVER) as sandbox:
        until(lambda: "listening" in sandbox.output(), "the server listens")
        sandbox.sh("head -c 20000000 /dev/urandom >/large")
        sandbox.turn()
        before = sandbox.ask("hash")
        sandbox.sh("echo more >>/large")
        sandbox.turn()
        # 64 MiB of memory and 20 MB of files, of which hardly anything changed after the first turns.
        written = [line["bytes_written"] for line in sandbox.turns() if line["checkpoint"]]
        assert sum(written) > 80e6 and written[-1] < 4e6, written
        assert crab("verify", sandbox.name).rc == 0
        assert sum(pack.stat().st_size for pack in store_of(sandbox).glob("packs/*")) < 1.1 * sum(written)
        sandbox.die()
        sandbox.restore()
        sandbox.start()
        assert sandbox.ask("hash") == before
        assert sandbox.sh("tail -c 5 /large") == "more\n"
        # But for what the next dump builds upon, where dumps do.
        left = lambda: {entry.name for entry in (store_of(sandbox) / "tmp").iterdir()} - {"parent"}
        until(lambda: not left(), "nothing is left of the restore, or of the last turn")


def test_space_comes_back(tmp_path):
    with Sandbox("ctr", tmp_path, options=["--annotation", "dev.crab.keep=3"]) as sandbox:
        for n in range(12):
            sandbox.sh(f"head -c 4000000 /dev/urandom >/file; echo {n} >/number")
            last = sandbox.turn()
        until(lambda: len(list(store_of(sandbox).glob("packs/*.pack"))) == 3, "three turns are kept")
        # Three kept, and the remains of those that have not been looked through yet.
        size = sum(pack.stat().st_size for pack in store_of(sandbox).glob("packs/*"))
        assert size < 16 * 4.5e6, size
        assert "passed over" in crab("gc", sandbox.name).out
        assert gc(sandbox.name)[0]["skipped"]
        sandbox.die()
        collected, = gc(sandbox.name)
        assert collected["turns"] == [] and not collected["removed"]
        assert sum(pack.stat().st_size for pack in store_of(sandbox).glob("packs/*")) < 4 * 4.5e6
        kept, = gc("--keep", "1", sandbox.name)
        assert len(kept["turns"]) == 2 and kept["freed_bytes"] > 3.5e6, kept
        assert crab("verify", sandbox.name).out == f"default/{sandbox.name}@{last}  ok\n"
        sandbox.restore()
        sandbox.start()
        assert sandbox.sh("cat /number") == "11\n"
        # A container that is there is not gone, stopped or not.
        sandbox.die()
        assert not gc("--gone", sandbox.name)[0]["removed"]
        sandbox.container.remove()
        gone, = gc("--gone", sandbox.name)
        assert gone["removed"] and not store_of(sandbox).exists()


def test_a_namespace_that_containerd_does_not_know_is_not_taken_for_an_empty_one(tmp_path):
    """Another containerd's, perhaps: all its sandboxes would be gone."""
    with Sandbox("ctr", tmp_path) as sandbox:
        sandbox.turn()
        sandbox.die()
        elsewhere = pathlib.Path("/var/lib/crab/elsewhere", sandbox.container.id)
        elsewhere.parent.mkdir(mode=0o700)
        store_of(sandbox).rename(elsewhere)
        try:
            done = crab("gc", "--gone", sandbox.name, check=False)
            assert done.rc == 1 and "no namespace" in done.err and "CONTAINERD_ADDRESS" in done.err, done
            assert list(elsewhere.glob("packs/*.pack"))
        finally:
            elsewhere.rename(store_of(sandbox))
            elsewhere.parent.rmdir()


def test_a_size_that_is_exceeded_takes_the_oldest(tmp_path):
    with Sandbox("ctr", tmp_path, options=["--annotation", "dev.crab.sandbox_limit=20MB"]) as sandbox:
        for _ in range(6):
            sandbox.sh("head -c 6000000 /dev/urandom >/file")
            last = sandbox.turn()
        packs = store_of(sandbox) / "packs"
        until(lambda: sum(pack.stat().st_size for pack in packs.glob("*")) <= 20e6, "it fits")
        kept = sorted(int(pack.stem) for pack in packs.glob("*.pack"))
        # Two turns have each file: that of the exec, and the checkpoint that was asked for.
        assert 2 <= len(kept) <= 7 and kept[-1] == last, kept
        assert crab("verify", sandbox.name).rc == 0


def test_verify_names_a_pack_that_is_broken_and_what_it_takes_away(tmp_path):
    with Sandbox("ctr", tmp_path) as sandbox:
        sandbox.sh("echo one >/file")
        first = sandbox.turn()
        sandbox.sh("echo two >/file")
        second = sandbox.turn()
        sandbox.die()
        pack = store_of(sandbox) / "packs" / f"{first}.pack"
        whole = bytearray(pack.read_bytes())
        whole[1000] ^= 4
        pack.write_bytes(whole)
        done = crab("verify", sandbox.name, check=False)
        assert done.rc == 1
        broken = next(line for line in done.out.splitlines() if f"packs/{first}.pack  BROKEN" in line)
        # The second shares its pages with the first.
        assert "turns lost:" in broken and str(first) in broken.rsplit(":", 1)[1], done.out
        assert f"@{first}  BROKEN" in done.out and str(second) in done.out
