"""Agreement: how often an arm's answer leads to what the strongest's would have led to, where nobody scores.

What counts is what the flow makes of an answer, as far as it only computes: ``NodeSpec.decide``. A share of
the calls is asked of the strongest too. It is large until it is known with the wanted confidence on which
side of the target an arm's agreement lies, and small from then on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

from chainwax.router.recorder import wilson
from chainwax.router.types import NodeSpec, Query

__all__ = ["Agreement", "agrees", "same"]

_SHARE = 0.2
"""Of an arm's calls that are compared while it is not known whether it agrees often enough."""
_KEPT = 0.02
"""Of those that are compared once it is known: what agreed may cease to."""
_FULL = 500
"""Comparisons from which on the share falls although nothing is known yet."""
_BUDGET = 0.1
"""What comparisons may cost of a node's budget."""


class Agreement:
    """What is known of the agreement of one node's arms with the strongest."""

    def __init__(self) -> None:
        self.cost = 0.0
        """Dollars that comparisons cost."""
        self._counts: dict[str, tuple[float, float]] = {}

    def share(self, node: NodeSpec, arm: str) -> float:
        """Probability with which the next call of an arm is compared."""
        if node.agreement <= 0.0 or (node.budget is not None and self.cost >= _BUDGET * node.budget):
            return 0.0
        agreed, n = self._counts.get(arm, (0.0, 0.0))
        low, high = wilson(agreed, n, NormalDist().inv_cdf((1.0 + node.agreement) / 2.0))
        if low >= node.target or high < node.target:
            return _KEPT
        return max(_KEPT, _SHARE * min(1.0, _FULL / max(n, 1.0)))

    def learn(self, arm: str, score: float, weight: float) -> None:
        """A comparison: 1 for the same. A negative weight takes one back."""
        agreed, n = self._counts.get(arm, (0.0, 0.0))
        self._counts[arm] = (agreed + weight * score, n + weight)

    def state(self) -> dict[str, Any]:
        """All of it, JSON-ready."""
        return {"cost": self.cost, "counts": {arm: list(known) for arm, known in self._counts.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Know what :meth:`state` gave."""
        self.cost = state["cost"]
        self._counts = {arm: (agreed, n) for arm, (agreed, n) in state["counts"].items()}


async def agrees(query: Query, one: Any, other: Any) -> bool:
    """Whether two answers to a query lead to the same.

    The flow's functions run off the loop. Where one of them fails on an answer, that is what it leads to.
    """
    decide = query.node.decide
    if decide is None or query.stream is not None:
        return same(one, other)
    return await asyncio.to_thread(lambda: same(decide(query.value, one), decide(query.value, other)))


def same(one: Any, other: Any) -> bool:
    """Whether two answers, or what they lead to, are the same; spaces in a text do not count."""
    if isinstance(one, str) and isinstance(other, str):
        return one.split() == other.split()
    try:
        return bool(one == other)
    except Exception:  # values may be anyone's classes, an array's == for instance is no truth
        return False
