"""One target for a flow's end result, split over its nodes by what a dollar buys at each.

An end result is right where all answers on its way are, so the end quality beside the strongest models' is
the product of the nodes' shares of their strongest's quality. It costs least where the next dollar buys the
same share of the end result at every node (the condition of Kuhn and Tucker), so the nodes have one price of
quality in common, counted in such shares; the policy ``adaptive`` solves for it over the calls of all of them
(:mod:`chainwax.router.learning.price`). A node's own target is what is bought there at that price, and the
targets' product over an item's way is kept at the flow's. Other policies keep an equal part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from chainwax.router.policies.adaptive import Adaptive

if TYPE_CHECKING:
    from chainwax.router.interface import LLMInterface

__all__ = ["FlowTarget"]

_EVERY = 25
"""End scores between two splits."""
_LEAST = 1e-4
"""Of its strongest's quality a node is taken to lose so much at least, in logarithms."""


class FlowTarget:
    """The targets of one flow's nodes. On the router's loop."""

    def __init__(self, target: float) -> None:
        self.target = target
        self._interfaces: dict[str, LLMInterface] = {}
        self._targets: dict[str, float] = {}
        self._through: dict[str, int] = {}
        self._scores = 0

    def add(self, interface: LLMInterface) -> None:
        """A node that shares in the target: until scores come all on the longest way have the same part."""
        self._interfaces[interface.node.id] = interface
        longest = max(one.node.depth for one in self._interfaces.values()) + 1
        part = self.target ** (1.0 / longest)
        if not self._scores:
            self._targets = dict.fromkeys(self._interfaces, part)
        self._targets.setdefault(interface.node.id, part)
        self._aim()

    def scored(self, nodes: Iterable[str]) -> None:
        """An end result that came by these nodes was scored."""
        self._scores += 1
        for node in set(nodes) & self._interfaces.keys():
            self._through[node] = self._through.get(node, 0) + 1
        if self._scores % _EVERY == 0:
            self._split()
            self._aim()

    def of(self, node: str) -> float:
        """The target of a node now."""
        return self._targets.get(node, self.target)

    def state(self) -> dict[str, Any]:
        """All of it, JSON-ready."""
        return {"targets": dict(self._targets), "through": dict(self._through), "scores": self._scores}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Know what :meth:`state` gave; nodes that are no longer there are passed over."""
        self._targets |= {node: one for node, one in state["targets"].items() if node in self._targets}
        self._through = dict(state["through"])
        self._scores = state["scores"]
        self._aim()

    def _split(self) -> None:
        share = {
            node: self._through[node] / self._scores for node, _ in self._sharing() if node in self._through
        }
        if not share:
            return
        given = -math.log(self.target)
        bought = {node: _bought(self._interfaces[node]) for node in share}
        lost = {
            node: given / sum(share.values()) if got is None else max(-math.log(got), _LEAST)
            for node, got in bought.items()
        }
        # What was bought comes to somewhat more or less than the target: all make up for it in proportion.
        scale = given / sum(share[node] * one for node, one in lost.items())
        for node, one in lost.items():
            self._targets[node] = math.exp(-scale * one)

    def _aim(self) -> None:
        for node, interface in self._sharing():
            if interface.node.target != self.of(node):
                interface.change(replace(interface.node, target=self.of(node)))

    def _sharing(self) -> list[tuple[str, LLMInterface]]:
        """Nodes that nobody gave a target of their own meanwhile."""
        return [(id, one) for id, one in self._interfaces.items() if one.node.flow_target is not None]


def _bought(interface: LLMInterface) -> float | None:
    """The share of the strongest's quality that a node's calls get by now, where its policy can tell."""
    policy = interface.router.policy
    return policy.bought if isinstance(policy, Adaptive) else None
