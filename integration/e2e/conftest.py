"""Set-up of the end-to-end tests: every test must leave the bed as it found it."""

import fnmatch
import os
import pathlib
import shutil
import tempfile

import pytest

pytest.register_assert_rewrite("harness", "equality", "programs")

import harness  # noqa: E402
import world  # noqa: E402

LOGS = [pathlib.Path(f"/var/log/bed/{name}.log") for name in ("containerd", "dockerd")]
GONE_WITHIN = harness.LIMIT / 2
"""Seconds. containerd ends a shim, and dockerd a container, a little after it has told the client."""


REPORTED = set()
"""What was left by an earlier test is that one's failure alone."""


def _leaves_nothing():
    before = world.snapshot()
    yield
    left = None

    def clean():
        nonlocal left
        left = world.snapshot() - before - REPORTED
        return not left

    try:
        harness.until(clean, "nothing left", GONE_WITHIN)
    except AssertionError:
        REPORTED.update(left)
        # Not every cgroup controller of every container.
        lines = sorted(line for line in left if not line.startswith("cgroup") or "/unified/" in line) or sorted(left)
        more = [f"and {len(lines) - 20} more"] if len(lines) > 20 else []
        pytest.fail("\n".join([f"left behind ({len(left)}):", *lines[:20], *more]), pytrace=False)


@pytest.fixture(scope="module", autouse=True)
def a_module_leaves_nothing():
    yield from _leaves_nothing()


@pytest.fixture(autouse=True)
def a_test_leaves_nothing(a_module_leaves_nothing, request):
    # Containers that a module's tests share are made before the first look.
    for name in ("shared", "pair"):
        if name in request.fixturenames:
            request.getfixturevalue(name)
    yield from _leaves_nothing()


@pytest.fixture
def open_dir():
    """A directory that every user may enter; pytest's own are for root alone."""
    path = pathlib.Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def config():
    """Writes /etc/crab/config.toml for the time of a test."""

    def write(text):
        harness.CONFIG.parent.mkdir(exist_ok=True)
        harness.CONFIG.write_text(text)

    yield write
    harness.CONFIG.unlink(missing_ok=True)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Shows what the daemons (and with containerd's log the shims) said during a test that fails."""
    if call.when == "setup":
        item.log_sizes = {log: log.stat().st_size for log in LOGS if log.exists()}
    report = (yield).get_result()
    if not report.failed:
        return
    for log, size in getattr(item, "log_sizes", {}).items():
        with open(log, "rb") as file:
            file.seek(size)
            lines = file.read().decode(errors="replace").splitlines()[-40:]
        report.sections.append((f"the end of {log}", "\n".join(lines)))


SKIPS = pathlib.Path("/src/integration/skips.txt")
skipped = []


def pytest_runtest_logreport(report):
    if report.skipped:
        skipped.append(report.nodeid.removeprefix("integration/e2e/"))


def pytest_sessionfinish(session):
    """A skip that nobody has listed with its reason is a failure."""
    lines = [line for line in SKIPS.read_text().splitlines() if line and not line.startswith("#")]
    listed = [line.split(maxsplit=1)[0] for line in lines]
    unlisted = [name for name in skipped if not any(fnmatch.fnmatch(name, pattern) for pattern in listed)]
    if unlisted:
        print(f"\nskipped, and not listed in {SKIPS}: {', '.join(unlisted)}")
        session.exitstatus = 1


def pytest_report_header():
    binary = pathlib.Path("/usr/local/bin/containerd-shim-crab-v2")
    return f"bed {os.environ.get('CRAB_BED_ID')}, shim {harness.run(binary, '-v').out.split()[2]}, {os.cpu_count()} cores"
