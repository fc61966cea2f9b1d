"""What the tests of the inspector's life need: sandboxes, drivers that can be killed, builds that differ."""

import ctypes
import itertools
import json
import os
import pathlib
import selectors
import shutil
import signal
import subprocess
import time

import kernel_objects

PATIENCE = 30.0
"""Seconds for one answer, however busy the machine is."""

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
DRIVER = (
    pathlib.Path(os.environ.get("CARGO_TARGET_DIR", CHECKOUT / "target"))
    / os.environ.get("CRAB_PROFILE", "release")
    / "examples/inspector"
)
CLONE_NEWNS = 0x20000
SHELL = 'echo 0 > "$1"; cd "$0"; while read -r line; do eval "$line"; echo $?; done'
numbers = itertools.count()


class Died(Exception):
    """The driver ended without an answer. `code`: as of subprocess, negative if by a signal."""

    def __init__(self, code, said):
        super().__init__(f"ended with {code}: {said}")
        self.code = code


class Refused(Exception):
    """The driver answered with an error."""


def unified():
    """Where cgroup v2 is mounted."""
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            before, after = line.split(" - ", 1)
            if after.startswith("cgroup2 "):
                return pathlib.Path(before.split()[4])
    raise OSError("cgroup v2 is not mounted")


class Build:
    """A driver with programs of its own: the embedded object names a map, and so its hash, as nobody else's.

    The name is not used by user space, and shows whose programs are in the kernel.
    """

    def __init__(self, directory):
        self.map = f"{os.getpid() % 100000:05d}{next(numbers) % 1000:03d}"
        self.path = directory / f"inspector-{self.map}"
        program = DRIVER.read_bytes()
        assert program.count(b"memories\0") == 2, "the symbol and its type"
        self.path.write_bytes(program.replace(b"memories\0", self.map.encode() + b"\0"))
        self.path.chmod(0o755)

    def is_loaded(self):
        return bool(kernel_objects.named("map", self.map))


