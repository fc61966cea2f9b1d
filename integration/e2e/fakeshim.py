"""A control socket as a shim has it, that says whatever a test wants: the shim of another build, one that goes away
while it is asked, one that hangs."""

import os
import pathlib
import socket
import struct
import threading

from taskapi import RESPONSE, decode, encode

RUN = pathlib.Path("/run/crab")
INVALID = 3
UNKNOWN = object()
"""An answer: there is no such call."""
CLOSE = object()
"""An answer: the connection ends."""


class FakeShim:
    """Serves for one sandbox. `answers`: {method: bytes of its response, UNKNOWN, CLOSE, or an Event to wait for, after
    which the connection ends}."""

    def __init__(self, sandbox, answers, namespace="default"):
        self.answers = answers
        self.asked = []
        self.link = RUN / "s" / namespace / sandbox / "control.sock"
        # Named by a process that lives, as shims' sockets are.
        self.path = RUN / "shims" / f"{os.getpid()}.sock"
        self.connections = []

    def __enter__(self):
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.link.parent.mkdir(mode=0o700, parents=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen()
        self.link.symlink_to(self.path)
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.path.unlink(missing_ok=True)
        self.link.unlink()
        self.link.parent.rmdir()
        for connection in self.connections:
            connection.close()

    def _accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        stream = connection.makefile("rb")
        while len(header := stream.read(10)) == 10:
            size, number, _, _ = struct.unpack(">IIBB", header)
            request = decode(stream.read(size))
            method = request[2].decode()
            self.asked.append(method)
            answer = self.answers.get(method, UNKNOWN)
            if isinstance(answer, threading.Event):
                answer.wait()
                answer = CLOSE
            if answer is CLOSE:
                connection.shutdown(socket.SHUT_RDWR)
                return
            if answer is UNKNOWN:
                said = f"/{request[1].decode()}/{method} does not exist"
                body = encode({1: {1: INVALID, 2: said}})
            else:
                body = encode({2: answer})
            connection.sendall(struct.pack(">IIBB", len(body), number, RESPONSE, 0) + body)


def listed(sandbox, namespace="default", version="0.0.9"):
    """The answer to List of a shim with one running sandbox."""
    return encode({1: [{1: sandbox, 2: namespace, 3: "running", 4: 1, 5: True}], 2: version})
