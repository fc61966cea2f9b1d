"""`crab doctor`: what a host offers, against what others say of the same host, and against machines that we know."""

import json
import os
import pathlib
import platform
import re

import pytest

from harness import crab, run
from test_cli import on_terminal

MACHINES = {
    r"6\.18\.\d+-fc-": {
        "cgroups": ("limited", {"layout": "hybrid"}),
        "freezer": ("ok", {}),
        "btf": ("ok", {}),
        "tp_btf": ("ok", {"missing": []}),
        "fentry": ("missing", {}),
        "inspector": ("ok", {"probes": "tp_btf"}),
        "packet_lock": ("ok", {}),
        "soft_dirty": ("missing", {}),
        "clear_refs": ("missing", {}),
        "pagemap_scan": ("ok", {}),
        "capabilities": ("limited", {"missing": ["CAP_SYS_RESOURCE"]}),
        "criu_check": ("ok", {}),
        "runc": ("ok", {}),
        "crun": ("limited", {}),
        "store": ("ok", {"file_system": "ext4"}),
        "containerd": ("ok", {"file_system": "ext4"}),
    },
    r"6\.12\..*\+deb13-cloud": {
        "cgroups": ("ok", {"layout": "v2", "v1": []}),
        "freezer": ("ok", {}),
        "btf": ("ok", {}),
        "tp_btf": ("missing", {}),
        "fentry": ("ok", {}),
        "inspector": ("ok", {"probes": "fentry"}),
        "packet_lock": ("ok", {}),
        "soft_dirty": ("ok", {}),
        "clear_refs": ("ok", {}),
        "pagemap_scan": ("ok", {}),
        "capabilities": ("ok", {"missing": []}),
        "criu_check": ("ok", {}),
        "runc": ("ok", {}),
        "crun": ("ok", {}),
        "store": ("ok", {}),
    },
}
"""By the kernel's release: verdicts, and some of the facts."""


@pytest.fixture(scope="module")
def doctor():
    return json.loads(crab("doctor", "--json").out)


@pytest.fixture
def path(tmp_path):
    """A PATH with links to some programs alone, and with programs of our own."""

    def make(*names, **scripts):
        for name in names:
            (tmp_path / name).symlink_to(run("which", name).out.strip())
        for name, text in scripts.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
        return {"PATH": str(tmp_path)}

    return make


CRAB = "/usr/local/bin/crab"


def missed(env, *said, json_flag=()):
    """It cannot run for this reason alone; returns what stands on stdout."""
    done = run(CRAB, *json_flag, "doctor", env=env, check=False)
    assert done.rc == 1, done
    assert re.fullmatch(r"crab: crab cannot run here: [^\n]+\n", done.err), done
    for part in said:
        assert part in done.err, (part, done)
    return done.out


def test_machines_that_we_know(doctor):
    release = platform.release()
    known = [checks for pattern, checks in MACHINES.items() if re.match(pattern, release)]
    for name, (verdict, facts) in {} if not known else known[0].items():
        check = doctor["checks"][name]
        assert check["verdict"] == verdict, (name, check)
        assert facts.items() <= check["facts"].items(), (name, check)


def test_what_others_say_of_this_host(doctor):
    checks = doctor["checks"]
    assert (doctor["can_run"], doctor["root"]) == (True, True)
    verdict = {name: check["verdict"] for name, check in checks.items()}
    facts = {name: check["facts"] for name, check in checks.items()}
    assert facts["kernel"] == {"release": platform.release(), "machine": platform.machine()}

    mounted = {line.split()[2] for line in pathlib.Path("/proc/self/mounts").read_text().splitlines()}
    layout = {(True, False): "v1", (True, True): "hybrid", (False, True): "v2"}["cgroup" in mounted, "cgroup2" in mounted]
    assert facts["cgroups"]["layout"] == layout
    assert facts["bpffs"]["mounted"] == ("bpf" in mounted)

    # CRIU asks the kernel in ways of its own.
    for name, feature in {"soft_dirty": "mem_dirty_track", "pagemap_scan": "pagemap_scan"}.items():
        has = run("criu", "check", "--feature", feature, check=False).rc == 0
        assert verdict[name] == ("ok" if has else "missing"), (name, checks[name])
    types = pathlib.Path("/sys/kernel/btf/vmlinux").read_bytes()
    newest = b"\0btf_trace_ctime_ns_xchg\0" in types
    assert verdict["tp_btf"] == ("ok" if newest else "missing"), checks["tp_btf"]

    status = pathlib.Path("/proc/self/status").read_text()
    has = int(re.search(r"^CapEff:\s*(\w+)$", status, re.M)[1], 16)
    for name, bit in {"CAP_SYS_ADMIN": 21, "CAP_SYS_RESOURCE": 24, "CAP_BPF": 39}.items():
        assert (name in facts["capabilities"]["missing"]) == (not has >> bit & 1), (name, checks["capabilities"])

    assert facts["criu"]["version"] in run("criu", "--version").out
    for name in ("runc", "crun"):
        assert facts[name]["version"] in run(name, "--version").out.splitlines()[0]
    for name, path in {"store": "/var/lib/crab", "containerd": "/var/lib/containerd", "docker": "/var/lib/docker"}.items():
        assert facts[name]["path"] == path
        assert facts[name]["file_system"] == run("findmnt", "-no", "FSTYPE", "-T", path).out.strip()


