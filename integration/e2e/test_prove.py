"""`crab checkpoint --prove`: a trial restore beside the running sandbox. Nobody feels it, and nothing of it is left
(every test here is also one of that: conftest.py)."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import tempfile

import world
from harness import SERVERS, crab, run, until
from test_armed_restore import Sandbox, both_clients
from test_poison import start

COUNTER = """
import time
n = 0
while True:
    n += 1
    with open("/count", "a") as file: file.write(f"{n}\\n")
    with open("/volume/count", "a") as file: file.write(f"{n}\\n")
    time.sleep(0.01)
"""


def prove(box, **kwargs):
    done = crab("checkpoint", "--json", "--prove", box.name, **kwargs)
    return done, json.loads(done.out)


@both_clients
def test_a_checkpoint_is_proved_and_nobody_feels_it(kind, tmp_path, open_dir):
    volume = ["--mount", f"type=bind,src={open_dir},dst=/volume" + (",options=rbind:rw" if kind == "ctr" else "")]
    with Sandbox(kind, tmp_path, image=SERVERS, options=volume) as box:
        box.sh("nginx; redis-server --daemonize yes >/dev/null; tmux new-session -d")
        box.exec("sh", "-c", 'nohup python3 -c "$1" & until test -s /volume/count; do sleep 0.02; done', "sh", COUNTER)
        # What a trial has must be gone as soon as it is over: all is looked at, but what the turn itself makes.
        before = world.snapshot()
        done, line = prove(box)
        assert line["proved"] is True and line["action"] == "full" and "proved by a trial restore" in line["note"], line
        assert not world.snapshot() - before
        assert box.turns()[-1]["note"] == line["note"]
        # One writer only, here and in the volume: no number is there twice, none is missing.
        for path in (pathlib.Path(f"/proc/{box.container.pid}/root/count"), open_dir / "count"):
            until(lambda: path.read_text().count("\n") > 100, "it counts")
            numbers = path.read_text().split("\n")[:-1]
            assert numbers == [str(n) for n in range(1, len(numbers) + 1)]
        assert box.sh("curl -s -o /dev/null -w '%{http_code}\n' http://127.0.0.1/; redis-cli ping; tmux list-sessions | wc -l") == "200\nPONG\n1\n"
        # And what was proved is true.
        box.die()
        box.restore(f"@{line['turn']}")
        box.start()
        assert box.sh("redis-cli ping") == "PONG\n"


def test_what_has_been_taken_back_can_be_proved(tmp_path):
    """Its init is another one than its client was told of, which is a zombie by now."""
    with Sandbox("ctr", tmp_path) as box:
        turn = box.turn()
        box.exec("sh", "-c", "sleep 12345 >/dev/null 2>&1 &")
        told = box.init
        crab("rollback", f"{box.name}@{turn}")
        assert box.init != told
        done, line = prove(box, check=False)
        assert done.rc == 0 and line["proved"] is True, (done, line)


def test_what_cannot_be_restored_is_not_proved_and_kept_all_the_same(tmp_path):
    # A network that the client has made: the address is there, and will not be in another network.
    def ip(*command):
        run("nsenter", "-t", box.container.pid, "-n", "ip", *command)

    with Sandbox("ctr", tmp_path) as box:
        for command in (["link", "add", "b0", "type", "bridge"], ["address", "add", "10.9.9.2/24", "dev", "b0"], ["link", "set", "b0", "up"]):
            ip(*command)
        start(box, 'keep.append(socket.create_server(("10.9.9.2", 7000)))')
        done, line = prove(box, check=False)
        assert done.rc == 1 and line["proved"] is False and line["checkpoint"], (done, line)
        assert "is kept, and not proved" in done.err and "Can't bind inet socket" in done.err, done.err
        assert "not proved" in box.turns()[-1]["note"]
        assert box.sh("kill -0 $(cat /ready) && echo alive") == "alive\n"


def test_what_would_be_felt_is_not_tried():
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        mount = ["--mount", f"type=bind,src={directory},dst=/host,options=rbind:rw"]
        with Sandbox("ctr", directory, options=mount) as box:
            start(box, 'keep.append(socket.socket(socket.AF_UNIX)); keep[0].bind("/host/socket"); keep[0].listen()')
            done, line = prove(box, check=False)
            assert done.rc == 1 and line["proved"] is False and "not tried" in done.err and "/host/socket" in done.err, done
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(f"{directory}/socket")
        with Sandbox("ctr", directory, options=["--net-host"]) as box:
            done, line = prove(box, check=False)
            assert done.rc == 1 and "host's network" in done.err, done


def test_a_trial_whose_shim_dies_is_removed(tmp_path):
    # Large enough that the shim is killed in the middle, and small enough that the rest of it takes no seconds.
    with Sandbox("ctr", tmp_path) as box:
        start(box, "keep.append(os.urandom(30 << 20))")
        trial = pathlib.Path(f"/run/crab/s/default/{box.container.id}/trial")
        client = subprocess.Popen(["crab", "checkpoint", "--prove", box.name], stderr=subprocess.DEVNULL)
        until(lambda: (trial / "criu-work/restore.log").exists(), "the trial begins")
        os.kill(box.container.shim, signal.SIGKILL)
        client.wait()
        until(lambda: box.container.status is None and not box.container.bundle.exists(), "containerd has cleaned up")
