"""Digests of open descriptors: what each refers to, its offset and flags, and the contents of pipes and sockets."""
from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import select
import socket
import stat
import struct
import termios
from dataclasses import dataclass, field
from typing import Any, Callable

import kernel
import tree
from definition import O_LARGEFILE, OPENING_FLAGS

_O_CLOEXEC, _O_PATH = 0o2000000, 0o10000000
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT
_SO_PEEK_OFF = 42

#: Socket options that are compared: name → (level, number, bytes).
_OPTIONS = {"reuseaddr": (1, 2, 4), "dontroute": (1, 5, 4), "broadcast": (1, 6, 4), "sndbuf": (1, 7, 4),
            "rcvbuf": (1, 8, 4), "keepalive": (1, 9, 4), "oobinline": (1, 10, 4), "priority": (1, 12, 4),
            "linger": (1, 13, 8), "reuseport": (1, 15, 4), "passcred": (1, 16, 4), "rcvlowat": (1, 18, 4),
            "rcvtimeo": (1, 20, 16), "sndtimeo": (1, 21, 16), "mark": (1, 36, 4)}
_TCP_OPTIONS = {"nodelay": (6, 1, 4), "cork": (6, 3, 4), "keepidle": (6, 4, 4), "keepintvl": (6, 5, 4),
                "keepcnt": (6, 6, 4), "user_timeout": (6, 18, 4)}
_V6_OPTIONS = {"v6only": (41, 26, 4)}
_TCP_STATES = ("", "established", "syn-sent", "syn-received", "fin-wait-1", "fin-wait-2", "time-wait", "closed",
               "close-wait", "last-ack", "listen", "closing")


@dataclass
class Descriptor:
    """One descriptor, as /proc tells of it. `owner` is the pid inside the sandbox, `pid` the host's."""
    owner: int
    pid: int
    number: int
    target: str
    info: list[tuple[str, str]]
    st: os.stat_result
    entry: dict[str, Any] = field(default_factory=dict)

    @property
    def flags(self) -> int:
        return int(dict(self.info)["flags"], 8) & ~O_LARGEFILE & ~OPENING_FLAGS

    @property
    def inode(self) -> tuple[int, int]:
        return self.st.st_dev, self.st.st_ino

    @property
    def is_path_only(self) -> bool:
        return bool(self.flags & _O_PATH)

    @property
    def reads(self) -> bool:
        return not self.is_path_only and self.flags & os.O_ACCMODE in (os.O_RDONLY, os.O_RDWR)

    @property
    def writes(self) -> bool:
        return not self.is_path_only and self.flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)


def read_all(owner: int, pid: int) -> list[Descriptor]:
    """The descriptors of one process, by number."""
    found = []
    for number in sorted(map(int, os.listdir(f"/proc/{pid}/fd"))):
        with open(f"/proc/{pid}/fdinfo/{number}", errors="surrogateescape") as file:
            info = [(line.split(":", 1)[0].split(" ", 1)[0], line.rstrip("\n").split(":", 1)[-1].strip()
                     if not line.startswith("inotify") else line.strip()) for line in file if line.strip()]
        path = f"/proc/{pid}/fd/{number}"
        found.append(Descriptor(owner, pid, number, os.readlink(path), info, os.stat(path)))
    return found


