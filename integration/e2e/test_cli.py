"""The crab command: every verb in every case in which it has to say no, and what it shows to people."""

import json
import pathlib
import re
import shutil
import threading

import pytest

from fakeshim import CLOSE, UNKNOWN, FakeShim, listed
from harness import Terminal, crab, run, unique
from test_armed_restore import Sandbox

STORE = pathlib.Path("/var/lib/crab")

OF_SANDBOX = {
    "log": ["log", "{}"],
    "show": ["show", "{}"],
    "show a turn": ["show", "{}@1"],
    "diff": ["diff", "{}@1", "{}@1"],
    "turn": ["turn", "{}"],
    "checkpoint": ["checkpoint", "{}"],
    "rollback": ["rollback", "{}@1"],
    "restore": ["restore", "{}"],
    "restore, cancelled": ["restore", "--cancel", "{}"],
    "verify": ["verify", "{}"],
    "gc": ["gc", "{}"],
}
"""Every verb that is about one sandbox."""
OF_TURN = {
    "show": ["show", "{}"],
    "diff": ["diff", "{0}", "{0}"],
    "rollback": ["rollback", "{}"],
    "restore": ["restore", "{}"],
    "verify": ["verify", "{}"],
}
OF_ALL = {"ps": ["ps"], "verify all": ["verify"], "gc all": ["gc"], "engine": ["engine"]}
OF_SHIM = {"turn": ["turn", "{}"], "checkpoint": ["checkpoint", "{}"], "rollback": ["rollback", "{}@1"]}
"""Every verb that asks a shim for something."""


def verbs(*tables):
    merged = {name: argv for table in tables for name, argv in table.items()}
    return pytest.mark.parametrize("argv", merged.values(), ids=merged.keys())


