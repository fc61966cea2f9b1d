"""A cut never catches a process between vfork and exec, where CRIU would give up after 10 s."""

import json

from harness import CRAB, Ctr, crab


def test_a_shell_that_starts_commands_all_the_time_can_be_dumped_at_any_moment():
    # dash vforks for every command; about one freeze in ten hits the moment.
    with Ctr(CRAB, "dash", "-c", "while :; do /bin/true; done", options=["--annotation", "dev.crab.enabled=true"]) as c:
        for _ in range(25):
            line = json.loads(crab("checkpoint", "--json", c.id).out)
            assert line["action"] == "full" and line["freeze_us"] < 10_000_000, line
