"""Turns that changed files alone: newer files beside the image of an older dump (D7a), where nothing stands in the way.

What comes back has the new files and the processes as they were, by the digest that shares no code with crab; and a
change of anything that a process stands upon is a whole checkpoint.
"""

import json
import pathlib
import sys
import types

from harness import LIMIT, SERVERS, crab, until
from test_inspector import Watched, is_none, serve

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "replay"))

import clients  # noqa: E402, F401 (puts integration/digest on the path)
from hooks import Hooks, of_cut  # noqa: E402
from judge import acquitted, judge  # noqa: E402

import process  # noqa: E402


class Held(Watched):
    """A sandbox whose turns are looked at, and what its checkpoints say about themselves."""

    def __init__(self, directory, **settings):
        # Which is the hook's, too: where the processor is emulated a digest of all takes longer than a minute.
        super().__init__(directory, dump_timeout=f"{LIMIT:.0f}s", **settings)

    def checkpoint(self):
        line = json.loads(crab("checkpoint", "--json", self.name).out)
        assert line["action"] == "full", line
        return line

    def hooks(self):
        return Hooks(types.SimpleNamespace(namespace="default", id=self.container.id))

    def come_back(self):
        """Dies, and goes on from its newest checkpoint."""
        self.die()
        self.restore()
        self.start()


def is_files(line):
    print(f"\n  {line['action']}: {line['note']}")
    assert line["action"] in ("files", "full"), line
    if line["action"] == "files":
        assert line["effects"] == ["files"] and line["checkpoint"], line
    return line["action"] == "files"


def test_new_files_come_back_beside_the_processes_of_an_older_dump(tmp_path):
    with Held(tmp_path, image=SERVERS) as sandbox:
        serve(sandbox)
        dump = sandbox.checkpoint()

        # Several, each upon the one before; nothing is frozen unless somebody runs.
        for number in range(3):
            line = sandbox.turn_of("sh", "-c", f"mkdir -p /made/{number} && echo {number} >/made/{number}/file && rm -f /etc/issue.net")
            assert is_files(line), line
            print(f"\n  {number}: frozen {line['freeze_us']} us, {line['bytes_captured']} bytes captured, {line['bytes_written']} written")
            # Of the dump nothing is written again.
            assert line["bytes_written"] < dump["bytes_captured"] / 10, (line, dump)
        assert is_none(sandbox.turn_of("cat", "/made/0/file"))

        hooks = sandbox.hooks()
        with hooks.installed():
            line = sandbox.turn_of("sh", "-c", "echo last >/made/last && rm -r /made/1 && ln /made/last /made/0/linked")
            assert is_files(line), line
            before = of_cut(hooks, "frozen")
            inner = process.members(sandbox.container.pid)
            sandbox.come_back()
            after = of_cut(hooks, "restored")
        may_differ = {str(inner[pid]) for pid in acquitted(line["note"]) if pid in inner}
        fault = judge(line["turn"], before, after, True, may_differ)
        print(f"  {fault.mode}: {fault.exact} {fault.ran_on} {fault.differences[:5]}")
        assert fault.is_equal, fault

        assert sandbox.sh("cat /made/0/linked /made/2/file; ls /made") == "last\n2\n0\n2\nlast\n"
        until(lambda: sandbox.exec("curl", "-sf", "-o", "/dev/null", "http://127.0.0.1/", check=False).rc == 0, "nginx answers")


HOLDER = """
import ctypes, mmap, os, socket, time
os.makedirs("/place/dir/sub"); os.makedirs("/place/cwd"); os.makedirs("/place/listed")
for name in ("open", "mapped", "neighbour", "dir/sub/open"):
    open("/place/" + name, "w").write("x" * 100)
kept = [open("/place/open"), open("/place/dir/sub/open"), os.open("/place/listed", os.O_RDONLY)]
file = open("/place/mapped", "rb")
kept.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)); file.close()
library = [line.split()[-1] for line in open("/proc/self/maps") if "/libm.so" in line or "/libc.so" in line][0]
os.system(f"cp {library} /place/library.so")
kept.append(os.open("/place/library.so", os.O_RDONLY))
kept.append(mmap.mmap(kept[-1], 0, access=mmap.ACCESS_READ)); os.close(kept[-2])
os.system("cp /usr/bin/sleep /place/program && (/place/program 100000 </dev/null >/dev/null 2>&1 &)")
server = socket.socket(socket.AF_UNIX); server.bind("/place/socket"); server.listen()
os.chdir("/place/cwd")
open("/ready", "w").close()
while True:
    time.sleep(1000)
"""
#: What is none of the processes' business.
HARMLESS = {
    "a file beside": "echo new >>/place/neighbour",
    "a file in the working directory": "echo new >/place/cwd/file",
    "a name in an open directory": "mkdir /place/listed/new",
    "a directory above in the layer": "chmod 711 /place/dir",
    "a directory above, copied up": "echo >/usr/lib/new",
    "a name that begins so": "echo >/place/open2; echo >/place/op",
}
USED = {
    "open": "echo more >>/place/open",
    "open, replaced": "echo other >/place/new && mv /place/new /place/open",
    "mapped": "printf y | dd of=/place/mapped conv=notrunc status=none",
    "library replaced": "cp /place/library.so /place/new.so && mv /place/new.so /place/library.so",
    "executed": "chmod 700 /place/program",
    "executed from a lower layer": "touch $(readlink -f /usr/bin/python3)",
    "parent renamed": "mv /place/dir /place/elsewhere",
    "working directory": "chmod 700 /place/cwd",
    "working directory renamed": "mv /place/cwd /place/cwd2",
    "bound socket": "chmod 600 /place/socket",
    "bound socket removed": "rm /place/socket",
}


