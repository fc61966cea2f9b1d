"""Every factor, limit and exclusion of a replay, by name. A replay's summary holds them all."""
from __future__ import annotations

import os
from typing import Any

#: Seconds that a command may take where the trace does not say.
DEFAULT_TIMEOUT_S = 120
#: Before each command through ctr. It tells the shim of its stdin's end when it sees it, which may be before the exec runs:
#: then containerd's own shim never ends that stdin, and a command that reads it (turn 8 of swe-requests-5414) hangs.
NO_STDIN = "exec </dev/null\n"
#: Seconds to wait for what should take milliseconds. An emulated machine gets more.
LIMIT_S = float(os.environ.get("CRAB_E2E_LIMIT", 60))
#: A command may take so many times what the trace says.
PATIENCE = max(1.0, LIMIT_S / 60)
#: No recorded think time counts for more seconds, unless --think-cap says so.
THINK_CAP_S = 60.0
#: Exit code of a command that was killed by its time-out, as timeout(1) has it.
TIMED_OUT = 124

#: The ways to die. init: kill -9 of the sandbox's init. tree: of each of its processes. shim: of its shim alone.
#: containerd: of the daemons and all that they have started, of all sandboxes at once. exec: of init in the middle of a
#: command. recovery: as init, and again while it is being restored. twice: as init, and again as soon as it is restored.
KINDS = ("init", "tree", "shim", "containerd", "exec", "recovery", "twice")
#: A command is killed at a random moment of as many milliseconds as it took in the recording, but no later than this…
EXEC_KILL_AT_MOST_MS = 1500
#: …and of so many where the recording does not say.
EXEC_KILL_UNKNOWN_MS = 200
#: A recovery is killed at most so many seconds after the first program of the runtime has been seen in it.
RECOVERY_KILL_AT_MOST_S = 0.4

#: What a process that merely ran may have lost after a turn that took no new dump of processes (docs/state.md, (c)): its
#: memory, and where it is. Not what it has open, nor how far it has read or written: that acquits nobody who moved data.
#: The mask of blocked signals is for a while that of the call in which a thread waits (sigsuspend, ppoll).
CUT_LOST = ("pages", "mappings")
CUT_LOST_OF_THREADS = ("sp", "pc", "SigBlk")
#: At most this many differences are kept for the report.
KEPT = 200

#: What two runs never have in common, so left out where the ends of two runs are compared: when a file was written.
#: (At a recovery it is compared, since that is within one run.)
FINAL_IGNORED = ("mtime_ns",)


def as_json() -> dict[str, Any]:
    return {name: value for name, value in globals().items() if name.isupper()}
