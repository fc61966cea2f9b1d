"""What a crash costs who keeps only the chat, or only the files; and crab, by replay.py.

A sandbox under containerd's own shim is played up to each of the drawn turns; at its boundary it is frozen, its state is
read (integration/digest) and its writable layer copied. From each such place: a fresh sandbox (chat), or a fresh one with
that layer (files), whose state is compared with that at the boundary, and which then plays the remaining turns.

Equal are the trees of root and tmpfs in every name, attribute and byte (but times in a tmpfs: /dev is made anew), and the
command lines and working directories of all processes. This is less than is asked of crab, whose processes are compared in all
that they are (a fresh init differs in its addresses).
"""
from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Sequence

import player
import settings
import trace as traces
from clients import Client, wait_for
from full import clear, upper

import container  # integration/digest, on the path by player
from crab import is_unprotected  # integration/replay
import digest
import final  # integration/replay

REPLAY = Path(player.HERE).parent / "replay" / "replay.py"


def crash_turns(trace: traces.Trace, quick: bool) -> list[int]:
    """Turns that a crash comes after, drawn; never the last, after which nothing would be left to do."""
    numbers = [turn.number for turn in trace.turns[:-1]]
    count = min(settings.QUICK_CRASHES if quick else settings.CRASHES, len(numbers))
    return sorted(random.Random(f"{settings.SEED} {trace.name}").sample(numbers, count))


def state(client: Client) -> dict[str, Any]:
    """The trees, and the processes' command lines and working directories."""
    seen = digest.sandbox(client.alive(), quick=True)["state"]
    lines = sorted([*p["cmdline"], p["cwd"]] for p in seen["processes"].values() if p.get("cmdline"))
    in_memory = {point: {path: {key: value for key, value in entry.items() if key != "mtime_ns"} for path, entry in tree.items()}
                 for point, tree in seen["tmpfs"].items()}
    return {"files": [seen["tree"], in_memory], "processes": lines}


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", f"{source}/.", str(target)], check=True)


def boundaries(trace: traces.Trace, at: list[int], factor: float, scratch: Path) -> dict[int, dict[str, Any]]:
    """The state at the end of each of these turns; the layer of then in scratch/TURN."""
    client, found = player.sandbox(trace, f"before-{os.getpid()}", protected=False), {}

    def after(turn: traces.Turn) -> None:
        if turn.number in at:
            init = client.alive()
            with container.frozen(init):
                found[turn.number] = state(client)
                (scratch / str(turn.number)).mkdir()
                copy(upper(init), scratch / str(turn.number))

    try:
        client.create()
        player.begin(client, trace)
        player.play(client, trace, [turn for turn in trace.turns if turn.number <= max(at)], factor, after)
    finally:
        client.remove()
    return found


def with_layer(client: Client, layer: Path) -> None:
    """Starts the fresh sandbox again, with this writable layer."""
    init = client.alive()
    own = upper(init)
    os.kill(init, signal.SIGKILL)
    client.died(init)
    clear(own)
    copy(layer, own)
    client.start_again()
    wait_for(f"{client.id} to be back", lambda: client.init_pid() not in (None, init))


def go_on(trace: traces.Trace, kind: str, turn: int, before: dict[str, Any], factor: float, layer: Path) -> dict[str, Any]:
    """A recovery, and the rest of the session after it."""
    client = player.sandbox(trace, f"{kind}-{os.getpid()}-{turn}", protected=False)
    try:
        client.create()
        if kind == "files":
            with_layer(client, layer)
        else:
            player.begin(client, trace)
        now = state(client)
        rest = player.play(client, trace, [one for one in trace.turns if one.number > turn], factor)
    finally:
        client.remove()
    wrong = [one["turn"] for one in rest if one["expected"] not in (None, one["code"])]
    return {"turn": turn, "files_equal": now["files"] == before["files"], "wrong_codes": wrong,
            "processes_equal": now["processes"] == before["processes"]}


def replay(trace: traces.Trace, path: Path, factor: float, out: Path, *options: str) -> tuple[dict[str, Any] | None, str]:
    """What replay.py found, if it came to its end, and what it said. The end's state is in out.final."""
    done = subprocess.run([sys.executable, "-B", str(REPLAY), "--trace", str(path), "--image", f"crab.test/{trace.name}:latest",
                           "--client", "ctr", "--think", str(factor), "--brief", "--json", str(out),
                           "--final", str(out.with_suffix(".final")), *options], capture_output=True, text=True)
    said = (done.stdout[-500:] + done.stderr[-2000:]).strip()
    return json.loads(out.read_text()) if out.exists() else None, said


