"""Rollback by files alone: no process has changed since the checkpoint's dump, so none is touched.

What the sandbox is afterwards must be what it was at the checkpoint's cut, by the digest that shares no code with crab;
that the processes are the same ones says how it came about.
"""

import contextlib
import json
import os
import pathlib
import random
import sys
import types

import pytest

from harness import LIMIT, crab
from test_inspector import Watched

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "replay"))

import clients  # noqa: E402, F401 (puts integration/digest on the path)
from hooks import HOOKS, Hooks, of_cut  # noqa: E402
from judge import judge  # noqa: E402

import process  # noqa: E402

HOLDER = """
import mmap, os, time
os.makedirs("/held/dir"); os.makedirs("/held/cwd"); os.makedirs("/held/listed"); os.makedirs("/w")
for name in ("log", "mapped", "dir/open"):
    open("/held/" + name, "w").write("x" * 5000)
kept = [open("/held/log", "a"), open("/held/dir/open"), os.open("/held/listed", os.O_RDONLY), os.open("/w", os.O_RDONLY)]
file = open("/held/mapped", "rb")
kept.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)); file.close()
os.chdir("/held/cwd")
open("/ready", "w").close()
while True:
    time.sleep(1000)
"""

#: Changes of all kinds, at places of which some are the image's. It prints what it did.
CHANGES = r"""
import os, random, shutil, socket, struct, sys
r = random.Random(int(sys.argv[1]))
PLACES = ["/w", "/held/cwd", "/held/listed", "/held/dir", "/usr/share/doc", "/usr/share/common-licenses", "/etc/skel", "/opt", "/usr/share/perl5"]
ACL = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in
    ((1, 7, 0xffffffff), (2, 5, 1234), (4, 5, 0xffffffff), (0x10, 7, 0xffffffff), (0x20, 5, 0xffffffff)))

def existing():
    found = []
    for place in PLACES:
        for top, dirs, files in os.walk(place):
            found += [os.path.join(top, name) for name in dirs + files]
            if len(found) > 400:
                break
    return sorted(path for path in found if path not in ("/held/dir/open",))

def new():
    dirs = [place for place in PLACES if os.path.isdir(place)] + [path for path in existing() if os.path.isdir(path) and not os.path.islink(path)]
    return os.path.join(r.choice(dirs), "n%d" % r.randrange(40))

def gone(path):
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)

def data():
    return r.randbytes(r.choice([0, 1, 700, 4096, 70000, 200000]))

def write(path, mode):
    gone(path)
    with open(path, mode) as file:
        file.write(data())

def sparse(path):
    gone(path)
    with open(path, "wb") as file:
        file.truncate(5 << 20); file.seek(3 << 20); file.write(b"x")

def bind(path):
    gone(path)
    socket.socket(socket.AF_UNIX).bind(path)

def of_files(act):
    files = [path for path in existing() if os.path.isfile(path) and not os.path.islink(path)]
    if files: act(r.choice(files))

def of_all(act):
    found = existing()
    if found: act(r.choice(found))

def of_dirs(act):
    dirs = [path for path in existing() if os.path.isdir(path) and not os.path.islink(path)]
    if dirs: act(r.choice(dirs))

def append(path):
    with open(path, "ab") as file: file.write(data())

def patch(path):
    with open(path, "r+b") as file:
        file.seek(r.randrange(1, 5000)); file.write(b"patched")

def opaque(path):
    shutil.rmtree(path); os.mkdir(path)
    write(os.path.join(path, "inside"), "xb")

def other_kind(path):
    was = os.path.isdir(path) and not os.path.islink(path)
    gone(path)
    write(path, "xb") if was else os.makedirs(path + "/deeper")

def rename(path):
    to = new()
    if to.startswith(path + "/"): return
    gone(to)
    try:
        os.rename(path, to)
    except OSError:
        shutil.move(path, to)

def times(path):
    os.utime(path, (1, r.randrange(1 << 30)), follow_symlinks=False)

def touched_by_nobody(path):
    info = os.stat(path); append(path); os.truncate(path, info.st_size); os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))

ACTS = [
    lambda: write(new(), "xb"), lambda: write(new(), "xb"), lambda: sparse(new()),
    lambda: (lambda path: (gone(path), os.makedirs(path + "/a/b"), write(path + "/a/file", "xb")))(new()),
    lambda: (lambda path: (gone(path), os.symlink("somewhere", path)))(new()),
    lambda: (lambda path: (gone(path), os.mkfifo(path, 0o640)))(new()),
    lambda: (lambda path: (gone(path), os.mknod(path, 0o20600, os.makedev(1, 3))))(new()),
    lambda: bind(new()),
    lambda: of_files(append), lambda: of_files(append), lambda: of_files(patch), lambda: of_files(touched_by_nobody),
    lambda: of_files(lambda path: os.truncate(path, r.randrange(3000))),
    lambda: of_all(gone), lambda: of_all(gone), lambda: of_all(other_kind), lambda: of_all(rename), lambda: of_all(rename),
    lambda: of_all(times), lambda: of_dirs(opaque), lambda: of_dirs(gone),
    lambda: of_all(lambda path: os.path.islink(path) or os.chmod(path, r.choice([0o600, 0o755, 0o4711, 0o2750]))),
    lambda: of_all(lambda path: os.chown(path, r.choice([0, 7]), r.choice([0, 9]), follow_symlinks=False)),
    lambda: of_files(lambda path: os.setxattr(path, "user.x", r.randbytes(r.choice([1, 900])))),
    lambda: of_dirs(lambda path: os.setxattr(path, "system.posix_acl_default", ACL)),
    lambda: of_files(lambda path: os.setxattr(path, "system.posix_acl_access", ACL)),
]
LINKS = [
    lambda: of_files(lambda path: (lambda to: (gone(to), os.link(path, to)) if to != path else None)(new())),
] * 4
for _ in range(int(sys.argv[2])):
    act = r.choice(ACTS + (LINKS if sys.argv[3] == "links" else []))
    try:
        act()
    except (FileNotFoundError, NotADirectoryError, OSError) as e:
        print(e)
"""


