"""Whether a sandbox that came back is what it was: by the independent digest, taken in crab's own cut and again before
the first instruction of what came back, so that not one instruction lies between the two (docs/state.md).

A road back is a function `road(sandbox, turn)`: the sandbox runs before and after it.
"""

import contextlib
import json
import os
import pathlib
import shutil
import sys

from harness import LIMIT, until
from test_armed_restore import Sandbox

sys.path += [str(pathlib.Path(__file__).parents[1] / name) for name in ("digest", "replay")]

import digest  # noqa: E402
import process  # noqa: E402
from diff import differences  # noqa: E402

HOOKS = pathlib.Path("/etc/crab/hooks")
HOOK = pathlib.Path(__file__).parents[1] / "replay/hook_digest.sh"
PEEK = pathlib.Path(__file__).with_name("peek.py")
RESULTS = pathlib.Path("/run/crab-replay")
"""Of each sandbox that has a directory here, the hooks leave digests there."""
MOMENTS = ("frozen", "restored")


@contextlib.contextmanager
def hooks_installed():
    """crab's hooks take digests, of the sandboxes that ask for it."""
    names = HOOKS / "digest"
    names.mkdir(parents=True)
    try:
        for moment in MOMENTS:
            # The script goes by the name under which it is called.
            (names / moment).symlink_to(HOOK)
            hook = HOOKS / f".{moment}"
            hook.write_text(f'#!/bin/sh\n{names / moment} "$@" && exec python3 -B {PEEK} {moment} "$@"\n')
            hook.chmod(0o755)
            hook.rename(HOOKS / moment)
        yield
    finally:
        shutil.rmtree(HOOKS)


def armed_restore(sandbox, turn):
    """The sandbox dies, and its next start goes on from the checkpoint."""
    sandbox.die()
    sandbox.restore(f"@{turn}")
    # With the same stdio as before: `--start` cannot know it.
    sandbox.start()


ROADS = [armed_restore]


class Compared(Sandbox):
    """A sandbox that can be compared with its checkpoint. Needs `hooks_installed`."""

    def __init__(self, kind, directory, **kwargs):
        # Which is the hook's, too: where the processor is emulated a digest of all takes longer than a minute.
        super().__init__(kind, directory, options=["--annotation", f"dev.crab.dump_timeout={LIMIT:.0f}s"], **kwargs)

    def __enter__(self):
        namespace = "default" if self.kind == "ctr" else "moby"
        self.results = RESULTS / namespace / self.container.id
        self._pid = None
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        shutil.rmtree(self.results, ignore_errors=True)

    @property
    def root(self):
        """Its files, from outside."""
        self._pid = self._pid or self.container.pid
        return pathlib.Path(f"/proc/{self._pid}/root")

    def read(self, path):
        """A file of the sandbox; empty if there is none."""
        try:
            return (self.root / path.lstrip("/")).read_text()
        except FileNotFoundError:
            return ""

    def number(self, path):
        return int(self.read(path) or 0)

    def background(self, *command, log="/log"):
        """Leaves a command running; its exit code will be in `log`.rc."""
        self.exec("sh", "-c", 'log=$1; shift; nohup sh -c \'log=$1; shift; "$@" >"$log" 2>&1 </dev/null; echo $? >"$log.new"; mv "$log.new" "$log.rc"\' sh "$log" "$@" >/dev/null 2>&1 </dev/null &', "sh", log, *command)

    def ended(self, log="/log"):
        """Waits for what `background` has left running; it must have succeeded."""
        code = until(lambda: self.read(f"{log}.rc"), f"the end of what writes to {log}; it says {self.read(log)[-2000:]!r}")
        assert code == "0\n", (code, self.read(log)[-3000:])

    def result(self, moment):
        path = self.results / f"{moment}.json"
        log = self.results / f"{moment}.log"
        assert path.exists(), log.read_text() if log.exists() else f"crab's hook was not run: {moment}"
        return digest.load(str(path))

    def checkpoint(self, peek=None):
        """Takes a checkpoint; returns its turn. `peek`: the argument of peek.py."""
        self.results.mkdir(parents=True, mode=0o700)
        if peek:
            (self.results / "peek").write_text(json.dumps(peek))
        return self.turn()

    def back(self, road, turn):
        """Goes that road, and must be what it was before the first instruction.

        `names` are then the files that it came back with, and `peeked` what peek.py saw in the cut and now.
        """
        # From outside, so in no turn: gone afterwards, or it was not this road.
        (self.root / "after-the-checkpoint").write_text("x")
        road(self, turn)
        self._pid = None
        before, after = self.result("frozen"), self.result("restored")
        found = [str(difference) for difference in differences(before, after)]
        assert not found, "\n".join([f"{len(found)} differences:", *found[:20]])
        assert before["digest"] == after["digest"]
        peeks = [self.results / f"{moment}.peek" for moment in MOMENTS]
        self.peeked = [json.loads(peek.read_text()) for peek in peeks if peek.exists()]
        self.names = before["state"]["tree"].keys()
        # Without it the hooks do nothing: later turns are quick.
        shutil.rmtree(self.results)
