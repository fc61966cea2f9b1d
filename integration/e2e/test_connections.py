"""TCP connections between a sandbox's processes, with data under way: not a byte is lost or said twice, and none stands
still, whether the sandbox goes on beside its checkpoint or comes back from it."""

import json
import pathlib
import struct

from harness import crab, until
from test_armed_restore import Sandbox, both_clients

PAIRS = 12
TRAFFIC = """
import array, os, random, socket, sys, threading, time

# Each connection carries the numbers from 0 on. A third of those who send fill all buffers; who receives reads in fits
# and starts, so that windows close and open, acknowledgements are put off and data waits for both. The others, of
# either side, send little by little through a cork, so that data waits although it may be sent.
pairs = int(sys.argv[1])
listener = socket.create_server(("127.0.0.1", 7000), backlog=pairs)
progress = os.open("/progress", os.O_RDWR | os.O_CREAT)
os.ftruncate(progress, pairs * 8)

def send(connection):
    at = 0
    while True:
        connection.sendall(array.array("Q", range(at, at + 16_384)).tobytes())
        at += 16_384

def drip(connection):
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    at = 0
    while True:
        connection.sendall(array.array("Q", range(at, at + 1)).tobytes())
        at += 1
        time.sleep(0.01)

def receive(which, connection):
    own, at, rest = random.Random(which), 0, b""
    while True:
        data = rest + connection.recv(own.choice([512, 8_192, 65_536, 262_144]))
        whole = len(data) & ~7
        numbers, rest = array.array("Q", data[:whole]), data[whole:]
        assert numbers == array.array("Q", range(at, at + len(numbers))), (which, at)
        at += len(numbers)
        os.pwrite(progress, at.to_bytes(8, "little"), which * 8)
        time.sleep(own.choice([0.005, 0.01, 0.03]))

def tried(function, *args):
    try:
        function(*args)
    except BaseException as error:
        open("/failed", "a").write(f"{function.__name__} {args}: {error!r}\\n")

is_client = os.fork() == 0
for which in range(pairs):
    # In turn, so that both sides mean the same connection.
    connection = socket.create_connection(("127.0.0.1", 7000)) if is_client else listener.accept()[0]
    sends, way = (which % 3 == 2) == is_client, send if which % 3 == 0 else drip
    args = (way, connection) if sends else (receive, which, connection)
    threading.Thread(target=tried, args=args).start()
"""


class Traffic:
    """A sandbox with connections that all carry data."""

    def __init__(self, sandbox):
        self.sandbox = sandbox
        sandbox.exec("sh", "-c", 'nohup python3 -c "$@" >/failed 2>&1 & :', "sh", TRAFFIC, str(PAIRS))
        until(lambda: all(self.progress()), "each connection carries data")

    def progress(self):
        """How many numbers have arrived, by connection. Read from outside: the sandbox has enough to do."""
        root = pathlib.Path(f"/proc/{self.sandbox.init}/root")
        assert (root / "failed").read_text() == ""
        if not (root / "progress").exists():
            return [0]
        return struct.unpack(f"<{PAIRS}Q", (root / "progress").read_bytes().ljust(PAIRS * 8, b"\0"))

    def goes_on(self):
        before = self.progress()
        until(lambda: all(now > then for now, then in zip(self.progress(), before)), f"each of {before} carries data")


@both_clients
def test_data_under_way_arrives_once(kind, tmp_path):
    with Sandbox(kind, tmp_path) as sandbox:
        traffic = Traffic(sandbox)
        for _ in range(3):
            line = json.loads(crab("checkpoint", "--json", sandbox.name).out)
            assert line["action"] == "full", line
            traffic.goes_on()
            crab("rollback", f"{sandbox.name}@{line['turn']}")
            traffic.goes_on()


def test_where_data_cannot_be_held_back_the_processes_are_not_kept(tmp_path):
    # Whoever held back the packets of the host's network would hold back everybody's.
    with Sandbox("ctr", tmp_path, options=["--net-host"]) as sandbox:
        traffic = Traffic(sandbox)
        said = crab("checkpoint", sandbox.name, check=False)
        assert said.rc == 1 and "data is under way" in said.err and "shares the host's network" in said.err, said
        traffic.goes_on()


REST = """
import os, socket, time
listener = socket.create_server(("127.0.0.1", 7001))
if os.fork():
    connection, _ = listener.accept()
    connection.sendall(bytes(200_000))
    connection.close()
    time.sleep(1000)
connection, got = socket.socket(), 0
connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
connection.connect(("127.0.0.1", 7001))
try:
    while data := connection.recv(1000):
        got += len(data)
        open("/got", "w").write(str(got))
        time.sleep(0.1)
except OSError as error:
    got = error
open("/end", "w").write(str(got))
time.sleep(1000)
"""


def test_what_a_closed_end_had_still_to_send_is_not_waited_for(tmp_path):
    """The kernel sends the rest of a connection that was closed; no process has it, so no image has."""
    with Sandbox("ctr", tmp_path) as sandbox:
        sandbox.exec("sh", "-c", 'nohup python3 -c "$1" >/failed 2>&1 & :', "sh", REST)
        root = lambda: pathlib.Path(f"/proc/{sandbox.init}/root")  # noqa: E731
        until(lambda: (root() / "got").exists(), "the client reads")
        turn = sandbox.turn()
        assert not (root() / "end").exists()
        crab("rollback", f"{sandbox.name}@{turn}")
        # As with a connection that leads outside: it learns that it is closed.
        end = until(lambda: (root() / "end").exists() and (root() / "end").read_text(), "the client learns of it")
        assert end != "200000" and (root() / "failed").read_text() == "", end
        print(f"  the client sees: {end}")