class Files(Watched):
    """A sandbox with a process that holds files."""

    def __init__(self, kind, directory, **settings):
        # Which is the hook's, too: where the processor is emulated a digest of all takes longer than a minute.
        super().__init__(directory, kind=kind, dump_timeout=f"{LIMIT:.0f}s", **settings)

    def hooks(self):
        namespace = "default" if self.kind == "ctr" else "moby"
        return Hooks(types.SimpleNamespace(namespace=namespace, id=self.container.id))

    def change(self, seed, count=8, links=""):
        """A turn of changes; its line, and what the sandbox was in its cut."""
        hooks = self.hooks()
        with hooks.installed():
            line = self.turn_of("python3", "-c", CHANGES, str(seed), str(count), links)
            assert line["checkpoint"], line
            if line["action"] != "files":
                print(f"  {line['action']}: {line['note']}")
            return line, of_cut(hooks, "frozen")

    def files_turn(self, script):
        """Its number. What else runs on the host may make a turn one of processes, too: then once more."""
        for _ in range(5):
            line = self.turn_of("sh", "-c", script)
            if line["action"] == "files":
                return line["turn"]
        raise AssertionError(line)

    def back(self, turn, hooks=None):
        with hooks.installed() if hooks else contextlib.nullcontext():
            report = json.loads(crab("rollback", "--json", f"{self.name}@{turn}").out)
            if not is_quick(report):
                print(f"  {self.turns()[-1]['note']}")
            return report, hooks and of_cut(hooks, "restored")

    def back_as_it_was(self, line, before):
        """Goes back there, and must be what it was. Whether its processes were left alone."""
        ran = started(self.processes())
        report, after = self.back(line["turn"], self.hooks())
        quick = is_quick(report)
        assert quick == (started(self.processes()) == ran), report
        equal(line["turn"], before, after, quick)
        return quick

    def processes(self):
        return process.members(self.init)


def equal(turn, before, after, ran_on):
    """By the digest. `ran_on`: the processes have run since, and moved no data."""
    fault = judge(turn, before, after, ran_on, set(before["state"]["processes"]) if ran_on else set())
    assert fault.is_equal, (fault.unequal, fault.differences[:10])


def is_quick(report):
    return "kill" not in report["steps_us"]


def started(pids):
    """Processes, and when each has begun."""
    return {pid: pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19] for pid in pids}


