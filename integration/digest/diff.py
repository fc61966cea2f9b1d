"""The differences between two digests, one by one."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterator

#: Values longer than this many characters are cut in the text of a difference.
SHOWN = 160


@dataclass(frozen=True)
class Difference:
    """`path` leads to the value: ("processes", "7", "pages", "7f12…"). None: absent on that side."""
    path: tuple[str, ...]
    before: Any
    after: Any

    @property
    def process(self) -> str | None:
        """The pid in the sandbox, if this is one of a process."""
        return self.path[1] if self.path[0] == "processes" and len(self.path) > 1 else None

    def __str__(self) -> str:
        return f"{' '.join(self.path)}: {_show(self.before)} -> {_show(self.after)}"


def _show(value: Any) -> str:
    if value is None:
        return "absent"
    text = value if isinstance(value, str) else repr(value)
    text = text.encode("ascii", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[Difference]:
    """Every difference of the digested parts (`state`), in order."""
    if before["version"] != after["version"]:
        raise ValueError(f"digests of definitions {before['version']} and {after['version']} cannot be compared")
    return list(_walk((), before["state"], after["state"]))


def _walk(path: tuple[str, ...], before: Any, after: Any) -> Iterator[Difference]:
    if before == after:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            yield from _walk((*path, key), before.get(key), after.get(key))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after)):
            yield from _walk((*path, str(index)), one, other)
    else:
        yield Difference(path, before, after)
