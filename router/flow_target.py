"""One target for a flow's end result, split over its nodes by what a dollar buys at each.

An end result is right where all answers on its way are, so the end quality beside the strongest models' is
the product of the nodes' shares of their strongest's quality: the logarithms of the nodes' targets add up to
that of the flow's. The *slack* of a node is minus the logarithm of its target. It is worth as many dollars as
a little more of it saves: what a point of quality costs there, at the margin. Slack moves to where it is worth
most, until it is worth the same everywhere (mirror descent on the slacks, whose sum stays as it is).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from chainwax.router.policies import Priced
from chainwax.router.stats import NodeStats

if TYPE_CHECKING:
    from chainwax.router.interface import LLMInterface

__all__ = ["FlowTarget", "margin"]

_EVERY = 25
"""End scores between two moves."""
_STEP = 0.3
"""How quickly slack moves: by so much of the logarithm of what it is worth here and elsewhere."""
_MOST = 2.0
"""Largest factor by which one move changes a slack."""
_LEAST = 1e-4
"""Slack that each node keeps, so that it can come back."""
_ENOUGH = 20.0
"""Scores of a node below which its slack stays as it is."""


class FlowTarget:
    """The targets of one flow's nodes. On the router's loop."""

    def __init__(self, target: float) -> None:
        self.target = target
        self._interfaces: dict[str, LLMInterface] = {}
        self._slack: dict[str, float] = {}
        self._through: dict[str, int] = {}
        self._scores = 0

    def add(self, interface: LLMInterface) -> None:
        """A node that shares in the target: until scores come all on the longest way have the same part."""
        self._interfaces[interface.node.id] = interface
        if not self._scores:
            longest = max(one.node.depth for one in self._interfaces.values()) + 1
            self._slack = dict.fromkeys(self._interfaces, -math.log(self.target) / longest)
        self._slack.setdefault(interface.node.id, _LEAST)
        self._aim()

    def scored(self, nodes: Iterable[str]) -> None:
        """An end result that came by these nodes was scored."""
        self._scores += 1
        for node in set(nodes) & self._interfaces.keys():
            self._through[node] = self._through.get(node, 0) + 1
        if self._scores % _EVERY == 0:
            self._move()
            self._aim()

    def of(self, node: str) -> float:
        """The target of a node now."""
        return math.exp(-self._slack.get(node, -math.log(self.target)))

    def state(self) -> dict[str, Any]:
        """All of it, JSON-ready."""
        return {"slack": dict(self._slack), "through": dict(self._through), "scores": self._scores}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Know what :meth:`state` gave; nodes that are no longer there are passed over."""
        self._slack |= {node: slack for node, slack in state["slack"].items() if node in self._slack}
        self._through = dict(state["through"])
        self._scores = state["scores"]
        self._aim()

    def _move(self) -> None:
        """Move slack from where it saves least to where it saves most."""
        worth = {}
        for node, interface in self._sharing():
            stats, policy = interface.router.stats, interface.router.policy
            if self._through.get(node) and sum(s.scored for s in stats.arms) >= _ENOUGH:
                if isinstance(policy, Priced):
                    # A unit of log quality is as many points as there is quality.
                    worth[node] = policy.price * stats.quality(stats.arms[0])
                else:
                    worth[node] = margin(stats, interface.node.target)
        if len(worth) < 2:
            return
        middle = sum(math.log(max(w, 1e-12)) for w in worth.values()) / len(worth)
        share = {node: self._through[node] / self._scores for node in worth}
        before = sum(share[node] * self._slack[node] for node in worth)
        for node, w in worth.items():
            factor = math.exp(_STEP * (math.log(max(w, 1e-12)) - middle))
            self._slack[node] = max(self._slack[node] * min(max(factor, 1.0 / _MOST), _MOST), _LEAST)
        after = sum(share[node] * self._slack[node] for node in worth)
        for node in worth:
            self._slack[node] *= before / after

    def _aim(self) -> None:
        for node, interface in self._sharing():
            if interface.node.target != self.of(node):
                interface.change(replace(interface.node, target=self.of(node)))

    def _sharing(self) -> list[tuple[str, LLMInterface]]:
        """Nodes that nobody gave a target of their own meanwhile."""
        return [(id, one) for id, one in self._interfaces.items() if one.node.flow_target is not None]


def margin(stats: NodeStats, target: float) -> float:
    """Dollars that a unit of log quality costs at a target, on the hull of the arms as they are known."""
    points = sorted((stats.mean_cost(s), math.log(max(stats.quality(s), 1e-3))) for s in stats.arms)
    wanted = math.log(target * max(stats.quality(stats.arms[0]), 1e-3))
    hull = _hull(points)
    for (cost, low), (dearer, high) in itertools.pairwise(hull):
        if wanted <= high:
            return (dearer - cost) / (high - low)
    return (hull[-1][0] - hull[-2][0]) / (hull[-1][1] - hull[-2][1]) if len(hull) > 1 else 0.0


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, log quality), cheapest first, those that no mixture of others beats."""
    hull: list[tuple[float, float]] = []
    for cost, quality in points:
        if hull and quality <= hull[-1][1]:
            continue
        while len(hull) > 1 and (quality - hull[-1][1]) * (hull[-1][0] - hull[-2][0]) >= (
            hull[-1][1] - hull[-2][1]
        ) * (cost - hull[-1][0]):
            hull.pop()
        hull.append((cost, quality))
    return hull
