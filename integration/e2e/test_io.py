"""What a process writes arrives, all of it, where the client wants it; what the client writes arrives as well."""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import re
import select
import subprocess
import time

import pytest

from harness import CRAB, IMAGE, LIMIT, Ctr, Docker, both, ctr, together, unique, until
from taskapi import PROCESS, Shim, any_of

MIB = 1 << 20
NOISE = "import hashlib, os, sys; sha = hashlib.sha256()\n" \
        "for _ in range({n}): b = os.urandom(65536); sha.update(b); sys.stdout.buffer.write(b)\n" \
        "sys.stdout.flush(); print(sha.hexdigest(), file=sys.stderr)"


@pytest.fixture(scope="module")
def shared():
    """One idle container under crab."""
    container = Ctr(CRAB)
    yield container
    container.remove()


class Exec:
    """An exec over the task API, with FIFOs of our own: a client that may read, or not."""

    def __init__(self, container, directory, *command, stdin=False, terminal=False):
        self.container, self.id = container, unique("io")
        self.shim = Shim.of(container)
        self.paths = [str(directory / f"{self.id}-{name}") for name in ("stdin", "stdout", "stderr")]
        for path in self.paths:
            os.mkfifo(path)
        process = {"args": list(command), "cwd": "/", "env": ["PATH=/usr/bin:/bin"], "user": {"uid": 0, "gid": 0}, "terminal": terminal}
        self.shim.call("Exec", {1: container.id, 2: self.id, 3: terminal, 4: self.paths[0] if stdin else "",
                                5: self.paths[1], 6: "" if terminal else self.paths[2], 7: any_of(PROCESS, process)})  # fmt: skip

    def reader(self, fd=1):
        """The client's end of a stream; does not wait for the other end."""
        return open(os.open(self.paths[fd], os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)

    def start(self):
        return self.shim.call("Start", {1: self.container.id, 2: self.id})[1]

    def wait(self):
        return self.shim.call("Wait", {1: self.container.id, 2: self.id}).get(1, 0)

    def delete(self):
        self.shim.call("Delete", {1: self.container.id, 2: self.id})
        self.shim.socket.close()


def read_all(file, limit=LIMIT):
    """Everything up to the end of the stream. A FIFO whose writer is yet to come is not at its end."""
    data = b""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        select.select([file], [], [], 1)
        try:
            more = os.read(file.fileno(), MIB)
        except BlockingIOError:
            continue
        if not more:
            return data
        data += more
    raise AssertionError(f"no end of the stream after {limit} s and {len(data)} bytes")


def test_fifty_megabytes_arrive_unchanged():
    argv = ["ctr", "run", "--rm", "--runtime", CRAB, IMAGE, unique("c"), "python3", "-c", NOISE.format(n=800)]
    client = subprocess.run(argv, capture_output=True, timeout=3 * LIMIT, stdin=subprocess.DEVNULL)
    assert len(client.stdout) == 50 * MIB
    assert hashlib.sha256(client.stdout).hexdigest() == client.stderr.decode().strip()


def test_random_bytes_of_an_exec_arrive_unchanged(shared):
    client = subprocess.run(shared.exec_argv("python3", "-c", NOISE.format(n=320)), capture_output=True, timeout=3 * LIMIT, stdin=subprocess.DEVNULL)
    assert len(client.stdout) == 20 * MIB
    assert hashlib.sha256(client.stdout).hexdigest() == client.stderr.decode().strip()


def test_a_huge_stdin_arrives_and_ends(shared):
    data = os.urandom(30 * MIB)
    assert shared.exec("sha256sum", stdin=data).out.split()[0] == hashlib.sha256(data).hexdigest()


def test_stdin_that_nobody_reads_holds_nothing_up(shared):
    assert shared.exec("sh", "-c", "exec <&-; echo done; exit 3", stdin=b"x" * MIB, check=False).rc == 3
    assert shared.sh("echo alive") == "alive\n"


def test_a_stdin_stays_open_until_the_client_closes_it(shared, tmp_path):
    process = Exec(shared, tmp_path, "sh", "-c", "cat; echo end", stdin=True)
    with process.reader() as out, process.reader(2):
        process.start()
        for text in (b"one\n", b"two\n"):
            with open(process.paths[0], "wb") as stdin:  # opened and closed: the stream must not end with it
                stdin.write(text)
            until(lambda: select.select([out], [], [], 0)[0], "the text came back")
            assert os.read(out.fileno(), 100) == text
        process.shim.call("CloseIO", {1: shared.id, 2: process.id, 3: True})
        assert process.wait() == 0
        assert read_all(out) == b"end\n"
    process.delete()


def test_a_reader_that_does_not_read_blocks_only_its_own_stream(shared, tmp_path):
    process = Exec(shared, tmp_path, "sh", "-c", f"head -c {8 * MIB} /dev/zero; echo finished >&2")
    with process.reader(1) as out, process.reader(2) as err:
        process.start()
        # Full: the FIFO, whatever the shim keeps, and the pipe. Then nothing moves.
        seen = [0]

        def stuck():
            waiting = fcntl.ioctl(out, 0x541B, b"\0" * 4)  # FIONREAD
            before, seen[0] = seen[0], int.from_bytes(waiting, "little")
            return before == seen[0] > 0

        until(stuck, "the stream is stuck")
        assert not select.select([err], [], [], 0)[0], "8 MiB went where nobody reads"
        for _ in range(3):
            assert shared.exec("python3", "-c", NOISE.format(n=8)).rc == 0
        data = read_all(out)
        assert len(data) == 8 * MIB
        assert read_all(err) == b"finished\n"
        assert process.wait() == 0
    process.delete()


def test_a_reader_that_goes_away_and_comes_back_loses_nothing(shared, tmp_path):
    script = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); echo line $i; done; until test -e /go; do sleep 0.02; done; echo last"
    process = Exec(shared, tmp_path, "sh", "-c", script)
    with process.reader(2):
        first = process.reader()
        process.start()
        until(lambda: select.select([first], [], [], 0)[0], "the first bytes")
        data = os.read(first.fileno(), 1000)
        first.close()
        shared.exec("touch", "/go")
        with process.reader() as second:
            data += read_all(second)
        assert process.wait() == 0
    process.delete()
    assert data.split(b"\n")[:-1] == [b"line %d" % n for n in range(1, 20001)] + [b"last"]


