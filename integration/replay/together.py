"""What all sandboxes of a replay have in common: the daemons, which die with everything below them."""
from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import strikes
from clients import Client, ClientError, call, is_alive, wait_for

import process  # integration/digest, on the path by clients

#: Where a bed (docs/testbed.md) keeps its daemons' pids and logs. Other daemons are none of our business.
PIDS = Path("/run/bed")
LOGS = Path("/var/log/bed")


class Together:
    """A place where all sandboxes meet: when the last has come, the daemons and all sandboxes die at once."""

    def __init__(self, clients: list[Client]):
        self.clients = clients
        self.started: list[subprocess.Popen[bytes]] = []
        self.barrier = threading.Barrier(len(clients), action=self._strike)
        self.failure: ClientError | None = None

    def strike(self) -> None:
        """Returns when the daemons run again. Each sandbox must be at rest, at a boundary that is known."""
        try:
            self.barrier.wait()
        except threading.BrokenBarrierError:
            raise self.failure or ClientError("the replay of another sandbox has failed") from None

    def give_up(self) -> None:
        """Nobody needs to wait for us any more."""
        self.barrier.abort()

    def _strike(self) -> None:
        try:
            self._kill_and_start()
        except ClientError as error:
            self.failure = error
            raise

    def _kill_and_start(self) -> None:
        below: list[int] = []
        for client in self.clients:
            shim = client.shim()
            below += [*([shim] if shim else []), *process.members(client.alive())]
        # The one that would bring others back first.
        daemons = [name for name in ("dockerd", "containerd") if (PIDS / f"{name}.pid").exists()]
        if "containerd" not in daemons:
            raise ClientError(f"{PIDS} knows of no containerd: a fault of kind containerd needs a bed of its own")
        pids = {name: int((PIDS / f"{name}.pid").read_text()) for name in daemons}
        commands = {name: Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
                    for name, pid in pids.items()}
        strikes.kill([*pids.values(), *below])
        for process_ in self.started:
            process_.poll()
        wait_for("all to be dead", lambda: not any(map(is_alive, [*pids.values(), *below])))
        for name in reversed(daemons):
            self._start(name, commands[name])

    def _start(self, name: str, command: list[str]) -> None:
        with open(LOGS / f"{name}.log", "ab") as log:
            daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self.started.append(daemon)
        (PIDS / f"{name}.pid").write_text(f"{daemon.pid}\n")
        probe = {"containerd": ("ctr", "version"), "dockerd": ("docker", "version")}[name]

        def answers() -> bool:
            if daemon.poll() is not None:
                raise ClientError(f"{name} does not start again: exit {daemon.returncode}; its log is in {LOGS}")
            try:
                call(*probe)
            except ClientError:
                return False
            return True

        wait_for(f"{name} to answer again", answers)
