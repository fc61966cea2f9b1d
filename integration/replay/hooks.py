"""Digests of what a sandbox is in crab's own freezes: hook_digest.sh as crab's hook."""
from __future__ import annotations

import contextlib
import os
import shutil
import threading
from pathlib import Path
from typing import Any, Iterator

from clients import Client, ClientError

import digest  # integration/digest, on the path by clients

#: Where crab looks for programs to run in a freeze; arguments: namespace, id, host pid of init.
HOOKS = Path("/etc/crab/hooks")
#: Where hook_digest.sh leaves its digests, and for which sandboxes it makes any. Same layout as in the script.
RESULTS = Path("/run/crab-replay")
HOOK = Path(__file__).resolve().with_name("hook_digest.sh")
MOMENTS = ("frozen", "restored")



class Hooks:
    """Installs hook_digest.sh for as long as one fault takes, so that other turns' freezes stay short.

    The links are there as long as any sandbox of this process needs them, the results' directory for this one's time.
    """

    _lock = threading.Lock()
    _users = 0

    def __init__(self, client: Client):
        self.results = RESULTS / client.namespace / client.id

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        shutil.rmtree(self.results, ignore_errors=True)
        self.results.mkdir(parents=True, mode=0o700)
        try:
            self._link()
            yield
        finally:
            shutil.rmtree(self.results, ignore_errors=True)
            self._unlink()

    @classmethod
    def _link(cls) -> None:
        with cls._lock:
            cls._users += 1
            if cls._users == 1:
                HOOKS.mkdir(parents=True, exist_ok=True)
                for moment in MOMENTS:
                    (HOOKS / moment).unlink(missing_ok=True)
                    os.symlink(HOOK, HOOKS / moment)

    @classmethod
    def _unlink(cls) -> None:
        with cls._lock:
            cls._users -= 1
            if cls._users == 0:
                for moment in MOMENTS:
                    (HOOKS / moment).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # somebody else has hooks there
                    HOOKS.rmdir()

    def forget(self, moment: str) -> None:
        """What it saw up to now is not what is waited for."""
        (self.results / f"{moment}.json").unlink(missing_ok=True)

    def result(self, moment: str) -> dict[str, Any] | None:
        path = self.results / f"{moment}.json"
        return digest.load(str(path)) if path.exists() else None

    def log(self, moment: str) -> str:
        """What hook_digest.sh said, for people."""
        with contextlib.suppress(OSError):
            return (self.results / f"{moment}.log").read_text(errors="replace")[-500:] or "it said nothing"
        return "it was not run"


def of_cut(hooks: Hooks, moment: str) -> dict[str, Any]:
    """What the hook saw in crab's own freeze. Without it nothing would be proved."""
    found = hooks.result(moment)
    if found is None:
        raise ClientError(f"crab's {moment!r} hook left no digest: {hooks.log(moment)}")
    return found