def test_nothing_is_lost_at_the_end_of_many_short_runs():
    def one(n):
        done = ctr("run", "--rm", "--runtime", CRAB, IMAGE, unique("short"), "echo", f"line {n}", check=False)
        return done.rc, done.out

    assert together([lambda n=n: one(n) for n in range(40)], workers=4) == [(0, f"line {n}\n") for n in range(40)]


def test_nothing_is_lost_at_the_end_of_many_short_execs(shared):
    def one(n):
        done = shared.exec("sh", "-c", f"echo line {n}; exit {n % 256}", exec_id=f"short{n}", check=False)
        return done.rc, done.out

    assert together([lambda n=n: one(n) for n in range(160)], workers=4) == [(n % 256, f"line {n}\n") for n in range(160)]


def test_output_goes_on_into_a_file(tmp_path):
    def scenario(runtime):
        path = tmp_path / unique("deep/") / "log"
        script = "echo out; echo err >&2; seq 10000"
        with Ctr(runtime, "sh", "-c", script, output=path) as container:
            container.stopped()
            container.delete_task()
            ctr("task", "start", "--detach", "--log-uri", f"file://{path}", container.id)
            container.stopped()
            assert container.delete_task() == 0
        return sorted(path.read_text().split())

    numbers = [str(n) for n in range(1, 10001)]
    assert both(scenario) == sorted((["out", "err"] + numbers) * 2)


LOGGER = """#!/usr/bin/python3
import os, sys, threading
def copy(fd, name):
    with open(fd, "rb") as source, open(f"{sys.argv[1]}/{name}", "ab") as target:
        while data := source.read1(65536):
            target.write(data); target.flush()
os.makedirs(sys.argv[1], exist_ok=True)
open(sys.argv[1] + "/environment", "w").write(os.environ["CONTAINER_ID"] + " " + os.environ["CONTAINER_NAMESPACE"] + " " + " ".join(sys.argv[2:]))
threads = [threading.Thread(target=copy, args=(fd, name)) for fd, name in ((3, "stdout"), (4, "stderr"))]
for t in threads: t.start()
os.close(5)
for t in threads: t.join()
"""


