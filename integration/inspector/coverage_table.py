"""The table of docs/inspector.md that says what is covered: written from a run, never by hand."""
from __future__ import annotations

import os
from typing import TYPE_CHECKING, Sequence

from effects import errno_name

if TYPE_CHECKING:
    from suite import Outcome

BEGIN = "<!-- effects: written by integration/inspector/suite.py --update-docs -->"
END = "<!-- effects: end -->"
DOCUMENT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../docs/inspector.md")


def _cell(outcomes: Sequence["Outcome"]) -> str:
    if not outcomes:
        return "not tried"
    if any(o.bad for o in outcomes):
        return "**fails**"
    refused = {o.refused for o in outcomes if o.refused}
    if refused:
        return "refused: " + ", ".join(errno_name(number) for number in sorted(refused))
    return "silent" if outcomes[0].effect.read_only else "reported"


def _targets(targets: tuple[str, ...]) -> str:
    return ", ".join("its directory" if t == "." else f"{t[1:]} (new)" if t.startswith("+") else t for t in targets)


def table(outcomes: Sequence["Outcome"]) -> str:
    systems = list(dict.fromkeys(o.fs for o in outcomes))
    by_effect: dict[str, list["Outcome"]] = {}
    for outcome in outcomes:
        by_effect.setdefault(outcome.effect.name, []).append(outcome)
    lines = [f"| effect | inodes | {' | '.join(systems)} |", "|---" * (2 + len(systems)) + "|"]
    for name, mine in by_effect.items():
        cells = " | ".join(_cell([o for o in mine if o.fs == fs]) for fs in systems)
        lines.append(f"| `{name}` | {_targets(mine[0].effect.targets)} | {cells} |")
    return "\n".join(lines)


def handle(outcomes: Sequence["Outcome"], update: bool, check: bool) -> int:
    """Writes the table, or compares it. The exit code."""
    if not (update or check):
        return 0
    with open(DOCUMENT) as source:
        text = source.read()
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not (begin and end):
        print(f"{os.path.normpath(DOCUMENT)} lacks the lines between which the table goes:\n{BEGIN}\n{END}")
        return 1
    new = f"\n{table(outcomes)}\n"
    if check and new != old:
        print("the table of effects in docs/inspector.md is not current: run suite.py --update-docs")
        return 1
    if update and new != old:
        with open(DOCUMENT, "w") as out:
            out.write(before + begin + new + end + after)
    return 0
