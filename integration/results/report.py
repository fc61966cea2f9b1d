"""docs/results.md and its plots, from what was measured. Pure but for main, which reads and writes the files."""
from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any, Sequence

import figures as f
import settings
import svg

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "integration" / "replay"))

import constants as replaying  # noqa: E402

#: Modules with constants, and what they are about.
CONSTANTS = {
    settings: "What is measured, and beside what: `integration/results/settings.py`.",
    replaying: "How faults are made, and what is left out where states are compared: `integration/replay/constants.py`.",
}
#: What stands between these in the README is written by this program.
MARKS = "<!-- results -->\n", "<!-- end of results -->\n"
COMMAND = "make bench"
Data = dict[str, Any]


def percent(value: float | None, digits: int = 0) -> str:
    return "not measured" if value is None else f"{value * 100:.{digits}f} %"


def ms(value: float | None) -> str:
    return "—" if value is None else "0 ms" if value == 0 else f"{value:.2f} ms" if value < 10 else f"{value:.0f} ms"


def mb(value: float | None) -> str:
    return "—" if value is None else f"{value / 1e6:.1f}"


def share(part: int, of: int) -> str:
    return f"{part} of {of}" + (f" ({part / of:.0%})".replace("%", " %") if of else "")


def judged(text: str, holds: bool | None, reason: str = "") -> str:
    """What was measured, and whether it is what was wanted. None: nothing was measured, or nothing was wanted."""
    if holds is None or holds:
        return text
    return f"{text}: **falls short**{': ' + reason if reason else ''}"


def least(value: float | None, wanted: float) -> bool | None:
    return None if value is None else value >= wanted


def most(value: float | None, wanted: float) -> bool | None:
    return None if value is None else value <= wanted


def row_recovered(data: Data) -> list[str]:
    equal, asked = f.recovered(data["recoveries"])
    bad = [f"{one['trace']}, {fault.get('kind', 'init')} after turn {fault['turn']}"
           for one in data["recoveries"] for fault in one["crab"]["faults"] if not fault["equal"]]
    ends = [(one["trace"], one["crab"].get("end")) for one in data["recoveries"]]
    other = [trace for trace, end in ends if end and not end["equal"]]
    missing = asked - sum(len(one["crab"]["faults"]) for one in data["recoveries"])
    failed = [f"{one['trace']}: {one['crab']['failure']}" for one in data["recoveries"] if one["crab"].get("failure")]
    reason = "; ".join((["unequal: " + ", ".join(bad)] if bad else []) + ([f"{missing} faults were not come to"] if missing else [])
                       + ([f"another end: {', '.join(other)}"] if other else []) + failed)
    kinds = {fault.get("kind", "init") for one in data["recoveries"] for fault in one["crab"]["faults"]}
    how = f.equal_how(data["recoveries"])
    text = (f"{share(equal, asked)} recoveries from {len(kinds)} kinds of faults: state equal ({how['exact']} exactly, {how['cut']} but for processes that "
            f"ran and moved no data; {how['late']} faults came late)") if asked else "not measured"
    known = [end for _, end in ends if end]
    if known:
        text += f"; at the end as without faults: {share(sum(end['equal'] for end in known), len(known))}"
    if asked:
        text += f"; not tried with {', '.join(settings.NOT_CRASHED)}"
    holds = least(equal / asked, settings.WANTED["recovered"]) and not other and not failed if asked else None
    return ["recovery correctness", "100 % (task passes, one crash)", "100 % state equality", judged(text, holds, reason)]


def row_baselines(data: Data) -> list[str]:
    cells = []
    for name in ("chat", "files"):
        found = f.baseline(data["recoveries"], name)
        cells.append(f"{name}: state equal {share(found['equal'], found['crashes'])}, remaining exit codes as expected {share(found['codes'], found['crashes'])}")
    return ["chat only / files only", "8–13 % / 28–100 %", "measured", "; ".join(cells)]


