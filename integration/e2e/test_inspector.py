"""What a turn changed, told by the shim in the journal (D6): a turn that changed nothing has no checkpoint.

Everything here goes through real execs of real clients. That a turn is `none` must be right, or a restore loses
something; that a turn of mere reading is `none` is what makes checkpoints cheap.
"""

import collections
import json
import pathlib
import re
import subprocess
import sys
import time

import pytest

from harness import EMULATED, IMAGE, SERVERS, crab, docker, run, until
from test_armed_restore import Sandbox

PREFIX = "dev.crab."
DIGEST = pathlib.Path(__file__).parents[1] / "digest/digest.py"


class Watched(Sandbox):
    """A sandbox whose turns are looked at."""

    execs = 0

    def __init__(self, directory, *command, kind="ctr", image=IMAGE, options=(), **settings):
        for key, value in settings.items():
            options = [*options, "--annotation", f"{PREFIX}{key}={value}"]
        super().__init__(kind, directory, *command, options=options, image=image)

    def last(self):
        """The number of the last turn in the journal."""
        return max((line["turn"] for line in self.turns()), default=0)

    def sh(self, script, **kwargs):
        return self.exec("sh", "-c", script, **kwargs).out

    def of_execs(self):
        """The journal's lines of all execs so far: a client has its answer before the journal has its line."""

        def read():
            lines = [line for line in self.turns() if line["trigger"] == "exec"]
            return [lines] if len(lines) >= self.execs else None

        [lines] = until(read, "a line for each exec")
        assert len(lines) == self.execs, lines
        return lines

    def turns_of(self, act):
        """The journal's lines of the turns that `act()` makes."""
        before = len(self.of_execs())
        act()
        return self.of_execs()[before:]

    def turn_of(self, *command, **kwargs):
        """The journal's line of one exec."""
        return self.turns_of(lambda: self.exec(*command, **kwargs))[0]

    def python(self, code, *args):
        return self.turn_of("python3", "-c", code, *args)

    def background(self, code, *args):
        """Leaves a Python program running that has said that it is ready by a file."""
        self.exec("sh", "-c", 'nohup python3 -c "$@" >/dev/null 2>&1 </dev/null & until test -e /ready; do sleep 0.02; done', "sh", code, *args)

    def settle(self):
        """Takes a checkpoint, and sees that reading alone is `none` after it."""
        line = json.loads(crab("checkpoint", "--json", self.name).out)
        assert line["action"] == "full", line
        assert is_none(self.turn_of("cat", "/etc/passwd")), self.turns()[-1]


def is_none(line):
    if line["effects"]:
        # Without one: it was refused, and the note says why.
        assert line["checkpoint"] or "not protected" in line["note"], line
        return False
    assert line["action"] == "skip" and line["checkpoint"] is None, line
    return True


# The acceptance test of D6.

BLOCKING = """
import signal, socket
signals = 0
def count(*_):
    global signals
    signals += 1
signal.signal(signal.SIGUSR1, count)
server = socket.create_server(("127.0.0.1", 7000))
open("/run/blocking.pid", "w").write(str(__import__("os").getpid()))
kept = []
while True:
    client, _ = server.accept()
    with client:
        kept.append(client.recv(100))
        client.sendall(b"%d" % len(kept))
"""
# Of what redis does ten times a second, as it comes, an emulated processor makes more CPU time than is forgiven.
START = f"""
set -e
mkdir -p /repo /www && cd /repo
echo hello >README && git init -q && git add . && git -c user.name=a -c user.email=a@b commit -qm one
cat >/blocking.py <<'END'
{BLOCKING}
END
nginx
redis-server --daemonize yes --dir / --logfile /dev/null --hz {1 if EMULATED else 10} >/dev/null
tmux new-session -d -x 80 -y 24 bash
nohup python3 /blocking.py </dev/null &
nohup python3 -m http.server -d /www --bind 127.0.0.1 8000 </dev/null >/dev/null 2>&1 &
"""
ANSWERS = {
    "nginx": "curl -sf -o /dev/null http://127.0.0.1/",
    "http.server": "curl -sf -o /dev/null http://127.0.0.1:8000/",
    "blocking server": "exec 3<>/dev/tcp/127.0.0.1/7000; echo word >&3; head -c1 <&3",
    "redis": "redis-cli ping",
    "redis, written": "redis-cli set a b",
    "tmux": "tmux send-keys x",
    "signal": "kill -USR1 $(cat /run/blocking.pid)",
}
"""What reaches one of the servers."""
READING = [
    ["cat", "/etc/passwd"],
    ["ls", "-lR", "/etc"],
    ["ps", "-ef"],
    ["git", "-C", "/repo", "status"],
    ["git", "-C", "/repo", "log", "-p"],
    ["python3", "-c", "print(open('/repo/README').read())"],
    ["sh", "-c", "find /usr/bin | wc -l; cat /proc/loadavg; df >/dev/null"],
    ["grep", "-r", "root", "/etc/nginx"],
    ["bash", "-c", "cat /repo/README | sort | head -1"],
    ["python3", "-c", "import json, subprocess; print(subprocess.run(['id'], capture_output=True).stdout)"],
]
SERVING = ["sleep", "nginx", "nginx", "redis-server", "tmux: server", "bash", "python3", "python3"]


