"""A client of the task API v2, for what ctr cannot say: ttrpc and as much of protobuf as it needs.

    shim = Shim.of(container)
    shim.call("Kill", {1: container.id, 3: 15})      # field numbers as in containerd's shim.proto
"""

import json
import os
import pathlib
import socket
import struct
import subprocess

SERVICE = "containerd.task.v2.Task"
REQUEST, RESPONSE = 1, 2
PROCESS = "types.containerd.io/opencontainers/runtime-spec/1/Process"
RESOURCES = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"


class Refused(Exception):
    """The shim said no."""

    CODES = {2: "unknown", 3: "invalid argument", 5: "not found", 6: "already exists", 9: "failed precondition",
             12: "unimplemented"}

    def __init__(self, code, message):
        super().__init__(f"{message} ({self.CODES.get(code, code)})")
        self.kind, self.message = self.CODES.get(code, code), message


def varint(n):
    out = b""
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


def encode(fields):
    """{number: str, bytes, int, bool, dict, or list of these} as a message."""
    out = b""
    for number, values in fields.items():
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, (bool, int)):
                out += varint(number << 3) + varint(int(value))
                continue
            if isinstance(value, dict):
                value = encode(value)
            if isinstance(value, str):
                value = value.encode()
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def decode(data):
    """{number: last value}; numbers as int, everything else as bytes."""
    fields, at = {}, 0

    def number():
        nonlocal at
        n = shift = 0
        while True:
            byte = data[at]
            at += 1
            n |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return n

    while at < len(data):
        key = number()
        if key & 7 == 0:
            value = number()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or number()
            value, at = data[at : at + size], at + size
        fields[key >> 3] = value
    return fields


def any_of(url, value):
    return {1: url, 2: json.dumps(value)}


class Shim:
    """A connection to one shim."""

    def __init__(self, address, limit=60):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(limit)
        self.socket.connect(address.removeprefix("unix://"))
        self.stream = -1

    @classmethod
    def of(cls, container, **kwargs):
        return cls((container.bundle / "address").read_text(), **kwargs)

    @classmethod
    def start(cls, bundle, id, namespace="default", binary="containerd-shim-crab-v2"):
        """A shim of our own, as containerd would start it. End it with Shutdown."""
        log = bundle / "log"
        if not log.exists():
            os.mkfifo(log)
        address = "/run/containerd/containerd.sock"
        argv = [binary, "-namespace", namespace, "-id", id, "-address", address, "start"]
        env = {**os.environ, "TTRPC_ADDRESS": address + ".ttrpc", "MAX_SHIM_VERSION": "2"}
        with open(log, "r+b", buffering=0) as fifo:
            done = subprocess.run(argv, cwd=bundle, env=env, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
            assert done.returncode == 0, (done, fifo and "")
        return cls(done.stdout.decode().strip())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, method, fields):
        self.stream += 2
        body = encode({1: SERVICE, 2: method, 3: encode(fields), 4: int(60e9)})
        self.socket.sendall(struct.pack(">IIBB", len(body), self.stream, REQUEST, 0) + body)
        return self.stream

    def receive(self):
        size, _, kind, _ = struct.unpack(">IIBB", self._exactly(10))
        assert kind == RESPONSE, kind
        response = decode(self._exactly(size))
        status = decode(response.get(1, b""))
        if status.get(1):
            raise Refused(status[1], status.get(2, b"").decode())
        return decode(response.get(2, b""))

    def call(self, method, fields):
        self.send(method, fields)
        return self.receive()

    def _exactly(self, size):
        data = b""
        while len(data) < size:
            more = self.socket.recv(size - len(data))
            assert more, "the shim closed the connection"
            data += more
        return data


def make_bundle(path, spec):
    """A bundle directory with this config.json (text, or an object)."""
    path = pathlib.Path(path)
    (path / "rootfs").mkdir(parents=True)
    (path / "config.json").write_text(spec if isinstance(spec, str) else json.dumps(spec))
    return path
