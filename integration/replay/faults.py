"""One fault: the sandbox dies after a turn, crab brings it back, and the two states are compared."""
from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Iterator

from clients import Client, wait_for
from crab import Crab

import digest  # integration/digest, on the path by clients
from diff import Difference, differences

#: Where crab looks for programs to run in a freeze; arguments: namespace, id, host pid of init.
HOOKS = Path("/etc/crab/hooks")
#: Where hook_digest.sh leaves its digests, and for which sandboxes it makes any. Same layout as in the script.
RESULTS = Path("/run/crab-replay")
HOOK = Path(__file__).resolve().with_name("hook_digest.sh")
MOMENTS = ("frozen", "restored")

#: What a process that has run may have changed: its memory, where it is, and how far it has read or written.
RAN_ON = frozenset({"pages", "threads", "descriptors", "mappings", "ShdPnd"})
#: At most this many differences are kept for the report.
KEPT = 200


@dataclass
class Fault:
    """The outcome. Times in milliseconds.

    mode: "exact" if both digests were taken within crab's own freezes, so that not one instruction lies between
    them: then everything must be equal. "outside" if one was taken by the replayer: then processes that differ only
    in what a running process changes are `ran_on`, and no failure.
    """
    turn: int
    mode: str
    before: str
    after: str
    processes: int
    exact: list[str] = field(default_factory=list)
    ran_on: list[str] = field(default_factory=list)
    unequal: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    digest_ms: list[float] = field(default_factory=list)
    kill_ms: float = 0.0
    restore_ms: float = 0.0

    @property
    def is_equal(self) -> bool:
        return not self.unequal

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"equal": self.is_equal}


class Hooks:
    """Installs hook_digest.sh for as long as one fault takes, so that other turns' freezes stay short."""

    def __init__(self, client: Client):
        self.results = RESULTS / client.namespace / client.id

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        shutil.rmtree(self.results, ignore_errors=True)
        self.results.mkdir(parents=True, mode=0o700)
        HOOKS.mkdir(parents=True, exist_ok=True)
        try:
            for moment in MOMENTS:
                with contextlib.suppress(FileNotFoundError):
                    (HOOKS / moment).unlink()
                os.symlink(HOOK, HOOKS / moment)
            yield
        finally:
            shutil.rmtree(self.results, ignore_errors=True)
            for moment in MOMENTS:
                with contextlib.suppress(FileNotFoundError):
                    (HOOKS / moment).unlink()

    def result(self, moment: str) -> dict[str, Any] | None:
        path = self.results / f"{moment}.json"
        return digest.load(str(path)) if path.exists() else None


def take(client: Client, from_hook: dict[str, Any] | None) -> tuple[dict[str, Any], bool]:
    """(digest, whether crab's own freeze gave it)."""
    if from_hook is not None:
        return from_hook, True
    return digest.sandbox(client.alive(), freeze=True), False


def crash_and_restore(client: Client, crab: Crab, hooks: Hooks, turn: int, keep: Path | None) -> Fault:
    """The fault itself. The turn's checkpoint is durable, and was taken with the hooks installed.

    keep: a directory for both digests as JSON.
    """
    before, in_cut = take(client, hooks.result("frozen"))
    old = client.alive()
    started = time.monotonic()
    client.crash()
    killed = time.monotonic()
    crab.arm()
    client.start_again()
    wait_for("the restored init", lambda: client.init_pid() not in (None, old))
    ended = time.monotonic()
    after, in_restore = take(client, hooks.result("restored"))
    if keep:
        digest.save(before, str(keep / f"turn-{turn}-before.json"))
        digest.save(after, str(keep / f"turn-{turn}-after.json"))
    fault = judge(turn, before, after, "exact" if in_cut and in_restore else "outside")
    fault.digest_ms = [round((d["observed"]["ended_s"] - d["observed"]["started_s"]) * 1000) for d in (before, after)]
    fault.kill_ms, fault.restore_ms = (killed - started) * 1000, (ended - killed) * 1000
    return fault


def judge(turn: int, before: dict[str, Any], after: dict[str, Any], mode: str) -> Fault:
    """Compares. In mode "outside" a process may have run on; everything else must be equal."""
    found = differences(before, after)
    fault = Fault(turn, mode, before["digest"], after["digest"], len(before["state"]["processes"]),
                  differences=[str(difference) for difference in found[:KEPT]])
    changed: dict[str, list[Difference]] = {}
    for difference in found:
        if difference.process is None:
            fault.unequal.append(" ".join(difference.path))
        else:
            changed.setdefault(difference.process, []).append(difference)
    for process in before["state"]["processes"].keys() | changed.keys():
        its = changed.get(process, [])
        if not its:
            fault.exact.append(process)
        elif mode == "outside" and all(len(d.path) > 2 and d.path[2] in RAN_ON for d in its):
            fault.ran_on.append(process)
        else:
            fault.unequal.append(f"process {process}")
    fault.unequal = fault.unequal[:KEPT]
    return fault
