"""What leaves no event in the turn in which it happens: each case of its own."""
from __future__ import annotations

import time
from typing import Iterator

import pytest

from filesystems import available
from stage import Stage

MAP = """
    fd = os.open("file", os.O_RDWR)
    mapping = Mapping(fd, 8192)
    os.close(fd)
    mapping.store(0, b"first")
"""


@pytest.fixture(params=available())
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    """With two files, in the first turn's end."""
    with Stage(request.param) as stage:
        stage.inside.python("""
            for name in ("file", "other"):
                with open(name, "wb") as out:
                    out.write(b"old!" * 2048)
        """)
        stage.turn_ends()
        quiet = stage.turn_ends()
        assert quiet.doubt is None and not quiet.inodes
        yield stage


def reported(stage: Stage, path: str = "file") -> bool:
    report = stage.turn_ends()
    assert report.doubt is None, report.doubt
    return stage.inode(path) in report.inodes


def content(stage: Stage, path: str = "file") -> bytes:
    with open(f"{stage.layer.merged}/{path}", "rb") as source:
        return source.read()


def test_a_mapping_outlives_its_turn(stage: Stage) -> None:
    """Stores into a page that is writable already run no code of the kernel."""
    stage.inside.python(MAP)
    assert reported(stage)
    for text in (b"second", b"third"):
        stage.inside.python(f"mapping.store(0, {text!r})")
        assert content(stage).startswith(text)
        assert reported(stage)


def test_a_mapping_that_nobody_stores_to_counts_until_it_is_gone(stage: Stage) -> None:
    stage.inside.python(MAP)
    stage.turn_ends()
    assert reported(stage)
    stage.inside.python("mapping.unmap()")
    stage.turn_ends()
    assert not reported(stage)


def test_an_old_mapping_is_stored_to_and_unmapped_in_one_turn(stage: Stage) -> None:
    stage.inside.python(MAP)
    stage.turn_ends()
    stage.inside.python("mapping.store(0, b'second'); mapping.unmap()")
    assert reported(stage)


def test_a_process_with_an_old_mapping_exits_after_storing(stage: Stage) -> None:
    other = stage.worker()
    other.python(MAP)
    stage.turn_ends()
    other.python("mapping.store(0, b'second')")
    other.close()
    assert reported(stage)


def test_a_write_in_the_tick_of_the_cut(stage: Stage) -> None:
    """Before and after, as close together as can be; the inode is dirty already."""
    for _ in range(20):
        stage.inside.python("fd = os.open('file', os.O_WRONLY); os.pwrite(fd, b'before', 0)")
        stage.driver.cut()
        stage.driver.durable()
        stage.inside.python("os.pwrite(fd, b'after', 0); os.close(fd)")
        assert reported(stage)


def test_a_child_keeps_the_mapping_that_its_parent_gave_up(stage: Stage) -> None:
    stage.inside.python(MAP + """
    go, done = os.pipe(), os.pipe()
    if not os.fork():
        os.read(go[0], 1)
        mapping.store(0, b"child")
        os.write(done[1], b"x")
        os.read(go[0], 1)
        os._exit(0)
    mapping.unmap()
    """)
    stage.turn_ends()
    stage.turn_ends()
    stage.inside.python("os.write(go[1], b'x'); os.read(done[0], 1)")
    assert content(stage).startswith(b"child")
    assert reported(stage)
    stage.inside.python("os.write(go[1], b'x'); os.wait()")


def test_a_process_in_a_descendant_cgroup_keeps_a_mapping(stage: Stage) -> None:
    child = stage.cgroup.child("deeper")
    stage.inside.python(f"with open({child!r} + '/cgroup.procs', 'w') as procs: procs.write('0')")
    stage.inside.python(MAP)
    stage.turn_ends()
    stage.inside.python("mapping.store(0, b'second')")
    assert reported(stage)


def test_an_outsider_keeps_a_mapping(stage: Stage) -> None:
    """As nsenter could have one."""
    stage.outside.python(MAP)
    assert reported(stage)
    stage.turn_ends()
    stage.outside.python("mapping.store(0, b'second')")
    assert content(stage).startswith(b"second")
    assert reported(stage)


