"""A sandbox's cgroup, in the unified hierarchy. It can be frozen there even on hybrid hosts: that takes no controller."""
from __future__ import annotations

import os
import re
import select
import time
from types import TracebackType

PREFIX = "crab-inspector-test-"

#: Seconds until freezing, thawing or ending counts as failed.
PATIENCE = 5.0


def unified() -> str:
    """Where cgroup v2 is mounted."""
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            before, after = line.split(" - ", 1)
            if after.startswith("cgroup2 "):
                return before.split()[4]
    raise OSError("cgroup v2 is not mounted")


class Cgroup:
    """`path`: its directory. Leaving the context ends every process in it, and in its descendants, and removes them."""

    def __init__(self, name: str = ""):
        root = unified()
        sweep(root)
        self.path = f"{root}/{PREFIX}{os.getpid()}{'-' * bool(name)}{name}"
        os.mkdir(self.path)

    def add(self, pid: int) -> None:
        _put(f"{self.path}/cgroup.procs", str(pid))

    def child(self, name: str) -> str:
        path = f"{self.path}/{name}"
        os.makedirs(path, exist_ok=True)
        return path

    def freeze(self) -> None:
        self._freeze(True)

    def thaw(self) -> None:
        self._freeze(False)

    def _freeze(self, frozen: bool) -> None:
        _put(f"{self.path}/cgroup.freeze", str(int(frozen)))
        wanted = f"frozen {int(frozen)}\n"
        deadline = time.monotonic() + PATIENCE
        with open(f"{self.path}/cgroup.events") as events:
            poll = select.poll()
            poll.register(events, select.POLLPRI)
            while wanted not in events.read():
                if (left := deadline - time.monotonic()) <= 0:
                    raise TimeoutError(f"{self.path} is not {wanted.strip()}")
                poll.poll(left * 1000)
                events.seek(0)

    def close(self) -> None:
        _remove(self.path)

    def __enter__(self) -> "Cgroup":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _put(path: str, value: str) -> None:
    with open(path, "w") as out:
        out.write(value)


def _remove(path: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while os.path.isdir(path):
        try:
            _put(f"{path}/cgroup.kill", "1")
            for base, _, _ in os.walk(path, topdown=False):
                os.rmdir(base)
        except FileNotFoundError:
            pass
        except OSError:  # processes are still dying
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)


def sweep(root: str) -> None:
    """Removes what a killed run left behind."""
    for entry in os.scandir(root):
        found = re.fullmatch(f"{PREFIX}([0-9]+)(-.*)?", entry.name)
        if found and not os.path.exists(f"/proc/{found[1]}"):
            _remove(entry.path)
