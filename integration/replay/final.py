#!/usr/bin/env python3
"""final.py A.json B.json C.json: whether the run C ended as the fault-free runs A and B of the same trace did.

The files are those that `replay.py --final` writes. What A and B do not have in common is left out, and printed: the
paths; the directories in which one has a name that the other has not (there, names that neither A nor B share are left out
with all below them); the command lines. Exit: 0 equal, 1 not.
"""
from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "digest"))

import digest  # noqa: E402  (integration/digest)
from constants import FINAL_IGNORED  # noqa: E402

State = dict[str, Any]
VERSION = 1
#: At most so many differences are printed.
SHOWN = 50


def of_sandbox(init: int) -> State:
    """The files that a sandbox has now, and its processes by command line."""
    state = digest.sandbox(init, freeze=True, quick=True)["state"]
    trees = {"": state["tree"], **state["tmpfs"]}
    tree = {point.rstrip("/") + path: {key: value for key, value in entry.items() if key not in FINAL_IGNORED}
            for point, below in trees.items() for path, entry in below.items()}
    commands = Counter(" ".join(entry["cmdline"]) for entry in state["processes"].values() if "cmdline" in entry)
    return {"version": VERSION, "tree": tree, "processes": dict(sorted(commands.items()))}


@dataclass
class Exclusions:
    """What two fault-free runs have not in common."""
    paths: set[str] = field(default_factory=set)
    listings: set[str] = field(default_factory=set)
    commands: set[str] = field(default_factory=set)

    def covers_name(self, path: str) -> bool:
        """Whether a name that no fault-free run shares lies in, or below, a directory where they differ in names."""
        while path not in ("", "/"):
            path = os.path.dirname(path)
            if path in self.listings:
                return True
        return False

    def in_words(self) -> list[str]:
        return [*(f"path {path}" for path in sorted(self.paths)),
                *(f"names in {path}" for path in sorted(self.listings)),
                *(f"command {command}" for command in sorted(self.commands))]


def exclusions(a: State, b: State) -> Exclusions:
    found = Exclusions()
    for path in a["tree"].keys() | b["tree"].keys():
        one, other = a["tree"].get(path), b["tree"].get(path)
        if one is not None and other is not None:
            if one != other:
                found.paths.add(path)
        else:
            above = os.path.dirname(path)
            # Of a directory that only one run has, the directory above it is what differs.
            if above in a["tree"] and above in b["tree"]:
                found.listings.add(above)
    found.commands = {command for command in a["processes"].keys() | b["processes"].keys()
                      if a["processes"].get(command) != b["processes"].get(command)}
    return found


def unequal(a: State, b: State, c: State, but: Exclusions) -> list[str]:
    """Where C is not what both A and B are."""
    found = []
    for path in sorted(a["tree"].keys() | b["tree"].keys() | c["tree"].keys()):
        one, other, third = (state["tree"].get(path) for state in (a, b, c))
        if path in but.paths or one == other == third:
            continue
        if (one is None or other is None) and but.covers_name(path):
            continue
        found.append(f"{path}: {json.dumps(one)} -> {json.dumps(third)}")
    for command in sorted(a["processes"].keys() | c["processes"].keys()):
        if command not in but.commands and a["processes"].get(command) != c["processes"].get(command):
            found.append(f"process {command!r}: {a['processes'].get(command, 0)} -> {c['processes'].get(command, 0)}")
    return found


def main() -> int:
    if len(sys.argv) != 4:
        print(__doc__, file=sys.stderr)
        return 2
    a, b, c = (json.loads(Path(name).read_text()) for name in sys.argv[1:])
    if {state["version"] for state in (a, b, c)} != {VERSION}:
        print("final.py: these are of other versions", file=sys.stderr)
        return 2
    but = exclusions(a, b)
    for line in but.in_words():
        print(f"excluded: {line}")
    found = unequal(a, b, c, but)
    for line in found[:SHOWN]:
        print(f"unequal: {line[:400]}")
    print(f"{'UNEQUAL' if found else 'equal'}: {len(a['tree'])} paths, {sum(a['processes'].values())} processes; "
          f"{len(but.in_words())} exclusions, {len(found)} differences")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