def serve(sandbox):
    """Starts all servers, waits for each, and lets every reading happen once: Python and git keep caches."""
    sandbox.exec("sh", "-c", START)
    for what in ("nginx", "http.server", "blocking server", "redis"):
        until(lambda: sandbox.exec("bash", "-c", ANSWERS[what], check=False).rc == 0, what)
    until(lambda: sandbox.exec("tmux", "capture-pane", "-p").out.strip(), "a prompt")
    # git takes an index as old as its files for doubtful, and writes it anew.
    time.sleep(1.1)
    for command in READING:
        sandbox.exec(*command)
    line = json.loads(crab("checkpoint", "--json", sandbox.name).out)
    assert line["action"] == "full", line
    names = sorted(sandbox.exec("ps", "-eo", "comm=").out.split("\n"))
    assert [name for name in names if name and name != "ps"].count("nginx") >= 2, names


def ways(lines):
    """How often which process was acquitted in which way, by the notes of the journal."""
    counted = collections.Counter()
    for line in lines:
        for part in (line["note"] or "").split("; "):
            title, _, rest = part.partition(": ")
            if title == "did not run":
                counted[title, ""] += int(rest)
            elif title in ("ran and moved no data", "equal to the image"):
                counted.update((title, name) for name in re.findall(r'\d+ "((?:[^"\\]|\\.)*)"', rest))
            elif title == "no process ran":
                counted["did not run", ""] += len(SERVING)
    return counted


def show(counted):
    for (way, name), times in sorted(counted.items()):
        print(f"  {way:24} {name:16} {times}")


def test_a_hundred_turns_of_reading_are_none_beside_servers_and_what_reaches_one_is_not(tmp_path):
    with Watched(tmp_path, image=SERVERS) as sandbox:
        serve(sandbox)
        begin = time.monotonic()
        count = 100

        lines = sandbox.turns_of(lambda: [sandbox.exec(*READING[n % len(READING)]) for n in range(count)])
        took = time.monotonic() - begin
        assert len(lines) == count
        changed = [line["note"] for line in lines if not is_none(line)]
        counted = ways(lines)
        looks = sorted(line["look_us"] for line in lines)
        print(f"\n{count} turns in {took:.1f} s, look: median {looks[count // 2]} us, at most {looks[-1]} us")
        show(counted)
        assert not changed, changed
        # A note that names nobody would pass for proof.
        assert any(way == "did not run" for way, _ in counted), lines[0]
        assert ("ran and moved no data", "redis-server") in counted, counted

        for what, command in ANSWERS.items():
            line = sandbox.turn_of("bash", "-c", command)
            print(f"  {what}: {line['effects']} {line['note']}")
            assert not is_none(line), what
            assert line["action"] == "full", line
            # And what it did is over with it.
            line = sandbox.turn_of("cat", "/etc/passwd")
            assert is_none(line), (what, line)


def test_without_the_consistent_cut_whoever_runs_is_compared_or_in_the_way(tmp_path):
    with Watched(tmp_path, image=SERVERS, consistent_cut="false") as sandbox:
        serve(sandbox)

        lines = sandbox.turns_of(lambda: [sandbox.exec(*READING[n % len(READING)]) for n in range(20)])
        none = [line for line in lines if is_none(line)]
        print(f"\n{len(none)} of 20 turns are none")
        show(ways(none))
        for line in lines:
            if not is_none(line):
                print(f"  {line['note']}")
        assert not any(way == "ran and moved no data" for way, _ in ways(none))
        assert len(none) < 20, "redis' cron runs ten times a second, and changes its memory"
        assert any("redis-server" in line["note"] for line in lines if not is_none(line))