def test_it_leaves_nothing(doctor):
    before = {path: sorted(os.listdir(path)) for path in ("/var/lib/crab", "/var/lib/containerd", "/run", "/tmp", "/")}
    crab("doctor")
    assert {path: sorted(os.listdir(path)) for path in before} == before


def test_a_line_for_each(doctor):
    head, *lines = crab("doctor").out.splitlines()
    assert re.split(r"  +", head) == ["WHAT", "FOUND", "VERDICT", "WITHOUT IT"]
    rows = [re.split(r"  +", line) for line in lines]
    found = sorted((row[2], row[3]) for row in rows)
    assert found == sorted((check["verdict"], check["without"]) for check in doctor["checks"].values())
    code, said = on_terminal("crab", "doctor")
    assert code == 0 and "\x1b[32mok" in said, said


def test_without_criu_or_runc_it_cannot_run(path):
    assert "cgroup" in missed(path(), "CRIU (not on PATH)", "runc (not on PATH)")


def test_without_criu_alone(path):
    out = json.loads(missed(path("runc"), "CRIU (not on PATH)", json_flag=["--json"]))
    assert out["can_run"] is False
    checks = out["checks"]
    assert checks["criu"]["verdict"] == "missing" and checks["criu"]["without"].startswith("cannot run"), checks
    assert checks["runc"]["verdict"] == "ok" and checks["crun"]["needed"] is False, checks


def test_a_check_that_fails_says_why(path):
    env = path("runc", criu='case $1 in check) echo "Error (criu/cr-check.c:1): no such thing" >&2; exit 1;; *) echo "Version: 4.2";; esac')
    out = missed(env, "criu check (", "no such thing")
    assert re.search(r"^CRIU  +4\.2, .*  ok  ", out, re.M), out


def test_the_runtime_that_is_configured_is_the_one_that_is_needed(path, config):
    config('runtime = "/opt/nowhere/runc"\n')
    missed(None, "runc (there is no /opt/nowhere/runc)")
    config('runtime = "crun"\n')
    checks = json.loads(run(CRAB, "doctor", "--json", check=False).out)["checks"]
    assert checks["runc"]["needed"] is False and checks["crun"]["needed"] is True
    hybrid = checks["cgroups"]["facts"]["layout"] == "hybrid"
    assert checks["crun"]["verdict"] == ("missing" if hybrid else "ok"), checks["crun"]


def test_a_store_in_memory_is_limited(config):
    config('store = "/run/crab-store"\n')
    check = json.loads(crab("doctor", "--json").out)["checks"]["store"]
    assert check["verdict"] == "limited" and "reboot" in check["without"], check
    assert not pathlib.Path("/run/crab-store").exists()


def test_who_is_not_root_learns_what_can_be_known():
    done = run("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", CRAB, "doctor", "--json")
    seen = json.loads(done.out)
    assert (seen["root"], seen["can_run"]) == (False, None), seen
    checks = seen["checks"]
    assert checks["cgroups"]["verdict"] != "unknown" and checks["runc"]["verdict"] == "ok", checks
    assert all(checks[name]["verdict"] == "unknown" for name in ("tp_btf", "inspector", "packet_lock", "criu_check")), checks
    assert checks["tp_btf"]["found"] == "only root can tell", checks
    text = run("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", CRAB, "doctor").out
    assert "sudo crab doctor" in text, text
