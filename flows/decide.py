"""What a flow makes of an answer: its pure functions, run on it up to the next model, state or sink.

A yes/no filter does not care about wording. So two answers of a node are compared by what they lead to: which
way the item goes through filters, branches and flat_maps, and what maps make of it. Where a function has read
the answer, its own text no longer counts; where none has, as at a sink right behind the node, it is the text
that counts. Functions with ``pure=False`` are never run: the item is taken to end there.

In the same way an item goes again, with another answer of one node, up to the score of its end result
(:func:`rerun`): there the models that come after are asked, and only what leads to that score is run.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from chainwax.flows.nodes import (
    BranchNode,
    FeedbackNode,
    FilterNode,
    FlatMapNode,
    LLMNode,
    MapNode,
    MergeNode,
    Node,
    Port,
)
from chainwax.operators.feedback import Score
from chainwax.operators.llm import merged
from chainwax.router.types import Steps

__all__ = ["Consumers", "consumers_of", "decider", "rerun"]

Consumers = Mapping[Port, tuple[Node, ...]]
"""Who takes each stream."""
_Walking = Generator[tuple[str, Any], Any, None]


def consumers_of(nodes: Iterable[Node]) -> Consumers:
    """Who takes each stream, in the order of the nodes."""
    taken: dict[Port, tuple[Node, ...]] = {}
    for node in nodes:
        for port in node.inputs:
            taken[port] = (*taken.get(port, ()), node)
    return taken


def decider(node_id: str, consumers: Consumers) -> Callable[[Any, Any], list[Any]]:
    """From an item's value and the node's answer to what the flow makes of it, to be compared by ``==``."""

    def decide(value: Any, answer: Any) -> list[Any]:
        walk = _Walk(node_id, answer, consumers)
        for _ in walk.on(Port(node_id), merged(value, node_id, answer), read=False):
            pass  # no model is asked
        return walk.ends

    return decide


def rerun(
    nodes: Mapping[str, Node], consumers: Consumers
) -> dict[str, dict[str, Callable[[Any, Any], Steps]]]:
    """How items go again from each LLM node, by the id of each ``feedback`` of an end result on their way."""
    ways: dict[str, dict[str, Callable[[Any, Any], Steps]]] = {}
    for end in nodes.values():
        if isinstance(end, FeedbackNode) and not end.about:
            through = _leading_to(end, nodes)
            for id in through:
                if isinstance(nodes[id], LLMNode):
                    ways.setdefault(id, {})[end.id] = _way(id, end, consumers, through)
    return ways


def _way(
    node_id: str, end: FeedbackNode, consumers: Consumers, through: frozenset[str]
) -> Callable[[Any, Any], Steps]:
    def again(value: Any, answer: Any) -> Steps:
        walk = _Walk(node_id, answer, consumers, through, end)
        yield from walk.on(Port(node_id), merged(value, node_id, answer), read=False)
        failed = [where for where, *how in walk.ends if len(how) == 2]
        if failed:
            return None if end.id in failed else 0.0  # a dead letter on the way is a bad end
        return walk.scores[0] if len(walk.scores) == 1 else None

    return again


def _leading_to(end: FeedbackNode, nodes: Mapping[str, Node]) -> frozenset[str]:
    """All from which an item may go again up to ``end``: what only computes, and models."""
    there = {end.id}
    left: list[Node] = [end]
    while left:
        for port in left.pop().inputs:
            node = nodes[port.node]
            match node:
                case (
                    FilterNode(pure=True)
                    | BranchNode(pure=True)
                    | MapNode(pure=True)
                    | FlatMapNode(pure=True)
                    | MergeNode()
                    | FeedbackNode()
                    | LLMNode(stream=False)
                ) if node.id not in there:
                    there.add(node.id)
                    left.append(node)
    return frozenset(there)


@dataclass(slots=True)
class _Walk:
    node_id: str
    answer: Any
    consumers: Consumers
    through: frozenset[str] | None = None
    """Nodes that it goes through; None is all."""
    until: FeedbackNode | None = None
    """Where it ends, with a score."""
    ends: list[Any] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)

    def on(self, port: Port, value: Any, *, read: bool) -> _Walking:
        """Go on with a value that came out of a node; ``read`` says whether a function has read it.

        Yields each model's node that it comes to, with the value there. Goes on with the answer that it is
        sent, or ends there where that is None.
        """
        for node in self.consumers.get(port, ()):
            if self.through is not None and node.id not in self.through:
                continue
            try:
                yield from self._into(node, value, read)
            except Exception as error:  # the item would go to the dead letters
                self.ends.append((node.id, "failed", type(error).__name__))
        if port not in self.consumers:
            self.ends.append((port.node, self._seen(value, read)))

    def _into(self, node: Node, value: Any, read: bool) -> _Walking:
        out = Port(node.id)
        if node is self.until:
            self.scores.append(_number(self.until.score(value)))
            return
        match node:
            case FilterNode(fn=fn, pure=True):
                if fn(value):
                    yield from self.on(out, value, read=True)
                else:
                    self.ends.append((node.id, "dropped"))
            case BranchNode(fn=fn, pure=True):
                yield from self.on(Port(node.id, "yes" if fn(value) else "no"), value, read=True)
            case MapNode(fn=fn, pure=True):
                yield from self.on(out, fn(value), read=True)
            case FlatMapNode(fn=fn, pure=True):
                for one in list(fn(value)):
                    yield from self.on(out, one, read=True)
            case MergeNode() | FeedbackNode():
                yield from self.on(out, value, read=read)
            case LLMNode() if (answer := (yield node.id, value)) is not None:
                yield from self.on(out, merged(value, node.id, answer), read=True)
            case _:
                self.ends.append((node.id, self._seen(value, read)))

    def _seen(self, value: Any, read: bool) -> Any:
        if not read:
            answer = self.answer
            return answer.split() if isinstance(answer, str) else answer
        if isinstance(value, Mapping) and value.get(self.node_id) is self.answer:
            return {name: known for name, known in value.items() if name != self.node_id}
        return value


def _number(scored: Any) -> float | None:
    """The score of an item's end result; None where there is none."""
    value = scored.value if isinstance(scored, Score) else scored
    return float(value) if isinstance(value, int | float) and 0 <= value <= 1 else None
