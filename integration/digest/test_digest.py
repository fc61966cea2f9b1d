"""Does the digest see every kind of change, and only those? Runs as root in the test bed:

    integration/testbed/enter -- python3 -m pytest integration/digest -q
"""
from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import container  # noqa: E402
import digest  # noqa: E402
import process  # noqa: E402
import stock  # noqa: E402
import tree  # noqa: E402
from diff import differences  # noqa: E402

HERE = Path(__file__).resolve().parent
SLEEPER = ["python3", "-c", "import signal, time\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
           "while True: time.sleep(1000)"]


def paths(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [" ".join(d.path) for d in differences(before, after)]


# --- files ------------------------------------------------------------------------------------------------------

def digest_of(directory: Path) -> dict[str, Any]:
    return digest.finish({"tree": tree.scan_directory(str(directory)).tree}, {})


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "file").write_bytes(b"contents")
    (tmp_path / "other").write_bytes(b"other")
    os.link(tmp_path / "other", tmp_path / "link")
    os.symlink("target", tmp_path / "symlink")
    os.mkfifo(tmp_path / "fifo")
    os.mknod(tmp_path / "device", 0o20600, os.makedev(1, 3))
    return tmp_path


def rewrite_keeping_mtime(path: Path) -> None:
    st = path.stat()
    path.write_bytes(b"CONTENTS")
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))


def break_link(d: Path) -> None:
    st = (d / "link").stat()
    (d / "link").unlink()
    shutil.copy2(d / "other", d / "link")
    os.utime(d / "link", ns=(st.st_atime_ns, st.st_mtime_ns))


def replace_device(d: Path, device: int) -> None:
    st = (d / "device").stat()
    (d / "device").unlink()
    os.mknod(d / "device", 0o20600, device)
    os.utime(d / "device", ns=(st.st_atime_ns, st.st_mtime_ns))


def retarget(d: Path) -> None:
    st = (d / "symlink").lstat()
    (d / "symlink").unlink()
    os.symlink("tarGet", d / "symlink")
    os.utime(d / "symlink", ns=(st.st_atime_ns, st.st_mtime_ns), follow_symlinks=False)


def set_acl(path: Path) -> None:
    subprocess.run(["setfacl", "-m", "u:7:r", str(path)], check=True)


SEEN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "contents": (lambda d: rewrite_keeping_mtime(d / "dir/file"), ["tree /dir/file sha256"]),
    "mode": (lambda d: (d / "dir/file").chmod(0o600), ["tree /dir/file mode"]),
    "mode_of_a_directory": (lambda d: (d / "dir").chmod(0o700), ["tree /dir mode"]),
    "setuid": (lambda d: (d / "dir/file").chmod(0o4644), ["tree /dir/file mode"]),
    "owner": (lambda d: os.chown(d / "dir/file", 7, -1), ["tree /dir/file uid"]),
    "group_of_a_symlink": (lambda d: os.lchown(d / "symlink", -1, 7), ["tree /symlink gid"]),
    "mtime_of_a_file": (lambda d: os.utime(d / "dir/file", ns=(0, 1)), ["tree /dir/file mtime_ns"]),
    "mtime_by_a_nanosecond": (lambda d: os.utime(d / "fifo", ns=(0, (d / "fifo").stat().st_mtime_ns + 1)),
                              ["tree /fifo mtime_ns"]),
    "extended_attribute": (lambda d: os.setxattr(d / "dir/file", "user.x", b"1"), ["tree /dir/file xattrs"]),
    "extended_attribute_of_a_directory": (lambda d: os.setxattr(d / "dir", "trusted.x", b"1"), ["tree /dir xattrs"]),
    "extended_attribute_of_a_symlink": (
        lambda d: os.setxattr(d / "symlink", "trusted.x", b"1", follow_symlinks=False), ["tree /symlink xattrs"]),
    "acl": (lambda d: set_acl(d / "dir"), ["tree /dir xattrs"]),
    "hard_link_broken": (break_link, ["tree /other gid", "tree /other mode"]),
    "symlink_target": (retarget, ["tree /symlink target"]),
    "device_number": (lambda d: replace_device(d, os.makedev(1, 5)), ["tree /device device"]),
    "device_becomes_whiteout": (lambda d: replace_device(d, 0), ["tree /device device"]),
    "new_file": (lambda d: (d / "new").write_bytes(b""), ["tree /new"]),
    "file_gone": (lambda d: (d / "dir/file").unlink(), ["tree /dir/file"]),
    "renamed": (lambda d: (d / "fifo").rename(d / "pipe"), ["tree /fifo", "tree /pipe"]),
}


