"""What must be in a store, going by what its writer was told to do and has reported.

A report is a promise: what was done before it is durable. What was begun and not reported may have been done or not, and
nothing in between.
"""

import dataclasses
import json

from disk import MARK


@dataclasses.dataclass
class Sandbox:
    """`maybe` in front of what may be so or not."""

    turns: dict = dataclasses.field(default_factory=dict)
    """Number → the answer that reported it."""
    maybe_there: dict = dataclasses.field(default_factory=dict)
    maybe_gone: set = dataclasses.field(default_factory=set)
    let_go: set = dataclasses.field(default_factory=set)
    """Of maybe_there: those that are gone for good once anything else of the packs is durable."""
    names: dict = dataclasses.field(default_factory=dict)
    """Name → the turns that it may stand for; None: there may be no such name."""
    armed: set = dataclasses.field(default_factory=lambda: {None})
    journal: list = dataclasses.field(default_factory=list)
    durable_lines: int = 0
    """So many of them must be there."""
    is_maybe_removed: bool = False

    def droppable(self, keep):
        stay = {*self.armed, *(turn for turns in self.names.values() for turn in turns)}
        return {turn for turn in sorted(self.turns)[:-keep] if turn not in stay}

    def forget(self):
        for turn in self.let_go:
            del self.maybe_there[turn]
        self.let_go = set()


def orders(records, at):
    """(order, answer or None) of the first `at` records' marks."""
    marks = [json.loads(bytes(record.data)) for record in records[:at] if record.kind == MARK and record.data[:1] == b"{"]
    done = [(mark["done"], mark["answer"]) for mark in marks if "done" in mark]
    begun = [(marks[-1]["begin"], None)] if marks and "begin" in marks[-1] else []
    return done + begun


def expect(records, at):
    """{id: Sandbox} of a store whose disk has lost power after `at` records."""
    future = {order["turn"]: answer for order, answer in orders(records, len(records)) if order["do"] == "checkpoint" and answer}
    sandboxes = {}
    for order, answer in orders(records, at):
        sandbox = sandboxes.setdefault(order["sandbox"], Sandbox())
        _apply(sandbox, order, answer, future)
        if order["do"] == "remove" and answer:
            del sandboxes[order["sandbox"]]
    return sandboxes


def _apply(sandbox, order, answer, future):
    done, turn = answer is not None, order.get("turn")
    match order["do"]:
        case "checkpoint" if done:
            sandbox.turns[turn] = answer
            sandbox.forget()
        case "checkpoint":
            # Not reported in time, but perhaps later, so its digest is known; else no other power loss tells it either.
            sandbox.maybe_there[turn] = future.get(turn)
        case "retain" if done:
            for turn in answer["gone"]:
                sandbox.maybe_there[turn] = sandbox.turns.pop(turn)
            sandbox.let_go |= set(answer["gone"])
        case "retain":
            sandbox.maybe_gone = sandbox.droppable(order["keep"])
        case "name":
            before = sandbox.names.get(order["name"], {None})
            sandbox.names[order["name"]] = {turn} if done else before | {turn}
        case "arm" | "disarm":
            sandbox.armed = {turn} if done else sandbox.armed | {turn}
        case "append":
            sandbox.journal.append(turn)
            if done and order["now"]:
                sandbox.durable_lines = len(sandbox.journal)
        case "remove":
            sandbox.is_maybe_removed = True
        case "collect" if done:
            sandbox.forget()
        case "collect" | "litter" | "close":
            pass
        case other:
            raise AssertionError(f"unknown: {other}")


def compare(sandboxes, seen):
    """What of a store that was seen cannot be."""
    wrong = [f"{id} was never there, or was removed" for id in seen if id not in sandboxes]
    for id, sandbox in sandboxes.items():
        if id in seen:
            wrong += [f"{id}: {text}" for text in _compare(sandbox, seen[id])]
        elif not sandbox.is_maybe_removed and (sandbox.turns or sandbox.durable_lines):
            wrong.append(f"{id} is gone")
    return wrong


def _compare(sandbox, seen):
    yield from seen["faults"]
    if "turns" not in seen:
        return
    turns = {int(number): found for number, found in seen["turns"].items()}
    known = {**sandbox.turns, **sandbox.maybe_there}
    for turn in sandbox.turns.keys() - sandbox.maybe_gone - turns.keys():
        yield f"turn {turn} is lost"
    for turn, found in turns.items():
        if turn not in known:
            yield f"turn {turn} was never there, or was let go"
        elif found and known[turn] and found != {key: known[turn][key] for key in found}:
            yield f"turn {turn} is another one: {found}, not {known[turn]}"
    for name in seen["names"].keys() | sandbox.names.keys():
        found, allowed = seen["names"].get(name), sandbox.names.get(name, {None})
        if found not in allowed:
            yield f"name {name} stands for {found}, not {allowed}"
    if seen["armed"] not in sandbox.armed:
        yield f"armed is {seen['armed']}, not {sandbox.armed}"
    lines = seen["journal"]
    if lines != sandbox.journal[: len(lines)] or len(lines) < sandbox.durable_lines:
        yield f"the journal has {lines}, not {sandbox.journal}, of which {sandbox.durable_lines} are durable"