@pytest.mark.parametrize(("kind", "links"), [("ctr", ""), ("docker", "links")])
def test_random_changes_go_back_and_no_process_is_touched(kind, links, tmp_path):
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"\n  seed {seed}")
    rng = random.Random(seed)
    with Files(kind, tmp_path) as sandbox:
        sandbox.background(HOLDER)
        crab("checkpoint", sandbox.name)
        states, quick = [], []
        for number in range(2):
            states.append(sandbox.change(f"{seed}{number}", links=links))
        for number in range(2, 4):
            line, before = rng.choice(states)
            quick.append(sandbox.back_as_it_was(line, before))
            states.append(sandbox.change(f"{seed}{number}", links=links))
        print(f"  {[line['action'] for line, _ in states]}, quick: {quick}")
        assert links or any(quick), "nothing stood in the way"
        # The last one was captured upon what crab itself had written: it must be right for those who restore it.
        line, before = states[-1]
        assert crab("verify", sandbox.name).rc == 0
        sandbox.exec("sh", "-c", "echo >/w/lost; sleep 1000 >/dev/null 2>&1 </dev/null &")
        sandbox.of_execs()
        report, after = sandbox.back(line["turn"], sandbox.hooks())
        assert not is_quick(report)
        equal(line["turn"], before, after, line["action"] == "files")


def test_what_is_done_again_after_a_rollback_is_kept(tmp_path):
    """It is then what the checkpoint was that files are held against, and not the one that it goes on from."""
    with Files("ctr", tmp_path) as sandbox:
        sandbox.sh("echo 1 >/file; echo 2 >/other")
        crab("checkpoint", sandbox.name)
        there = sandbox.turn_of("sh", "-c", "echo >/unrelated")
        gone = sandbox.turn_of("rm", "/file")
        assert gone["action"] == "files", gone
        report, _ = sandbox.back(there["turn"])
        # From outside: an exec would be a turn.
        assert is_quick(report) and (root_of(sandbox) / "file").read_text() == "1\n"
        line = sandbox.turn_of("rm", "/file")
        assert line["checkpoint"] and line["action"] == "files", line
        sandbox.die()
        sandbox.restore()
        sandbox.start()
        assert sandbox.sh("cat /other; ls /file 2>&1", check=False) == "2\nls: cannot access '/file': No such file or directory\n"


def root_of(sandbox):
    return pathlib.Path(f"/proc/{sandbox.init}/root")


def leave_running(sandbox):
    sandbox.exec("sh", "-c", "sleep 1000 >/dev/null 2>&1 </dev/null &")
    sandbox.of_execs()


def delete_what_is_held(sandbox):
    (root_of(sandbox) / "held/dir/open").unlink()


def grow_the_log(sandbox):
    with open(root_of(sandbox) / "held/log", "a") as log:
        log.write("from outside")


def test_otherwise_the_processes_go_back_too(tmp_path):
    """Without digests: they read the memory of processes, which counts as a change of these from then on."""
    spoils = [(delete_what_is_held, '"/held/dir/open") changed'), (grow_the_log, 'a process uses "held/log"'), (leave_running, "another dump")]
    with Files("ctr", tmp_path) as sandbox:
        sandbox.background(HOLDER)
        for spoil, why in spoils:
            crab("checkpoint", sandbox.name)
            turn = sandbox.files_turn("echo 1 >/w/file")
            spoil(sandbox)
            (root_of(sandbox) / "w/file").write_text("2")
            report, _ = sandbox.back(turn)
            assert not is_quick(report), (spoil, report)
            assert why in sandbox.turns()[-1]["note"], (spoil, sandbox.turns()[-1])
            assert sandbox.sh("cat /w/file; stat -c %s /held/log /held/dir/open") == "1\n5000\n5000\n"
        # And from there on files alone do again, once there is a dump.
        crab("checkpoint", sandbox.name)
        for _ in range(5):
            turn = sandbox.files_turn("echo 3 >/w/file")
            if sandbox.turn_of("sh", "-c", "echo 4 >/w/file")["action"] == "files":
                break
        report, _ = sandbox.back(turn)
        assert is_quick(report) and sandbox.sh("cat /w/file") == "3\n", sandbox.turns()[-1]


#: Leaves no time of access, as on a file system mounted with noatime: that would count as a file that it touched.
READER = """
import os, time
open("/ready", "w").close()
while True:
    fd = os.open("/w/file", os.O_RDONLY | os.O_NOATIME); os.read(fd, 100); os.close(fd)
    time.sleep(0.2)
"""