def row_nothing(data: Data) -> list[str]:
    runs = data["runs"]
    each = ", ".join(f"{name} {percent(f.nothing_share(runs, name))}" for name in f.trace_names(runs))
    return ["turns with nothing to save", "over 75 %", "measured per trace", f"{percent(f.nothing_share(runs))}: {each}"]


def row_bytes(data: Data) -> list[str]:
    runs = data["runs"]
    value = f.down(f.traffic(runs).values())
    reason = (f"of what full keeps {percent(f.unseen_share(runs))} are pages of {settings.PAGE} bytes that no turn before had, which whoever stores each whole page "
              f"once keeps, too (the changed files alone are {percent(f.file_share(runs))}): of all else {percent(f.saved_of_savable(runs))} is saved; of crab's bytes at the device {percent(f.stored_share(runs))} are what it stores, the rest is the file system's journal and "
              f"metadata; {percent(f.first_share(runs))} of what it stores is the sandbox's first checkpoint, its whole memory and layer")
    return ["bytes against full-per-turn", "down by up to 87 %", "at least 95 % down",
            judged("not measured" if value is None else f"down by {percent(value, 1)}", least(value, settings.WANTED["bytes down"]), reason)]


def row_client(data: Data) -> list[str]:
    pairs = f.client_time(data["runs"])
    value = f.ratio(list(pairs.values()))
    by = {name: other / none for name, (none, other) in pairs.items()}
    reason = f"most with {max(by, key=by.__getitem__)}, {max(by.values()) - 1:+.2%}" if by else ""
    return ["client time against no crab, factor 1.0", "within 1.9 %", "within 1 %",
            judged("not measured" if value is None else f"{(value - 1) * 100:+.2f} %, {len(pairs)} traces", most(value, settings.WANTED["client time"]), reason)]


def row_exec(data: Data) -> list[str]:
    pairs = f.exec_pairs(data["runs"], "crab")
    value, ends = f.ratio(pairs), f.interval(pairs)
    text = f"{value:.3f} ({settings.CONFIDENCE:.0%} interval {ends[0]:.3f} to {ends[1]:.3f})".replace("%", " %") if value and ends else "not measured"
    slower = f.quantile([other - none for none, other in pairs], 0.5)
    return ["sum of exec times, crab against none", "not reported", "at most 1.03",
            judged(text, most(value, settings.WANTED["exec time"]), f"the median exec takes {slower or 0:.1f} ms longer")]


#: Known from perf of the shim's thread: of 2.2 ms of processor time a turn, a sixth reads /proc, an eighth asks BPF's maps.
LOOK_REASON = ("each look reads anew what /proc says of every process that is there, the mounts and the network: some 100 system "
               "calls for one process that has no socket, 70 more for each further one, and no single one stands out "
               "(docs/inspector-processes.md)")


def row_look(data: Data) -> list[str]:
    looks = [line["look_us"] / 1000 for line in f.lines(f.of(data["runs"], "crab"))]
    value = f.quantile(looks, 0.5)
    return ["look at a turn, median", "31–72 ms", "under 1 ms",
            judged(f"{ms(value)}, p95 {ms(f.quantile(looks, 0.95))}", most(value, settings.WANTED["look"]), LOOK_REASON)]


def slow_text(slow: Sequence[dict[str, Any]]) -> str:
    """What checkpoints have in common that took longer than is wanted."""
    files, captured = ([line[key] for line in slow] for key in ("changed_files", "bytes_captured"))
    frozen = [line["freeze_us"] / 1000 for line in slow]
    dumped = f"; they were frozen for {ms(f.quantile(frozen, 0.5))} at the median, in which CRIU dumps" if any(frozen) else ""
    return (f"the {len(slow)} that took longer than is wanted captured {f.quantile(files, 0.5):.0f} files and {mb(f.quantile(captured, 0.5))} MB at the "
            f"median, {max(files)} files and {mb(max(captured))} MB at the most, to be read, hashed, compressed and synced{dumped}")


