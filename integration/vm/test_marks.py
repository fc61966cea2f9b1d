"""Somebody else than CRIU clears the kernel's marks of written pages: dumps that build upon each other lose nothing. Where
that is not seen, each of these sandboxes comes back with old memory."""

import os
import pathlib
import signal

import pytest

from harness import run, until
from heap import ASK, PAGE, Chained
from test_armed_restore import Sandbox
from test_chains import WRITES, wrapped  # noqa: F401 (a fixture)

PAGES = (8 << 20) // PAGE
SOME = (7, 50)
"""A seed, and how many pages."""

WRITE = 'python3 -c "$0" "some %d %d" && ' % SOME
CLEARERS = {
    "itself": 'python3 -c "$0" clear',
    "another": 'for its in /proc/[0-9]*; do tr "\\0" " " <$its/cmdline | grep -q "heap = mmap" && echo 4 >$its/clear_refs; done; :',
}
"""What else the turn does in which these pages are written."""
pytestmark = pytest.mark.usefixtures("shared")
OTHERS = pathlib.Path("/sys/fs/cgroup/others")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A sandbox that does nothing: while there is one, the inspector's programs stay loaded, which takes long here."""
    with Sandbox("ctr", tmp_path_factory.mktemp("marks")) as sandbox:
        sandbox.exec("true")
        sandbox.settled()
        yield sandbox


@pytest.fixture
def others():
    """A cgroup of somebody else's."""
    OTHERS.mkdir()
    yield
    until(lambda: not (OTHERS / "cgroup.procs").read_text(), "they are gone")
    OTHERS.rmdir()


def comes_back(sandbox):
    sandbox.die()
    sandbox.restore()
    sandbox.start()
    sandbox.check()


def test_dumps_build_upon_each_other_without_being_asked_for(tmp_path, config):
    config("")
    with Chained(tmp_path, PAGES) as sandbox:
        assert sandbox.serve()["bytes_captured"] > PAGES * PAGE
        line = sandbox.some(*SOME)
        assert line["action"] == "full" and line["bytes_captured"] < PAGES * PAGE / 2, line
        comes_back(sandbox)


@pytest.mark.parametrize("clears", CLEARERS.values(), ids=CLEARERS)
def test_a_turn_in_which_marks_were_cleared_has_everything(clears, tmp_path, config):
    config("")
    with Chained(tmp_path, PAGES) as sandbox:
        sandbox.serve()
        sandbox.exec("sh", "-c", WRITE + clears, ASK)
        sandbox.model.some(*SOME)
        line = sandbox.last()
        assert line["bytes_captured"] > PAGES * PAGE and "cleared" in line["note"], line
        # It is forgotten with the dump.
        after = sandbox.some(8, 50)
        assert after["bytes_captured"] < PAGES * PAGE / 2, after
        comes_back(sandbox)


def test_somebody_outside_who_clears_marks_is_seen_too(tmp_path, config, others):
    config("")
    with Chained(tmp_path, PAGES) as sandbox:
        sandbox.serve()
        server = int(run("pgrep", "-f", "-o", "heap = mmap").out)
        written = pathlib.Path(f"/proc/{server}/root/dev/shm/written")
        os.kill(server, signal.SIGUSR1)
        until(written.exists, "a page is written")
        sandbox.model.pages[0] = 1001
        run("sh", "-c", f"echo $$ >{OTHERS}/cgroup.procs && echo 4 >/proc/{server}/clear_refs")
        sandbox.exec("rm", "/dev/shm/written")
        line = sandbox.last()
        assert line["bytes_captured"] > PAGES * PAGE and "cleared" in line["note"], line
        comes_back(sandbox)


AS_AN_EXEC = """\
(echo $BASHPID >"/sys/fs/cgroup$(sed s/0::// "/proc/$server/cgroup")/cgroup.procs" && echo 4 >"/proc/$server/clear_refs")
"""


def test_marks_that_are_cleared_between_a_pre_dump_and_the_dump_cost_another_dump(tmp_path, wrapped):  # noqa: F811
    calls = wrapped('incremental = "auto"\npre_dumps = "1"', WRITES + AS_AN_EXEC)
    with Chained(tmp_path, PAGES) as sandbox:
        sandbox.serve()
        line = sandbox.some(1, 50)
        assert calls() == ["pre-dump", "dump", "dump"] * 2 and line["pre_dumps"] == 0, line
        assert "in vain" in line["note"], line
        sandbox.model.pages[0] = 1002
        comes_back(sandbox)
