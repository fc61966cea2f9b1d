"""A sandbox under stock runc and CRIU, without containerd and without crab: what do they alone change?

The checkpoint is taken in one freeze. The restore freezes the cgroup from CRIU's action script, while CRIU still
holds every task before its first instruction (no signal is sent, so none is left pending): the digests of both
freezes must be equal.
"""
from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from typing import Any

import container
import digest
import process

IMAGE = "crab.test/agent:latest"
#: Seconds that anything waited for may take. Only a failure waits so long.
LIMIT = 60.0
#: Freezes the sandbox just before CRIU lets go of the tasks. In cgroup v1 CRIU has moved itself into the sandbox's
#: cgroup to fork the tasks there, so it and this script must leave it first.
_HOLD = """#!/bin/sh
[ "$CRTOOLS_SCRIPT_ACTION" = pre-resume ] || exit 0
if [ -d /sys/fs/cgroup/freezer ]; then
  for pid in $PPID $$; do echo $pid >/sys/fs/cgroup/freezer/cgroup.procs; done
  echo FROZEN >/sys/fs/cgroup/freezer/stock/{name}/freezer.state
else
  for pid in $PPID $$; do echo $pid >/sys/fs/cgroup/cgroup.procs; done
  echo 1 >/sys/fs/cgroup/stock/{name}/cgroup.freeze
fi
"""
_FIRST_INHERITED = 200  # descriptor numbers of `runc restore`, high enough to be free


