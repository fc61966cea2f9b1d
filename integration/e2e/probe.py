"""Runs inside a container: prints, as JSON, what a process can see of where it is.

Numbers that the kernel makes up (inodes, device numbers, pids) are left out or replaced; the rest is what was found.
"""

import fcntl
import glob
import json
import os
import re
import resource
import socket
import stat
import struct
import sys


def text(path):
    try:
        with open(path, errors="replace") as file:
            return file.read(1 << 18)
    except OSError as e:
        return e.strerror


def link(path):
    try:
        return os.readlink(path)
    except OSError as e:
        return e.strerror


def fields(path, *names):
    return {k: v.split() for k, v in (line.split(":", 1) for line in text(path).splitlines()) if k in names}


def mounts():
    found = []
    for line in text("/proc/self/mountinfo").splitlines():
        left, right = line.split(" - ")
        _, _, _, root, point, options, *shared = left.split()
        kind, source, more = right.split()
        if kind == "overlay":
            # How many layers below, not where they are; xino and the like.
            lower = re.search(r"lowerdir=([^,]*)", more)
            more = re.sub(r"(lower|upper|work)dir=[^,]*", r"\1dir", more) + f" {len(lower[1].split(':'))}"
        shared = [re.sub(r":\d+", "", tag) for tag in shared]
        found.append([point, re.sub(r"[0-9a-f]{64}|/tmp/tmp\w+", "ID", root), options, shared, kind, source, more])
    return found


def devices():
    found = {}
    for path in sorted(glob.glob("/dev/*") + glob.glob("/dev/pts/*")):
        if re.fullmatch(r"/dev/pts/\d+", path):
            continue  # the terminals of others
        info = os.lstat(path)
        what = os.readlink(path) if stat.S_ISLNK(info.st_mode) else [os.major(info.st_rdev), os.minor(info.st_rdev)]
        found[path] = [oct(info.st_mode), info.st_uid, info.st_gid, what]
    return found


def network():
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            flags = fcntl.ioctl(s, 0x8913, struct.pack("16sH14x", name.encode(), 0))[16:18]  # SIOCGIFFLAGS
            found[name] = [struct.unpack("H", flags)[0], text(f"/sys/class/net/{name}/mtu")]
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 2):
            found["loopback"] = "works"
    except OSError as e:
        found["loopback"] = str(e)
    found["addresses"] = re.sub(r"(?m)^(\S+ )\S+", r"\1", text("/proc/net/if_inet6"))
    found["routes"] = text("/proc/net/fib_trie")
    return found


def descriptors(pid="self"):
    found = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            what = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue  # the one that lists
        mode = text(f"/proc/{pid}/fdinfo/{fd}").split("flags:")[1].split()[0]
        found[fd] = [re.sub(r"\d+\]|/pts/\d+", "", what), oct(int(mode, 8) & (os.O_ACCMODE | os.O_CLOEXEC))]
    return found


def main():
    # First, before this program has opened anything itself.
    fds = descriptors()
    namespaces = {name: os.readlink(f"/proc/self/ns/{name}") for name in sorted(os.listdir("/proc/self/ns"))}
    root = os.stat("/")
    json.dump(
        {
            "descriptors": fds,
            "descriptors of init": descriptors(1) if os.getpid() != 1 and os.access("/proc/1/fd", os.R_OK) else None,
            "namespaces": namespaces,
            "namespaces of init": {n: link(f"/proc/1/ns/{n}") == namespaces[n] for n in namespaces},
            "mounts": mounts(),
            "status": fields("/proc/self/status", "Umask", "Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb",
                             "NoNewPrivs", "Seccomp", "Seccomp_filters", "Cpus_allowed_list", "Mems_allowed_list", "SigBlk", "SigIgn",
                             "SigCgt", "THP_enabled", "CoreDumping", "Speculation_Store_Bypass"),
            "limits": text("/proc/self/limits"),
            "uid map": text("/proc/self/uid_map"), "gid map": text("/proc/self/gid_map"), "setgroups": text("/proc/self/setgroups"),
            "devices": devices(),
            "network": network(),
            "environment": dict(os.environ),
            "cgroup": text("/proc/self/cgroup"),
            "scores": [text(f"/proc/{pid}/oom_score_adj") for pid in ("self", 1)],
            "nice": os.nice(0), "scheduler": os.sched_getscheduler(0), "coredump": text("/proc/self/coredump_filter"),
            "slack": text("/proc/self/timerslack_ns"), "personality": text("/proc/self/personality"),
            "leads": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
            "terminal": [os.isatty(fd) for fd in (0, 1, 2)],
            "hostname": socket.gethostname(), "cwd": os.getcwd(),
            "root": [oct(root.st_mode), root.st_uid, root.st_gid, sorted(os.listdir("/"))],
            "hosts": text("/etc/hosts"), "resolver": text("/etc/resolv.conf"),
            "label": text("/proc/self/attr/current"),
            "keyring": "_ses" in text("/proc/keys"),
            "sysctl": {p: text(f"/proc/sys/{p}") for p in ("net/ipv4/ip_unprivileged_port_start", "net/ipv4/ping_group_range", "kernel/msgmax")},
            "writable": {p: os.access(p, os.W_OK) for p in ("/proc/sys", "/proc/sysrq-trigger", "/sys", "/sys/fs/cgroup", "/proc/irq", "/", "/tmp")},
            "masked": {p: bool(text(p)) if not os.path.isdir(p) else os.listdir(p)
                       for p in ("/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/acpi", "/proc/scsi", "/sys/firmware", "/proc/latency_stats")},
            "stack": resource.getrlimit(resource.RLIMIT_STACK),
        },
        sys.stdout,
    )  # fmt: skip


main()