def row_checkpoint(data: Data) -> list[str]:
    cells = []
    for name in ("files", "processes"):
        times = f.durable_ms(data["runs"], name)
        if not times:
            cells.append(f"{name}: none")
            continue
        p50, p95 = f.quantile(times, 0.5), f.quantile(times, 0.95)
        holds = most(p50, settings.WANTED[f"{name} p50"]) and most(p95, settings.WANTED[f"{name} p95"])
        later = f.quantile(f.durable_ms(data["runs"], name, but_first=True), 0.95)
        slow = f.slow_lines(data["runs"], name, settings.WANTED[f"{name} p95"])
        reason = (f"the longest took {ms(f.quantile(times, 1.0))}; p95 without the first of each sandbox, which loads the inspector: {ms(later)}; "
                  f"{slow_text(slow)}" if slow else "")
        cells.append(judged(f"{name} {ms(p50)} / {ms(p95)} ({len(times)} turns)", holds, reason))
    return ["checkpoint p50 / p95, until durable", "0.1 / 0.7 s", "files under 20 ms, processes under 250 ms", "; ".join(cells)]


def row_exposed(data: Data) -> list[str]:
    cells = []
    for name in ("nothing", "files", "processes"):
        held = f.exposed_ms(data["runs"], name)
        if held:
            p50 = f.quantile(held, 0.5)
            cells.append(judged(f"{name} {ms(p50)} / {ms(f.quantile(held, 0.99))}", most(p50, settings.WANTED["exposed p50"])))
    return ["exposed delay p50 / p99", "0 / not reported", "0 / stated, per kind of turn",
            "; ".join(cells) or "not measured"]


def row_faults(data: Data) -> list[str]:
    most_ = max((one["crab"]["planned"] for one in data["recoveries"]), default=0)
    return ["faults per run, sandboxes at once", "1, 16–96 on 128 vCPU", "5, up to 60 on 2 vCPU",
            f"{most_}; sixty sandboxes: [engine.md](engine.md)"]


ROWS = (row_recovered, row_baselines, row_nothing, row_bytes, row_client, row_exec, row_look, row_checkpoint, row_exposed, row_faults)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)) + "\n"


def main_table(data: Data) -> str:
    return table(("", "the paper", "wanted", "measured"), [row(data) for row in ROWS])


def trace_table(data: Data) -> str:
    runs, rows = data["runs"], []
    for name in f.trace_names(runs):
        pairs, bytes_ = f.exec_pairs(runs, "crab", name), f.traffic(runs).get(name, (None, None))
        value, ends = f.ratio(pairs), f.interval(pairs)
        kinds = [f.kind(line) for line in f.lines(f.of(runs, "crab", name))]
        counts = " / ".join(str(kinds.count(one)) for one in ("nothing", "files", "processes", "unprotected"))
        wrong = sum(turn["expected"] not in (None, turn["code"]) for run in f.of(runs, "crab", name) for turn in run["turns"])
        wrong_none = sum(turn["expected"] not in (None, turn["code"]) for run in f.of(runs, "none", name) for turn in run["turns"])
        rows.append([name, str(f.of(runs, "none", name)[0]["factor"]) if f.of(runs, "none", name) else "—", counts,
                     f"{value:.3f} ({ends[0]:.3f} to {ends[1]:.3f})" if value and ends else "—",
                     mb(bytes_[0]), mb(f.unseen(runs, name)), mb(f.device_bytes(runs, name, "full in crab")), mb(bytes_[1]), percent(f.down([bytes_]) if bytes_[0] else None, 1),
                     f"{wrong} / {wrong_none}"])
    return table(("trace", "think ×", "turns of crab: nothing / files / processes / unprotected", "exec times, crab / none (interval)", "MB: full",
                  "its unseen pages", "full in crab", "crab", "down by", "unexpected exit codes: crab / none"), rows)


