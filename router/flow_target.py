"""One target for a flow's end result, split over its nodes by what a dollar buys at each.

An end result is right where all answers on its way are, so the end quality beside the strongest models' is
the product of the nodes' shares of their strongest's quality. Every node begins with the cheapest of its
arms, and the next better one is taken where a dollar buys most of the logarithm of the end quality, until the
flow's target is reached (the greedy solution of the multiple-choice knapsack; Sinha and Zoltners 1979). The
last step, which goes beyond the target, is taken only where no cheaper one would do. A node's target is then
put between the arm that it is to use and the next worse one, so that its own router finds that arm good
enough, what it sees in a call's prompt included, and the worse one not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from chainwax.router.stats import NodeStats

if TYPE_CHECKING:
    from chainwax.router.interface import LLMInterface

__all__ = ["FlowTarget", "hull"]

_EVERY = 25
"""End scores between two splits."""
_ENOUGH = 20.0
"""Scores of each node before the first split."""


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
        stats = {node: one.router.stats for node, one in self._sharing() if self._through.get(node)}
        if len(stats) < 2 or any(sum(s.scored for s in one.arms) < _ENOUGH for one in stats.values()):
            return
        hulls = {node: hull(one) for node, one in stats.items()}
        share = {node: self._through[node] / self._scores for node in stats}
        at = dict.fromkeys(stats, 0)
        lacking = math.log(self.target) - sum(share[node] * hulls[node][0][1] for node in stats)
        while lacking > 0.0:
            steps = {node: _step(hulls[node], at[node]) for node in at if at[node] + 1 < len(hulls[node])}
            if not steps:
                break
            # Of those that would do, the cheapest; where none would, what a dollar buys most of.
            enough = {n: share[n] * cost for n, (cost, gain) in steps.items() if share[n] * gain >= lacking}
            if enough:
                node = min(enough, key=enough.__getitem__)
            else:
                node = max(steps, key=lambda n: steps[n][1] / max(steps[n][0], 1e-12))
            lacking -= share[node] * steps[node][1]
            at[node] += 1
        for node, one in hulls.items():
            quality = one[at[node]][1]
            worse = one[at[node] - 1][1] if at[node] else quality - 1.0
            self._targets[node] = math.exp((quality + worse) / 2.0)

    def _aim(self) -> None:
        for node, interface in self._sharing():
            if interface.node.target != self.of(node):
                interface.change(replace(interface.node, target=self.of(node)))

    def _sharing(self) -> list[tuple[str, LLMInterface]]:
        """Nodes that nobody gave a target of their own meanwhile."""
        return [(id, one) for id, one in self._interfaces.items() if one.node.flow_target is not None]


def hull(stats: NodeStats) -> list[tuple[float, float]]:
    """The arms that no mixture of others beats, cheapest first.

    Each as (dollars a call, logarithm of its share of the strongest's quality).
    """
    best = math.log(max(stats.quality(stats.arms[0]), 1e-3))
    found: list[tuple[float, float]] = []
    for cost, quality in sorted(
        (stats.mean_cost(s), min(math.log(max(stats.quality(s), 1e-3)) - best, 0.0)) for s in stats.arms
    ):
        if found and quality <= found[-1][1]:
            continue
        while len(found) > 1 and _slope(found[-2], found[-1]) <= _slope(found[-1], (cost, quality)):
            found.pop()
        found.append((cost, quality))
    return found


def _slope(one: tuple[float, float], other: tuple[float, float]) -> float:
    return (other[1] - one[1]) / max(other[0] - one[0], 1e-12)


def _step(points: list[tuple[float, float]], at: int) -> tuple[float, float]:
    """What the next arm costs more, and how much better it is."""
    return points[at + 1][0] - points[at][0], points[at + 1][1] - points[at][1]
