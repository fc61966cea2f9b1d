"""All tests here mount file systems: in a mount namespace of their own, so that nothing stays behind."""

import os
import pathlib
import subprocess
import tempfile

import pytest

pytest.register_assert_rewrite("watcher")

import watcher  # noqa: E402
from syscalls import private_mounts  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def mounts():
    assert os.geteuid() == 0, "needs root"
    private_mounts()


@pytest.fixture(scope="session")
def base(mounts):
    """Memory, so that an inode number is never used twice; gone with this process' mount namespace."""
    path = pathlib.Path(tempfile.mkdtemp(prefix="crab-life-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755,size=1g", "crab-life", path], check=True)
    yield path
    subprocess.run(["umount", "-l", path], check=True)
    path.rmdir()


@pytest.fixture(scope="session")
def builds(base):
    """Two builds that differ in their programs."""
    return watcher.Build(base), watcher.Build(base)


@pytest.fixture
def bed(base):
    made = watcher.Bed(base)
    yield made
    made.close()