def mode_table(data: Data) -> str:
    rows = []
    for mode in settings.MODES:
        runs = f.of(data["runs"], mode)
        if not runs:
            continue
        pairs, held = f.exec_pairs(data["runs"], mode), f.exposed_ms(data["runs"], None, mode)
        if mode == "full":
            held = [turn["held_ms"] for run in runs for turn in run["turns"]]
        value = f.ratio(pairs)
        rows.append([mode, settings.MODES[mode], str(len(runs)), f"{value:.3f}" if value and mode != "none" else "1",
                     f"{ms(f.quantile(held, 0.5))} / {ms(f.quantile(held, 0.99))}" if mode != "none" else "—"])
    return table(("mode", "what it is", "runs", "exec times against none, in the same traces", "the next turn waited, p50 / p99"), rows)


def end_in_words(end: dict[str, Any] | None) -> str:
    """How a run with faults ended, beside two without any."""
    if end is None:
        return "not measured"
    if not end["paths"]:
        return f"**{'; '.join(end['unequal'])}**"
    what = "equal" if end["equal"] else f"**{len(end['unequal'])} differ**"
    return f"{what}: {end['paths']} paths but {len(end['excluded'])}"


def recovery_table(data: Data) -> str:
    rows = []
    for one in data["recoveries"]:
        end = one["crab"].get("end")
        faults = ", ".join(f"{fault.get('kind', 'init')} {fault['turn']}{' (late)' if fault.get('late') else ''}" for fault in one["crab"]["faults"])
        after = "—" if one.get("vm") else ", ".join(map(str, one["turns"]))
        wrong = ", ".join(map(str, one["crab"]["wrong_codes"])) or "none"
        cells = [one["trace"], faults, share(*f.recovered([one])), end_in_words(end), wrong, after]
        for name in ("chat", "files"):
            found = f.baseline([one], name)
            cells.append(f"{found['equal']} / {found['files']} / {found['codes']} of {found['crashes']}" if found["crashes"] else "—")
        rows.append(cells)
    return table(("trace", "crab's faults: kind, turn", "equal", "at the end", "turns with unexpected exit codes", "crashes of the others, after turns", "chat: state equal / files equal / exit codes", "files: the same"), rows)


def constants() -> str:
    return "\n".join(f"{what}\n\n{listed(module)}" for module, what in CONSTANTS.items())


def listed(module: ModuleType) -> str:
    names = [name for name in vars(module) if name.isupper()]
    return "\n".join(f"- `{name}` = `{json.dumps(getattr(module, name), ensure_ascii=False)}`" for name in names) + "\n"


def doubts(data: Data) -> list[str]:
    """Why what was measured is a trial, and no result."""
    m = data["machine"]
    reasons = (("debug binaries", m["profile"] != "release"), (f"think times × {m['think']}", m["think"] is not None),
               (f"failed: {'; '.join(data['failed'])}", bool(data["failed"])))
    return [name for name, is_so in reasons if is_so]


def limits(data: Data) -> list[str]:
    """In what it is less than the whole measurement."""
    quick = f"`--quick`: one run of each mode, mostly with think times × {settings.QUICK_FACTOR}, {settings.QUICK_CRASHES} faults a trace"
    reasons = ((quick, data["machine"]["quick"]), ("without " + ", ".join(data["missing"]), bool(data["missing"])))
    return [name for name, is_so in reasons if is_so]


def builds(runs: Sequence[f.Run]) -> str:
    """Which runs are of another build of crab than most, if any: parts can be measured at different times. A run of before
    builds were told apart is of one more."""
    usual = Counter(run.get("build") for run in runs).most_common(1)
    others = [run["trace"] for run in runs if run.get("build") != usual[0][0]]
    names = ", ".join(dict.fromkeys(others))
    return f"The runs of {names} are of another build of crab than the others." if names else ""