# Who runs on in the background.

EVERY_50_MS = """
import ctypes, mmap, os, socket, sys, time
a, b = socket.socketpair()
r, w = os.pipe()
def mapped(path):
    with open(path, "wb+") as file:
        file.truncate(4096)
        return mmap.mmap(file.fileno(), 4096)
{begin}
open("/ready", "w").close()
n = 0
while True:
    n = n % 250 + 1
    {act}
    time.sleep(0.05)
"""
ACTS = {
    "socket": ("", "a.send(b'x'); b.recv(1)"),
    "pipe": ("", "os.write(w, b'x'); os.read(r, 1)"),
    "file": ("f = open('/f', 'wb')", "os.pwrite(f.fileno(), bytes([n]), 0)"),
    "deleted file": ("f = open('/f', 'wb'); os.unlink('/f')", "os.pwrite(f.fileno(), bytes([n]), 0)"),
    "mapping of a file of the layer": ("m = mapped('/m')", "m[0] = n"),
    "mapping of a file in memory": ("m = mapped('/dev/shm/m')", "m[0] = n"),
    "splice": ("f = open('/etc/passwd', 'rb')", "os.splice(f.fileno(), w, 1, 0); os.splice(r, a.fileno(), 1); b.recv(1)"),
    "sendfile": ("f = open('/etc/passwd', 'rb')", "os.sendfile(a.fileno(), f.fileno(), 0, 1); b.recv(1)"),
    "datagrams": ("u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('127.0.0.1', 0))", "u.sendto(b'x', u.getsockname()); u.recv(1)"),
    "children": ("", "os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)"),
    "counting": ("", "\n    while True: n += 1"),
}


@pytest.mark.parametrize("what", ACTS)
def test_what_a_background_process_does_counts(what, tmp_path):
    begin, act = ACTS[what]
    with Watched(tmp_path) as sandbox:
        sandbox.background(EVERY_50_MS.format(begin=begin, act=act))
        for _ in range(3):
            line = sandbox.turn_of("sleep", "0.3")
            assert not is_none(line), line
        print(f"\n  {what}: {line['effects']} {line['note']}")


def test_a_background_process_that_merely_wakes_up_is_acquitted(tmp_path):
    """The counterpart: without it, the tests above would prove nothing."""
    with Watched(tmp_path) as sandbox:
        sandbox.background(EVERY_50_MS.format(begin="", act="pass"))
        sandbox.settle()
        line = sandbox.turn_of("sleep", "0.3")
        assert is_none(line), line
        assert "ran and moved no data: " in line["note"], line


SYSV = """
import ctypes, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
id = libc.shmget(0x1234, 4096, 0o1600)
assert id >= 0
address = libc.shmat(id, None, 0)
memory = (ctypes.c_uint * 1).from_address(address)
"""


def test_memory_that_an_exec_shares_with_a_process_counts(tmp_path):
    """What the process stores there leaves no trace; that an exec looks there does."""
    with Watched(tmp_path) as sandbox:
        sandbox.background(SYSV + "open('/ready', 'w').close()\nwhile True:\n    memory[0] += 1; time.sleep(0.05)")
        crab("checkpoint", sandbox.name)
        for reading in (SYSV + "print(memory[0])", SYSV + "memory[0] = 7"):
            line = sandbox.python(reading)
            assert not is_none(line), line
        print(f"\n  {line['effects']} {line['note']}")


# Who sleeps, and is reached by an exec.