@pytest.mark.parametrize("name", SEEN)
def test_a_change_of_files_is_seen(name: str, files: Path) -> None:
    change, expected = SEEN[name]
    before = digest_of(files)
    change(files)
    found = paths(before, digest_of(files))
    if name == "hard_link_broken":
        assert found and all(path.startswith(("tree /other", "tree /link")) for path in found)
    else:
        assert found == expected


def touch_and_undo(d: Path) -> None:
    (d / "dir/made").write_bytes(b"")
    (d / "dir/made").unlink()


def change_and_undo(d: Path) -> None:
    st = (d / "dir/file").stat()
    rewrite_keeping_mtime(d / "dir/file")
    (d / "dir/file").write_bytes(b"contents")
    os.utime(d / "dir/file", ns=(st.st_atime_ns, st.st_mtime_ns))


def copy_to_new_inode(d: Path) -> None:
    shutil.copy2(d / "dir/file", d / "copy")
    (d / "copy").rename(d / "dir/file")


NOT_SEEN: dict[str, Callable[[Path], object]] = {
    "ctime": lambda d: (d / "dir/file").chmod((d / "dir/file").stat().st_mode),
    "atime": lambda d: os.utime(d / "dir/file", ns=(1, (d / "dir/file").stat().st_mtime_ns)),
    "mtime_of_a_directory": lambda d: os.utime(d / "dir", ns=(1, 1)),
    "made_and_unmade": touch_and_undo,
    "changed_and_changed_back": change_and_undo,
    "inode_number": copy_to_new_inode,
    "overlay_attribute": lambda d: os.setxattr(d / "dir", "trusted.overlay.opaque", b"y"),
}


@pytest.mark.parametrize("name", NOT_SEEN)
def test_what_is_no_change_of_files_is_not_seen(name: str, files: Path) -> None:
    before = digest_of(files)
    NOT_SEEN[name](files)
    assert paths(before, digest_of(files)) == []


