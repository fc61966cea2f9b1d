"""What of a container can be left in the bed, looked up without asking any client."""

import os
import pathlib

from harness import DAEMONS, processes

RUN = ("/run/crab", "/run/containerd/s", "/run/containerd/runc", "/run/containerd/io.containerd.runtime.v2.task",
       "/run/docker/runtime-runc", "/var/lib/docker/containers", "/var/run/docker/containerd")
SHARED = {"/run/crab", "/run/crab/runc", "/run/crab/s", "/run/crab/shims"}
"""Directories that are made with the first sandbox and may stay. So may those of a namespace, one level below."""
KEPT = {"/run/crab/bpf.lock", "/run/crab/engine.v1"}
"""A file that is locked can't be removed without a race: whoever waits for it would have the lock of no file. And what
the host has spent on checkpoints is known beyond the last sandbox."""


class Task(str):
    """A process. It stays the same one when it executes another program: `runc init` becomes the container's own."""

    def __new__(cls, pid, start, argv):
        self = super().__new__(cls, f"process {pid} (started at {start}): {' '.join(argv)[:300]}")
        self.key = pid, start
        return self

    def __eq__(self, other):
        return isinstance(other, Task) and self.key == other.key

    def __hash__(self):
        return hash(self.key)


def mounts():
    lines = pathlib.Path("/proc/self/mountinfo").read_text().splitlines()
    return {f"mount {line.split()[4]} ({line.split(' - ')[1].split()[0]})" for line in lines}


def cgroups():
    found = set()
    for top, dirs, _ in os.walk("/sys/fs/cgroup"):
        found.update(f"cgroup {top}/{d}" for d in dirs)
    # Parents that containerd and Docker keep.
    return {c for c in found if c.rsplit("/", 1)[1] not in ("default", "docker", "buildkit")}


def files():
    found = set()
    for root in map(os.path.realpath, RUN):
        for top, dirs, names in os.walk(root):
            dirs[:] = [d for d in dirs if d != "rootfs"]
            found.update(f"file {top}/{n}" for n in names if f"{top}/{n}" not in KEPT)
            found.update(f"directory {top}/{d}" for d in dirs if not is_shared(f"{top}/{d}"))
    return found


def is_shared(path):
    parent, name = path.rsplit("/", 1)
    if path in SHARED or path in map(os.path.realpath, RUN):
        return True
    namespaces = ("/run/crab/s", "/run/crab/runc", "/run/containerd/runc", "/run/docker/runtime-runc",
                  "/run/containerd/io.containerd.runtime.v2.task")
    return parent in namespaces and name in ("default", "moby")


def tasks():
    """Processes that are neither pytest's own nor the bed's."""
    found = processes()
    daemons = {p.pid for p in DAEMONS}
    ours = {os.getpid()}
    while True:
        more = {pid for pid, (_, parent, _) in found.items() if parent in ours and pid not in daemons} - ours
        if not more:
            break
        ours |= more
    kept = {pid: task for pid, task in found.items() if pid not in ours | daemons}
    return {Task(pid, start, argv) for pid, (start, _, argv) in kept.items()}


def snapshot():
    return mounts() | cgroups() | files() | tasks()
