"""What surrounds the processes: cgroup (and freezing it), mounts, namespaces, network, IPC objects, limits."""
from __future__ import annotations

import array
import contextlib
import fcntl
import hashlib
import os
import re
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any, Iterator

import kernel
from definition import KERNEL_FILE_SYSTEMS

#: A freeze that takes longer than this many seconds has failed.
FREEZE_LIMIT = 60.0


def _unescape(text: str) -> str:
    """mountinfo writes space, tab, newline and backslash as \\ooo."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo; `point` as the process sees it."""
    point: str
    root: str
    kind: str
    options: str
    super_options: str
    propagation: str


def mounts(pid: int | str) -> list[Mount]:
    """The mounts that the process sees, in the order in which they were made."""
    found = []
    with open(f"/proc/{pid}/mountinfo", errors="surrogateescape") as file:
        for line in file:
            left, right = line.rstrip("\n").split(" - ", 1)
            fields, (kind, _source, super_options) = left.split(" "), right.split(" ", 2)
            found.append(Mount(_unescape(fields[4]), _unescape(fields[3]), kind, fields[5], super_options,
                               " ".join(sorted(re.sub(r":\d+", "", field) for field in fields[6:]))))
    return found


def describe_mounts(all_mounts: list[Mount]) -> dict[str, dict[str, str]]:
    """By mount point. A mount hidden below a later one on the same point is numbered."""
    found: dict[str, dict[str, str]] = {}
    for mount in all_mounts:
        point, number = mount.point, 1
        while point in found:
            number += 1
            point = f"{mount.point} ({number})"
        if is_below(point, ("/proc", "/sys")) and mount.kind in ("tmpfs", "devtmpfs"):
            found[point] = {"kind": "mask"}  # rule MASKS
            continue
        entry = {"kind": mount.kind, "options": mount.options, "propagation": mount.propagation}
        if mount.kind == "tmpfs":
            entry["super_options"] = mount.super_options
        found[point] = entry
    return found


def is_below(path: str, parents: tuple[str, ...]) -> bool:
    return any(path == parent or path.startswith(parent + "/") for parent in parents)


def extra_trees(all_mounts: list[Mount]) -> list[str]:
    """Mount points of tmpfs, whose contents are part of the state. Rule KERNEL_FILE_SYSTEMS: not the masks of runc
    below /proc and /sys."""
    return sorted({mount.point for mount in all_mounts
                   if mount.kind == "tmpfs" and mount.point != "/" and not is_below(mount.point, ("/proc", "/sys"))
                   and _is_top(mount, all_mounts)})


def external_mounts(all_mounts: list[Mount]) -> list[str]:
    """Rule EXTERNAL_MOUNTS: what is neither the root, nor a tmpfs, nor the kernel's."""
    return sorted(mount.point for mount in all_mounts
                  if mount.point != "/" and mount.kind != "tmpfs" and mount.kind not in KERNEL_FILE_SYSTEMS
                  and not is_below(mount.point, ("/proc", "/sys")))


def _is_top(mount: Mount, all_mounts: list[Mount]) -> bool:
    return [other for other in all_mounts if other.point == mount.point][-1] is mount


# --- cgroups ---------------------------------------------------------------------------------------------------

def cgroups(pid: int) -> dict[str, str]:
    """Controller → cgroup path as this process's cgroup namespace shows it. "" is the unified hierarchy."""
    found = {}
    with open(f"/proc/{pid}/cgroup") as file:
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            for controller in controllers.split(","):
                found[controller] = path
    return found


def _directory(pid: int, controller: str) -> str | None:
    """Where the cgroup of pid in that hierarchy is mounted here; None if it is not."""
    path = cgroups(pid).get(controller)
    if path is None:
        return None
    for mount in mounts("self"):
        if controller == "" and mount.kind == "cgroup2" or \
                mount.kind == "cgroup" and controller in mount.super_options.split(","):
            inside = path if mount.root == "/" else path.removeprefix(mount.root)
            directory = mount.point + inside
            if os.path.isdir(directory):
                return directory
    return None


def processes_of_cgroup(pid: int) -> set[int]:
    """Host pids in the cgroup of pid and below it. Empty where the cgroup is the root: it is not the sandbox's."""
    for controller in ("freezer", "pids", ""):
        directory = _directory(pid, controller)
        if directory and cgroups(pid)[controller] != "/":
            found: set[int] = set()
            for parent, _, files in os.walk(directory):
                if "cgroup.procs" in files:
                    with contextlib.suppress(OSError), open(os.path.join(parent, "cgroup.procs")) as file:
                        found.update(int(line) for line in file)
            return found
    return set()


def limits(pid: int) -> dict[str, str]:
    """The limits of the sandbox's cgroup."""
    wanted = {"memory": ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.soft_limit_in_bytes"),
              "pids": ("pids.max",), "cpu": ("cpu.shares", "cpu.cfs_quota_us", "cpu.cfs_period_us"),
              "cpuset": ("cpuset.cpus", "cpuset.mems"), "devices": ("devices.list",), "blkio": ("blkio.weight",),
              "": ("memory.max", "memory.high", "memory.low", "memory.swap.max", "pids.max", "cpu.max", "cpu.weight",
                   "cpuset.cpus", "cpuset.mems", "io.max", "io.weight")}
    found = {}
    for controller, names in wanted.items():
        directory = _directory(pid, controller)
        for name in names if directory else ():
            with contextlib.suppress(OSError), open(f"{directory}/{name}") as file:
                found[name] = file.read().strip()
    return found


