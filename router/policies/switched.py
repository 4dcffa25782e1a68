"""``switched``: ask the cheap one first, and escalate when its answer does not pass validation."""

from __future__ import annotations

from collections.abc import Sequence

from chainwax.router.policies.base import Plan
from chainwax.router.stats import ArmState, NodeStats
from chainwax.router.types import NodeSpec, Query

__all__ = ["Switched"]


class Switched:
    """Cheapest first, then dearer ones up to the strongest."""

    def __init__(self, node: NodeSpec, stats: NodeStats, seed: int | None = None) -> None:
        self.node = node
        self._stats = stats

    def plan(self, query: Query, arms: Sequence[ArmState]) -> Plan:
        """All arms in order of cost."""
        return Plan(self._stats.by_cost(arms))

    def choice(self) -> str | None:
        """The arm that answered most."""
        used = max(self._stats.arms, key=lambda s: s.used)
        return used.key if used.used else None
