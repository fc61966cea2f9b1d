"""Docker's health checks are no turns."""

import json

from harness import CRAB, Docker, crab, until


def test_a_health_check_neither_is_a_turn_nor_ends_one():
    options = ("--annotation", "dev.crab.enabled=true", "--health-cmd", "echo checked >>/health", "--health-interval", "200ms")
    with Docker(CRAB, options=options, name="health") as c:
        def checks():
            return c.state["Health"]["Log"] or []

        def turns():
            return [json.loads(line) for line in crab("-n", "moby", "log", "--json", c.id).out.splitlines()]

        until(lambda: len(checks()) >= 2, "two health checks")
        assert {check["ExitCode"] for check in checks()} == {0}
        assert turns() == []
        # The same words, but another shell: a turn like any other. What the checks wrote is found then.
        c.exec("bash", "-c", "echo checked >>/health")
        (turn,) = until(turns, "a line in the journal")
        assert turn["trigger"] == "exec" and "files" in turn["effects"], turn
