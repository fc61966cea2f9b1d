"""What two fault-free runs have not in common is left out of a comparison, and nothing else."""
import copy
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import final  # noqa: E402

A = {"version": 1, "processes": {"bash": 1, "server": 1, "sleep 1": 1},
     "tree": {"/": {"type": "dir"}, "/same": {"content": "1"}, "/token": {"content": "a"}, "/objects": {"type": "dir"},
              "/objects/kept": {"content": "k"}, "/objects/a1": {"type": "dir"}, "/objects/a1/x": {"content": "a"}}}
B = copy.deepcopy(A)
B["tree"]["/token"] = {"content": "b"}
for name in ("/objects/a1", "/objects/a1/x"):
    B["tree"][name.replace("a1", "b1")] = B["tree"].pop(name)
del B["processes"]["sleep 1"]


def compared(**changes):
    c = copy.deepcopy(A)
    for part, entries in changes.items():
        for name, value in entries.items():
            if value is None:
                del c[part][name]
            else:
                c[part][name] = value
    return final.unequal(A, B, c, final.exclusions(A, B))


def test_what_differs_without_faults_is_named():
    found = final.exclusions(A, B)
    assert (found.paths, found.listings, found.commands) == ({"/token"}, {"/objects"}, {"sleep 1"})


def test_a_run_that_differs_where_fault_free_runs_do_is_equal():
    assert compared() == []
    assert compared(tree={"/token": {"content": "c"}, "/objects/a1": None, "/objects/a1/x": None,
                          "/objects/c1": {"type": "dir"}, "/objects/c1/y": {"content": "c"}}) == []
    assert compared(processes={"sleep 1": None}) == []


@pytest.mark.parametrize("changes", [
    {"tree": {"/same": {"content": "2"}}}, {"tree": {"/same": None}}, {"tree": {"/new": {"content": "1"}}},
    {"tree": {"/objects/kept": None}}, {"tree": {"/objects/kept": {"content": "other"}}},
    {"processes": {"server": None}}, {"processes": {"server": 2}}, {"processes": {"another": 1}},
], ids=str)
def test_any_other_difference_is_told(changes):
    assert len(compared(**changes)) == 1
