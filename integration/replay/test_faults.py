"""What a restore after a turn that was none may differ in, and what not."""
import copy
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import crab  # noqa: E402
from judge import acquitted, judge  # noqa: E402

STATE = {
    "tree": {"/file": {"content": "one"}},
    "processes": {
        name: {"state": "alive", "pages": {"7f00": "a"}, "mappings": [["7f00", "rw"]], "ShdPnd": "0",
               "descriptors": {"3": {"offset": 5}},
               "threads": {name: {"state": "alive", "sp": "1", "pc": "2", "SigPnd": "0"}}}
        for name in ("1", "7")
    },
}


def of(state):
    return {"version": 1, "digest": "", "state": state}


def restored(*path, value):
    """Judges a state that differs in one place. Process 7 has been acquitted as having run, 1 has not."""
    after = copy.deepcopy(STATE)
    place = after
    for word in path[:-1]:
        place = place[word]
    place[path[-1]] = value
    return judge(4, of(STATE), of(after), True, {"7"})


def test_an_equal_state_is_exact():
    fault = judge(4, of(STATE), of(STATE), True, {"7"})
    assert fault.mode == "exact" and fault.is_equal and sorted(fault.exact) == ["1", "7"]


PRIVATE = [("pages", {"7f00": "b"}), ("mappings", [["7f00", "rw"], ["8000", "rw"]]),
           ("threads", {"7": {"state": "alive", "sp": "9", "pc": "9", "SigPnd": "0"}})]


@pytest.mark.parametrize("part, value", PRIVATE)
def test_a_process_that_ran_may_lose_its_private_bookkeeping(part, value):
    fault = restored("processes", "7", part, value=value)
    assert fault.mode == "cut" and fault.ran_on == ["7"] and fault.exact == ["1"] and fault.differences


MOVED = {"state": "alive", "sp": "9", "pc": "2", "SigPnd": "0"}


@pytest.mark.parametrize("part, value", [*PRIVATE[:2], ("threads", {"1": MOVED})])
def test_one_that_the_journal_does_not_name_may_not(part, value):
    assert restored("processes", "1", part, value=value).mode == "unequal"


@pytest.mark.parametrize("path, value", [
    (("tree", "/file", "content"), "two"),
    (("processes", "7", "descriptors", "3", "offset"), 6),
    (("processes", "7", "ShdPnd"), "1"),
    (("processes", "7", "state"), "stopped"),
    (("processes", "7", "threads", "7", "SigPnd"), "1"),
    (("processes", "7", "threads", "8"), {"state": "alive"}),
    (("processes", "9"), {"state": "alive"}),
], ids=str)
def test_what_somebody_else_could_have_seen_may_never_differ(path, value):
    fault = restored(*path, value=value)
    assert fault.mode == "unequal" and not fault.is_equal


def test_a_process_that_does_not_come_back_is_unequal():
    after = copy.deepcopy(STATE)
    del after["processes"]["7"]
    assert judge(4, of(STATE), of(after), True, {"7"}).mode == "unequal"


def test_the_journal_names_who_was_acquitted_and_a_name_cannot_lie():
    assert acquitted(None) == acquitted('12 "bash": forked') == set()
    assert acquitted('ran and moved no data: 12 "bash", 3 "redis-server"; 5 "x"') == {12, 3}
    assert acquitted(r'9 "ran and moved no data: 4 \"a\"": forked') == set()
    assert acquitted(r'ran and moved no data: 12 "a\", 1 \"b", 3 "c"') == {12, 3}


def test_a_turn_that_could_not_be_protected_is_not_one_that_changed_nothing():
    line = {"action": "skip", "trigger": "exec", "effects": [], "checkpoint": None}
    for boundary in ("exec", "manual"):
        assert crab.is_none(line | {"trigger": boundary}) and not crab.is_unprotected(line | {"trigger": boundary})
    for change in ({"effects": ["files"]}, {"trigger": "rollback"}, {"note": "not protected: no room"}):
        assert not crab.is_none(line | change) and crab.is_unprotected(line | change)
    # Its files alone are not what a replay expects.
    assert crab.is_unprotected(line | {"action": "files", "effects": ["files"], "checkpoint": "x", "missing": ["processes"]})
