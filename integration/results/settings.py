"""Every constant that a figure of docs/results.md depends on, by name. The report prints them above its table."""
from __future__ import annotations

#: The recorded sessions that are measured.
TRACES = ("swe-requests-5414", "tb-tmux", "swe-pydicom-1694", "ps-marshmallow-1867", "ps-gson-1555", "swe-django-16612",
          "swe-seaborn-3069")
#: Those of --quick.
QUICK_TRACES = ("swe-requests-5414", "tb-tmux", "swe-pydicom-1694", "ps-marshmallow-1867")
#: Those of which nothing is measured but crab's recoveries, in the virtual machine, and why.
RECOVERED_IN_VM = {
    "tb-nginx": "nginx's workers are another user's, whom CRIU cannot dump where CAP_SYS_RESOURCE is missing, as here; and "
                "emulated, no time says anything",
}
#: The session in this repository, which is measured where no other is at hand (docs/traces.md).
OWN_TRACE = "crab-h11-chunked"
#: Of the recorded think times, in most runs, with --quick, and in those that measure a client's time.
FACTOR, QUICK_FACTOR, CLIENT_FACTOR = 0.2, 0.1, 1.0
#: No less than this for these: what tb-tmux types into panes takes as long as its agent thought.
LEAST_FACTOR = {"tb-tmux": 1.0}
#: No more than this, unless --think says so: an agent that thought for a quarter of an hour.
MOST_FACTOR = {"swe-seaborn-3069": 0.1}
#: No pause is longer, in seconds.
THINK_CAP_S = 60.0
#: How often crab and the Go shim are run, in turn; the other modes once.
ROUNDS = 2
#: Once for these, with hundreds of seconds of tests in them.
ONCE = ("swe-django-16612", "swe-seaborn-3069")
#: Also run with CLIENT_FACTOR (tb-tmux always is).
CLIENT_TRACES = ("swe-requests-5414",)
#: Also run without the engine, and with a whole checkpoint of crab's own after each turn.
FURTHER_TRACES = ("swe-requests-5414", "tb-tmux")

#: What runs a sandbox in each mode. full: containerd's shim, and after each turn CRIU's image and the files that changed.
MODES = {
    "none": "containerd's own shim (io.containerd.runc.v2), nothing is kept",
    "crab": "crab as docs/engine.md measures it: with the host's budget",
    "full": "containerd's own shim; after each turn runc's checkpoint and the changed files, each compressed as crab does",
    "full in crab": "crab with skip_unchanged = false: the same into crab's store, which deduplicates",
    "no engine": "crab without a limit on bytes or dumps",
}
#: The host's budget in mode crab, as in docs/engine.md.
ENGINE_RATE, ENGINE_BURST = "20MB/s", "64MiB"
#: More dumps at once than there are.
NO_LIMIT_ON_DUMPS = 1024
#: zstd's, as crab's packs have it (src/store/pack/writer.rs).
ZSTD_LEVEL = 1
#: Bytes of a page, of which of what mode full keeps the unseen ones are counted.
PAGE = 4096
#: Bytes of the file system (ext4 on a loop device) that holds nothing but the store, or what mode full keeps.
STORE_DISK = 8 << 30

#: Crashes per trace of chat and files, after turns that are drawn, one a run (as in the paper).
CRASHES, QUICK_CRASHES = 5, 2
#: Faults per trace of crab, all in one run: one of each kind (integration/replay/constants.py).
FAULTS, QUICK_FAULTS = 7, 2
#: So many of chat's and files' recoveries side by side.
AT_ONCE = 4
#: Exit code of a command that was ended by its time-out (integration/replay/constants.py).
TIMED_OUT = 124

#: Recoveries are not tried with these…
NOT_CRASHED = {"swe-seaborn-3069": "its tests run into their time-outs, so its exit codes say little"}
#: …nor, with --quick, with these.
NOT_CRASHED_QUICKLY = ("tb-tmux",)
#: In the virtual machine, where a digest of everything takes minutes.
VM_CRASHES = 2
#: For the draws (also of think times, where a session has none), and for the bootstrap.
SEED = 7
#: Resamplings of the bootstrap, and the interval that is told.
RESAMPLINGS, CONFIDENCE = 4000, 0.95

#: A command of ours before the first turn, so that a session does not depend on the machine's speed: tb-tmux ends tmux's
#: last session and makes a new one in the same breath, and the server is about to end then.
FIRST = {"tb-tmux": "echo 'set -s exit-empty off' >~/.tmux.conf"}

#: What is wanted, as the table judges it. Shares and ratios, times in milliseconds.
WANTED = {
    "recovered": 1.0, "bytes down": 0.95, "client time": 1.01, "exec time": 1.03, "look": 1.0,
    "files p50": 20.0, "files p95": 20.0, "processes p50": 250.0, "processes p95": 250.0, "exposed p50": 0.0,
}


def factor(trace: str, asked: float | None, quick: bool) -> float:
    """The think times' factor of most runs of a trace."""
    if asked is None:
        asked = min(QUICK_FACTOR if quick else FACTOR, MOST_FACTOR.get(trace, 1.0))
    return max(asked, LEAST_FACTOR.get(trace, 0.0))


def plan(trace: str, asked: float | None, quick: bool) -> list[tuple[str, float, int]]:
    """All runs of a trace in their order: (mode, factor, round). The modes take turns, and so does who begins."""
    usual = factor(trace, asked, quick)
    rounds = 1 if quick or trace in ONCE else ROUNDS
    first = ["none", "crab", "full"] + (["full in crab", "no engine"] if trace in FURTHER_TRACES and not quick else [])
    runs = [(mode, usual, 0) for mode in first]
    runs += [(mode, usual, n) for n in range(1, rounds) for mode in (("crab", "none") if n % 2 else ("none", "crab"))]
    if not quick and asked is None and trace in CLIENT_TRACES and usual != CLIENT_FACTOR:
        runs += [(mode, CLIENT_FACTOR, 0) for mode in ("none", "crab")]
    return runs