class Sandbox:
    """A cgroup, an overlay, and a shell in both (which only writes where it is told to)."""

    def __init__(self, base):
        self.name = f"crab-life-{os.getpid()}-{next(numbers)}"
        self.base = base / self.name
        for name in ("lower", "upper", "work", "merged", "volume"):
            (self.base / name).mkdir(parents=True)
        self.upper, self.rootfs = self.base / "upper", self.base / "merged"
        layers = f"lowerdir={self.base}/lower,upperdir={self.upper},workdir={self.base}/work"
        subprocess.run(["mount", "-t", "overlay", self.name, "-o", layers, self.rootfs], check=True)
        self.cgroup = unified() / self.name
        self.cgroup.mkdir()
        (self.cgroup / "inner").mkdir()
        self.device = self.upper.stat().st_dev
        self.inodes = {path.stat().st_ino for path in (self.upper, self.base / "volume")}
        """All inode numbers that it ever had there and in its volume."""
        self.shell = None

    def enter(self):
        """The calling process goes in: for a child after its fork."""
        (self.cgroup / "inner/cgroup.procs").write_text("0")

    def run(self, line):
        """Has the shell do `line`; only built-ins keep it quick."""
        if self.shell is None:
            self.shell = subprocess.Popen(
                ["sh", "-c", SHELL, self.rootfs, self.cgroup / "inner/cgroup.procs"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        self.shell.stdin.write(line + "\n")
        self.shell.stdin.flush()
        assert self.shell.stdout.readline() == "0\n", line

    def write(self):
        """Writes to two new files, one in the root file system and one in a volume; returns their inode numbers.

        The first is known by its device, whoever writes, and the second by the cgroup.
        """
        name = f"f{next(numbers)}"
        self.run(f"echo something > {name}; echo something > {self.base}/volume/{name}")
        written = {(directory / name).stat().st_ino for directory in (self.upper, self.base / "volume")}
        self.inodes |= written
        return written

    def close(self):
        if self.shell:
            self.shell.stdin.close()
            self.shell.wait()
            self.shell.stdout.close()
        (self.cgroup / "inner").rmdir()
        self.cgroup.rmdir()
        subprocess.run(["umount", self.rootfs], check=True)
        shutil.rmtree(self.base)


class Watcher:
    """A driver. It runs from here on; `ready` waits until it watches."""

    def __init__(self, build, run, sandbox, die_at="", prefix=()):
        self.sandbox = sandbox
        environment = {**os.environ, "CRAB_INSPECTOR_DIE_AT": die_at}
        self.process = subprocess.Popen(
            [*prefix, build.path, "--run", run, "--cgroup", sandbox.cgroup, "--rootfs", sandbox.rootfs],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
            env=environment, start_new_session=True,
        )  # fmt: skip
        self.buffer = b""
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.process.stdout, selectors.EVENT_READ)

    @property
    def pid(self):
        return self.process.pid

    def answer(self):
        while b"\n" not in self.buffer:
            assert self.selector.select(PATIENCE), f"no answer within {PATIENCE} s"
            chunk = self.process.stdout.read(1 << 20)
            if not chunk:
                said = self.process.stderr.read().decode(errors="replace")
                raise Died(self.process.wait(PATIENCE), said)
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\n")
        found = json.loads(line)
        if "error" in found:
            raise Refused(found["error"])
        return found

    def ready(self):
        assert self.answer()["ready"]
        return self

    def send(self, *orders):
        self.process.stdin.write(b"".join(b'{"do":"%s"}\n' % order.encode() for order in orders))

    def ask(self, order):
        self.send(order)
        return self.answer()

    def inodes(self, order="look"):
        """The doubt, and the inode numbers in the writable layer and the volume that count as changed."""
        found = self.ask(order)
        device = f"{os.major(self.sandbox.device)}:{os.minor(self.sandbox.device)}"
        return found["doubt"], {i["ino"] for i in found["inodes"] if i["dev"] == device}

    def sees(self):
        """Whether it does its work: what its sandbox writes is seen, nothing else is, and a cut forgets it."""
        written = self.sandbox.write()
        _, found = self.inodes()
        assert written <= found
        assert found <= self.sandbox.inodes, "what others write is not this sandbox's"
        self.ask("cut")
        self.ask("durable")
        assert self.inodes() == (None, set())
        written = self.sandbox.write()
        doubt, found = self.inodes()
        assert doubt is None
        assert written <= found <= self.sandbox.inodes

    def leave(self):
        """Ends it in order, and returns its exit code."""
        self.send("quit")
        return self.end()

    def kill(self, family=True):
        """`family`: its loader, if there is one, as well."""
        if family:
            os.killpg(self.pid, signal.SIGKILL)
        else:
            self.process.kill()
        self.end()

    def end(self):
        code = self.process.wait(PATIENCE)
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.stderr.close()
        self.selector.close()
        return code

    def close(self):
        """For the end of a test, whatever happened in it."""
        if not self.process.stdout.closed:
            self.kill() if self.process.poll() is None else self.end()


class Bed:
    """A run directory, and all that a test makes, which it takes away with it."""

    def __init__(self, base):
        self.base = base
        self.run = base / f"run-{next(numbers)}"
        self.bpffs = self.run / "bpf"
        self.census = kernel_objects.Census()
        self.made, self.builds = [], []

    def build(self):
        self.builds.append(Build(self.base))
        return self.builds[-1]

    def sandbox(self):
        self.made.append(Sandbox(self.base))
        return self.made[-1]

    def watcher(self, build, sandbox, **how):
        self.made.append(Watcher(build, self.run, sandbox, **how))
        return self.made[-1]

    def note(self):
        """Remembers what is in the kernel now, to look for it at the end."""
        running = [w.pid for w in self.made if isinstance(w, Watcher) and w.process.poll() is None]
        self.census.note(self.bpffs, *running)
        assert self.census.seen

    def nothing_is_left(self, *builds):
        """No pins, and in the kernel nothing that was ever noted, nor any of these builds' programs."""
        pins = [str(pin.relative_to(self.bpffs)) for pin in kernel_objects.pins(self.bpffs)]
        assert not pins, f"pins are left: {pins[:5]}"
        left = self.census.left()
        assert not left, f"left in the kernel: {sorted(left)}"
        end = time.monotonic() + 5
        while any(build.is_loaded() for build in builds):
            assert time.monotonic() < end, "programs are left in the kernel that were never pinned"
            time.sleep(0.01)

    def close(self):
        for thing in reversed(self.made):
            thing.close()
        for build in self.builds:
            build.path.unlink()
        subprocess.run(["umount", "-q", self.bpffs], check=False)
        shutil.rmtree(self.run, ignore_errors=True)