def at_the_end(crashed: Path, first: Path, second: Path) -> dict[str, Any]:
    """Whether a run with crashes ended as fault-free ones do, as final.py tells. One that has no end differs."""
    lost = [path.stem for path in (crashed, first, second) if not path.exists()]
    if lost:
        return {"equal": False, "unequal": [f"the run {name} has no end" for name in lost], "paths": 0, "excluded": []}
    c, a, b = (json.loads(path.read_text()) for path in (crashed, first, second))
    but = final.exclusions(a, b)
    found = final.unequal(a, b, c, but)
    return {"equal": not found, "unequal": found[:final.SHOWN], "paths": len(a["tree"]), "excluded": but.in_words()}


def of_crab(trace: traces.Trace, path: Path, count: int, factor: float, scratch: Path) -> dict[str, Any]:
    """So many faults of all kinds in one run, each recovery compared in full by replay.py; and its end with two others'."""
    options = ("--faults", str(count), "--seed", str(settings.SEED))
    result, said = replay(trace, path, factor, scratch / "crashed.json", *options)
    found = NONE_OF_CRAB | {"asked": count, "said": said}
    if result is None:
        return found | {"failure": "no end"}
    for name in ("first", "second"):
        replay(trace, path, factor, scratch / f"{name}.json")
    found["end"] = at_the_end(*(scratch / f"{name}.final" for name in ("crashed", "first", "second")))
    return found | told(result)


#: Of crab's recoveries, before any has been tried.
NONE_OF_CRAB: dict[str, Any] = {"asked": 0, "planned": 0, "faults": [], "wrong_codes": [], "failure": None, "said": "", "end": None}


def told(result: dict[str, Any]) -> dict[str, Any]:
    """What recover/TRACE.json holds of a replay. Asked: recoveries, of which a death that comes twice has two."""
    plan = result["summary"]["plan"].values()
    summary = result["summary"]
    return {"asked": len(plan) + list(plan).count("twice"), "planned": len(plan), "failure": why_bad(result),
            "wrong_codes": summary["codes_not_as_expected"],
            "faults": [{key: fault.get(key) for key in ("turn", "kind", "equal", "mode", "unequal", "late")}
                       for fault in result["faults"]]}


def why_bad(result: dict[str, Any]) -> str | None:
    """Why a replay is no success although its recoveries may be: it ended early, or a turn of it was not kept."""
    summary = result["summary"]
    if summary["failure"] is not None:
        return summary["failure"]
    if summary["turns"] < summary["turns_in_trace"]:
        return f"ended after {summary['turns']} of {summary['turns_in_trace']} turns"
    lost = [str(turn["turn"]) for turn in result["turns"] if turn["crab"] and is_unprotected(turn["crab"])]
    return f"not protected: turns {', '.join(lost)}" if lost else None


def in_vm(trace: str, result: dict[str, Any]) -> dict[str, Any]:
    """The same of a replay in the virtual machine, where nothing but crab's recoveries is tried."""
    return {"trace": trace, "turns": sorted(map(int, result["summary"]["plan"])), "crab": NONE_OF_CRAB | told(result),
            "chat": [], "files": [], "vm": True}


def of_baselines(trace: traces.Trace, at: list[int], factor: float) -> dict[str, list[dict[str, Any]]]:
    """What chat and files come back with after each of these turns."""
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        before = boundaries(trace, at, factor, scratch)
        # Nobody looks at the time here: several at once, each in a process of its own.
        with ProcessPoolExecutor(settings.AT_ONCE, multiprocessing.get_context("fork")) as pool:
            jobs = {(kind, turn): pool.submit(go_on, trace, kind, turn, before[turn], factor, scratch / str(turn))
                    for turn in at for kind in ("chat", "files")}
        return {kind: [jobs[kind, turn].result() for turn in at] for kind in ("chat", "files")}


def recoveries(trace: traces.Trace, path: Path, factor: float, quick: bool, only: str | None) -> dict[str, Any]:
    """All of one trace, as recover/TRACE.json holds them; or only those of crab, or of the baselines."""
    at = crash_turns(trace, quick)
    found: dict[str, Any] = {"trace": trace.name, "turns": at}
    if only in (None, "crab"):
        with tempfile.TemporaryDirectory() as directory:
            found["crab"] = of_crab(trace, path, settings.QUICK_FAULTS if quick else settings.FAULTS, factor, Path(directory))
    if only in (None, "baselines"):
        found |= of_baselines(trace, at, factor)
    return found


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 3:
        print("recover.py NAME REPLAY.json OUT.json: what a replay in the virtual machine found, as the report reads it", file=sys.stderr)
        return 2
    name, replayed, out = arguments
    Path(out).write_text(json.dumps(in_vm(name, json.loads(Path(replayed).read_text()))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
