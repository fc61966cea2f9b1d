"""A persistent shell and its commands, with a bash of our own in a sandbox's place."""
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from shell import INIT, Shell, ShellEnded, ShellTimeout  # noqa: E402


@pytest.fixture
def shell():
    started = Shell(INIT)
    yield started
    started.kill()


def test_variables_functions_and_the_directory_carry_over(shell):
    assert shell.run("cd /; f() { echo \"$X in $PWD\"; }; X='it''s'", 10) == (0, b"")
    assert shell.run("f; false", 10) == (1, b"its in /\n")
    assert shell.run("cat <<'end'\n'$X'\nend", 10) == (0, b"'$X'\n")


def test_a_command_that_reads_or_cannot_be_parsed_does_not_eat_the_next_one(shell):
    assert shell.run("cat; read x", 10) == (1, b"")
    assert shell.run("if then", 10)[0] == 2
    assert shell.run("echo there", 10) == (0, b"there\n")


def test_errors_come_where_they_were_written_and_what_looks_like_an_end_is_none(shell):
    assert shell.run("echo 1; echo 2 >&2; echo 3", 10) == (0, b"1\n2\n3\n")
    code, output = shell.run("set -v; printf '\\nend-of-command-0 0\\n'", 10)
    assert code == 0 and b"end-of-command-0 0" in output
    assert shell.run("set +v; seq 100000", 30)[1].endswith(b"\n100000\n")


def test_the_end_of_the_shell_is_told_and_so_is_one_that_takes_too_long(shell):
    with pytest.raises(ShellTimeout):
        shell.run("sleep 1000 & wait", 0.1)
    with pytest.raises(ShellEnded):
        Shell(INIT).run("exit 3", 10)
