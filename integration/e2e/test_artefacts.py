"""What belongs to a sandbox's state and lies in files of the host (D9c): limits, and what Docker binds into it."""

import json

from harness import crab, docker
from test_armed_restore import Sandbox
from test_files_only import is_files

LIMIT = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null | head -1"
MIB = 1 << 20


def test_limits_and_files_of_the_client_come_back_as_they_were(tmp_path):
    with Sandbox("docker", tmp_path) as sandbox:
        docker("update", "--memory", "96m", "--memory-swap", "96m", sandbox.name)
        sandbox.sh("echo 192.0.2.1 then >>/etc/hosts")
        number = sandbox.turn()
        then = sandbox.sh("cat /etc/hosts")
        assert int(sandbox.sh(LIMIT)) == 96 * MIB

        # Each of them is a change by itself, and none for which processes are dumped.
        sandbox.settled()
        sandbox.sh("echo 192.0.2.2 later >>/etc/hosts")
        sandbox.settled()
        line = sandbox.turns()[-1]
        assert is_files(line) and "etc-hosts changed" in line["note"], line
        docker("update", "--memory", "128m", "--memory-swap", "128m", sandbox.name)
        sandbox.sh("true")
        sandbox.settled()
        line = sandbox.turns()[-1]
        assert is_files(line) and "resources.json changed" in line["note"], line

        sandbox.die()
        sandbox.restore(f"@{number}")
        sandbox.start()
        assert sandbox.sh("cat /etc/hosts") == then
        assert int(sandbox.sh(LIMIT)) == 96 * MIB
        # The next checkpoint has them, too.
        later = json.loads(crab("checkpoint", "--json", sandbox.name).out)["turn"]
        sandbox.die()
        sandbox.restore(f"@{later}")
        sandbox.start()
        assert int(sandbox.sh(LIMIT)) == 96 * MIB