def test_who_has_read_files_does_not_live_on_beside_older_ones(tmp_path):
    """It moves no data, so its turns are of files alone; taken back alone, it would know of them what is not so yet."""
    with Files("ctr", tmp_path) as sandbox:
        sandbox.sh("mkdir /w; echo 0 >/w/file")
        sandbox.background(READER)
        crab("checkpoint", sandbox.name)
        turn = sandbox.files_turn("echo 1 >/w/file")
        assert sandbox.turn_of("sh", "-c", "echo 2 >/w/file; sleep 1")["action"] == "files"
        report, _ = sandbox.back(turn)
        assert not is_quick(report), report
        assert "has read something since its dump" in sandbox.turns()[-1]["note"], sandbox.turns()[-1]
        assert sandbox.sh("cat /w/file") == "1\n"


ONCE = """#!/bin/sh
test -e {flag} && exit 0
touch {flag}
exit 1
"""


@pytest.mark.parametrize("hook", [ONCE, "#!/bin/sh\nexit 1\n"], ids=["once", "always"])
def test_half_way_back_it_goes_the_whole_way_or_ends(hook, tmp_path):
    """It fails when the files are what they are to be, and nothing has run: the hook says no."""
    with Files("ctr", tmp_path) as sandbox:
        crab("checkpoint", sandbox.name)
        there = sandbox.turn_of("sh", "-c", "echo 1 >/file; rm -r /etc/skel")["turn"]
        sandbox.turn_of("sh", "-c", "echo 2 >/file; mkdir /etc/skel")
        HOOKS.mkdir(parents=True, exist_ok=True)
        script = HOOKS / ".restored"
        script.write_text(hook.format(flag=tmp_path / "flag"))
        script.chmod(0o755)
        script.rename(HOOKS / "restored")
        try:
            done = crab("rollback", "--json", f"{sandbox.name}@{there}", check=False)
        finally:
            (HOOKS / "restored").unlink()
        note = sandbox.turns()[-1]["note"]
        assert "restored: Exited(1)" in note, note
        if hook == ONCE:
            assert done.rc == 0 and not is_quick(json.loads(done.out)), done
        else:
            assert done.rc == 1 and "The sandbox had to be ended" in done.err, done
            sandbox.container.stopped()
            sandbox.container.delete_task()
            sandbox.restore(f"@{there}")
            sandbox.start()
        assert sandbox.sh("cat /file; ls -d /etc/skel 2>&1", check=False) == "1\nls: cannot access '/etc/skel': No such file or directory\n"


def test_what_no_checkpoint_holds_yet_goes_back_too(tmp_path):
    """Somebody outside changes files after the last turn: he ends none, and what he did is undone."""
    with Files("ctr", tmp_path) as sandbox:
        sandbox.sh("mkdir /w; echo 1 >/w/changed; echo 2 >/w/removed")
        crab("checkpoint", sandbox.name)
        turn = sandbox.files_turn("echo 3 >/w/turn")
        before = sandbox.turns()[-1]["turn"]
        here = root_of(sandbox)
        (here / "w/changed").write_text("other")
        (here / "w/removed").unlink()
        (here / "w/new").mkdir()
        (here / "w/new/file").write_text("new")
        (here / "etc/hostname.conf").write_text("new")
        report, _ = sandbox.back(turn)
        assert is_quick(report) and sandbox.turns()[-1]["turn"] == before + 1, sandbox.turns()[-1]
        assert sorted(os.listdir(here / "w")) == ["changed", "removed", "turn"]
        assert [(here / "w" / name).read_text() for name in ("changed", "removed", "turn")] == ["1\n", "2\n", "3\n"]
        assert not (here / "etc/hostname.conf").exists()


def test_a_live_exec_ends(tmp_path):
    with Files("ctr", tmp_path) as sandbox:
        crab("checkpoint", sandbox.name)
        line = sandbox.turn_of("sh", "-c", "echo 1 >/file")
        client = sandbox.container.start_exec("sh", "-c", "echo up; exec sleep 1000")
        with client:
            assert client.stdout.readline() == b"up\n"
            report, _ = sandbox.back(line["turn"])
            assert not is_quick(report)
            client.communicate(timeout=60)
            assert client.returncode == 137