TARGET = """
import ctypes, os, signal, socket
memory = ctypes.create_string_buffer(b"before", 64)
ctypes.CDLL(None).prctl(0x59616d61, ctypes.c_ulong(-1))  # PR_SET_PTRACER, any
r, w = os.pipe()
a, b = socket.socketpair()
with open("/target", "w") as file:
    file.write(f"{os.getpid()} {ctypes.addressof(memory)} {w} {a.fileno()}")
open("/ready", "w").close()
while True:
    signal.pause()
"""
REACH = """
import ctypes, os, sys
pid, address, pipe, sock = map(int, open("/target").read().split())
libc = ctypes.CDLL(None, use_errno=True)
def done(result):
    assert result >= 0, os.strerror(ctypes.get_errno())
    return result
"""
REACHES = {
    "/proc/PID/mem": """
with open(f"/proc/{pid}/mem", "rb+", buffering=0) as mem:
    mem.seek(address)
    assert mem.write(b"after!") == 6
""",
    "ptrace": """
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long
done(libc.ptrace(16, pid, None, None)); os.waitpid(pid, 0x40000000)
done(libc.ptrace(4, pid, address, 0x21212121)); done(libc.ptrace(17, pid, None, None))
""",
    "pipe in /proc/PID/fd": """
with open(f"/proc/{pid}/fd/{pipe}", "wb", buffering=0) as file:
    assert file.write(b"x") == 1
""",
    "pidfd_getfd": """
import socket
handle = os.pidfd_open(pid)
fd = done(libc.syscall(438, handle, sock, 0))
assert socket.socket(fileno=fd).send(b"x") == 1
""",
    "prlimit": """
import resource
resource.prlimit(pid, resource.RLIMIT_NOFILE, (500, 500))
""",
    "setpriority": "os.setpriority(os.PRIO_PROCESS, pid, 5)",
    "oom_score_adj": "open(f'/proc/{pid}/oom_score_adj', 'w').write('7')",
    "stop": "os.kill(pid, 19)",
    "kill": "os.kill(pid, 9)",
}


@pytest.mark.parametrize("how", REACHES)
def test_an_exec_that_reaches_a_sleeping_process_counts(how, tmp_path):
    with Watched(tmp_path) as sandbox:
        sandbox.background(TARGET)
        sandbox.settle()
        line = sandbox.python(REACH + REACHES[how])
        print(f"\n  {how}: {line['effects']} {line['note']}")
        assert not is_none(line), line
        if how == "stop":
            sandbox.python(REACH + "os.kill(pid, 18)")


def test_an_exec_that_looks_at_a_sleeping_process_does_not_count(tmp_path):
    """The counterpart: that an exec opens /target and runs Python is not what was found above."""
    with Watched(tmp_path) as sandbox:
        sandbox.background(TARGET)
        sandbox.settle()
        line = sandbox.python(REACH + "print(os.getpriority(os.PRIO_PROCESS, pid), os.listdir(f'/proc/{pid}/fd'))")
        assert is_none(line), line


