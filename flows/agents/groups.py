"""Which listeners run together: those that share something, and those whose order can be told only so.

Listeners that stand alone are steps of their own. Fused into one are listeners that

* use the same state, one of them at least changing it;
* hang on the same stream, where one changes the item that the next is given;
* write to the same stream, for its order is that in which they are called;
* feed each other in a circle;
* and, where a group takes several streams, all that lies between it and the sources: what comes first is then
  told by the order of arrival and not by which step was quicker.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from chainwax.flows.agents.analysis import Place, Touches, is_leaf, touches
from chainwax.flows.chainstream._world import Listener, World

__all__ = ["Group", "Member", "grouped"]


@dataclass(slots=True)
class Member:
    """A listener and what it touches."""

    listener: Listener
    touches: Touches
    writes: frozenset[str]
    """The streams that it may write to."""

    @property
    def asks(self) -> bool:
        """Whether it asks models."""
        return bool(self.touches.questions)

    def check_write(self, stream: str) -> None:
        """Raise RuntimeError where nobody foresaw that it writes to a stream: it would lead nowhere."""
        if stream not in self.writes:
            raise RuntimeError(
                f"{self.listener.shown} adds to '{stream}', which its source does not show: "
                "let it get the stream itself (cs.get_stream), or hold it in a variable or attribute"
            )


@dataclass(slots=True)
class Group:
    """Listeners that are one step of the flow."""

    id: str
    members: list[Member]
    """In the order in which they were hung on their streams."""
    inputs: tuple[str, ...]
    """Streams that come from outside."""
    outputs: tuple[str, ...]
    """Streams that others may listen to."""
    state: dict[Place, Any] = field(default_factory=dict)
    """Places that its members change, and what they read of them."""
    why: tuple[str, ...] = ()
    """Why its members run together, for people."""

    @property
    def asks(self) -> bool:
        """Whether a member asks models."""
        return any(member.asks for member in self.members)

    @property
    def is_line(self) -> bool:
        """Whether its members follow one another, without a state, without models and without a way back."""
        heard = {member.listener.stream for member in self.members}
        after = [{member.listener.stream} for member in self.members[1:]] + [set()]
        return (
            not self.state
            and not self.asks
            and len(self.inputs) == 1
            and self.members[0].listener.stream == self.inputs[0]
            and all(
                after.listener.stream == before.listener.output
                for before, after in zip(self.members, self.members[1:], strict=False)
            )
            and all(
                heard.isdisjoint(member.writes - following)
                for member, following in zip(self.members, after, strict=True)
            )
            and not any(member.touches.changes_item or member.touches.anywhere for member in self.members)
        )


def grouped(world: World) -> list[Group]:
    """The steps of a world, each after those that it hangs on."""
    members = [_member(listener, world) for listener in world.listeners]
    union = _Union(len(members))
    if any(member.touches.anywhere for member in members):
        union.join(range(len(members)), "one of them may write to any stream")
    _join_by_state(members, union)
    _join_by_item(members, union)
    while _join_by_order(members, union):
        pass
    _join_lines(members, union, world)
    return _groups(members, union, world)


def _member(listener: Listener, world: World) -> Member:
    found = touches(listener)
    streams = {listener.output, *(found.streams & world.streams.keys())}
    return Member(listener, found, frozenset(world.streams if found.anywhere else streams))


class _Union:
    """Sets of members that only ever grow together."""

    def __init__(self, size: int) -> None:
        self._root = list(range(size))
        self.why: dict[int, list[str]] = {}

    def find(self, index: int) -> int:
        while self._root[index] != index:
            index = self._root[index]
        return index

    def join(self, indices: Iterable[int], why: str) -> bool:
        """Join members; whether any two of them were apart."""
        roots = sorted({self.find(index) for index in indices})
        if len(roots) < 2:
            return False
        reasons = [reason for root in roots for reason in self.why.pop(root, ())]
        for root in roots[1:]:
            self._root[root] = roots[0]
        self.why[roots[0]] = list(dict.fromkeys([*reasons, why]))
        return True


def _join_by_state(members: Sequence[Member], union: _Union) -> None:
    places: dict[Place | int, list[int]] = {}
    labels: dict[Place | int, str] = {}
    changed: set[Place | int] = set()
    for index, member in enumerate(members):
        for place, value in member.touches.reads.items():
            # What can change is told by what it is, too: two names may stand for one buffer.
            keys: list[Place | int] = [place] if is_leaf(value) else [place, id(value)]
            for key in keys:
                places.setdefault(key, []).append(index)
                labels.setdefault(key, place.label)
                if place in member.touches.writes:
                    changed.add(key)
    for key, users in places.items():
        if key in changed:
            union.join(users, f"they share '{labels[key]}'")


def _join_by_item(members: Sequence[Member], union: _Union) -> None:
    by_stream: dict[str, list[int]] = {}
    for index, member in enumerate(members):
        by_stream.setdefault(member.listener.stream, []).append(index)
    for stream, users in by_stream.items():
        if any(members[index].touches.changes_item for index in users):
            union.join(users, f"one of them changes the items of '{stream}'")


def _join_by_order(members: Sequence[Member], union: _Union) -> bool:
    """One round; whether anything was joined."""
    joined = False
    writers: dict[str, list[int]] = {}
    for index, member in enumerate(members):
        for stream in member.writes:
            writers.setdefault(stream, []).append(index)
    for stream, users in writers.items():
        joined |= union.join(users, f"they write to '{stream}'")
    sets: dict[int, list[int]] = {}
    for index in range(len(members)):
        sets.setdefault(union.find(index), []).append(index)
    feeds: dict[int, set[int]] = {root: set() for root in sets}
    for index, member in enumerate(members):
        for writer in writers.get(member.listener.stream, ()):
            if union.find(writer) != union.find(index):
                feeds[union.find(index)].add(union.find(writer))
    above = {root: _reached(root, feeds) for root in sets}
    for root, ancestors in above.items():
        if root in ancestors:
            circle = [other for other in ancestors if root in above[other]] + [root]
            joined |= union.join(circle, "they feed each other in a circle")
        inside = {stream for index in sets[root] for stream in members[index].writes}
        inputs = {members[index].listener.stream for index in sets[root]} - inside
        if len(inputs) > 1 and ancestors:
            joined |= union.join([root, *ancestors], "the order of several streams comes together in them")
    return joined


def _join_lines(members: Sequence[Member], union: _Union, world: World) -> None:
    """Listeners that only follow one another are one step: it saves Bytewax the way between them."""
    free = [not (m.asks or m.touches.writes or m.touches.changes_item or m.touches.anywhere) for m in members]
    users: dict[str, list[int]] = {}
    for index, member in enumerate(members):
        users.setdefault(member.listener.stream, []).append(index)
    sizes: dict[int, int] = {}
    for index in range(len(members)):
        sizes[union.find(index)] = sizes.get(union.find(index), 0) + 1
    alone = [free[index] and sizes[union.find(index)] == 1 for index in range(len(members))]
    for index, member in enumerate(members):
        after = users.get(member.listener.output, ())
        own = {stream for stream in member.writes if stream in users and stream != member.listener.output}
        if alone[index] and member.listener.output in world.anonymous and len(after) == 1 and not own:
            (follower,) = after
            if alone[follower]:
                union.join((index, follower), "they follow one another")


def _reached(start: int, edges: dict[int, set[int]]) -> set[int]:
    seen: set[int] = set()
    todo = list(edges[start])
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += edges[node]
    return seen


def _groups(members: Sequence[Member], union: _Union, world: World) -> list[Group]:
    sets: dict[int, list[Member]] = {}
    for index, member in enumerate(members):
        sets.setdefault(union.find(index), []).append(member)
    found: list[Group] = []
    for root, own in sets.items():
        writes = {stream for member in own for stream in member.writes}
        listens = {member.listener.stream for member in own}
        outside = {m.listener.stream for other, ms in sets.items() if other != root for m in ms}
        # A stream that the group feeds itself may also be a source's.
        inputs = sorted(s for s in listens if s not in writes or s in world.given)
        outputs = sorted(s for s in writes if s in outside or s not in world.anonymous)
        state = {
            place: value
            for member in own
            for place, value in member.touches.reads.items()
            if any(place in other.touches.writes for other in own)
        }
        name = own[0].listener.id if len(own) == 1 else f"{own[0].listener.id}-and-{len(own) - 1}"
        found.append(Group(name, own, tuple(inputs), tuple(outputs), state, tuple(union.why.get(root, ()))))
    return _in_order(found)


def _in_order(groups: list[Group]) -> list[Group]:
    """Each after those that feed it."""
    done: list[Group] = []
    known: set[str] = set()
    fed = {stream for group in groups for stream in group.outputs}
    left = list(groups)
    while left:
        ready = [g for g in left if all(s in known or s not in fed or s in g.outputs for s in g.inputs)]
        for group in ready or left[:1]:
            done.append(group)
            left.remove(group)
            # A stream is complete when all that write to it are there; by then there is one that does.
            known.update(group.outputs)
    return done
