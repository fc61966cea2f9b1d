"""Where it is measured: file systems, cgroups, and the processes that do the work or stand for the inspector."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def sh(*words: object) -> None:
    subprocess.run([str(w) for w in words], check=True)


class Child:
    """A process that answers each line with one."""

    def __init__(self, words: list[object], cgroup: Path | None = None):
        enter = (lambda: (cgroup / "cgroup.procs").write_text("0")) if cgroup else None
        self.process = subprocess.Popen([str(w) for w in words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=enter)

    def read(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"cost: {self.process.args[0]} ended: {self.process.wait()}")
        return line

    def ask(self, line: str) -> str:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.read()

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Bench(Child):
    def __init__(self, place: Path, cgroup: Path | None, binary: Path):
        super().__init__([binary, place], cgroup)

    def ns(self, op: str, batches: int, microseconds: int) -> float:
        return float(self.ask(f"{op}\t{batches}\t{microseconds}"))

    def do(self, op: str, times: int) -> None:
        self.ask(f"count {op}\t{times}")


class Sandbox(Child):
    """One registered sandbox: the inspector's own driver."""

    def __init__(self, run: Path, cgroup: Path, rootfs: Path):
        super().__init__([os.environ["CRAB_INSPECTOR"], "--run", run, "--cgroup", cgroup, "--rootfs", rootfs])

    def order(self, do: str) -> dict:
        return self.check(json.loads(self.ask(json.dumps({"do": do}))))

    def ready(self) -> None:
        self.check(json.loads(self.read()))

    @staticmethod
    def check(answer: dict) -> dict:
        if "error" in answer:
            raise SystemExit(f"cost: the inspector: {answer['error']}")
        return answer


class Place:
    """Mounts (in this process's own namespace), cgroups and binaries; gone at the end of the `with`."""

    def __enter__(self) -> "Place":
        self.base = Path(tempfile.mkdtemp(prefix="crab-cost-"))
        with open("/proc/self/mounts") as mounts:
            unified = next((line.split()[1] for line in mounts if line.split()[2] == "cgroup2"), None)
        if unified is None:
            raise SystemExit("cost: no cgroup v2 hierarchy is mounted")
        self.cgroups = Path(unified) / f"crab-cost-{os.getpid()}"
        self.cgroups.mkdir()
        for name in ("bench", "empty"):
            sh("cc", "-O2", "-o", self.base / name, HERE / f"{name}.c")
        self.run = self.base / "run"
        self.run.mkdir()
        self.plain = {kind: self._file_system(kind) for kind in ("tmpfs", "ext4")}
        return self

    def __exit__(self, *_: object) -> None:
        for directory, _below, _files in os.walk(self.cgroups, topdown=False):
            os.rmdir(directory)
        with open("/proc/self/mounts") as mounts:
            mine = [line.split()[1] for line in mounts if line.split()[1].startswith(str(self.base))]
        for mount in reversed(mine):
            subprocess.run(["umount", "--lazy", mount], check=False)
        shutil.rmtree(self.base, ignore_errors=True)

    def _file_system(self, kind: str) -> Path:
        mount = self.base / kind
        mount.mkdir()
        if kind == "tmpfs":
            sh("mount", "-t", "tmpfs", "none", mount)
        else:
            # Above tmpfs, so that no disk is waited for.
            sh("truncate", "-s", "2G", self.base / "tmpfs" / "image")
            sh("mkfs.ext4", "-q", self.base / "tmpfs" / "image")
            sh("mount", "-o", "loop", self.base / "tmpfs" / "image", mount)
        return mount

    def directory(self, kind: str, name: str) -> Path:
        """On the file system itself, in no sandbox."""
        made = self.plain[kind] / name
        made.mkdir()
        return made

    def overlay(self, kind: str, name: str) -> Path:
        base = self.directory(kind, f"overlay-{name}")
        for part in ("lower", "upper", "work", "merged"):
            (base / part).mkdir()
        options = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
        sh("mount", "-t", "overlay", "overlay", "-o", options, base / "merged")
        return base / "merged"

    def cgroup(self, name: str) -> Path:
        made = self.cgroups / name
        made.mkdir(exist_ok=True)
        return made
