"""The figures of docs/results.md, from the JSON of measure.py. Pure: nothing is read or run here."""
from __future__ import annotations

import math
import random
from collections import defaultdict
from typing import Any, Iterable, Sequence

import settings

Run = dict[str, Any]
#: What the journal calls an action, and what the table calls such a turn.
KINDS = {"skip": "nothing", "files": "files", "full": "processes"}


def quantile(values: Iterable[float], q: float) -> float | None:
    """The smallest value that a share q of them does not exceed; None of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else None


def of(runs: Sequence[Run], mode: str, trace: str | None = None, factor: float | None = None) -> list[Run]:
    return [run for run in runs if run["mode"] == mode and trace in (None, run["trace"]) and factor in (None, run["factor"])]


def trace_names(runs: Sequence[Run]) -> list[str]:
    """In the order of the settings; others after them."""
    names = {run["trace"] for run in runs}
    return [name for name in settings.TRACES if name in names] + sorted(names - set(settings.TRACES))


def kind(line: dict[str, Any]) -> str:
    """What a turn was for crab. Unprotected: without a checkpoint although something had changed, or without the processes,
    or nothing new in a sandbox whose processes cannot be kept."""
    name, note = KINDS.get(line["action"], line["action"]), line.get("note") or ""
    if line["checkpoint"] is None and (name != "nothing" or line["effects"] or note.startswith("not protected")):
        return "unprotected"
    return "unprotected" if "processes" in line.get("missing", ()) or "without processes" in note else name


def lines(runs: Sequence[Run]) -> list[dict[str, Any]]:
    return [line for run in runs for line in run["journal"]]


def whole_journal(run: Run) -> list[dict[str, Any]]:
    """With the lines of what was run before the first turn (settings.FIRST)."""
    return [*run.get("begin", ()), *run["journal"]]


def exec_pairs(runs: Sequence[Run], mode: str, trace: str | None = None) -> list[tuple[float, float]]:
    """For each turn of each trace and factor the mean of what its exec took without crab, and in `mode`, with what it was held
    before; milliseconds. Without turns that each run ended by their time-out: these take as long whatever is beneath."""
    seen: dict[tuple, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run["mode"] in ("none", mode) and trace in (None, run["trace"]):
            for turn in run["turns"]:
                seen[run["trace"], run["factor"], turn["turn"]][run["mode"]].append(turn)
    mean = lambda turns: sum(turn["ms"] + turn["held_ms"] for turn in turns) / len(turns)  # noqa: E731
    return [(mean(turns["none"]), mean(turns[mode])) for turns in seen.values() if turns["none"] and turns[mode]
            and any(turn["code"] != settings.TIMED_OUT for turn in turns["none"] + turns[mode])]


def ratio(pairs: Sequence[tuple[float, float]]) -> float | None:
    below = sum(none for none, _ in pairs)
    return sum(other for _, other in pairs) / below if below else None


def interval(pairs: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """The bootstrap's confidence interval of `ratio`: pairs are drawn again with replacement."""
    if not pairs:
        return None
    rng = random.Random(settings.SEED)
    drawn = [ratio(rng.choices(pairs, k=len(pairs))) or 0.0 for _ in range(settings.RESAMPLINGS)]
    tail = (1 - settings.CONFIDENCE) / 2
    return quantile(drawn, tail) or 0.0, quantile(drawn, 1 - tail) or 0.0


def client_time(runs: Sequence[Run]) -> dict[str, tuple[float, float]]:
    """Trace → mean seconds of whole runs with CLIENT_FACTOR: without crab, with it."""
    found = {}
    for trace in trace_names(runs):
        means = []
        for mode in ("none", "crab"):
            times = [run["wall_s"] for run in of(runs, mode, trace, settings.CLIENT_FACTOR)]
            means.append(sum(times) / len(times) if times else None)
        if None not in means:
            found[trace] = (means[0], means[1])
    return found


def device_bytes(runs: Sequence[Run], trace: str, mode: str) -> float | None:
    """The mean over the runs with the usual factor, which mode full has as well."""
    usual = [run["factor"] for run in of(runs, "full", trace)]
    found = [run["device_bytes"] for run in of(runs, mode, trace) if not usual or run["factor"] in usual]
    return sum(found) / len(found) if found else None


def traffic(runs: Sequence[Run]) -> dict[str, tuple[float, float]]:
    """Trace → bytes at the device: full, crab."""
    pairs = {trace: (device_bytes(runs, trace, "full"), device_bytes(runs, trace, "crab")) for trace in trace_names(runs)}
    return {trace: pair for trace, pair in pairs.items() if None not in pair}


def down(pairs: Iterable[tuple[float, float]]) -> float | None:
    """By which share crab's bytes are fewer."""
    pairs = list(pairs)
    full = sum(one for one, _ in pairs)
    return 1 - sum(other for _, other in pairs) / full if full else None


