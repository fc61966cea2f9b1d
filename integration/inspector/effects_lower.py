"""Effects on what lies in the lower layer: copying up, whiteouts, opaque directories."""
from __future__ import annotations

import os
import shutil
from typing import Iterator

from effects import Place, effect, everywhere

Steps = Iterator[None]


@effect(". +lf", lower=True)
def lower_append(t: Place) -> Steps:
    yield
    t.write("lf", b"more", os.O_WRONLY | os.O_APPEND)


@effect(". +lf", lower=True)
def lower_open_RDWR_only(t: Place) -> Steps:
    """Copied up, and that is all."""
    yield
    os.close(t.open("lf", os.O_RDWR))


@effect(". +lf", lower=True)
def lower_chmod(t: Place) -> Steps:
    yield
    os.chmod(t / "lf", 0o600)


@effect(". +lf", lower=True)
def lower_chown(t: Place) -> Steps:
    yield
    os.chown(t / "lf", 1000, 1000)


@effect(". +lf", lower=True)
def lower_utimensat(t: Place) -> Steps:
    yield
    os.utime(t / "lf", (1, 2))


@effect(". +lf", lower=True)
def lower_truncate(t: Place) -> Steps:
    yield
    os.truncate(t / "lf", 10)


@effect(". +lf", lower=True)
def lower_O_TRUNC(t: Place) -> Steps:
    yield
    os.close(t.open("lf", os.O_WRONLY | os.O_TRUNC))


@effect(". +lf", lower=True)
def lower_setxattr(t: Place) -> Steps:
    yield
    os.setxattr(t / "lf", "user.new", b"value")


@effect(". +lf +lf2", lower=True)
def lower_rename(t: Place) -> Steps:
    yield
    os.rename(t / "lf", t / "lf2")


@effect(". +lf +lf2", lower=True)
def lower_link(t: Place) -> Steps:
    yield
    os.link(t / "lf", t / "lf2")


@effect(". +lf", lower=True)
def lower_unlink(t: Place) -> Steps:
    """Leaves a whiteout."""
    yield
    os.unlink(t / "lf")


@effect(". lf +lf", lower=True)
def lower_copied_up_unlink(t: Place) -> Steps:
    os.close(t.open("lf", os.O_RDWR))
    yield
    os.unlink(t / "lf")


@effect(". +lf", lower=True)
def lower_creat_over_whiteout(t: Place) -> Steps:
    os.unlink(t / "lf")
    yield
    t.write("lf")


@effect(". +lf", lower=True)
def lower_rename_over(t: Place) -> Steps:
    yield
    os.rename(t / "g", t / "lf")


@effect(". +lsym", lower=True)
def lower_lchown_symlink(t: Place) -> Steps:
    yield
    os.chown(t / "lsym", 1000, 1000, follow_symlinks=False)


@effect(". +lsym", lower=True)
def lower_unlink_symlink(t: Place) -> Steps:
    yield
    os.unlink(t / "lsym")


@effect(". +s", lower=True)
def lower_directory_chmod(t: Place) -> Steps:
    yield
    os.chmod(t / "s", 0o700)


@effect(". +s +s/new", lower=True)
def lower_subdirectory_creat(t: Place) -> Steps:
    yield
    t.write("s/new")


@effect(". +s +s/deep +s/deep/z", lower=True)
def lower_deep_append(t: Place) -> Steps:
    """A whole path of directories is copied up."""
    yield
    t.write("s/deep/z", b"more", os.O_WRONLY | os.O_APPEND)


@effect(". +s", lower=True)
def lower_opaque_directory(t: Place) -> Steps:
    yield
    shutil.rmtree(t / "s")
    os.mkdir(t / "s")


@effect(". +s", lower=True)
def lower_mkdir_over_whiteout(t: Place) -> Steps:
    shutil.rmtree(t / "s")
    yield
    os.mkdir(t / "s")


@effect(". +s", lower=True)
def lower_directory_rm(t: Place) -> Steps:
    yield
    shutil.rmtree(t / "s")


@effect(". +s", lower=True, refused=everywhere("EXDEV"))
def lower_directory_rename(t: Place) -> Steps:
    """Refused where the kernel's default is redirect_dir=off: mv copies."""
    yield
    os.rename(t / "s", t / "s2")


@effect("lf", lower=True)
def write_old_descriptor_after_copy_up(t: Place) -> Steps:
    fd = t.open("lf")
    yield
    os.write(fd, b"copied")
    yield
    os.close(fd)


# Copying up changes the directories of the writable layer without a trace on overlay's own inodes. For an outsider,
# whom no cgroup gives away, only what was wanted is reported: a new inode in a directory that is not. Whoever asks
# must search the layer for an inode that he does not know.


@effect("+lf", lower=True, outside=True)
def outsider_lower_append(t: Place) -> Steps:
    yield
    t.write("lf", b"more", os.O_WRONLY | os.O_APPEND)


@effect("+lf", lower=True, outside=True)
def outsider_lower_chmod(t: Place) -> Steps:
    yield
    os.chmod(t / "lf", 0o600)


@effect(".", lower=True, outside=True)
def outsider_lower_unlink(t: Place) -> Steps:
    yield
    os.unlink(t / "lf")


@effect("+s/deep +s/deep/new", lower=True, outside=True)
def outsider_lower_deep_creat(t: Place) -> Steps:
    """Copies directories up on the way: docker cp into a directory of the image."""
    yield
    t.write("s/deep/new")
