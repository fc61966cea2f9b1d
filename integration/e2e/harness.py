"""What the end-to-end tests share: real clients, and waiting with a limit.

A test says what must hold in terms of `Ctr` (a container of containerd's own client) and `Docker` (one of Docker's).
Both are context managers: whatever happens, nothing of them is left.

`both(scenario)` runs a scenario under crab and under containerd's own runc shim at the same time; its two results
must be equal. What cannot be (ids, pids, times) the scenario leaves out of its result.
"""

import concurrent.futures
import difflib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import pprint
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import threading
import time

from cgroups import cgroup_of

IMAGE = "crab.test/agent:latest"
SERVERS = "crab.test/servers:latest"
"""The same with nginx and redis, all as root. In the bed by way of `run`."""
RUNC, CRAB = "io.containerd.runc.v2", "io.containerd.crab.v2"
RUNTIMES = (RUNC, CRAB)
CONFIG = pathlib.Path("/etc/crab/config.toml")
BUNDLES = pathlib.Path("/run/containerd/io.containerd.runtime.v2.task")

LIMIT = float(os.environ.get("CRAB_E2E_LIMIT", 60))
"""Seconds that anything waited for may take. Generous: two slow cores, all of them busy. Only a failure waits so long."""

STOCK_GAVE_UP = "OCI runtime pause failed: unable to freeze"
"""runc's own pause, which runc.v2 uses, gives up after a while that is too short for a busy machine. What it
says then is not what is compared, so such a command is tried again. crab freezes by itself, and never says this."""

_VENDOR = pathlib.Path("/sys/class/dmi/id/sys_vendor")
EMULATED = _VENDOR.exists() and _VENDOR.read_text().strip() == "QEMU"
"""In the bed's virtual machine, whose processor may be a program: all that a process does takes some ten times the CPU time."""

_numbers = itertools.count(1)
_collecting = threading.Lock()


def unique(prefix):
    """A name that no other container of this bed has.

    Never used twice: containerd refuses the second checkpoint of two containers whose specs are equal.
    """
    return f"{prefix}{next(_numbers)}"


class Done:
    """How a command has ended."""

    def __init__(self, args, rc, out, err):
        self.args, self.rc, self.out, self.err = args, rc, out, err

    def __repr__(self):
        return f"Done(rc={self.rc}, out={self.out[-2000:]!r}, err={self.err[-2000:]!r}, args={self.args})"


def run(*args, check=True, stdin=b"", limit=LIMIT * 2, cwd=None, env=None):
    """Runs a command to its end. Output is text; bytes that are none survive as surrogates."""
    args = [str(a) for a in args]
    stdin = stdin.encode() if isinstance(stdin, str) else stdin
    env = {**os.environ, **env} if env else None
    for _ in range(20):
        try:
            done = subprocess.run(args, input=stdin, capture_output=True, timeout=limit, cwd=cwd, env=env)
        except subprocess.TimeoutExpired as e:
            raise AssertionError(f"no end after {limit} s: {args}; stdout {e.stdout!r}, stderr {e.stderr!r}") from None
        out, err = (b.decode(errors="surrogateescape") for b in (done.stdout, done.stderr))
        done = Done(args, done.returncode, out, err)
        if STOCK_GAVE_UP not in err:
            break
    assert not check or done.rc == 0, done
    return done


def until(condition, what, limit=LIMIT):
    """Waits until `condition()` is true, and returns what it returned."""
    end = time.monotonic() + limit
    pause = 0.002
    while True:
        began = time.monotonic()
        value = condition()
        if value:
            return value
        took = time.monotonic() - began
        assert time.monotonic() < end, f"in vain for {limit} s: {what}; last seen: {value!r}"
        # Where each look takes long (emulation), looking must not take the processors from what is waited for.
        time.sleep(pause if took < 0.1 else took)
        pause = min(pause * 1.5, 0.05)


def both(scenario):
    """Runs `scenario(runtime)` under both runtimes and compares. Returns the result."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ours, theirs = pool.submit(scenario, CRAB), pool.submit(scenario, RUNC)
        ours, theirs = ours.result(), theirs.result()
    if ours != theirs:
        texts = [pprint.pformat(result, width=100).splitlines() for result in (theirs, ours)]
        raise AssertionError("\n".join(difflib.unified_diff(*texts, "runc.v2", "crab", lineterm="", n=1)))
    return ours


def together(jobs, workers=8):
    """Runs functions at the same time; returns their results in order."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def ctr(*args, **kwargs):
    return run("ctr", *args, **kwargs)


def docker(*args, **kwargs):
    return run("docker", *args, **kwargs)


def crab(*args, **kwargs):
    return run("crab", *args, **kwargs)


