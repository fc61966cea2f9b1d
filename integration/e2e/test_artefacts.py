"""What belongs to a sandbox's state and lies in files of the host (D9c): limits, and what Docker binds into it.

Not /etc/hosts: Docker writes that anew after each start.
"""

import json
import pathlib

from harness import crab, docker
from test_files_only import is_files
from test_inspector import Watched, is_none

MIB = 1 << 20


def memory_limit(pid):
    """The limit of a process's cgroup, from outside."""
    for line in pathlib.Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return int(pathlib.Path(f"/sys/fs/cgroup/memory{path}/memory.limit_in_bytes").read_text())
    return int(pathlib.Path(f"/sys/fs/cgroup{path}/memory.max").read_text())


def test_limits_and_files_of_the_client_come_back_as_they_were(tmp_path):
    with Watched(tmp_path, kind="docker") as sandbox:

        def limit(mebibytes):
            docker("update", "--memory", f"{mebibytes}m", "--memory-swap", f"{mebibytes}m", sandbox.name)

        def checkpoint():
            return json.loads(crab("checkpoint", "--json", sandbox.name).out)["turn"]

        def come_back(turn):
            sandbox.die()
            sandbox.restore(f"@{turn}")
            sandbox.start()

        limit(96)
        sandbox.sh("echo \"# then\" >>/etc/resolv.conf")
        number = checkpoint()
        then = sandbox.sh("cat /etc/resolv.conf")
        assert memory_limit(sandbox.container.pid) == 96 * MIB

        # Each of them is a change by itself, and none for which processes are dumped.
        line = sandbox.turn_of("sh", "-c", "echo \"# later\" >>/etc/resolv.conf")
        assert is_files(line) and "etc-resolv.conf changed" in line["note"], line
        limit(128)
        line = sandbox.turn_of("true")
        assert is_files(line) and "resources.json changed" in line["note"], line
        assert is_none(sandbox.turn_of("true"))

        come_back(number)
        assert sandbox.sh("cat /etc/resolv.conf") == then
        assert memory_limit(sandbox.container.pid) == 96 * MIB
        # The next checkpoint has them, too.
        come_back(checkpoint())
        assert sandbox.sh("cat /etc/resolv.conf") == then
        assert memory_limit(sandbox.container.pid) == 96 * MIB