def refused(argv, word, *said, code=1, prefix=(), flags=()):
    """Runs a verb that has to fail, for people and for programs: one line that says why."""
    argv = [part.format(word) for part in argv]
    for json_flag in ([], ["--json"]):
        done = run(*prefix, "crab", *flags, *json_flag, *argv, check=False)
        assert done.rc == code, done
        assert done.out == "", done
        assert re.fullmatch(r"crab: [^\n\r\x1b]+\n", done.err), done
        for part in said:
            assert part in done.err, (part, done)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A sandbox that has died: its checkpoints, and what crab said while it lived."""
    with Sandbox("ctr", tmp_path_factory.mktemp("cli")) as box:
        box.sh("echo one >/kept; echo old >/root/changed; echo x >/gone; chmod 600 /etc/hostname")
        box.turn()
        box.sh("""echo two >/root/changed; rm /gone /usr/bin/tac; mkdir /new; printf x >"$(printf '/new/a\\033[2Jb')" """)
        named = json.loads(crab("checkpoint", "--json", "--name", "before", "--prove", box.name).out)
        box.alive = crab("ps").out, box.shown
        box.last = named["turn"]
        box.die()
        yield box


@verbs(OF_SANDBOX)
def test_no_such_sandbox(argv):
    refused(argv, "nobody", "no sandbox nobody", "crab ps")
    refused(argv, "no\x1b[2Jbody", "no sandbox no\\u{1b}[2Jbody")


@verbs(OF_SANDBOX)
def test_no_such_sandbox_in_a_namespace(argv, shared):
    refused(argv, shared.name, f"no sandbox {shared.name} in the namespace elsewhere", flags=["-n", "elsewhere"])


@pytest.fixture
def twins():
    """Two sandboxes of the store with one beginning."""
    stem = unique("twin")
    dirs = [STORE / "default" / f"{stem}-{n}" for n in (1, 2)]
    for path in dirs:
        path.mkdir(mode=0o700, parents=True)
    yield stem
    for path in dirs:
        shutil.rmtree(path)


@verbs(OF_SANDBOX)
def test_an_ambiguous_prefix_names_the_candidates(argv, shared, twins):
    refused(argv, twins, f"{twins} is ambiguous: default/{twins}-1, default/{twins}-2", "-n")


@verbs(OF_SANDBOX, OF_ALL)
def test_who_is_not_root_is_told_so(argv):
    nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    refused(argv, "any", "only root", "sudo", prefix=nobody)


@verbs(OF_SANDBOX, {"verify all": ["verify"], "gc all": ["gc"]})
def test_no_store(argv, shared, config):
    config('store = "/var/lib/crab-elsewhere"\n')
    refused(argv, shared.name, "/var/lib/crab-elsewhere")
    # The same if it runs, but for what its shim does by itself.
    if argv[0] not in ("turn", "checkpoint", "restore"):
        with FakeShim(shared.name, {"List": listed(shared.name)}):
            refused(argv, shared.name, "no store /var/lib/crab-elsewhere")
    assert not pathlib.Path("/var/lib/crab-elsewhere").exists()


@verbs(OF_SANDBOX, {"verify all": ["verify"], "gc all": ["gc"]})
def test_a_store_that_others_may_read(argv, shared):
    STORE.chmod(0o750)
    try:
        refused(argv, shared.name, str(STORE), "0750", "chmod 0700")
    finally:
        STORE.chmod(0o700)


@verbs(OF_SANDBOX, OF_ALL, {"doctor": ["doctor"]})
def test_a_configuration_that_is_wrong(argv, shared, config):
    config("kep = 3\n")
    refused(argv, shared.name, "/etc/crab/config.toml", "kep")


@verbs(OF_TURN)
def test_no_such_turn_or_name(argv, shared):
    refused(argv, f"{shared.name}@999", shared.name, "turn 999")
    refused(argv, f"{shared.name}@never", shared.name, '"never"')


@verbs(OF_SHIM)
def test_a_sandbox_that_does_not_run(argv, shared):
    way = {"turn": "start it first", "checkpoint": "start it first", "rollback": f"crab restore {shared.name}@1 --start"}
    refused(argv, shared.name, f"default/{shared.name} is not running under crab", way[argv[0]])


@verbs(OF_SHIM)
def test_a_shim_of_another_build(argv, shared):
    with FakeShim(shared.name, {"List": listed(shared.name), "Turn": UNKNOWN, "Checkpoint": UNKNOWN, "Rollback": UNKNOWN}) as shim:
        refused(argv, shared.name, shared.name, "another build of crab (0.0.9)", "start it again")
        assert shim.asked == [argv[0].capitalize(), "List"] * 2


@verbs(OF_SHIM)
def test_a_sandbox_that_goes_away_in_the_middle(argv, shared):
    with FakeShim(shared.name, {"Turn": CLOSE, "Checkpoint": CLOSE, "Rollback": CLOSE}):
        refused(argv, shared.name, f"default/{shared.name}", "went away", "crab log")


def test_a_restore_of_what_runs(shared):
    with FakeShim(shared.name, {"List": listed(shared.name)}):
        refused(["restore", "{}@1"], shared.name, "is running", "stop or kill it first", "crab rollback")
    # Nobody knows whether one with a shim that says nothing runs.
    with FakeShim(shared.name, {}):
        refused(["restore", "{}@1"], shared.name, shared.name, "another build of crab")


@pytest.mark.parametrize("answer, said", [(UNKNOWN, "another build of crab"), (CLOSE, "went away"), (None, "does not answer")],
                         ids=["another build", "goes away", "hangs"])
def test_ps_names_the_sandbox_of_a_shim_that_says_nothing(answer, said, shared):
    never = threading.Event()
    with FakeShim(shared.name, {"List": answer or never}) as shim:
        # Each waits for one that hangs.
        for flags in (["--json"],) if answer is None else ([], ["--json"]):
            done = crab("ps", *flags, check=False)
            assert done.rc == 1 and re.fullmatch(r"crab: [^\n]+\n", done.err), done
            assert f"default/{shared.name}" in done.err and said in done.err, done
            assert shared.name in done.out, done
        assert json.loads(done.out)["status"] == "unknown", done
        asked = len(shim.asked)
        # It is not asked about others.
        assert crab("ps", "-n", "elsewhere").out.count("\n") == 1 and len(shim.asked) == asked > 0
        never.set()


@pytest.mark.parametrize("argv", [
    ["fly"], [], ["log"], ["log", ""], ["log", "c1@7"], ["log", "c1", "c2"], ["show"], ["show", "c1@"], ["show", "@7"], ["diff", "c1@1"],
    ["diff", "@1", "c1@2"], ["diff", "c1@1", "@"], ["checkpoint"], ["checkpoint", "c1@7"], ["rollback"], ["rollback", "c1"],
    ["restore"], ["restore", "--cancel", "--start", "c1"], ["verify", "--deep"], ["gc", "--keep", "0"], ["gc", "c1@7"],
    ["engine", "--prometheus", "--json"], ["doctor", "c1"], ["completions", "cmd"], ["ps", "-n"],
], ids=" ".join)
def test_wrong_usage(argv):
    done = crab(*argv, check=False)
    assert done.rc == 2 and done.out == "", done
    assert "--help" in done.err or "Usage: crab" in done.err, done


def test_who_is_protected_up_to_which_turn(shared):
    text, seen = shared.alive
    head, *rows = text.splitlines()
    assert head.split() == ["NAMESPACE", "ID", "STATE", "PROTECTED", "TURN", "AGE", "NOTE"]
    row = next(row for row in rows if shared.name in row)
    assert re.fullmatch(rf"default +{shared.name} +running +yes +{shared.last} +\S+( \S+)?", row), row
    assert (seen["status"], seen["turn"], seen["lost"], seen["problem"]) == ("yes", shared.last, None, None), seen
    # Columns stand below their heads.
    assert row.index("yes") == head.index("PROTECTED")


def test_the_log_reads_like_one_of_git(shared):
    lines = crab("log", shared.name).out.splitlines()
    assert len(lines) == len(shared.turns())
    assert all(re.match(r" +\d+  ([0-9a-f]{12}|-) +(full|files|none|-) ", line) for line in lines), lines
    assert "(before) " in lines[-1] and "proved by a trial restore" in lines[-1], lines
    last, = crab("log", "--last", "1", shared.name).out.splitlines()
    # Aligned by itself.
    assert last.split() == lines[-1].split()
    assert len(crab("log", "--last", "1", "--json", shared.name).out.splitlines()) == 1


def test_one_checkpoint(shared):
    text = crab("show", f"{shared.name}@before").out
    assert text == crab("show", shared.name).out
    fields = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert fields["turn"] == str(shared.last) and fields["names"] == "before"
    assert fields["kept"] == "the newest; has a name" and fields["proof"] == "proved by a trial restore"
    assert fields["holds"].startswith("files and ") and re.match(r"turn \d+$", fields["parent"])
    shown = json.loads(crab("show", "--json", shared.name).out)
    assert shown["checkpoint"] == fields["checkpoint"] and shown["journal"]["turn"] == shared.last
    assert shown["stored_bytes"] == shown["journal"]["bytes_written"]


def test_the_files_that_differ(shared):
    first = min(line["turn"] for line in shared.turns())
    said = crab("diff", f"{shared.name}@{first}", "@before").out.splitlines()
    assert [line.split(maxsplit=2) for line in said] == [
        ["D", "file", "/gone"],
        ["A", "directory", "/new"],
        ["A", "file", "/new/a\\u{1b}[2Jb"],
        ["M", "file", "/root/changed  (content)"],
        ["M", "directory", "/usr"],
        ["M", "directory", "/usr/bin"],
        ["D", "image", "/usr/bin/tac"],
    ]
    back = [json.loads(line) for line in crab("diff", "--json", f"{shared.name}@before", f"{shared.name}@{first}").out.splitlines()]
    by_path = {line["path"]: line for line in back}
    assert by_path["/new/a\x1b[2Jb"] == {"change": "deleted", "kind": "file", "path": "/new/a\x1b[2Jb", "utf8": True, "what": []}
    assert by_path["/usr/bin/tac"]["change"] == "added" and by_path["/gone"]["change"] == "added"
    assert crab("diff", shared.name, shared.name).out == ""


def on_terminal(*argv, env=()):
    with Terminal("env", "-u", "NO_COLOR", "TERM=xterm", *env, *argv) as terminal:
        return terminal.finish()


def test_colours_are_for_terminals_alone(shared):
    code, said = on_terminal("crab", "log", shared.name)
    assert code == 0 and "\x1b[33m" in said, said
    for env in (["NO_COLOR=1"], ["TERM=dumb"]):
        code, said = on_terminal("crab", "log", shared.name, env=env)
        assert code == 0 and "\x1b" not in said, said
    assert "\x1b" not in crab("log", shared.name).out


def test_what_takes_long_shows_that_it_goes_on(shared):
    held = threading.Event()
    with FakeShim(shared.name, {"Checkpoint": held}):
        with Terminal("env", "TERM=xterm", "crab", "checkpoint", shared.name) as terminal:
            terminal.expect(rf"checkpoint of default/{shared.name} … [12] s")
            held.set()
            code, rest = terminal.finish()
    # The line has gone before the next one comes.
    assert code == 1 and re.search(r"\x1b\[K\s*crab: default/", rest), rest


def test_completions_and_manual_pages(tmp_path):
    (tmp_path / "crab.bash").write_text(crab("completions", "bash").out)
    script = 'source "$0"; COMP_WORDS=(crab che); COMP_CWORD=1; _crab crab che crab; echo "${COMPREPLY[@]}"'
    assert run("bash", "-c", script, tmp_path / "crab.bash").out == "checkpoint\n"
    for shell in ("zsh", "fish"):
        assert "rollback" in crab("completions", shell).out
    crab("man", tmp_path)
    assert {"crab.1", "crab-ps.1", "crab-show.1", "crab-rollback.1"} <= {path.name for path in tmp_path.iterdir()}