class Ctr:
    """A container made by ctr."""

    def __init__(self, runtime, *command, options=(), name="c", id=None, output=None, image=IMAGE):
        self.id = id or unique(name)
        self.runtime = runtime
        self._execs = itertools.count(1)
        log = () if output is None else ("--log-uri", f"file://{output}")
        try:
            ctr("run", "--detach", "--runtime", runtime, *log, *options, image, self.id, *(command or ("sleep", "infinity")))
        except BaseException:
            self.remove()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.remove()

    def exec_argv(self, *command, options=(), exec_id=None):
        exec_id = exec_id or f"e{next(self._execs)}"
        return ["ctr", "task", "exec", "--exec-id", exec_id, *options, self.id, *map(str, command)]

    def exec(self, *command, options=(), exec_id=None, **kwargs):
        return run(*self.exec_argv(*command, options=options, exec_id=exec_id), **kwargs)

    def sh(self, script, **kwargs):
        """The output of a shell script inside."""
        return self.exec("sh", "-c", script, **kwargs).out

    def start_exec(self, *command, **kwargs):
        """An exec in the background: a Popen of its client."""
        return subprocess.Popen(
            self.exec_argv(*command, **kwargs), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def detached(self, *command, options=(), exec_id=None):
        """Starts a process that outlives its exec; returns when the exec is over."""
        return self.exec("sh", "-c", 'nohup "$@" & :', "sh", *command, options=options, exec_id=exec_id)

    def kill(self, sig="KILL", check=True, options=()):
        return ctr("task", "kill", "-s", sig, *options, self.id, check=check)

    @property
    def status(self):
        """(pid, status) of its task, or None."""
        for line in ctr("task", "ls").out.splitlines()[1:]:
            id, pid, status = line.split()
            if id == self.id:
                return int(pid), status
        return None

    @property
    def pid(self):
        return self.status[0]

    def stopped(self):
        until(lambda: self.status and self.status[1] == "STOPPED", f"{self.id} stopped")

    @property
    def bundle(self):
        return BUNDLES / "default" / self.id

    @property
    def shim(self):
        return shim_pid(self.id)

    def cgroup(self, controller):
        return cgroup_of(self.pid, controller)

    def restart(self):
        """Starts the task of a container that has one no more."""
        ctr("task", "start", "--detach", self.id)

    def delete_task(self):
        """Deletes its task, killing it if needed; returns its exit code."""
        said = ctr("task", "delete", "--force", self.id, check=False).err
        code = re.search(r"exit with non-zero exit code (\d+)", said)
        return int(code[1]) if code else 0

    def remove(self):
        self.delete_task()
        ctr("container", "delete", self.id, check=False)
        forget_socket(self.runtime, "default", self.id)


class Docker:
    """A container made by docker."""

    def __init__(self, runtime, *command, options=(), name="dock", verb="run", image=IMAGE):
        self.name = unique(name)
        self.runtime = runtime
        detach = ("--detach",) if verb == "run" else ()
        self.argv = ["docker", verb, *detach, "--name", self.name, "--runtime", runtime, "--network", "none", *options]
        self.argv += [image, *(command or ("sleep", "infinity"))]
        try:
            self.id = run(*self.argv).out.strip()
        except BaseException:
            self.remove()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.remove()

    def __call__(self, verb, *args, options=(), **kwargs):
        """docker VERB OPTIONS NAME ARGS"""
        return docker(verb, *options, self.name, *args, **kwargs)

    def exec(self, *command, options=(), **kwargs):
        return docker("exec", *options, self.name, *command, **kwargs)

    def sh(self, script, **kwargs):
        return self.exec("sh", "-c", script, **kwargs).out

    def detached(self, *command, options=()):
        """Starts a process that outlives its exec; returns when the exec is over."""
        return self.exec("sh", "-c", 'nohup "$@" & :', "sh", *command, options=options)

    def inspect(self):
        return json.loads(docker("inspect", self.name).out)[0]

    @property
    def state(self):
        return self.inspect()["State"]

    @property
    def pid(self):
        return self.state["Pid"]

    @property
    def shim(self):
        return shim_pid(self.id)

    def cgroup(self, controller):
        return cgroup_of(self.pid, controller)

    def logs(self):
        done = docker("logs", self.name)
        return done.out

    def remove(self):
        docker("rm", "--force", "--volumes", self.name, check=False)
        if hasattr(self, "id"):
            forget_socket(self.runtime, "moby", self.id)


CONTAINER = {"ctr": Ctr, "docker": Docker}


def pair(kind, *command, **kwargs):
    """One container of each runtime, made at the same time: {runtime: container}."""
    made = together([lambda r=r: CONTAINER[kind](r, *command, **kwargs) for r in RUNTIMES])
    return dict(zip(RUNTIMES, made))


KERNEL_THREAD = 0x0020_0000
"""PF_KTHREAD. A bed has none; the virtual machine's come and go with its work."""


def processes():
    """All processes of the bed: {pid: (start time, parent, argv)}."""
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = pathlib.Path(f"/proc/{entry}/stat").read_text()
            argv = pathlib.Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        fields = stat[stat.rindex(")") + 2 :].split()
        if int(fields[6]) & KERNEL_THREAD:
            continue
        name = argv if argv != [""] else [stat[stat.index("(") : stat.rindex(")") + 1], fields[0]]
        found[int(entry)] = (int(fields[19]), int(fields[1]), name)
    return found


def shim_pid(container_id):
    for pid, (_, _, argv) in processes().items():
        if "containerd-shim" in argv[0] and container_id in argv and "start" not in argv and "delete" not in argv:
            return pid
    return None


def shim_socket(namespace, id):
    """Where the shim of a container listens."""
    name = hashlib.sha256(f"/run/containerd/containerd.sock/{namespace}/{id}".encode()).hexdigest()
    return pathlib.Path("/run/containerd/s", name)


def forget_socket(runtime, namespace, id):
    """runc.v2 leaves its socket when it was killed. crab must not, so of crab none is removed here."""
    if runtime == RUNC:
        shim_socket(namespace, id).unlink(missing_ok=True)


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *argv, rows=24, cols=80):
        self.master, slave = pty.openpty()
        self.resize(rows, cols)
        # setsid -c: Python's own way (preexec_fn) is not safe beside threads.
        argv = ["setsid", "--ctty", "--wait", *map(str, argv)]
        self.process = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, start_new_session=False)
        os.close(slave)
        self.seen = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def resize(self, rows, cols):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def type(self, text):
        os.write(self.master, text.encode())

    def _read(self, limit):
        """Some output; None after the end, or when none came in time."""
        if not select.select([self.master], [], [], max(0, limit))[0]:
            return None
        try:
            # ctr and docker differ in whether their own terminal makes \r\n of the container's \r\n again.
            return os.read(self.master, 65536).replace(b"\r", b"")
        except OSError as e:
            assert e.errno == errno.EIO
            return None

    def expect(self, pattern, limit=LIMIT):
        """Reads until a pattern shows; returns the match. What came up to its end is consumed."""
        end = time.monotonic() + limit
        while True:
            match = re.search(pattern.encode(), self.seen)
            if match:
                self.seen = self.seen[match.end() :]
                return match
            data = self._read(end - time.monotonic())
            assert data is not None, f"{pattern!r} never came; seen: {self.seen!r}"
            self.seen += data

    def finish(self, limit=LIMIT):
        """Reads to the end; returns exit code and the rest of the output."""
        end = time.monotonic() + limit
        while (data := self._read(end - time.monotonic())) is not None:
            self.seen += data
        assert time.monotonic() < end, f"no end; seen: {self.seen!r}"
        return self.process.wait(limit), self.seen.decode()


