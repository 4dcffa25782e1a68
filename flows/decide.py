"""What a flow makes of an answer: its pure functions, run on it up to the next model, state or sink.

A yes/no filter does not care about wording. So two answers of a node are compared by what they lead to: which
way the item goes through filters, branches and flat_maps, and what maps make of it. Where a function has read
the answer, its own text no longer counts; where none has, as at a sink right behind the node, it is the text
that counts. Functions with ``pure=False`` are never run: the item is taken to end there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from chainwax.flows.nodes import (
    BranchNode,
    FeedbackNode,
    FilterNode,
    FlatMapNode,
    MapNode,
    MergeNode,
    Node,
    Port,
)
from chainwax.operators.llm import merged

__all__ = ["Consumers", "consumers_of", "decider"]

Consumers = Mapping[Port, tuple[Node, ...]]
"""Who takes each stream."""


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
        walk.on(Port(node_id), merged(value, node_id, answer), read=False)
        return walk.ends

    return decide


@dataclass(slots=True)
class _Walk:
    node_id: str
    answer: Any
    consumers: Consumers
    ends: list[Any] = field(default_factory=list)

    def on(self, port: Port, value: Any, *, read: bool) -> None:
        """Go on with a value that came out of a node; ``read`` says whether a function has read it."""
        for node in self.consumers.get(port, ()):
            try:
                self._into(node, value, read)
            except Exception as error:  # the item would go to the dead letters
                self.ends.append((node.id, "failed", type(error).__name__))
        if port not in self.consumers:
            self.ends.append((port.node, self._seen(value, read)))

    def _into(self, node: Node, value: Any, read: bool) -> None:
        out = Port(node.id)
        match node:
            case FilterNode(fn=fn, pure=True):
                if fn(value):
                    self.on(out, value, read=True)
                else:
                    self.ends.append((node.id, "dropped"))
            case BranchNode(fn=fn, pure=True):
                self.on(Port(node.id, "yes" if fn(value) else "no"), value, read=True)
            case MapNode(fn=fn, pure=True):
                self.on(out, fn(value), read=True)
            case FlatMapNode(fn=fn, pure=True):
                for one in list(fn(value)):
                    self.on(out, one, read=True)
            case MergeNode() | FeedbackNode():
                self.on(out, value, read=read)
            case _:
                self.ends.append((node.id, self._seen(value, read)))

    def _seen(self, value: Any, read: bool) -> Any:
        if not read:
            answer = self.answer
            return answer.split() if isinstance(answer, str) else answer
        if isinstance(value, Mapping) and value.get(self.node_id) is self.answer:
            return {name: known for name, known in value.items() if name != self.node_id}
        return value
