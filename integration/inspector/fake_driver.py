#!/usr/bin/env python3
"""Stands in for the driver, to test the suite and the fuzzer themselves: no BPF, it looks at the layer again and again.

It compares ctimes (precise on kernels from 6.13 on, once somebody has looked) and takes every inode mapped shared
and writable for changed. It cannot see what leaves no ctime, so it misses some stores; that is for the suite to find.
--lie silent: it reports nothing. --lie everything: it reports all that there is, and that nothing changed.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../digest"))
import tree  # noqa: E402

Seen = dict[tuple[int, int], int]


class Fake:
    def __init__(self, args: argparse.Namespace):
        self.lie = args.lie
        self.cgroup = args.cgroup
        self.rootfs = args.rootfs
        self.roots = [args.upper, f"{args.rootfs}/volume", f"{args.rootfs}/dev/shm"]
        self.device = os.stat(args.upper).st_dev
        self.seen = self._scan()
        self.mapped: set[tuple[int, int]] = set()
        self.dirty: set[tuple[int, int]] = set()
        self.digest = self._digest()

    def _digest(self) -> tree.Tree:
        return tree.scan_directory(self.rootfs).tree

    def _scan(self) -> Seen:
        seen: Seen = {}
        for root in self.roots:
            for base, names, files in os.walk(root):
                for path in (base, *(f"{base}/{name}" for name in (*names, *files))):
                    st = os.lstat(path)
                    seen[st.st_dev, st.st_ino] = st.st_ctime_ns
        return seen

    def _mappings(self) -> set[tuple[int, int]]:
        found = set()
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/maps") as maps:
                    lines = maps.readlines()
            except OSError:
                continue
            for line in lines:
                _, prot, _, _, ino, *path = line.split(None, 5)
                if prot[3] == "s" and path and self.rootfs in path[0]:
                    found.add((self.device, int(ino)))
        return found

    def _look(self) -> tuple[set[tuple[int, int]], Seen]:
        now = self._scan()
        changed = {inode for inode in self.seen.keys() | now.keys() if self.seen.get(inode) != now.get(inode)}
        return changed | self.mapped | self._mappings() | self.dirty, now

    def _report(self, inodes: set[tuple[int, int]], now: Seen) -> dict[str, object]:
        inodes = {"silent": set(), "everything": set(now)}.get(self.lie, inodes)
        return {"doubt": None, "flags": ["shm"] if self.lie != "silent" else [], "inodes": [
            {"dev": f"{os.major(dev)}:{os.minor(dev)}", "ino": ino, "how": ["fake"]} for dev, ino in sorted(inodes)]}

    def look(self) -> dict[str, object]:
        return self._report(*self._look())

    def cut(self) -> dict[str, object]:
        inodes, self.seen = self._look()
        self.dirty, self.mapped = inodes, self._mappings()
        return self._report(inodes, self.seen)

    def durable(self) -> dict[str, object]:
        self.dirty = set()
        return {}

    def failed(self) -> dict[str, object]:
        return {}

    def changes(self) -> dict[str, object]:
        now = self._digest()
        if self.lie:
            now = self.digest if self.lie == "silent" else {path: {} for path in now}
        found = []
        for path in sorted(self.digest.keys() | now.keys()):
            old, new = self.digest.get(path), now.get(path)
            if old != new:
                found.append({"path": path.lstrip("/"), "what": "added" if old is None else "removed" if new is None else "content"})
        return {"changes": found, "doubt": None}

    def capture(self) -> dict[str, object]:
        answer = self.changes()
        self.cut()
        self.durable()
        self.digest = self._digest()
        return answer


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--run", "--cgroup", "--rootfs", "--upper", "--without", "--lie"):
        parser.add_argument(name, default=os.environ.get("FAKE_LIE", "") if name == "--lie" else "")
    fake = Fake(parser.parse_args())
    print(json.dumps({"ready": True, "probes": "fake"}), flush=True)
    for line in sys.stdin:
        do = json.loads(line)["do"]
        if not re.fullmatch("look|cut|durable|failed|changes|capture", do):
            return
        began = time.monotonic_ns()
        answer = getattr(fake, do)()
        print(json.dumps({**answer, "us": (time.monotonic_ns() - began) / 1000}), flush=True)


if __name__ == "__main__":
    main()