def extent(data: Data) -> str:
    """What a reader must know before any figure; nothing of the whole measurement."""
    trial, short = doubts(data), limits(data)
    if trial:
        return f"**A trial run ({', '.join(trial + short)}): its figures are no results.**"
    return f"**A short run ({'; '.join(short)}).**" if short else ""


def machine(data: Data) -> str:
    m = data["machine"]
    versions = "; ".join(" ".join(m[name]) for name in ("containerd", "runc", "criu", "crab") if m.get(name))
    loads = [run["load"] for run in data["runs"]]
    text = (f"{m['cpu']}, {m['cpus']} CPUs, {m['memory_kb'] / 1e6:.0f} GB, kernel {m['kernel']}; {versions}; {m['date']}; "
            f"load average at the runs' ends {min(loads, default=0):.1f} to {max(loads, default=0):.1f}.")
    return "\n\n".join(filter(None, (text, *data["remarks"], builds(data["runs"]), extent(data))))


def in_readme(readme: str, data: Data) -> str:
    """The README with the short table; a trial leaves it as it is."""
    begin, end = readme.find(MARKS[0]), readme.find(MARKS[1])
    if doubts(data) or begin < 0 or end < begin:
        return readme
    text = "\n\n".join(filter(None, (*data["remarks"], builds(data["runs"]), extent(data), main_table(data))))
    # Links are relative to docs/ on the page itself.
    return readme[:begin] + MARKS[0] + text.replace("](", "](docs/") + readme[end:]


def page(data: Data) -> str:
    """docs/results.md."""
    return PAGE.format(machine=machine(data), constants=constants(), main=main_table(data), traces=trace_table(data),
                       modes=mode_table(data), recoveries=recovery_table(data), command=COMMAND)


PAGE = """# Results

Recorded agents' sessions, played in sandboxes as they were recorded, with crab and without. Everything here is made by
`{command}` (`integration/results/run OUT-DIR`, then `integration/results/report OUT-DIR`), which writes this page: change
the programs, not the page. "The paper" is the one whose idea crab follows; its figures are its own, from its own machines.

## The machine
{machine}

## Constants
All that a figure depends on. Times in milliseconds where no unit is named, shares and ratios as such.

{constants}
## The table
{main}
- **Equal** is what [state.md](state.md) promises: files and processes as they were at the boundary, read by a program that
  shares no code with crab, in the same run. **Exactly** means in all that it reads. Otherwise processes of which crab's
  journal says that they ran and moved no data came back as they were at their last dump (the rule of the consistent cut):
  they may differ in memory, mappings, stack pointer, program counter and signal mask (`CUT_LOST`), in nothing else. Faults
  are drawn, turns and kinds: `kill -9` of init, of each process, of the shim, of containerd with all that it has started;
  of init in the middle of a command, which is then issued again; again during the recovery, and as soon as it is over
  (two recoveries). A fault came **late** if what it was to interrupt was over by then. **At the end as without faults**: all
  files and command lines are those of two runs without a fault, but for what these two have not in common.
- **Client time** is that of the whole session. **Exec times** are those of the client's whole calls, with what the call was
  held before (at the gate, or by `crab turn`, or by mode full). Nothing but the commands is waited for: the agent thinks
  while a checkpoint is taken. Turns that every run ended by their time-out are left out of them. The image is read once
  before the first run, and who runs first takes turns; where a trace is run once for each mode, it is containerd's own shim.
- **Bytes** are counted by the block device under the file system that holds nothing but the store, its own metadata and
  journal included, after a `sync`. **Unseen pages** are those pieces of 4 KiB of what full keeps that no turn before had, of
  an image's file or a file's contents from its beginning on, compressed together: about what a store writes that keeps each
  whole page once, without what says where it belongs.

## Per trace
{traces}
![bytes](results/bytes.svg)

![exec times](results/exec.svg)

## The modes
They take turns, in one bed, on a store of their own.

{modes}
![exposed delay](results/exposed.svg)

## Recoveries
What comes back for those who keep only the chat (a fresh sandbox, where the agent goes on), or the files (a fresh sandbox
with the writable layer of then); one crash a run. Equal are all files, and the command lines and working directories of all
processes; crab's recoveries are compared in all that a process is, as told above. What a shell knows beyond that (variables, functions)
shows in the exit codes of those sessions that are typed into one shell (`ps-…`, whose turns end with `crab turn`; the others'
commands are execs). The paper's figures count tasks that pass; here it is the exit codes of
the remaining commands, which is less: a command may fail as expected, and a right exit code says nothing of its output.

{recoveries}"""


