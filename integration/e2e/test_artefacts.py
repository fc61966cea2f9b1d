"""What belongs to a sandbox's state and lies in files of the host (D9c): limits, and what Docker binds into it."""

import json

from harness import crab, docker
from test_files_only import is_files
from test_inspector import Watched, is_none

LIMIT = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null | head -1"
MIB = 1 << 20


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
        sandbox.sh("echo 192.0.2.1 then >>/etc/hosts")
        number = checkpoint()
        then = sandbox.sh("cat /etc/hosts")
        assert int(sandbox.sh(LIMIT)) == 96 * MIB

        # Each of them is a change by itself, and none for which processes are dumped.
        line = sandbox.turn_of("sh", "-c", "echo 192.0.2.2 later >>/etc/hosts")
        assert is_files(line) and "etc-hosts changed" in line["note"], line
        limit(128)
        line = sandbox.turn_of("true")
        assert is_files(line) and "resources.json changed" in line["note"], line
        assert is_none(sandbox.turn_of("true"))

        come_back(number)
        assert sandbox.sh("cat /etc/hosts") == then
        assert int(sandbox.sh(LIMIT)) == 96 * MIB
        # The next checkpoint has them, too.
        come_back(checkpoint())
        assert sandbox.sh("cat /etc/hosts") == then
        assert int(sandbox.sh(LIMIT)) == 96 * MIB