class Describer:
    """Describes the descriptors of all processes of one sandbox together, because what they share is part of them.

    pids: host pid → pid in the sandbox. inodes: (device, inode) → path, from the trees. peers: unix_peers().
    """

    def __init__(self, pids: dict[int, int], inodes: dict[tuple[int, int], str],
                 peers: Callable[[], dict[int, int]]):
        self.pids = pids
        self.inodes = inodes
        self.all: list[Descriptor] = []
        self.numbers: dict[tuple[str, int, int], str] = {}
        self._peers = peers

    def describe(self, descriptors: list[Descriptor]) -> dict[int, dict[str, dict[str, Any]]]:
        """Pid in the sandbox → descriptor number → description. Rule INODE_NUMBER: shared objects are numbered."""
        self.all = descriptors
        peers = self._peers() if any(d.target.startswith("socket:") for d in descriptors) else {}
        for d in descriptors:
            if d.target.startswith(("socket:", "pipe:")) or stat.S_ISFIFO(d.st.st_mode):
                self._number(d.target.split(":")[0] if ":" in d.target else "fifo", d.inode)
        result: dict[int, dict[str, dict[str, Any]]] = {}
        for d in descriptors:
            d.entry = {"flags": f"{d.flags:o}", "pos": int(dict(d.info)["pos"])}
            d.entry.update(self._kind(d, peers))
            locks = [self._lock(value) for name, value in d.info if name == "lock"]
            if locks:
                d.entry["locks"] = locks
            result.setdefault(d.owner, {})[str(d.number)] = d.entry
        self._mark_shared()
        return result

    def _number(self, kind: str, inode: tuple[int, int]) -> str:
        key = (kind, *inode)
        if key not in self.numbers:
            self.numbers[key] = f"{kind} {sum(k[0] == kind for k in self.numbers) + 1}"
        return self.numbers[key]

    def _mark_shared(self) -> None:
        """`same_as`: the first descriptor that is the same open file (dup, fork), so shares offset and flags."""
        groups: dict[tuple[Any, ...], list[Descriptor]] = {}
        for d in self.all:
            key = (d.target, d.inode, d.entry["pos"], d.flags & ~_O_CLOEXEC)
            firsts = groups.setdefault(key, [])
            for first in firsts:
                if kernel.compare_files(first.pid, first.number, d.pid, d.number) == 0:
                    d.entry["same_as"] = f"{first.owner}/{first.number}"
                    break
            else:
                firsts.append(d)

    def _kind(self, d: Descriptor, peers: dict[int, int]) -> dict[str, Any]:
        mode = d.st.st_mode
        if d.is_path_only:
            return {"kind": "path", "to": d.target}
        if d.target.startswith("pipe:") or stat.S_ISFIFO(mode):
            return self._pipe(d)
        if d.target.startswith("socket:"):
            return self._socket(d, peers)
        if d.target.startswith(("anon_inode:", "pidfd:")):
            return self._anonymous(d)
        if re.match(r"^\w+:\[\d+\]$", d.target):
            return {"kind": "namespace", "to": d.target.split(":")[0]}
        if stat.S_ISREG(mode):
            return self._file(d)
        if stat.S_ISCHR(mode):
            return self._device(d)
        return {"kind": "directory" if stat.S_ISDIR(mode) else "other", "to": d.target}

    def _file(self, d: Descriptor) -> dict[str, Any]:
        entry: dict[str, Any] = {"kind": "file", "to": d.target}
        if d.target.endswith(" (deleted)"):
            fd = os.open(f"/proc/{d.pid}/fd/{d.number}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                entry["size"] = d.st.st_size
                entry["mode"] = f"{stat.S_IMODE(d.st.st_mode):04o}"
                entry["sha256"] = tree.file_digest(fd, d.st.st_size)
            finally:
                os.close(fd)
            entry["object"] = self._number("deleted file", d.inode)
            with contextlib.suppress(OSError), kernel.borrowed(d.pid, d.number) as copy:
                entry["seals"] = fcntl.fcntl(copy, 1034)  # F_GET_SEALS: a memfd
        return entry

    def _device(self, d: Descriptor) -> dict[str, Any]:
        major, minor = os.major(d.st.st_rdev), os.minor(d.st.st_rdev)
        entry: dict[str, Any] = {"kind": "device", "to": d.target, "device": f"{major}:{minor}"}
        if 136 <= major <= 143 or (major, minor) == (5, 2):
            entry["kind"] = "terminal"
            entry.update(self._terminal(d))
        return entry

    def _terminal(self, d: Descriptor) -> dict[str, Any]:
        """Settings and size of a pseudo terminal; of what is queued in it, the number of bytes."""
        index = dict(d.info).get("tty-index")
        entry: dict[str, Any] = {} if index is None else {"index": int(index)}
        with kernel.borrowed(d.pid, d.number) as fd:
            try:
                iflag, oflag, cflag, lflag, ispeed, ospeed, cc = termios.tcgetattr(fd)
            except termios.error:
                return entry | {"hung_up": True}
            entry["settings"] = [iflag, oflag, cflag, lflag, ispeed, ospeed,
                                 b"".join(c if isinstance(c, bytes) else bytes([c]) for c in cc).hex()]
            entry["size"] = list(struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8))))
            entry["queued"] = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]
        return entry

    def _pipe(self, d: Descriptor) -> dict[str, Any]:
        named = not d.target.startswith("pipe:")
        entry: dict[str, Any] = {"kind": "fifo" if named else "pipe",
                                 "object": self.numbers[("fifo" if named else "pipe", *d.inode)]}
        if named:
            entry["to"] = d.target
        ends = [other for other in self.all if other.inode == d.inode and not other.is_path_only]
        readers = [other for other in ends if other.reads]
        writers = [other for other in ends if other.writes]
        with kernel.borrowed(ends[0].pid, ends[0].number) as fd:
            if readers and writers:
                entry["ends"] = "inside"
            else:  # nobody at the other end at all shows as hang-up or error
                poll = select.poll()
                poll.register(fd, 0)
                lost = any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))
                entry["ends"] = "other end closed" if lost else "other end outside"  # rule EXTERNAL_PIPE
        if entry["ends"] != "other end outside":
            with kernel.borrowed(ends[0].pid, ends[0].number) as fd:
                entry["capacity"] = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
            if readers:
                with kernel.borrowed(readers[0].pid, readers[0].number) as fd:
                    data = kernel.peek_pipe(fd)
                entry["holds"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return entry

    def _anonymous(self, d: Descriptor) -> dict[str, Any]:
        kind = "pidfd" if d.target.startswith("pidfd:") else d.target.removeprefix("anon_inode:").strip("[]")
        entry: dict[str, Any] = {"kind": kind}
        info = dict(d.info)
        if kind == "eventpoll":
            entry["watches"] = sorted(" ".join(("tfd: " + value).split()[:6]) for name, value in d.info if name == "tfd")
        elif kind == "inotify":
            entry["watches"] = sorted(self._watch(value) for name, value in d.info if name == "inotify")
        elif kind == "pidfd":
            entry["process"] = self.pids.get(int(info["Pid"]), int(info["Pid"]) if int(info["Pid"]) <= 0 else "outside")
        elif kind == "timerfd":  # rule TIMER_REMAINING
            armed = re.sub(r"[^\d]", "", info["it_value"]).strip("0") != "" or int(info["ticks"]) > 0
            entry |= {"clock": info["clockid"], "armed": armed, "interval": info["it_interval"]}
        else:
            entry |= {name: value for name, value in d.info
                      if name not in ("pos", "flags", "mnt_id", "ino", "lock", "eventfd-id", "scm_fds")}
        return entry

    def _watch(self, line: str) -> str:
        """An inotify line with the watched path instead of its inode."""
        fields = dict(part.split(":", 1) for part in line.split() if ":" in part)
        device = int(fields["sdev"], 16)
        inode = (os.makedev(device >> 20, device & 0xFFFFF), int(fields["ino"], 16))
        return f"{fields['wd']} {fields['mask']} {self.inodes.get(inode, 'not in a tree')}"

    def _lock(self, value: str) -> str:
        """`1: POSIX ADVISORY WRITE pid dev:ino start end`, the pid translated, the inode left out."""
        fields = value.split()
        fields[4] = str(self.pids.get(int(fields[4]), fields[4]))
        return " ".join(fields[1:5] + fields[6:])

    # --- sockets ---------------------------------------------------------------------------------------------------

    def _socket(self, d: Descriptor, peers: dict[int, int]) -> dict[str, Any]:
        with kernel.borrowed(d.pid, d.number) as fd:
            sock = socket.socket(fileno=os.dup(fd))
        with sock:
            family, kind, protocol = (sock.getsockopt(1, number) for number in (39, 3, 38))
            entry: dict[str, Any] = {"kind": "socket", "object": self.numbers[("socket", *d.inode)],
                                     "socket": [_family(family), _type(kind), protocol]}
            if family in (socket.AF_INET, socket.AF_INET6) and kind == socket.SOCK_STREAM:
                entry["state"] = _TCP_STATES[sock.getsockopt(6, 11, 1)[0]]
                if _is_outside(sock):  # rule OUTSIDE_TCP
                    return entry | {"state": "connection to the outside"}
            entry["listening"] = bool(sock.getsockopt(1, 30))
            entry["local"] = _address(sock.getsockname)
            entry["peer"] = _address(sock.getpeername)
            if family == socket.AF_UNIX and entry["peer"] is not None:  # rule CONNECTED_UNIX_NAME
                entry |= {"local": "connected", "peer": "connected"}
            if family == socket.AF_UNIX and d.st.st_ino in peers:
                peer = next((other for other in self.all if other.target == f"socket:[{peers[d.st.st_ino]}]"), None)
                entry["peer_object"] = self.numbers[("socket", *peer.inode)] if peer else "not open in the sandbox"
            entry["options"] = _options(sock, family, kind)
            if entry["peer"]:  # rule CONNECTED_REUSEPORT
                entry["options"].pop("reuseport", None)
            if not entry["listening"]:
                entry["queued"] = _queued(sock, kind)
            return entry


def _family(number: int) -> str:
    try:
        return socket.AddressFamily(number).name
    except ValueError:
        return str(number)


def _type(number: int) -> str:
    try:
        return socket.SocketKind(number).name
    except ValueError:
        return str(number)


def _address(get: Callable[[], Any]) -> str | None:
    try:
        return repr(get())
    except OSError:
        return None


def _is_outside(sock: socket.socket) -> bool:
    """Connected to another address than one's own, so to another machine, or to a program outside."""
    try:
        local, peer = sock.getsockname()[0], sock.getpeername()[0]
    except OSError:
        return False
    return peer != local and not peer.startswith(("127.", "::ffff:127.")) and peer != "::1"


def _options(sock: socket.socket, family: int, kind: int) -> dict[str, str | int]:
    """Those that are not zero."""
    wanted = dict(_OPTIONS)
    if family in (socket.AF_INET, socket.AF_INET6) and kind == socket.SOCK_STREAM:
        wanted |= _TCP_OPTIONS
    if family == socket.AF_INET6:
        wanted |= _V6_OPTIONS
    found: dict[str, str | int] = {}
    for name, (level, number, size) in wanted.items():
        with contextlib.suppress(OSError):
            value = sock.getsockopt(level, number, size)
            if value.strip(b"\0"):
                found[name] = int.from_bytes(value, "little") if size == 4 else value.hex()
    for name in ("sndbuf", "rcvbuf"):  # rule EVEN_BUFFERS
        if isinstance(size := found.get(name), int):
            found[name] = size & ~1
    return found


def _queued(sock: socket.socket, kind: int) -> dict[str, Any]:
    """What has arrived and was not yet read."""
    messages = _peek_messages(sock) if kind != socket.SOCK_STREAM else _peek_stream(sock)
    return {"messages": len(messages), "bytes": sum(map(len, messages)),
            "sha256": hashlib.sha256(b"".join(len(m).to_bytes(4, "big") + m for m in messages)).hexdigest()}


def _peek_stream(sock: socket.socket) -> list[bytes]:
    try:
        data = sock.recv(8 << 20, _PEEK)
    except OSError:
        return []
    return [data] if data else []


def _peek_messages(sock: socket.socket, limit: int = 4096) -> list[bytes]:
    messages: list[bytes] = []
    try:
        sock.setsockopt(1, _SO_PEEK_OFF, 0)
    except OSError:
        return messages
    try:
        while len(messages) < limit:
            message = sock.recv(1 << 18, _PEEK)
            if not message:
                break
            messages.append(message)
    except OSError:
        pass
    finally:
        sock.setsockopt(1, _SO_PEEK_OFF, -1)
    return messages