#: The inodes of many files of memory, made and given back.
MANY_MEMORY_FILES = """
import os, sys
for _ in range(2000):
    child = os.fork()
    if child == 0:
        os.close(os.open("/proc/self/mem", os.O_RDONLY))
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_other_files_of_proc_are_no_memory_files(tmp_path):
    """Until they have a mode of their own their inodes show that of whoever was at their place before."""
    with Watched(tmp_path) as sandbox:
        sandbox.background(TARGET)
        sandbox.settle()
        subprocess.run([sys.executable, "-c", MANY_MEMORY_FILES], check=True)
        line = sandbox.turn_of("find", "/proc", "-name", "[0-9]*", "-prune", "-o", "-size", "+1", "-print")
        assert is_none(line) and "equal" not in line["note"], line


# Files.

NOTHING_LEFT = {
    "made and removed": "echo x >/new && rm /new",
    "a tree made and removed": "mkdir -p /a/b && echo x >/a/b/c && ln /a/b/c /a/d && rm -r /a",
    "made and removed in memory": "echo x >/dev/shm/new && rm /dev/shm/new",
    "renamed and back": "mv /kept /other && mv /other /kept",
    "removed and kept": "cat /kept /usr/bin/tac >/dev/null; ls -l /kept",
    "a volume": "echo more >>/volume/file; mkdir /volume/d$$",
}
CHANGES = {
    "touch": "touch /kept",
    "touch of a lower file": "touch /etc/hostname.conf /etc/passwd",
    "contents": "echo y >/kept",
    "the same contents": "echo kept >/kept",
    "append": "echo z >>/kept",
    "chmod": "chmod 600 /kept",
    "chmod of a lower directory": "chmod 700 /opt",
    "chown": "chown 1:1 /kept",
    "xattr": "python3 -c 'import os; os.setxattr(\"/kept\", \"user.x\", b\"y\")'",
    "hard link": "ln /kept /link",
    "symbolic link": "ln -s kept /symlink",
    "rename": "mv /kept /renamed",
    "rename over": "echo a >/two; mv /two /renamed",
    "rename of a lower file": "mv /etc/issue /etc/issue2",
    "removed lower file": "rm /usr/bin/tac",
    "removed file": "rm /renamed",
    "removed lower tree": "rm -r /etc/skel",
    "mkdir": "mkdir /dir",
    "rmdir": "rmdir /dir",
    "fifo": "mkfifo /fifo",
    "new empty file": ": >/empty",
    "file in memory": "echo x >/dev/shm/x",
    "contents in memory": "echo y >/dev/shm/x",
    "a volume and a file": "echo more >>/volume/file; echo x >/both",
}


def test_what_becomes_of_files_counts_and_nothing_else(tmp_path):
    volume = tmp_path / "volume"
    volume.mkdir()
    mount = ("--mount", f"type=bind,src={volume},dst=/volume,options=rbind:rw")
    with Watched(tmp_path, options=mount) as sandbox:
        sandbox.sh("echo kept >/kept")
        sandbox.settle()
        wrong = {}
        for what, script in NOTHING_LEFT.items():
            line = sandbox.turn_of("sh", "-ec", script)
            if not is_none(line):
                wrong[what] = line
        for what, script in CHANGES.items():
            line = sandbox.turn_of("sh", "-ec", script)
            if is_none(line) or line["effects"] != ["files"]:
                wrong[what] = line
        assert (volume / "file").read_text() == "more\n" * 2
        assert not wrong, json.dumps(wrong, indent=1)
        assert is_none(sandbox.turn_of("true"))


def test_what_the_client_copies_into_a_sandbox_is_seen_at_the_next_boundary(tmp_path):
    (tmp_path / "copied").write_text("one\n")
    with Watched(tmp_path, kind="docker") as sandbox:
        sandbox.sh("mkdir /d")
        sandbox.settle()
        for text, place in (("one", "/d/copied"), ("two", "/d/copied"), ("three", "/usr/local/lib/copied")):
            (tmp_path / "copied").write_text(text)
            docker("cp", tmp_path / "copied", f"{sandbox.name}:{place}")
            line = sandbox.turn_of("true")
            assert not is_none(line) and "files" in line["effects"], (place, line)
            assert is_none(sandbox.turn_of("cat", place))


# What follows.

def test_with_skip_unchanged_off_every_turn_is_full(tmp_path):
    with Watched(tmp_path, skip_unchanged="false") as sandbox:
        for _ in range(3):
            assert sandbox.turn_of("true")["action"] == "full"


def test_a_checkpoint_that_is_asked_for_is_taken_though_nothing_changed(tmp_path):
    with Watched(tmp_path) as sandbox:
        sandbox.sh("echo x >/x")
        sandbox.settle()
        line = json.loads(crab("checkpoint", "--json", sandbox.name).out)
        assert line["action"] == "full" and not line["effects"], line


def digest(pid, place):
    run(sys.executable, DIGEST, "sandbox", "--pid", pid, "--freeze", "--json", place)
    return place


def test_after_a_skipped_turn_a_restore_gives_the_state_of_that_turn(tmp_path):
    with Watched(tmp_path) as sandbox:
        sandbox.sh("mkdir /d; echo one >/d/one; rm /usr/bin/tac; echo two >/dev/shm/two")
        sandbox.background(TARGET)
        sandbox.settle()
        before = sandbox.last()
        skipped = sandbox.turns_of(lambda: [sandbox.sh("cat /d/one; echo x >/y; rm /y; ls /proc/*/fd") for _ in range(5)])
        assert all(map(is_none, skipped)), skipped
        then = digest(sandbox.container.pid, tmp_path / "then.json")
        sandbox.die()
        sandbox.restore()
        sandbox.start()
        now = digest(sandbox.container.pid, tmp_path / "now.json")
        done = run(sys.executable, DIGEST, "diff", then, now, check=False)
        assert done.rc == 0, done
        # The journal goes on behind the skipped turns.
        assert sandbox.turn_of("cat", "/d/one")["turn"] > before + 5
        assert sandbox.sh("cat /d/one /dev/shm/two; test -e /usr/bin/tac || echo gone; test -e /y || echo none") == "one\ntwo\ngone\nnone\n"
