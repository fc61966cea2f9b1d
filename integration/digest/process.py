"""Digests of the processes of a sandbox, read from /proc while they do not run."""
from __future__ import annotations

import contextlib
import os
from typing import Any, Callable

import container
import descriptors
import memory
from definition import STATUS_FIELDS, THREAD_FIELDS

Process = dict[str, Any]

#: Numbers of fields in /proc/PID/stat (proc(5), counted from 1) that are compared. All are addresses.
_STAT_ADDRESSES = {"start_code": 26, "end_code": 27, "start_stack": 28, "start_data": 45, "end_data": 46,
                   "start_brk": 47, "arg_start": 48, "arg_end": 49, "env_start": 50, "env_end": 51}


def _read(path: str) -> str:
    with open(path, errors="surrogateescape") as file:
        return file.read()


def _status(path: str) -> dict[str, list[str]]:
    return {name: value.split() for name, _, value in (line.partition(":") for line in _read(path).splitlines())}


def _stat(path: str) -> list[str]:
    """Fields of a stat file, such that index N is field N of proc(5); comm is left empty."""
    return ["", "", ""] + _read(path).rpartition(")")[2].split()


def members(init: int) -> dict[int, int]:
    """Host pid → pid in the sandbox, of all processes of its pid namespace and its cgroup."""
    level = len(_status(f"/proc/{init}/status")["NSpid"]) - 1
    namespace = os.stat(f"/proc/{init}/ns/pid").st_ino
    is_private = namespace != os.stat("/proc/self/ns/pid").st_ino
    candidates = container.processes_of_cgroup(init) | {init}
    if is_private:
        candidates |= {int(name) for name in os.listdir("/proc") if name.isdigit()}
    found: dict[int, int] = {}
    for pid in sorted(candidates):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            numbers = _status(f"/proc/{pid}/status").get("NSpid", [])
            if len(numbers) > level and (not is_private or _descends(pid, init, namespace, len(numbers) == level + 1)):
                found[pid] = int(numbers[level])
    return found


def _descends(pid: int, init: int, namespace: int, is_same_level: bool) -> bool:
    """In the namespace itself, or (deeper) below one of its processes."""
    if is_same_level:
        try:
            return os.stat(f"/proc/{pid}/ns/pid").st_ino == namespace
        except OSError:  # a zombie has no namespaces any more
            pass
    while pid > 1:
        if pid == init:
            return True
        pid = int(_stat(f"/proc/{pid}/stat")[4])
    return False


def processes(init: int, inodes: dict[tuple[int, int], str], quick: bool) -> tuple[dict[str, Process], dict[str, Any]]:
    """The processes by their pid in the sandbox, and what is only observed: how much CPU time each has used."""
    pids = members(init)
    order = sorted(pids, key=pids.__getitem__)
    namespaces = {kind: _namespace(init, kind) for kind in os.listdir(f"/proc/{init}/ns")}
    objects: dict[tuple[str, int], str] = {}
    found, ran, opened = {}, {}, []
    for pid in order:
        try:
            entry, its = _one(pid, init, pids, namespaces, objects, quick)
        except (FileNotFoundError, ProcessLookupError):  # a dead exec, reaped from outside while we read
            continue
        opened += its
        found[str(pids[pid])] = entry
        ran[str(pids[pid])] = _ran(pid)
    if not quick:
        describer = descriptors.Describer(pids, inodes, lambda: container.unix_peers(init))
        for owner, table in describer.describe(opened).items():
            found[str(owner)]["descriptors"] = table
    return found, ran


def _one(pid: int, init: int, pids: dict[int, int], namespaces: dict[str, int],
         objects: dict[tuple[str, int], str], quick: bool) -> tuple[Process, list[descriptors.Descriptor]]:
    """One process, and its descriptors, which are described when those of all are known."""
    entry = _identity(pid, init, pids, namespaces)
    if entry["state"] in ("zombie", "dead"):
        return entry, []
    entry["threads"] = _threads(pid, pids, quick)
    if quick:
        return entry, []
    entry.update(_details(pid))
    maps = memory.mappings(pid)
    tids = [int(tid) for tid in os.listdir(f"/proc/{pid}/task")]
    entry["mappings"] = memory.describe(maps, objects)
    entry["pages"] = memory.pages(pid, maps, memory.rseq_masks(pid, tids, maps))
    return entry, descriptors.read_all(pids[pid], pid)


def _namespace(pid: int, kind: str) -> int:
    return os.stat(f"/proc/{pid}/ns/{kind}").st_ino


def _pid_in(pids: dict[int, int], pid: int) -> int:
    """Rule HOST_PID. 0: outside of the sandbox."""
    return pids.get(pid, 0)


def _state(letter: str) -> str:
    """Rule SLEEP_STATE."""
    return {"T": "stopped", "t": "traced", "Z": "zombie", "X": "dead"}.get(letter, "alive")


