#!/usr/bin/env python3
"""One life of a virtual machine that loses its power: ./power is what kills it, and begins the next life on the same disk.

  power.py [--unwatched] start        makes a sandbox, then takes turns until it is killed
  power.py [--unwatched] again LAST   what is on the disk must be whole, and the sandbox comes back no older than LAST; then
                                      as above
  power.py [--unwatched] end LAST     as again, but it ends after some turns

--unwatched: each turn is kept whatever it has changed, so that nothing of the inspector is loaded; and by crun. Both take an
emulated processor less time.

Says `released N` when the sandbox's gate has let the exec after count N pass: from then on N may not be lost.
"""
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "e2e"))

from harness import CONFIG, CRAB, Ctr, crab, ctr, unique, until  # noqa: E402
from test_armed_restore import ASK, OPT_IN  # noqa: E402
from test_power_loss import COUNTER  # noqa: E402

NAME, KEEP, LAST_TURNS = "counter", 3, 3
LOG = pathlib.Path("/tmp/counter.log")
#: The next exec, which has counted, and the one before it: neither had to be durable yet.
UNRELEASED = 2


def ask(word):
    """(count in its memory, the counts in its file)."""
    done = ctr("task", "exec", "--exec-id", unique("ask"), NAME, "python3", "-c", ASK, word)
    return eval(done.out)  # of our own server


def start(is_watched):
    options = [*OPT_IN, "--annotation", f"dev.crab.keep={KEEP}", "--annotation", f"dev.crab.skip_unchanged={is_watched}".lower()]
    Ctr(CRAB, "python3", "-uc", COUNTER, id=NAME, output=LOG, options=options)
    until(lambda: LOG.exists() and "listening" in LOG.read_text(), "it listens")


def come_back(released):
    """What a host does after its power has come back. Whoever looks at the disk must find nothing half done."""
    print(crab("verify").out, end="", flush=True)
    crab("restore", NAME)
    ctr("task", "start", "--detach", "--log-uri", f"file://{LOG}", NAME)
    count, files = ask("look")
    assert files == {count}, f"counts in the file: {files}, in memory: {count}"
    assert released <= count <= released + UNRELEASED, f"count {count} is back, {released} was released"
    print(f"back {count}", flush=True)


def take_turns(turns):
    while turns:
        count, files = ask("count")
        assert files == {count}, (files, count)
        # This exec ran: the gate had let it pass, so that the turn before it is durable.
        if count > 1:
            print(f"released {count - 1}", flush=True)
        turns -= 1


def main(*arguments):
    is_watched = arguments[0] != "--unwatched"
    how, *released = arguments if is_watched else arguments[1:]
    if not is_watched:
        CONFIG.parent.mkdir(exist_ok=True)
        CONFIG.write_text('runtime = "crun"\n')
    if how == "start":
        start(is_watched)
    else:
        come_back(int(released[0]))
    take_turns(LAST_TURNS if how == "end" else -1)


if __name__ == "__main__":
    main(*sys.argv[1:])
