"""Where and how the sandboxes of a replay die: drawn from a seed, so that a run can be made again."""
from __future__ import annotations

import random
from collections.abc import Sequence

#: Turn → kind (constants.KINDS).
Plan = dict[int, str]


def draw(turns: Sequence[int], count: int, kinds: Sequence[str], seed: int, copy: int) -> Plan:
    """`count` different turns of one sandbox, the copy-th of this replay. Each kind comes before one comes again.

    All sandboxes of one seed die with containerd equally often, since they do so together. Nothing happens at the first
    turn: what would die in the middle of it had no boundary to go back to.
    """
    if not kinds or count > len(turns) - 1:
        raise ValueError(f"{count} faults do not fit into {len(turns)} turns")
    # Drawn for all, so the same in all.
    common = _cycle(list(kinds), count, random.Random(f"{seed}")).count("containerd")
    chance = random.Random(f"{seed}/{copy}")
    own = [kind for kind in kinds if kind != "containerd"]
    drawn = ["containerd"] * common + _cycle(own, count - common, chance)
    chance.shuffle(drawn)
    return dict(zip(sorted(chance.sample(list(turns[1:]), count)), drawn, strict=True))


def _cycle(kinds: list[str], count: int, chance: random.Random) -> list[str]:
    drawn: list[str] = []
    while len(drawn) < count:
        chance.shuffle(kinds)
        drawn += kinds[:count - len(drawn)]
    return drawn