def _identity(pid: int, init: int, pids: dict[int, int], namespaces: dict[str, int]) -> Process:
    status, stat = _status(f"/proc/{pid}/status"), _stat(f"/proc/{pid}/stat")
    state = _state(stat[3])
    entry: Process = {
        "state": state, "parent": _pid_in(pids, int(stat[4])), "comm": " ".join(status["Name"]),
        "group": int(status["NSpgid"][_level(status, pids[pid])]), "session": int(status["NSsid"][_level(status, pids[pid])]),
    }
    if state in ("zombie", "dead"):
        return entry | {"exit_code": int(stat[52])}
    tty = int(stat[7]) if entry["session"] == pids[pid] else 0  # rule MEMBER_TERMINAL
    entry |= {
        "terminal": f"{tty >> 8 & 0xFFF}:{tty & 0xFF | tty >> 12 & 0xFFF00}" if tty else None,
        "foreground_group": _pid_in(pids, int(stat[8])) if tty else None,
        "cmdline": _read(f"/proc/{pid}/cmdline").split("\0")[:-1],
        "exe": _link(f"/proc/{pid}/exe"), "cwd": _link(f"/proc/{pid}/cwd"), "root": _link(f"/proc/{pid}/root"),
        "namespaces": sorted(kind for kind, inode in namespaces.items()
                             if not kind.endswith("_for_children") and _namespace(pid, kind) != inode),
        "cgroup": {name: os.path.relpath(path, container.cgroups(init)[name])
                   for name, path in container.cgroups(pid).items()},
    }
    for name in STATUS_FIELDS:
        if name in status:
            entry[name] = " ".join(status[name])
    return entry


def _level(status: dict[str, list[str]], pid: int) -> int:
    """Which of the columns of NSpid is the sandbox's."""
    return status["NSpid"].index(str(pid)) if status["NSpid"][-1] != str(pid) else -1


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError as error:
        return f"({error.strerror})"


def _optional(path: str, read: Callable[[str], Any] = _read) -> Any:
    """None where this kernel has no such file."""
    try:
        return read(path)
    except (OSError, ValueError):
        return None


def _details(pid: int) -> Process:
    stat = _stat(f"/proc/{pid}/stat")
    return {
        "environment": _read(f"/proc/{pid}/environ").split("\0")[:-1],
        "addresses": {name: f"{int(stat[number]):x}" for name, number in _STAT_ADDRESSES.items()},
        "auxv": _optional(f"/proc/{pid}/auxv", lambda path: open(path, "rb").read().hex()),
        "limits": [" ".join(line.split()) for line in _read(f"/proc/{pid}/limits").splitlines()[1:]],
        "timers": _timers(pid),
        "oom_score_adj": int(_read(f"/proc/{pid}/oom_score_adj")),
        "label": _optional(f"/proc/{pid}/attr/current"),
        "loginuid": _optional(f"/proc/{pid}/loginuid"),
        "uid_map": _optional(f"/proc/{pid}/uid_map"),
        "gid_map": _optional(f"/proc/{pid}/gid_map"),
    }


def _timers(pid: int) -> list[str]:
    """POSIX timers: id, signal, way of notification, clock. Not the notified thread, which is a host's number."""
    lines = (_optional(f"/proc/{pid}/timers") or "").splitlines()
    return [line.split("/")[0] if line.startswith("notify") else line for line in lines]


def _threads(pid: int, pids: dict[int, int], quick: bool) -> dict[str, Any]:
    found = {}
    for tid in sorted(map(int, os.listdir(f"/proc/{pid}/task"))):
        base = f"/proc/{pid}/task/{tid}"
        status, stat = _status(f"{base}/status"), _stat(f"{base}/stat")
        entry: dict[str, Any] = {"state": _state(stat[3]), "comm": _read(f"{base}/comm").rstrip("\n")}
        if not quick:
            entry |= {name: " ".join(status[name]) for name in THREAD_FIELDS if name in status}
            entry |= {"nice": int(stat[19]), "realtime_priority": int(stat[40]), "policy": int(stat[41])}
            entry |= _stack_and_counter(pid, base)
        found[status["NSpid"][_level(_status(f"/proc/{pid}/status"), pids[pid])]] = entry
    return found


def _stack_and_counter(pid: int, base: str) -> dict[str, str]:
    """Stack pointer and program counter; nothing of a thread that is running right now."""
    fields = (_optional(f"{base}/syscall") or "running").split()
    if fields[0] == "running":
        return {}
    return {"sp": fields[-2], "pc": f"{memory.system_call_address(pid, int(fields[-1], 16)):#x}"}


def _ran(pid: int) -> dict[str, int]:
    """Rule CPU_TIME: nanoseconds on a CPU, of all threads together. Not part of the digest."""
    total = 0
    with contextlib.suppress(OSError):
        for tid in os.listdir(f"/proc/{pid}/task"):
            total += int((_read(f"/proc/{pid}/task/{tid}/schedstat").split() or ["0"])[0])
    return {"cpu_ns": total, "host_pid": pid}