class Events:
    """What `ctr events` shows while this is open."""

    def __init__(self, namespace="default"):
        self.lines = []
        self.client = subprocess.Popen(["ctr", "-n", namespace, "events"], stdout=subprocess.PIPE, text=True)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        # The client says nothing when it is connected: make events until one is seen.
        probe = unique("probe")
        def seen():
            ctr("-n", namespace, "namespaces", "label", namespace, f"{probe}=1")
            ctr("-n", namespace, "namespaces", "label", namespace, f"{probe}=")
            return self.lines
        until(seen, "ctr events shows something")

    def _read(self):
        for line in self.client.stdout:
            self.lines.append(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.kill()
        self.client.wait()
        self.reader.join()
        self.client.stdout.close()

    def of(self, id):
        """(topic, message) of each event of one container's tasks."""
        found = []
        for line in list(self.lines):
            topic, _, message = line.split(" ", 5)[5].partition(" ")
            message = json.loads(message)
            if topic.startswith("/tasks/") and message.get("container_id") == id:
                found.append((topic, message))
        return found

    def wait_for(self, id, topic, limit=LIMIT):
        until(lambda: any(t == topic for t, _ in self.of(id)), f"{topic} of {id}", limit)


def daemon_pid(name):
    return int(pathlib.Path(f"/run/bed/{name}.pid").read_text())


def listening(socket):
    return socket in run("ss", "-xlH").out


def stop_containerd(sig=signal.SIGKILL):
    """Ends the bed's containerd; returns its command line."""
    pid = daemon_pid("containerd")
    argv = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
    os.kill(pid, sig)
    until(lambda: not alive(pid), "containerd ended")
    return argv


def start_containerd(argv):
    with open("/var/log/bed/containerd.log", "ab") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    pathlib.Path("/run/bed/containerd.pid").write_text(f"{process.pid}\n")
    until(lambda: run("ctr", "version", check=False).rc == 0, "containerd answers")
    DAEMONS.append(process)


DAEMONS = []
"""Daemons that a test has started again: children of ours, but no leftovers."""


def collect_garbage(namespace):
    """Makes containerd drop blobs that nobody refers to.

    Docker's next checkpoint, or start from one, fails with "already exists" as long as containerd still has the blobs
    of the last one, with any runtime.
    """
    with _collecting:
        _prune(namespace)


def _prune(namespace):
    # It fails when somebody else removes a blob that it has just listed.
    until(lambda: ctr("-n", namespace, "content", "prune", "references", check=False).rc == 0, "unused blobs are gone")


def docker_start_from(checkpoint, name, **kwargs):
    """docker start --checkpoint, once containerd has dropped the blobs of the last one.

    One at a time: Docker's blob of the images has no reference until the task has been made, and another scenario's
    collection would take it away.
    """
    with _collecting:
        _prune("moby")
        return docker("start", "--checkpoint", checkpoint, name, **kwargs)
