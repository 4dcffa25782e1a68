"""``parallel``: ask several at once, answer with the strongest, and learn who agrees with it."""

from __future__ import annotations

from collections.abc import Sequence

from chainwax.router.policies.base import Plan
from chainwax.router.stats import ArmState, NodeStats
from chainwax.router.types import NodeSpec, Query

__all__ = ["Parallel"]

MOST = 4
"""Arms that are asked at once."""


class Parallel:
    """The strongest and the cheapest others, at once."""

    def __init__(self, node: NodeSpec, stats: NodeStats, seed: int | None = None) -> None:
        self.node = node
        self._stats = stats

    def plan(self, query: Query, arms: Sequence[ArmState]) -> Plan:
        """The strongest first: its answer is used, and the others are compared with it."""
        others = self._stats.by_cost(arms[1:])[: MOST - 1]
        # Where the strongest fails, the next one's answer is used: by tier, and not the cheapest one's.
        return Plan([arms[0], *sorted(others, key=lambda s: s.index)], together=True)

    def choice(self) -> str | None:
        """The strongest."""
        return self._stats.arms[0].key if self._stats.arms else None