def test_output_goes_to_a_logger(tmp_path):
    logger = tmp_path / "logger"
    logger.write_text(LOGGER)
    logger.chmod(0o755)

    def scenario(runtime):
        directory, id = tmp_path / unique("logged"), unique("c")
        uri = f"binary://{logger}?{directory}=more"
        ctr("run", "--detach", "--runtime", runtime, "--log-uri", uri, IMAGE, id, "sh", "-c", "echo out; echo err >&2; seq 10000")
        # Not "--force": nothing may be lost of a container that ends by itself.
        until(lambda: ctr("task", "delete", id, check=False).rc == 0, "the container ended")
        ctr("container", "delete", id)
        whole = {"stdout": "\n10000\n", "stderr": "err\n"}
        has_all = lambda name: (file := directory / name).exists() and file.read_text().endswith(whole[name])
        until(lambda: all(map(has_all, whole)), "the logger has everything")
        environment = (directory / "environment").read_text().replace(id, "ID")
        return (directory / "stdout").read_text(), (directory / "stderr").read_text(), environment

    numbers = "".join(f"{n}\n" for n in range(1, 10001))
    assert both(scenario) == ("out\n" + numbers, "err\n", "ID default more")


def test_a_logger_that_is_not_there_is_named():
    id = unique("c")
    done = ctr("run", "--rm", "--runtime", CRAB, "--log-uri", "binary:///no/such/logger", IMAGE, id, "true", check=False)
    ctr("container", "delete", id, check=False)
    assert done.rc != 0 and "/no/such/logger" in done.err


def test_a_logger_that_ends_at_once_does_not_stop_the_container():
    def scenario(runtime):
        done = ctr("run", "--rm", "--runtime", runtime, "--log-uri", "binary:///bin/false", IMAGE, unique("c"), "sh", "-c", "seq 1000; exit 3", check=False)
        return done.rc

    assert both(scenario) in (3, 141)


def open_files(pid):
    """What a process has open; it may open and close files meanwhile."""
    found = []
    for fd in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(fd))
    return found


def test_attach_takes_up_the_streams_of_a_container():
    def scenario(runtime):
        with Ctr(runtime, "sh", "-c", "until test -e /go; do sleep 0.02; done; echo attached; exit 6") as container:
            client = subprocess.Popen(["ctr", "task", "attach", container.id], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
            until(lambda: any("stdout" in file for file in open_files(client.pid)), "it is attached")
            container.exec("touch", "/go", check=False)
            out = client.communicate(timeout=LIMIT)[0]
            return client.returncode, out

    assert both(scenario) == (6, b"attached\n")


SERVER = "until test -e /go; do sleep 0.02; done; i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.02; done"


def ticks_in(log):
    return [int(n) for n in re.findall(r"tick (\d+)\n", log)]


def test_output_of_a_background_process_reaches_the_containers_log(tmp_path):
    log = tmp_path / "log"
    with Ctr(CRAB, output=log) as container:
        container.detached("sh", "-c", SERVER)
        container.exec("touch", "/go")
        ticks = until(lambda: (t := ticks_in(log.read_text() if log.exists() else "")) and len(t) > 20 and t, "its output comes")
        assert ticks == list(range(1, len(ticks) + 1))


def test_output_of_a_background_process_reaches_docker_logs():
    with Docker(CRAB) as container:
        container.detached("sh", "-c", SERVER)
        container.exec("touch", "/go")
        ticks = until(lambda: (t := ticks_in(container.logs())) and len(t) > 20 and t, "its output comes")
        assert ticks == list(range(1, len(ticks) + 1))


def test_a_silent_background_process_does_not_hold_up_its_exec():
    with Ctr(CRAB) as container:

        def took(*command):
            start = time.monotonic()
            container.detached(*command)
            return time.monotonic() - start

        # Whoever waits does so every time; a busy machine does not.
        assert min(took("sleep", "1000") for _ in range(3)) < 5