def first_share(runs: Sequence[Run]) -> float | None:
    """The share of crab's stored bytes that each sandbox's first checkpoint is: its whole memory and layer."""
    first = total = 0
    for run in of(runs, "crab"):
        stored = [line["bytes_written"] for line in whole_journal(run) if line["checkpoint"]]
        first, total = first + sum(stored[:1]), total + sum(stored)
    return first / total if total else None


def stored_share(runs: Sequence[Run]) -> float | None:
    """The share of crab's bytes at the device that its packs are."""
    total = sum(run["device_bytes"] for run in of(runs, "crab"))
    return sum(line["bytes_written"] for run in of(runs, "crab") for line in whole_journal(run)) / total if total else None


def unseen_share(runs: Sequence[Run]) -> float | None:
    """The share of what mode full keeps that pages are which no earlier turn of the run had (full.unseen_bytes)."""
    full = [run for run in of(runs, "full") if "unseen_bytes" in run]
    total = sum(sum(run["kept_bytes"]) for run in full)
    return sum(sum(run["unseen_bytes"]) for run in full) / total if total else None


def unseen(runs: Sequence[Run], trace: str) -> float | None:
    """Bytes of such pages, of one trace."""
    found = [sum(run["unseen_bytes"]) for run in of(runs, "full", trace) if "unseen_bytes" in run]
    return sum(found) / len(found) if found else None


def saved_of_savable(runs: Sequence[Run]) -> float | None:
    """The share of mode full's other bytes at the device that crab does not write: 1 if it wrote unseen pages and nothing else."""
    found = [(full, crab, unseen(runs, trace)) for trace, (full, crab) in traffic(runs).items()]
    known = [(full, crab, fresh) for full, crab, fresh in found if fresh is not None]
    savable = sum(full - fresh for full, _, fresh in known)
    return sum(full - crab for full, crab, _ in known) / savable if savable else None


def file_share(runs: Sequence[Run]) -> float | None:
    """The share of what mode full keeps that the changed files are: whoever keeps a turn has to keep these."""
    total = sum(sum(run["kept_bytes"]) for run in of(runs, "full"))
    return sum(sum(run["kept_file_bytes"]) for run in of(runs, "full")) / total if total else None


def durable_ms(runs: Sequence[Run], name: str, but_first: bool = False) -> list[float]:
    """Until checkpoints of a kind were durable; `but_first`: without the first one of each sandbox."""
    found = []
    for run in of(runs, "crab"):
        made = [line for line in run["journal"] if line["durable_us"] is not None]
        is_first = not any(line["durable_us"] is not None for line in run.get("begin", ()))
        found += [line["durable_us"] / 1000 for line in made[1 if but_first and is_first else 0:] if kind(line) == name]
    return found


def slow_lines(runs: Sequence[Run], name: str, limit_ms: float) -> list[dict[str, Any]]:
    """The journal's lines of those checkpoints of a kind that took longer."""
    return [line for line in lines(of(runs, "crab"))
            if line["durable_us"] is not None and kind(line) == name and line["durable_us"] > limit_ms * 1000]


def exposed_ms(runs: Sequence[Run], name: str | None = None, mode: str = "crab") -> list[float]:
    """How long the next turn was held, of turns of a kind."""
    return [line["exposed_us"] / 1000 for line in lines(of(runs, mode)) if name in (None, kind(line))]


def nothing_share(runs: Sequence[Run], trace: str | None = None) -> float | None:
    found = [kind(line) == "nothing" for line in lines(of(runs, "crab", trace))]
    return sum(found) / len(found) if found else None


def recovered(recoveries: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Of crab: equal states, crashes that were asked for."""
    return (sum(bool(fault["equal"]) for one in recoveries for fault in one["crab"]["faults"]),
            sum(one["crab"]["asked"] for one in recoveries))


def equal_how(recoveries: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Of crab's equal recoveries: exact ones, and those in which processes that ran and moved no data came back as they were at
    their last dump; and of all faults those that came when what they were to interrupt was over."""
    faults = [fault for one in recoveries for fault in one["crab"]["faults"]]
    return {"exact": sum(fault["mode"] == "exact" for fault in faults), "cut": sum(fault["mode"] == "cut" for fault in faults),
            "late": sum(bool(fault.get("late")) for fault in faults)}


def baseline(recoveries: Sequence[dict[str, Any]], name: str) -> dict[str, int]:
    """Of chat or files: crashes, equal states, equal files, sessions that then end with the expected exit codes."""
    all_ = [one for recovery in recoveries for one in recovery[name]]
    return {"crashes": len(all_), "equal": sum(one["files_equal"] and one["processes_equal"] for one in all_),
            "files": sum(one["files_equal"] for one in all_), "codes": sum(not one["wrong_codes"] for one in all_)}
