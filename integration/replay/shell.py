"""The client's end of a persistent shell: a bash that is the sandbox's init, fed through its client."""
from __future__ import annotations

import contextlib
import os
import re
import secrets
import select
import shlex
import signal
import subprocess
import time

from constants import LIMIT_S

#: A bash with all its output in one stream, so that the order in which things were written is kept.
INIT = ["bash", "-c", "exec bash 2>&1"]


class ShellEnded(Exception):
    """The shell's output has ended: it is dead, or its client is."""


class ShellTimeout(Exception):
    """A command took too long. Nobody can say what the shell would do with the next one."""


class Shell:
    """One client process whose stdin and output are the shell's. Another one takes its place after each restore."""

    def __init__(self, client: list[str]):
        self.client = subprocess.Popen(client, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                       start_new_session=True)
        self.rest = b""

    def run(self, command: str, timeout_s: float) -> tuple[int, bytes]:
        """Exit code and output. The end is told by a marker that nobody knew before.

        The command's stdin is empty: a program that reads would else eat what is fed next.
        """
        marker = f"end-of-command-{secrets.token_hex(16)}"
        text = f"eval {shlex.quote(command)} </dev/null; printf '\\n%s %d\\n' {marker} $?\n"
        assert self.client.stdin is not None
        try:
            self.client.stdin.write(text.encode())
            self.client.stdin.flush()
        except BrokenPipeError:
            raise ShellEnded("nobody reads what it is fed") from None
        return self._until(re.compile(rf"\n{marker} (\d+)\r?\n".encode()), time.monotonic() + timeout_s)

    def _until(self, end: re.Pattern[bytes], limit: float) -> tuple[int, bytes]:
        assert self.client.stdout is not None
        output, seen = self.rest, 0
        while not (found := end.search(output, seen)):
            # The marker may have come in pieces.
            seen = max(0, len(output) - 200)
            ready, _, _ = select.select([self.client.stdout], [], [], max(0.0, limit - time.monotonic()))
            if not ready:
                raise ShellTimeout(f"the shell's command was not done in time; its output ends with {output[-300:]!r}")
            piece = os.read(self.client.stdout.fileno(), 1 << 16)
            if not piece:
                raise ShellEnded(f"its output ends with {output[-300:]!r}")
            output += piece
        self.rest = output[found.end():]
        return int(found[1]), output[:found.start()]

    def ended(self) -> bool:
        return self.client.poll() is not None

    def close(self) -> bytes:
        """Waits for the client of a dead shell to end by itself, or ends it; what it still had to say."""
        assert self.client.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.client.stdin.close()
        self.client.stdin = None
        try:
            said = self.client.communicate(timeout=LIMIT_S / 4)[0]
        except subprocess.TimeoutExpired:
            self.kill()
            return b""
        return said or b""

    def kill(self) -> None:
        """The client, and what it has started: others may hold its output open, so its end is not waited for."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.client.pid, signal.SIGKILL)
        self.client.wait()
