"""What the kernel says of a process's cgroup, in both hierarchies."""

import pathlib

UNIFIED = pathlib.Path("/sys/fs/cgroup/cgroup.controllers").exists()
"""Whether there is version 2 alone, with all controllers."""


def cgroup_of(pid, controller):
    """The directory of a process's cgroup that a controller's files are in."""
    unified = None
    for line in pathlib.Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            return pathlib.Path(f"/sys/fs/cgroup/{controller}{path}")
        if not names:
            unified = path
    return pathlib.Path("/sys/fs/cgroup" + unified)


def is_frozen(pid):
    """Whether the cgroup of this process is frozen, whoever has done it."""
    cgroup = cgroup_of(pid, "freezer")
    state = cgroup / "freezer.state"
    if state.exists():
        return state.read_text() == "FROZEN\n"
    return "frozen 1" in (cgroup / "cgroup.events").read_text()


def freeze(pid, frozen):
    """Freezes the cgroup of this process, or thaws it, as the host's root may; does not wait."""
    cgroup = cgroup_of(pid, "freezer")
    state = cgroup / "freezer.state"
    if state.exists():
        state.write_text("FROZEN" if frozen else "THAWED")
    else:
        (cgroup / "cgroup.freeze").write_text("1" if frozen else "0")


def unified_of(pid):
    """The directory of a process's cgroup in the hierarchy of version 2."""
    lines = pathlib.Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    path = next(line.removeprefix("0::") for line in lines if line.startswith("0::"))
    tops = (pathlib.Path(top) for top in ("/sys/fs/cgroup/unified", "/sys/fs/cgroup"))
    return next(pathlib.Path(f"{top}{path}") for top in tops if (top / "cgroup.procs").exists())


def cpu_time(pid):
    """What the cgroup of this process has used; in which unit is the hierarchy's affair."""
    cgroup = cgroup_of(pid, "cpuacct")
    if UNIFIED:
        first = (cgroup / "cpu.stat").read_text().splitlines()[0]
        return int(first.removeprefix("usage_usec "))
    return int((cgroup / "cpuacct.usage").read_text())


def limits(pid):
    """Of the cgroup of this process: {"memory", "pids", "quota", "period"}, and "shares", or on version 2 "weight"."""
    text = lambda controller, name: (cgroup_of(pid, controller) / name).read_text().strip()
    read = lambda controller, name: int(text(controller, name))
    if UNIFIED:
        quota, period = map(int, text("cpu", "cpu.max").split())
        return {"memory": read("memory", "memory.max"), "pids": text("pids", "pids.max"),
                "quota": quota, "period": period, "weight": read("cpu", "cpu.weight")}
    return {"memory": read("memory", "memory.limit_in_bytes"), "pids": text("pids", "pids.max"),
            "quota": read("cpu", "cpu.cfs_quota_us"), "period": read("cpu", "cpu.cfs_period_us"), "shares": read("cpu", "cpu.shares")}