def run(*command: str, **options: Any) -> str:
    """Runs to the end; a failure shows what was said."""
    done = subprocess.run(command, text=True, capture_output=True, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


class Pipes:
    """stdin, stdout and stderr of one process. `ours` are the ends that stay with us."""

    def __init__(self) -> None:
        stdin, self.stdin = os.pipe()
        self.stdout, stdout = os.pipe()
        self.stderr, stderr = os.pipe()
        self.theirs = [stdin, stdout, stderr]
        self.keys = [f"pipe:[{os.fstat(fd).st_ino}]" for fd in self.theirs]

    def hand_over(self) -> None:
        for fd in self.theirs:
            os.close(fd)


def _layers(point: str) -> str:
    """The image's layers as overlay's lowerdir option. The mounted image itself would not do: CRIU cannot find the
    mount of a program that lies on an overlay on an overlay."""
    run("ctr", "image", "mount", IMAGE, point)
    try:
        options = [mount.super_options for mount in container.mounts("self") if mount.point == point][-1]
    finally:
        run("umount", point)
    return next(option for option in options.split(",") if option.startswith("lowerdir=")).removeprefix("lowerdir=")


class Sandbox:
    """One container with an overlay of its own on the image."""

    def __init__(self, name: str, init: list[str], mounts: list[dict[str, Any]] | None = None):
        self.name = name
        self.dir = tempfile.mkdtemp(prefix=f"stock-{name}-", dir="/var/lib/crab")
        self.rootfs, self.images = f"{self.dir}/rootfs", f"{self.dir}/images-0"
        self.generation = 0
        for directory in (self.rootfs, f"{self.dir}/upper", f"{self.dir}/work"):
            os.mkdir(directory)
        self.lower = _layers(self.rootfs)
        self._mount()
        self.netns = f"/run/netns/{name}"
        run("ip", "netns", "add", name)
        run("ip", "-n", name, "link", "set", "lo", "up")
        self._write_spec(init, mounts or [])
        self.pipes: list[Pipes] = []
        pipes = Pipes()
        self._spawn(["runc", "--log", f"{self.dir}/runc.log", "run", "-d", "--bundle", self.dir, name], pipes)

    def _mount(self) -> None:
        run("mount", "-t", "overlay", "overlay", "-o",
            f"lowerdir={self.lower},upperdir={self.dir}/upper,workdir={self.dir}/work", self.rootfs)

    def _write_spec(self, init: list[str], mounts: list[dict[str, Any]]) -> None:
        run("runc", "spec", cwd=self.dir)
        with open(f"{self.dir}/config.json") as file:
            spec = json.load(file)
        spec["process"] |= {"terminal": False, "args": init}
        spec["root"] = {"path": self.rootfs, "readonly": False}
        spec["mounts"] += mounts
        spec["linux"]["cgroupsPath"] = f"/stock/{self.name}"
        for namespace in spec["linux"]["namespaces"]:
            if namespace["type"] == "network":
                namespace["path"] = self.netns
        spec["annotations"] = {"org.criu.config": f"{self.dir}/criu.conf"}
        for kind in ("bounding", "effective", "permitted"):
            spec["process"]["capabilities"][kind] = ["CAP_" + name for name in (
                "CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE "
                "SYS_CHROOT KILL AUDIT_WRITE SYS_NICE IPC_LOCK").split()]
        with open(f"{self.dir}/config.json", "w") as file:
            json.dump(spec, file)

    def _spawn(self, command: list[str], pipes: Pipes, inherited: list[int] | None = None) -> None:
        stdin, stdout, stderr = pipes.theirs
        done = subprocess.run(command, stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=inherited or [])
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{self.logs()}")
        pipes.hand_over()
        self.pipes.append(pipes)

    def logs(self) -> str:
        text = ""
        for name in (f"{self.dir}/runc.log", f"{self.images}/dump.log", f"{self.images}/restore.log"):
            if os.path.exists(name):
                with open(name, errors="replace") as file:
                    text += f"--- {name}\n" + "".join(
                        line for line in file.readlines()[-200:] if "rror" in line or "Warn" in line)
        return text

    @property
    def init(self) -> int:
        return int(json.loads(run("runc", "state", self.name))["pid"])

    def execute(self, *command: str) -> None:
        """Starts a process. It is in a dump only once the exec has ended: what stays must be started by a shell."""
        self._spawn(["runc", "--log", f"{self.dir}/runc.log", "exec", "-d", self.name, *command], Pipes())

    def rest(self, limit: float = LIMIT, execs_over: bool = False) -> None:
        """Waits until no process wants to run or has used CPU time for 0.3 s. (On a busy machine one may want to run for
        longer than that and use none.)"""
        end, last = time.monotonic() + limit, None
        while time.monotonic() < end:
            parents, states, now = {}, set(), {}
            for pid in process.members(self.init):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    parents[pid] = process._stat(f"/proc/{pid}/stat")[4]
                    states |= {process._stat(f"/proc/{pid}/task/{tid}/stat")[3] for tid in os.listdir(f"/proc/{pid}/task")}
                    now[pid] = process._ran(pid)["cpu_ns"]
            foreign = [pid for pid, parent in parents.items() if int(parent) not in parents and pid != self.init]
            if now == last and not states & {"R", "D"} and not (execs_over and foreign):
                return
            last = now
            time.sleep(0.3)
        raise TimeoutError("the sandbox does not come to rest")

    def settle(self) -> None:
        """The same, and until every exec has ended."""
        self.rest(execs_over=True)

    def checkpoint(self, *flags: str) -> digest.Digest:
        """Freezes, dumps, digests, kills. Returns the digest of the frozen sandbox after the dump."""
        with open(f"{self.dir}/criu.conf", "w") as file:
            file.write("ghost-limit 256M\nnetwork-lock skip\n")
        self.generation += 1
        self.images = f"{self.dir}/images-{self.generation}"
        os.mkdir(self.images)
        run("runc", "pause", self.name)
        command = ["runc", "--log", f"{self.dir}/runc.log", "checkpoint", "--leave-running", "--file-locks",
                   "--tcp-established", "--image-path", self.images, "--work-path", self.images, *flags, self.name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as done:
            try:
                said = done.communicate(timeout=30)[0]
            except subprocess.TimeoutExpired:  # CRIU waits for a task that is frozen and stopped
                container.Freezer(self.init).set(False)
                said = done.communicate()[0]
        if done.returncode != 0:
            raise RuntimeError(f"checkpoint: {said}\n{self.logs()}")
        before = digest.sandbox(self.init, freeze=True)
        container.Freezer(self.init).set(True)
        self._kill()
        return before

    def _kill(self) -> None:
        init = self.init
        freezer = container.Freezer(init)
        run("runc", "kill", self.name, "KILL")
        freezer.set(False)
        end = time.monotonic() + LIMIT
        while json.loads(run("runc", "state", self.name))["status"] != "stopped":
            if time.monotonic() > end:
                raise TimeoutError(f"{self.name} does not die")
            time.sleep(0.01)

    def restore(self, time_namespace: bool = False) -> digest.Digest:
        """Restores, frozen before the first instruction, and digests.

        time_namespace: as CRIU does by itself, in a new time namespace, which later execs do not join (runc knows
        nothing of it): what they leave behind makes the next dump one that cannot be restored. CRIU makes none
        where its image has no clocks. (Starting `runc exec` in that namespace does not do: it then reads another
        start time of init in /proc and takes the container for stopped.)
        """
        run("runc", "delete", self.name)
        with open(f"{self.dir}/criu.conf", "a") as file:
            file.write(f"action-script {self.dir}/hold\n")
        with open(f"{self.dir}/hold", "w") as file:
            file.write(_HOLD.replace("{name}", self.name))
        os.chmod(f"{self.dir}/hold", 0o755)
        if not time_namespace:
            os.unlink(f"{self.images}/timens-0.img")
        old, self.pipes = self.pipes, []
        table: list[str] = json.load(open(f"{self.images}/descriptors.json"))
        init_pipes, inherited, number = Pipes(), [], _FIRST_INHERITED
        new = []
        for pipes in old[1:]:
            fresh = Pipes()
            new.append(fresh)
            for key, fd in zip(pipes.keys, fresh.theirs):
                os.dup2(fd, number)
                table += [""] * (number - len(table)) + [key]
                inherited.append(number)
                number += 1
        for index, key in enumerate(old[0].keys):
            table[index] = key
        with open(f"{self.images}/descriptors.json", "w") as file:
            json.dump(table, file)
        self._spawn(["runc", "--log", f"{self.dir}/runc.log", "restore", "-d", "--file-locks", "--tcp-established",
                     "--image-path", self.images, "--work-path", self.images, "--bundle", self.dir, self.name],
                    init_pipes, inherited)
        for fd in inherited:
            os.close(fd)
        for pipes in new:
            pipes.hand_over()
        self.pipes += new
        container.Freezer(self.init).set(True)  # v1 says FREEZING until the last task has got there
        return digest.sandbox(self.init)

    def thaw(self) -> None:
        run("runc", "resume", self.name)

    def remove(self) -> None:
        """All that was made, whatever state it is in."""
        subprocess.run(["runc", "resume", self.name], capture_output=True)
        subprocess.run(["runc", "delete", "-f", self.name], capture_output=True)
        for command in (["umount", "-l", self.rootfs], ["ip", "netns", "del", self.name]):
            subprocess.run(command, capture_output=True)
        shutil.rmtree(self.dir, ignore_errors=True)