def test_a_change_of_what_a_process_stands_upon_is_a_whole_checkpoint(tmp_path):
    with Held(tmp_path) as sandbox:
        sandbox.background(HOLDER)
        sandbox.checkpoint()
        for what, command in HARMLESS.items():
            line = sandbox.turn_of("sh", "-c", command)
            assert is_files(line), (what, line)
        for what, command in USED.items():
            line = sandbox.turn_of("sh", "-c", command)
            print(f"  {what}: {line['note']}")
            assert not is_files(line) and line["checkpoint"], (what, line)
            # And it is over with that.
            assert is_files(sandbox.turn_of("sh", "-c", "echo >>/place/neighbour")), what


LOOP = """
import os
file = os.open("/work-number", os.O_RDWR | os.O_CREAT)
number = 0
os.pwrite(file, b"%020d" % number, 0)
open("/ready", "w").close()
while True:
    number += 1
    if int(os.pread(file, 20, 0)) != number - 1:
        break
    os.pwrite(file, b"%020d" % number, 0)
    if int(os.pread(file, 20, 0)) != number:
        break
open("/broken", "w").write(f"{number} in memory")
"""


def test_a_number_in_memory_and_in_a_file_never_differ_by_more_than_one(tmp_path):
    """The program looks itself, before and after each time that it writes."""
    with Held(tmp_path) as sandbox:
        sandbox.background(LOOP)

        def number():
            return int(sandbox.sh("cat /work-number"))

        for _ in range(5):
            line = sandbox.turn_of("true")
            assert line["action"] == "full", line
            before = number()
            sandbox.of_execs()
            sandbox.come_back()
            until(lambda: number() > before, "it counts on")
            assert sandbox.exec("test", "-e", "/broken", check=False).rc == 1, sandbox.sh("cat /broken /work-number")


SIGNALLED = """
import os, signal, time
signal.signal(signal.SIGUSR1, lambda *_: None)
open("/pid", "w").write(str(os.getpid()))
open("/ready", "w").close()
while True:
    time.sleep(1000)
"""


def test_a_turn_that_also_reached_a_process_is_a_whole_checkpoint(tmp_path):
    with Held(tmp_path) as sandbox:
        sandbox.background(SIGNALLED)
        sandbox.checkpoint()
        assert is_files(sandbox.turn_of("sh", "-c", "echo >/one"))
        line = sandbox.turn_of("sh", "-c", "echo >/two; kill -USR1 $(cat /pid)")
        assert not is_files(line), line


def test_files_alone_also_without_the_consistent_cut(tmp_path):
    """Nobody runs, so nobody is frozen, so nobody has run."""
    with Held(tmp_path, consistent_cut="false") as sandbox:
        sandbox.checkpoint()
        for _ in range(3):
            line = sandbox.turn_of("sh", "-c", "echo >>/file")
            assert is_files(line), line
            assert line["freeze_us"] == 0, line


def test_a_large_file_that_grew_is_captured_for_what_it_grew_by(tmp_path):
    with Held(tmp_path) as sandbox:
        sandbox.sh("head -c 64M /dev/urandom >/large; ln /large /linked")
        sandbox.checkpoint()
        line = sandbox.turn_of("sh", "-c", "head -c 1M /dev/urandom >>/large")
        print(f"  {line['bytes_written']} bytes written, frozen {line['freeze_us']} us, durable {line['durable_us']} us")
        assert is_files(line) and line["changed_files"] == 2, line
        assert line["bytes_written"] < 4 << 20, line
        digest = sandbox.sh("sha256sum </large")
        # Written through a mapping that the process keeps: read in the cut, not before.
        sandbox.background(MAPPED)
        sandbox.checkpoint()
        assert not is_files(sandbox.turn_of("sh", "-c", "kill -USR1 $(cat /pid); until test -e /stored; do sleep 0.02; done"))
        changed = sandbox.sh("sha256sum </large")
        assert changed != digest
        sandbox.of_execs()
        sandbox.come_back()
        assert sandbox.sh("sha256sum </large; stat -c %h /large") == changed + "2\n"


MAPPED = """
import mmap, os, signal
file = open("/large", "r+b")
memory = mmap.mmap(file.fileno(), 0)
def store(*_):
    memory[40 << 20] ^= 255
    open("/stored", "w").close()
signal.signal(signal.SIGUSR1, store)
open("/pid", "w").write(str(os.getpid()))
open("/ready", "w").close()
while True:
    signal.pause()
"""
