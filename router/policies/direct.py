"""``direct``: a fixed model."""

from __future__ import annotations

from collections.abc import Sequence

from chainwax.router.errors import NoModelAllowed
from chainwax.router.policies.base import Plan
from chainwax.router.stats import ArmState, NodeStats
from chainwax.router.types import NodeSpec, Query

__all__ = ["Direct"]


class Direct:
    """Always the node's ``model``; without one, the strongest that is allowed."""

    def __init__(self, node: NodeSpec, stats: NodeStats, seed: int | None = None) -> None:
        self.node = node
        self._stats = stats

    def plan(self, query: Query, arms: Sequence[ArmState]) -> Plan:
        """One arm."""
        return Plan((self._fixed(arms),))

    def choice(self) -> str | None:
        """The fixed arm."""
        return self._fixed(self._stats.arms).key if self._stats.arms else None

    def _fixed(self, arms: Sequence[ArmState]) -> ArmState:
        wanted = self.node.model
        if wanted is None:
            return arms[0]
        for state in arms:
            if wanted in (state.arm.model, state.key):
                return state
        raise NoModelAllowed(f"node '{self.node.id}': its model '{wanted}' is down or not allowed")
