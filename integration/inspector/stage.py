"""A sandbox with everything around it: file system, overlay, cgroup, a worker inside and one outside, the inspector."""
from __future__ import annotations

import contextlib
import os
from types import TracebackType
from typing import Callable

from driver import Driver, Inode, Report
from filesystems import Layer
from sandbox import Cgroup
from worker import Worker


class Stage:
    """`furnish`: fills the lower directory before the overlay is mounted. Wants syscalls.private_mounts."""

    def __init__(self, fs: str, binary: str = "", furnish: Callable[[str], None] = lambda lower: None, name: str = "",
                 without: tuple[str, ...] = ()):
        self._stack = contextlib.ExitStack()
        try:
            self.layer = self._stack.enter_context(Layer(fs))
            furnish(self.layer.lower)
            self.layer.join()
            self.cgroup = self._stack.enter_context(Cgroup(name or fs))
            self.inside = self._stack.enter_context(Worker(f"{self.cgroup.path}/cgroup.procs"))
            self.outside = self._stack.enter_context(Worker())
            for worker in (self.inside, self.outside):
                worker.python(f"import mmap, os, struct, sys; root = {self.layer.merged!r}; os.chdir(root)\n"
                              "import syscalls as sc, uring; from syscalls import Mapping")
            self.driver = self._stack.enter_context(
                Driver(self.cgroup.path, self.layer.merged, self.layer.upper, without, binary))
        except BaseException:
            self._stack.close()
            raise

    def worker(self) -> Worker:
        """One more process inside."""
        worker = self._stack.enter_context(Worker(f"{self.cgroup.path}/cgroup.procs"))
        worker.python(f"import mmap, os, struct, sys; root = {self.layer.merged!r}; os.chdir(root)\n"
                      "import syscalls as sc, uring; from syscalls import Mapping")
        return worker

    def inode(self, path: str) -> Inode:
        """Of a file, in the writable layer."""
        st = os.lstat(f"{self.layer.upper}/{path}")
        return st.st_dev, st.st_ino

    def turn_ends(self) -> Report:
        """Freeze, cut, thaw, durable."""
        self.cgroup.freeze()
        try:
            report = self.driver.cut()
        finally:
            self.cgroup.thaw()
        self.driver.durable()
        return report

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()