def plots(data: Data) -> dict[str, str]:
    """File names below docs/results, and what is in them."""
    runs = data["runs"]
    ratios = {name: [f.ratio(f.exec_pairs(runs, "crab", name)) or 0.0] for name in f.trace_names(runs)}
    held = {name: f.exposed_ms(runs, name) for name in ("nothing", "files", "processes")}
    held["full per turn"] = [turn["held_ms"] for run in f.of(runs, "full") for turn in run["turns"]]
    return {
        "bytes.svg": svg.bars("Bytes at the block device", " MB", ("full per turn", "crab"),
                              {name: [one / 1e6 for one in pair] for name, pair in f.traffic(runs).items()}),
        "exec.svg": svg.bars("Sum of exec times, crab / none", "", ("crab",), ratios, mark=settings.WANTED["exec time"]),
        "exposed.svg": svg.distribution("How long the next turn waited, by kind of turn", "ms", {name: v for name, v in held.items() if v}),
    }


def missing(measured: Sequence[str], recovered: Sequence[str], quick: bool) -> list[str]:
    """The sessions, or their recoveries, that the whole measurement has, and this one has not."""
    crashed = [name for name in (settings.QUICK_TRACES if quick else settings.TRACES)
               if name not in settings.NOT_CRASHED and not (quick and name in settings.NOT_CRASHED_QUICKLY)]
    return ([name for name in settings.TRACES if name not in measured]
            + [f"recoveries of {name}" for name in crashed if name in measured and name not in recovered]
            + [name for name in settings.RECOVERED_IN_VM if name not in recovered and not quick])


def load(out: Path) -> Data:
    """All that measure.py left."""
    machine_ = json.loads((out / "machine.json").read_text())
    order = lambda path: (path.name.rsplit(".", 2)[0], int(path.name.rsplit(".", 2)[1]))  # noqa: E731
    runs = [json.loads(path.read_text()) for path in sorted((out / "runs").glob("*.json"), key=order)]
    recoveries = [json.loads(path.read_text()) for path in sorted((out / "recover").glob("*.json"))]
    failed, remarks = out / "failed", out / "remarks"
    return {"machine": machine_, "runs": runs, "failed": failed.read_text().splitlines() if failed.exists() else [],
            "missing": missing(f.trace_names(runs), [one["trace"] for one in recoveries if one["crab"]["asked"]], machine_["quick"]),
            "recoveries": recoveries,
            # What whoever measured knows of it: a line each.
            "remarks": remarks.read_text().splitlines() if remarks.exists() else []}


def main(arguments: Sequence[str]) -> int:
    if not 1 <= len(arguments) <= 2:
        print("report OUT-DIR [ROOT]: writes ROOT/docs/results.md, its plots, and the README's table (default: the checkout)", file=sys.stderr)
        return 2
    data, root = load(Path(arguments[0])), Path(arguments[1]) if len(arguments) == 2 else ROOT
    docs, readme = root / "docs", root / "README.md"
    (docs / "results").mkdir(parents=True, exist_ok=True)
    (docs / "results.md").write_text(page(data))
    for name, text in plots(data).items():
        (docs / "results" / name).write_text(text)
    if readme.exists():
        readme.write_text(in_readme(readme.read_text(), data))
    print(main_table(data))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
