#!/usr/bin/env python3
"""digest.py: what a sandbox is, as one number and as the JSON behind it, to tell whether two of them are equal.

  digest.py sandbox --pid INIT_PID [--json OUT] [--freeze] [--quick]   a running (frozen or idle) sandbox
  digest.py tree DIR [--json OUT]                                      a file tree
  digest.py diff A.json B.json                                         every difference; exit 1 if there is any
  digest.py definition                                                 what is not compared, and why

Needs root. Shares no code with crab. What is part of a state: docs/state.md.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import time
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import container  # noqa: E402
import definition  # noqa: E402
import process  # noqa: E402
import tree  # noqa: E402
from diff import differences  # noqa: E402

Digest = dict[str, Any]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def finish(state: dict[str, Any], observed: dict[str, Any]) -> Digest:
    """Adds the numbers: one for each part, one for all."""
    parts = {name: _hash(part) for name, part in state.items()}
    return {"version": definition.VERSION, "digest": _hash([definition.VERSION, parts]), "parts": parts,
            "observed": observed, "state": state}


def sandbox(pid: int, freeze: bool = False, quick: bool = False) -> Digest:
    """The digest of the sandbox whose init is the process `pid`."""
    started = time.clock_gettime(time.CLOCK_BOOTTIME)
    with container.frozen(pid) if freeze else contextlib.nullcontext():
        mounts = container.mounts(pid)
        state: dict[str, Any] = {}
        inodes: dict[tuple[int, int], str] = {}
        state["tree"], state["tmpfs"] = _trees(pid, mounts, inodes)
        state["processes"], ran = process.processes(pid, inodes, quick)
        if not quick:
            state["mounts"] = container.describe_mounts(mounts)
            state["external"] = container.external_mounts(mounts)
            state["limits"] = container.limits(pid)
            state["names"] = container.host_name(pid)
            state["network"] = container.network(pid)
            state["ipc"] = container.ipc_objects(pid)
    ended = time.clock_gettime(time.CLOCK_BOOTTIME)
    return finish(state, {"ran": ran, "started_s": started, "ended_s": ended})


def _trees(pid: int, mounts: list[container.Mount],
           inodes: dict[tuple[int, int], str]) -> tuple[tree.Tree, dict[str, tree.Tree]]:
    """The root's tree and those of the tmpfs mounts. Other mounts are noted in them by name, and not entered."""
    points = frozenset(mount.point for mount in mounts)
    root = os.open(f"/proc/{pid}/root", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        scan = tree.Scan(root, points)
        inodes.update(scan.inodes)
        extra = {}
        for point in container.extra_trees(mounts):
            scan_of_point = _scan_mount(root, point, points)
            if scan_of_point is not None:
                extra[point] = scan_of_point.tree
                for key, path in scan_of_point.inodes.items():
                    inodes.setdefault(key, point + path.rstrip("/"))
        return scan.tree, extra
    finally:
        os.close(root)


def _scan_mount(root: int, point: str, points: frozenset[str]) -> tree.Scan | None:
    """None where a directory is not reachable: the mount lies on a file, or below a later one."""
    try:
        fd = os.open("." + point, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        below = frozenset(other.removeprefix(point) for other in points if other.startswith(point + "/"))
        return tree.Scan(fd, below, definition.TMPFS_MTIME_NS)
    finally:
        os.close(fd)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("sandbox")
    verb.add_argument("--pid", type=int, required=True, help="the sandbox's init, as the caller sees it")
    verb.add_argument("--json", metavar="OUT")
    verb.add_argument("--freeze", action="store_true", help="freeze its cgroup around the reading")
    verb.add_argument("--quick", action="store_true", help="only the tree and the list of processes")
    verb = verbs.add_parser("tree")
    verb.add_argument("directory")
    verb.add_argument("--json", metavar="OUT")
    verb = verbs.add_parser("diff")
    verb.add_argument("before")
    verb.add_argument("after")
    verbs.add_parser("definition")
    args = parser.parse_args()
    return _VERBS[args.verb](args)


def _run_sandbox(args: argparse.Namespace) -> int:
    return _report(sandbox(args.pid, args.freeze, args.quick), args.json)


def _run_tree(args: argparse.Namespace) -> int:
    return _report(finish({"tree": tree.scan_directory(args.directory).tree}, {}), args.json)


def _report(digest: Digest, out: str | None) -> int:
    if out:
        save(digest, out)
    print(f"sha256:{digest['digest']}")
    return 0


def save(digest: Digest, out: str) -> None:
    """For root alone: it holds environments and the names of everything."""
    fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "w") as file:
        json.dump(digest, file, sort_keys=True, indent=1)
        file.write("\n")


def load(path: str) -> Digest:
    with open(path) as file:
        return json.load(file)


def _run_diff(args: argparse.Namespace) -> int:
    before, after = load(args.before), load(args.after)
    found = differences(before, after)
    for difference in found:
        print(difference)
    print(f"before sha256:{before['digest']}\nafter  sha256:{after['digest']}\n{len(found)} differences")
    return 1 if found else 0


def _run_definition(_: argparse.Namespace) -> int:
    print(definition.text())
    return 0


_VERBS = {"sandbox": _run_sandbox, "tree": _run_tree, "diff": _run_diff, "definition": _run_definition}

if __name__ == "__main__":
    sys.exit(main())