@pytest.mark.parametrize("size", [1 << 20, 40 << 20])
def test_a_hole_equals_zeros(size: int, tmp_path: Path) -> None:
    def write(fill_hole: bool) -> dict[str, Any]:
        with open(tmp_path / "file", "wb") as file:
            if fill_hole:
                file.write(bytes(size))
            file.truncate(size)
            file.seek(size // 2)
            file.write(b"x")
        os.utime(tmp_path / "file", ns=(0, 0))
        return digest_of(tmp_path)
    assert paths(write(False), write(True)) == []


def test_a_byte_in_a_large_sparse_file_is_seen(tmp_path: Path) -> None:
    def write(at: int) -> dict[str, Any]:
        with open(tmp_path / "file", "wb") as file:
            file.truncate(10 << 40)
            file.seek(at)
            file.write(b"x")
        os.utime(tmp_path / "file", ns=(0, 0))
        return digest_of(tmp_path)
    assert paths(write(7 << 40), write((7 << 40) + (1 << 20))) == ["tree /file sha256"]


def test_names_that_are_no_text_survive(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff\n")).write_bytes(b"")
    one = digest_of(tmp_path)
    digest.save(one, str(tmp_path.parent / "saved.json"))
    assert digest.load(str(tmp_path.parent / "saved.json"))["digest"] == one["digest"]


def test_the_command_tells_differences_and_fails(files: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(HERE / "digest.py"), *arguments], capture_output=True, text=True)
    a, b = str(files.parent / "a.json"), str(files.parent / "b.json")
    assert command("tree", str(files), "--json", a).stdout.startswith("sha256:")
    assert command("diff", a, a).returncode == 0
    (files / "dir/file").chmod(0o600)
    command("tree", str(files), "--json", b)
    said = command("diff", a, b)
    assert said.returncode == 1 and "tree /dir/file mode: 0644 -> 0600" in said.stdout
    assert "RSEQ_KERNEL_BYTES" in command("definition").stdout


# --- processes ---------------------------------------------------------------------------------------------------

#: Runs in the sandbox: executes each line (base64 of Python) and answers it, so a test knows that it is done.
DRIVER = """
import base64, sys
names = {}
for line in sys.stdin:
    exec(base64.b64decode(line), names)
    print("done", flush=True)
"""

PRELUDE = """
import ctypes, fcntl, mmap, os, resource, select, signal, socket, struct, termios, time
libc = ctypes.CDLL(None)
"""


class Driver:
    """A process in the sandbox that does as it is told."""

    def __init__(self, sandbox: stock.Sandbox):
        self.sandbox = sandbox
        sandbox.execute("python3", "-c", DRIVER)
        self.pipes = sandbox.pipes[-1]
        self.tell(PRELUDE)

    def tell(self, code: str) -> None:
        os.write(self.pipes.stdin, base64.b64encode(code.encode()) + b"\n")
        if os.read(self.pipes.stdout, 100) != b"done\n":
            raise RuntimeError(os.read(self.pipes.stderr, 10000).decode())


@pytest.fixture(scope="module")
def sandbox() -> Iterator[stock.Sandbox]:
    made = stock.Sandbox(f"digest-{os.getpid()}", SLEEPER)
    yield made
    made.remove()


@pytest.fixture(scope="module")
def driver(sandbox: stock.Sandbox) -> Driver:
    return Driver(sandbox)


def processes(sandbox: stock.Sandbox) -> dict[str, Any]:
    with container.frozen(sandbox.init):
        found, ran = process.processes(sandbox.init, {}, quick=False)
    return digest.finish({"processes": found}, {"ran": ran})


# name: (preparation, change, what must be among the differences). %d: any pid.
CHANGES = {
    "memory": ("x = bytearray(1 << 20)", "x[1 << 19] = 1", r"^processes \d+ pages"),
    "offset": ("f = os.open('/etc/passwd', 0)", "os.lseek(f, 7, 0)", r"descriptors \d+ pos"),
    "open_flags": ("f = os.open('/etc/passwd', 0)", "fcntl.fcntl(f, fcntl.F_SETFL, os.O_NONBLOCK)",
                   r"descriptors \d+ flags"),
    "close_on_exec": ("f = os.open('/etc/passwd', 0)", "os.set_inheritable(f, True)", r"descriptors \d+ flags"),
    "opened": ("", "keep = os.open('/etc/group', 0)", r"descriptors \d+"),
    "another_file": ("f = os.open('/etc/passwd', 0)", "os.dup2(os.open('/etc/group', 0), f)", r"descriptors \d+ to"),
    "dup_instead_of_open": ("a = os.open('/etc/passwd', 0); b = os.dup(a)",
                            "c = os.open('/etc/passwd', 0); os.dup2(c, b); os.close(c)",
                            r"descriptors \d+ same_as|descriptors \d+ flags"),
    "deleted_file_contents": ("f = os.open('/tmp/d', 66); os.unlink('/tmp/d')", "os.pwrite(f, b'x', 0)",
                              r"descriptors \d+ sha256"),
    "pipe_contents": ("r, w = os.pipe()", "os.write(w, b'x')", r"descriptors \d+ holds bytes"),
    "pipe_capacity": ("r, w = os.pipe()", "fcntl.fcntl(r, 1031, 1 << 18)", r"descriptors \d+ capacity"),
    "pipe_end_closed": ("r, w = os.pipe()", "os.close(w)", r"descriptors \d+ ends"),
    "listening": ("s = socket.socket(); s.bind(('127.0.0.1', 0))", "s.listen()", r"descriptors \d+ listening"),
    "socket_option": ("s = socket.socket()", "s.setsockopt(6, 1, 1)", r"descriptors \d+ options nodelay"),
    "socket_address": ("s = socket.socket()", "s.bind(('127.0.0.1', 0))", r"descriptors \d+ local"),
    "socket_received": ("a, b = socket.socketpair()", "a.send(b'x')", r"descriptors \d+ queued bytes"),
    "datagrams_joined": ("a, b = socket.socketpair(type=2); a.send(b'12'); a.send(b'3')",
                         "b.recv(9); b.recv(9); a.send(b'1'); a.send(b'23')", r"descriptors \d+ queued sha256"),
    "socket_peer": ("a, b = socket.socketpair()", "b.close()", r"descriptors \d+"),
    "eventfd": ("e = os.eventfd(1)", "os.eventfd_write(e, 1)", r"descriptors \d+ eventfd-count"),
    "epoll": ("p = select.epoll(); e = os.eventfd(1)", "p.register(e, 1)", r"descriptors \d+ watches"),
    "timerfd": ("t = os.timerfd_create(1)", "os.timerfd_settime(t, initial=5000)", r"descriptors \d+ armed"),
    "memfd_seal": ("m = os.memfd_create('m', os.MFD_ALLOW_SEALING)", "fcntl.fcntl(m, 1033, 2)",
                   r"descriptors \d+ seals"),
    "file_lock": ("f = open('/tmp/lock', 'w')", "fcntl.flock(f, fcntl.LOCK_EX)", r"descriptors \d+ locks"),
    "inotify": ("i = libc.inotify_init()", "libc.inotify_add_watch(i, b'/tmp', 2)", r"descriptors \d+ watches"),
    "terminal_settings": ("m, s = os.openpty(); a = termios.tcgetattr(s)",
                          "a[3] &= ~termios.ECHO; termios.tcsetattr(s, 0, a)", r"descriptors \d+ settings 3"),
    "terminal_size": ("m, s = os.openpty()", "fcntl.ioctl(s, termios.TIOCSWINSZ, struct.pack('4H', 9, 9, 0, 0))",
                      r"descriptors \d+ size 0"),
    "terminal_typed": ("m, s = os.openpty()", "os.write(m, b'x\\n')", r"descriptors \d+ queued"),
    "working_directory": ("os.chdir('/')", "os.chdir('/usr')", r"\d+ cwd"),
    "umask": ("os.umask(0o22)", "os.umask(0o27)", r"\d+ Umask"),
    "signal_mask": ("", "signal.pthread_sigmask(0, [signal.SIGUSR2])", r"threads \d+ SigBlk"),
    "signal_ignored": ("", "signal.signal(signal.SIGUSR1, signal.SIG_IGN)", r"\d+ SigIgn"),
    "signal_caught": ("", "signal.signal(signal.SIGWINCH, lambda *_: None)", r"\d+ SigCgt"),
    "signal_pending": ("signal.pthread_sigmask(0, [signal.SIGHUP])", "os.kill(os.getpid(), 1)", r"\d+ ShdPnd"),
    "posix_timer": ("", "t = ctypes.c_void_p(); libc.timer_create(1, None, ctypes.byref(t))", r"\d+ timers"),
    "name": ("", "libc.prctl(15, b'other', 0, 0, 0)", r"\d+ comm"),
    "new_mapping": ("", "m = mmap.mmap(-1, 1 << 20)", r"mappings"),
    "protection": ("m = mmap.mmap(-1, 1 << 16, flags=2); at = ctypes.addressof(ctypes.c_char.from_buffer(m))",
                   "libc.mprotect(ctypes.c_void_p(at), 1 << 16, 1)", r"mappings \w+"),
    "locked_memory": ("m = mmap.mmap(-1, 1 << 16); at = ctypes.addressof(ctypes.c_char.from_buffer(m))",
                      "libc.mlock(ctypes.c_void_p(at), 1 << 16)", r"mappings \w+ flags|mappings \w+"),
    "shared_memory": ("m = mmap.mmap(-1, 1 << 16); m[0] = 1", "m[1] = 1", r"pages"),
    "process_group": ("c = os.fork()\nif c == 0:\n  while True: time.sleep(1000)", "os.setpgid(c, c)",
                      r"^processes \d+ group$"),
    "session": ("r, w = os.pipe(); a, b = os.pipe(); c = os.fork()\nif c == 0:\n  os.read(r, 1); os.setsid(); "
                "os.write(b, b'x')\n  while True: time.sleep(1000)", "os.write(w, b'x'); os.read(a, 1)",
                r"^processes \d+ session$"),
    "zombie": ("signal.signal(signal.SIGCHLD, signal.SIG_DFL)", "z = os.fork()\nif z == 0: os._exit(3)\n"
               "os.waitid(os.P_PID, z, os.WEXITED | os.WNOWAIT)", r"processes \d+"),
    "capabilities": ("", "libc.capset(ctypes.byref((ctypes.c_uint * 2)(0x20080522, 0)), "
                     "ctypes.byref((ctypes.c_uint * 6)(1, 3, 0, 0, 0, 0)))", r"\d+ Cap(Prm|Eff)"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_a_process_is_seen(name: str, sandbox: stock.Sandbox, driver: Driver) -> None:
    prepare, change, expected = CHANGES[name]
    driver.tell(prepare)
    before = processes(sandbox)
    driver.tell(change)
    found = paths(before, processes(sandbox))
    assert any(re.search(expected, path) for path in found), found


def test_nothing_changes_while_nothing_runs(sandbox: stock.Sandbox, driver: Driver) -> None:
    sandbox.rest()  # the driver has answered and is on its way to its next order
    before = processes(sandbox)
    assert paths(before, processes(sandbox)) == []


@pytest.fixture
def sleeper(sandbox: stock.Sandbox) -> Iterator[int]:
    """Host pid of a process that sleeps, to be changed from outside."""
    known = set(process.members(sandbox.init))
    sandbox.execute("sleep", "1000")
    pid = next(iter(set(process.members(sandbox.init)) - known))
    while Path(f"/proc/{pid}/comm").read_text() != "sleep\n" or "nanosleep" not in Path(f"/proc/{pid}/wchan").read_text():
        time.sleep(0.01)
    yield pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 9)


def poke(pid: int) -> None:
    """Another byte in the stack's oldest page, where the environment is."""
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        at = int(process._stat(f"/proc/{pid}/stat")[50])  # env_start
        memory.seek(at)
        byte = memory.read(1)
        memory.seek(at)
        memory.write(bytes([byte[0] ^ 1]))


FROM_OUTSIDE: dict[str, tuple[Callable[[int], object], str]] = {
    "a_memory_byte": (poke, r"^processes \d+ (environment 0|pages \w+)$"),
    "a_resource_limit": (lambda pid: subprocess.run(["prlimit", f"--pid={pid}", "--core=0:5"], check=True),
                         r"^processes \d+ limits \d+$"),
    "niceness": (lambda pid: os.setpriority(os.PRIO_PROCESS, pid, 5), r"^processes \d+ threads \d+ nice$"),
    "oom_score_adj": (lambda pid: Path(f"/proc/{pid}/oom_score_adj").write_text("77"),
                      r"^processes \d+ oom_score_adj$"),
    "scheduling_policy": (lambda pid: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)),
                          r"^processes \d+ threads \d+ policy$"),
}