def test_an_outsider_stores_into_the_sandbox_memory(stage: Stage) -> None:
    """process_vm_writev, as a debugger has it."""
    address = stage.inside.python(MAP + "\n    answer = mapping.address")
    stage.turn_ends()
    stage.outside.python(f"sc.process_vm_write({stage.inside.pid}, {address}, b'debugger')")
    assert content(stage).startswith(b"debugger")
    assert reported(stage)


@pytest.mark.parametrize("flags", ["os.O_DIRECT", "0"])
def test_asynchronous_io_is_in_flight_at_the_cut(stage: Stage, flags: str) -> None:
    stage.inside.python(f"""
        buffer, context = sc.aligned(b"a" * 4096), sc.Aio()
        fd = os.open("file", os.O_RDWR | {flags})
        context.submit_write(fd, buffer.address, 4096, 0)
    """)
    assert reported(stage)
    stage.inside.python("context.wait()")
    assert reported(stage)  # the data may have come after the copy
    stage.inside.python("context.close(); os.close(fd)")
    stage.turn_ends()
    assert not reported(stage)


def test_a_ring_has_a_request_in_flight_at_the_cut(stage: Stage) -> None:
    """A write that waits for another request, a read of an empty pipe."""
    stage.inside.python("""
        ring, ends = uring.Ring(), os.pipe()
        fd = os.open("file", os.O_RDWR)
        buffer = sc.aligned(bytes(4096))
        ring.submit(22, ends[0], buffer.address, 4, -1)  # OP_READ
        ring.submit(uring.OP_WRITE, fd, ring.text(b"later"), 5, 0, sqe_flags=2)  # IOSQE_IO_DRAIN
    """)
    stage.turn_ends()
    stage.turn_ends()
    stage.inside.python("os.write(ends[1], b'go!!'); ring.wait(); ring.wait()")
    assert content(stage).startswith(b"later")
    assert reported(stage)


def test_a_buffer_of_a_ring_pins_pages_of_a_file_that_is_no_longer_mapped(stage: Stage) -> None:
    """On tmpfs such pages can be written without a mapping and without an event."""
    pinned = stage.inside.python(MAP + """
    ring = uring.Ring()
    try:
        ring.register(mapping)
        answer = True
    except OSError as error:
        answer = str(error)
    address = mapping.address
    mapping.unmap()
    source = os.open("other", os.O_RDONLY)
    """)
    if pinned is not True:
        assert stage.layer.fs != "tmpfs" and "Bad address" in pinned  # file systems on disks forbid it
        return
    stage.turn_ends()
    stage.turn_ends()
    stage.inside.python("ring.run(4, source, address, 100, 0)")  # OP_READ_FIXED
    assert not content(stage).startswith(b"first")
    assert reported(stage)


def test_a_failed_capture_leaves_everything_dirty(stage: Stage) -> None:
    stage.inside.python("os.chmod('file', 0o600)")
    assert stage.inode("file") in stage.driver.cut().inodes
    stage.driver.failed()
    stage.inside.python("os.chmod('other', 0o600)")
    again = stage.driver.cut()
    assert {stage.inode("file"), stage.inode("other")} <= again.inodes.keys()
    stage.driver.durable()
    assert not reported(stage)


def test_looking_resets_nothing(stage: Stage) -> None:
    stage.inside.python("os.chmod('file', 0o600)")
    for _ in range(3):
        assert stage.inode("file") in stage.driver.look().inodes
    assert reported(stage)


def test_writes_during_the_cut_are_in_it_or_in_the_next(stage: Stage) -> None:
    """A writer that never rests. What the file is when all is frozen, after the cut, is what a capture would read."""
    # It may not have been given a CPU before the first cut.
    copy = content(stage)
    stage.inside.python("""
        import threading
        stop = False
        def scribble():
            fd, count = os.open("file", os.O_WRONLY), 0
            while not stop:
                os.pwrite(fd, b"%08d" % count, 0)
                count += 1
        thread = threading.Thread(target=scribble)
        thread.start()
    """)
    for _ in range(10):
        stage.cgroup.freeze()
        report = stage.driver.cut()
        now = content(stage)
        assert now == copy or stage.inode("file") in report.inodes
        copy = now
        stage.cgroup.thaw()
        stage.driver.durable()
    # The writer has to be given a CPU after the last cut, however busy the machine is.
    for _ in range(1000):
        if content(stage) != copy:
            break
        time.sleep(0.01)
    stage.inside.python("stop = True; thread.join()")
    assert content(stage) != copy and reported(stage)
