"""Where faults are drawn to strike."""
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from constants import KINDS  # noqa: E402
from plan import draw  # noqa: E402

TURNS = range(1, 50)


def test_a_seed_draws_the_same_again_and_another_seed_or_sandbox_something_else():
    assert draw(TURNS, 7, KINDS, 4, 0) == draw(TURNS, 7, KINDS, 4, 0)
    assert draw(TURNS, 7, KINDS, 4, 0) != draw(TURNS, 7, KINDS, 4, 1)
    assert draw(TURNS, 7, KINDS, 4, 0) != draw(TURNS, 7, KINDS, 5, 0)


@pytest.mark.parametrize("seed", range(20))
def test_each_kind_comes_before_one_comes_again(seed):
    drawn = draw(TURNS, len(KINDS), KINDS, seed, 0)
    assert sorted(drawn.values()) == sorted(KINDS) and list(drawn) == sorted(drawn) and 1 not in drawn


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("count", [1, 3, 11])
def test_all_sandboxes_die_with_containerd_equally_often(seed, count):
    assert len({list(draw(TURNS, count, KINDS, seed, copy).values()).count("containerd") for copy in range(5)}) == 1


def test_one_kind_alone_is_drawn_as_often_as_asked_for():
    for kind in KINDS:
        assert list(draw(TURNS, 3, [kind], 1, 0).values()) == [kind] * 3


def test_more_faults_than_turns_are_refused():
    with pytest.raises(ValueError):
        draw(range(1, 4), 3, KINDS, 1, 0)