class Freezer:
    """The freezer of one sandbox: v1's where there is one, else v2's."""

    def __init__(self, pid: int):
        v1 = _directory(pid, "freezer")
        directory = v1 or _directory(pid, "")
        if directory is None or cgroups(pid)["freezer" if v1 else ""] == "/":
            raise RuntimeError(f"process {pid} has no cgroup of its own that could be frozen")
        self.file = f"{directory}/freezer.state" if v1 else f"{directory}/cgroup.freeze"
        self.status = self.file if v1 else f"{directory}/cgroup.events"
        self.words = ("THAWED", "FROZEN") if v1 else ("0", "1")
        self.is_v1 = v1 is not None

    def is_frozen(self) -> bool:
        with open(self.status) as file:
            text = file.read()
        return text.strip() == "FROZEN" if self.is_v1 else "frozen 1" in text

    def set(self, frozen: bool) -> None:
        with open(self.file, "w") as file:
            file.write(self.words[frozen])
        limit = time.monotonic() + FREEZE_LIMIT
        while self.is_frozen() != frozen:
            if time.monotonic() > limit:
                raise TimeoutError(f"{self.file} does not become {self.words[frozen]}")
            time.sleep(0.001)


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Holds the sandbox frozen; leaves it as it was found."""
    freezer = Freezer(pid)
    if freezer.is_frozen():
        yield
        return
    try:
        freezer.set(True)
        yield
    finally:
        freezer.set(False)


# --- namespaces ------------------------------------------------------------------------------------------------

def host_name(pid: int) -> dict[str, str]:
    def read() -> dict[str, str]:
        with open("/proc/sys/kernel/domainname") as file:
            return {"host": os.uname().nodename, "domain": file.read().strip()}
    return kernel.inside(pid, "uts", read)


def network(pid: int) -> dict[str, Any]:
    """Interfaces: up or not, IPv4 address; IPv6 addresses; IPv4 routes."""
    if os.path.samefile(f"/proc/{pid}/ns/net", "/proc/self/ns/net"):
        return {"shared with the host": True}

    def read() -> dict[str, Any]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            return {name: _interface(sock, name) for _, name in socket.if_nameindex()}

    found: dict[str, Any] = {"interfaces": kernel.inside(pid, "net", read)}
    with open(f"/proc/{pid}/net/route") as file:
        found["routes"] = sorted(" ".join(line.split()[:8]) for line in file.readlines()[1:])
    with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/net/if_inet6") as file:
        found["inet6"] = sorted(" ".join((fields := line.split())[0:1] + fields[2:4] + fields[5:]) for line in file)
    return found


def _interface(sock: socket.socket, name: str) -> dict[str, Any]:
    request = struct.pack("16s24x", name.encode())
    flags, = struct.unpack_from("<H", fcntl.ioctl(sock, 0x8913, request), 16)  # SIOCGIFFLAGS
    entry: dict[str, Any] = {"up": bool(flags & 1)}
    with contextlib.suppress(OSError):
        entry["inet"] = socket.inet_ntoa(fcntl.ioctl(sock, 0x8915, request)[20:24])  # SIOCGIFADDR
    return entry


def unix_peers(pid: int) -> dict[int, int]:
    """Inode of each connected unix socket of the process's network namespace → inode of its peer (unix_diag)."""
    def read() -> dict[int, int]:
        peers: dict[int, int] = {}
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as sock:  # NETLINK_SOCK_DIAG
            # nlmsghdr: SOCK_DIAG_BY_FAMILY, REQUEST|DUMP; unix_diag_req: all states, UDIAG_SHOW_PEER
            sock.send(struct.pack("<IHHIIBBHIIIII", 40, 20, 0x301, 1, 0, socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, 4,
                                  0xFFFFFFFF, 0xFFFFFFFF))
            while True:
                data = sock.recv(1 << 18)
                at = 0
                while at < len(data):
                    length, kind = struct.unpack_from("<IH", data, at)
                    if kind == 3:  # NLMSG_DONE
                        return peers
                    if kind == 2:  # NLMSG_ERROR
                        raise OSError(-struct.unpack_from("<i", data, at + 16)[0], "unix_diag")
                    inode, = struct.unpack_from("<I", data, at + 20)
                    attribute = at + 32
                    while attribute + 4 <= at + length:
                        size, name = struct.unpack_from("<HH", data, attribute)
                        if name == 2:  # UNIX_DIAG_PEER
                            peers[inode], = struct.unpack_from("<I", data, attribute + 4)
                        attribute += (size + 3) & ~3
                    at += (length + 3) & ~3
    return kernel.inside(pid, "net", read)


def ipc_objects(pid: int) -> dict[str, Any]:
    """SysV shared memory, semaphores and message queues, with the contents of the first two."""
    if os.path.samefile(f"/proc/{pid}/ns/ipc", "/proc/self/ns/ipc"):
        return {"shared with the host": True}

    def table(kind: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
        with open(f"/proc/sysvipc/{kind}") as file:
            head = file.readline().split()
            rows = [dict(zip(head, line.split())) for line in file]
        return [{name: row[name] for name in names} for row in rows]

    def read() -> dict[str, Any]:
        owner = ("uid", "gid", "cuid", "cgid")
        segments = table("shm", ("key", "shmid", "perms", "size", "nattch", *owner))
        for row in segments:
            row["sha256"] = hashlib.sha256(kernel.shared_memory(int(row["shmid"]), int(row["size"]))).hexdigest()
        sets = table("sem", ("key", "semid", "perms", "nsems", *owner))
        for row in sets:
            row["values"] = kernel.semaphore_values(int(row["semid"]), int(row["nsems"]))
        queues = table("msg", ("key", "msqid", "perms", "cbytes", "qnum", *owner))
        return {"shm": {row["shmid"]: row for row in segments}, "sem": {row["semid"]: row for row in sets},
                "msg": {row["msqid"]: row for row in queues}}
    return kernel.inside(pid, "ipc", read)