@pytest.mark.parametrize("name", FROM_OUTSIDE)
def test_exactly_one_change_is_seen(name: str, sandbox: stock.Sandbox, driver: Driver, sleeper: int) -> None:
    change, expected = FROM_OUTSIDE[name]
    sandbox.rest()
    before = processes(sandbox)
    change(sleeper)
    found = paths(before, processes(sandbox))
    assert found and all(re.search(expected, path) for path in found), found


def test_a_process_that_ends_is_seen(sandbox: stock.Sandbox, driver: Driver, sleeper: int) -> None:
    before = processes(sandbox)
    os.kill(sleeper, 9)
    while Path(f"/proc/{sleeper}").exists():
        time.sleep(0.01)
    found = paths(before, processes(sandbox))
    assert found and all(path.startswith("processes ") for path in found)


def test_a_freeze_is_left_as_it_was_found(sandbox: stock.Sandbox) -> None:
    freezer = container.Freezer(sandbox.init)
    with container.frozen(sandbox.init):
        assert freezer.is_frozen()
        with container.frozen(sandbox.init):
            pass
        assert freezer.is_frozen()
    assert not freezer.is_frozen()


def test_the_tree_stays_in_its_mount(sandbox: stock.Sandbox) -> None:
    found = digest.sandbox(sandbox.init, freeze=True, quick=True)
    assert found["state"]["tree"]["/proc"] == {"type": "mount"}
    assert len(found["state"]["tree"]) > 5000 and "/dev/shm" in found["state"]["tmpfs"]


