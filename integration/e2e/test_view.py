"""What an agent sees of its own turns (`view`): up to date before it can look, and never taken back."""

import json

import pytest
from harness import CRAB, Ctr, crab, ctr, until
from test_armed_restore import OPT_IN, Sandbox, both_clients

VIEW = ["--annotation", "dev.crab.view=true"]
FILE = "/run/crab/turn.json"
FOLLOWER = """
import time
view = open("/run/crab/turn.json")
while True:
    view.seek(0)
    open("/seen.new", "w").write(view.read())
    import os
    os.rename("/seen.new", "/seen")
    time.sleep(0.05)
"""


def seen(sandbox):
    return json.loads(sandbox.sh(f"cat {FILE}"))


@both_clients
def test_an_agent_sees_its_turns_and_that_it_was_taken_back(kind, tmp_path):
    with Sandbox(kind, tmp_path, options=VIEW) as sandbox:
        assert seen(sandbox) == {"turn": 0, "went_back": None}
        sandbox.sh("echo one >/file")
        assert seen(sandbox) == {"turn": 2, "went_back": None}
        # Nobody in it can write there, and it is no part of what is kept.
        assert sandbox.exec("sh", "-c", f"echo 9 >{FILE}", check=False).rc != 0
        kept = sandbox.turn()
        sandbox.sh("echo two >/file; sleep 1000 >/dev/null 2>&1 &")
        done = json.loads(crab("rollback", "--json", f"{sandbox.name}@{kept}").out)
        assert sandbox.sh("cat /file") == "one\n"
        assert seen(sandbox) == {"turn": done["turn"] + 1, "went_back": {"times": 1, "from": done["from"], "to": kept}}
        # Files alone.
        once = sandbox.turn()
        sandbox.sh("echo three >/file")
        crab("rollback", f"{sandbox.name}@{once}")
        again = seen(sandbox)["went_back"]
        assert (again["times"], again["to"]) == (2, once)
        # And after a death.
        sandbox.die(with_shim=True)
        sandbox.restore(f"@{kept}")
        sandbox.start()
        last = seen(sandbox)["went_back"]
        assert (last["times"], last["to"]) == (3, kept)
        assert crab("verify", sandbox.name).rc == 0


def test_whoever_holds_it_open_comes_back(tmp_path):
    with Sandbox("ctr", tmp_path, "python3", "-c", FOLLOWER, options=VIEW) as sandbox:
        sandbox.sh("until [ -e /seen ]; do sleep 0.02; done")
        kept = sandbox.turn()
        sandbox.sh("sleep 1000 >/dev/null 2>&1 &")
        crab("rollback", f"{sandbox.name}@{kept}")
        until(lambda: json.loads(sandbox.sh("cat /seen"))["went_back"], "its reader sees that it was taken back")


def test_a_mount_of_the_clients_own_there_is_refused(tmp_path):
    mount = ["--mount", f"type=bind,src={tmp_path},dst=/run/crab/mine,options=rbind:ro"]
    with pytest.raises(AssertionError, match="view: the container has something of its own"):
        Ctr(CRAB, options=[*OPT_IN, *VIEW, *mount])
    assert not ctr("task", "ls", "-q").out.strip()