# --- stock runc and CRIU ---------------------------------------------------------------------------------------------

def restored(name: str, start: Callable[[stock.Sandbox], object]) -> list[str]:
    """The differences between a sandbox frozen for its checkpoint and the same restored, before it runs."""
    made = stock.Sandbox(name, SLEEPER)
    try:
        start(made)
        made.settle()
        before = made.checkpoint()
        after = made.restore()
        return [str(difference) for difference in differences(before, after)]
    finally:
        made.remove()


def start_zoo(made: stock.Sandbox) -> None:
    """One of everything (zoo.py), in the background."""
    shutil.copy(HERE / "zoo.py", f"{made.rootfs}/zoo.py")
    made.execute("bash", "-c", "python3 /zoo.py >/tmp/zoo.log 2>&1 </dev/null &")
    made.settle()
    assert Path(f"{made.rootfs}/tmp/zoo.log").read_text() == ""
    assert len(process.members(made.init)) > 15


def start_tmux(made: stock.Sandbox) -> None:
    made.execute("bash", "-c", "cd /root; tmux new-session -d -s w; tmux split-window -t w; "
                 "tmux send-keys -t w:0.1 cat Enter; sleep 1000 & sleep 1001 >/root/log 2>&1 &")


@pytest.mark.parametrize("start", [start_zoo, start_tmux])
def test_a_restore_before_its_first_instruction_is_equal(start: Callable[[stock.Sandbox], None]) -> None:
    assert restored(f"{start.__name__[6:]}-{os.getpid()}", start) == []


def second_generation(name: str, time_namespace: bool) -> list[str]:
    """Restored, an exec leaves a process behind, dumped and restored again."""
    made = stock.Sandbox(name, SLEEPER)
    try:
        made.settle()
        made.checkpoint()
        made.restore(time_namespace)
        made.thaw()
        made.execute("bash", "-c", "sleep 1000 >/dev/null 2>&1 </dev/null &")
        made.settle()
        before = made.checkpoint()
        return [str(difference) for difference in differences(before, made.restore(time_namespace))]
    finally:
        made.remove()


def test_a_second_generation_is_equal() -> None:
    assert second_generation(f"second-{os.getpid()}", time_namespace=False) == []


def test_crius_time_namespace_makes_the_second_generation_poison() -> None:
    """When this fails, runc or CRIU has learned it, and crab need not take the clocks out of images any more."""
    with pytest.raises(RuntimeError, match="Can't restore sub-task in NS"):
        second_generation(f"poison-{os.getpid()}", time_namespace=True)
