"""``adaptive``: Thompson sampling for each node, with the target as its constraint.

Each arm's quality has a Beta posterior from the scores that came back from downstream. One draw of all
qualities says which arms are good enough (at least ``target`` times the strongest's draw), and the
cheapest of those is asked (Thompson 1933; as posterior sampling for a constraint, Agrawal and Goyal
2012). The probability of each arm is estimated from :data:`DRAWS` draws at once, and choices are made
with those probabilities, so that the propensity that is logged is the one that was used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chainwax.router.learning.packed import pack, unpack
from chainwax.router.policies.base import Plan
from chainwax.router.stats import ArmState, NodeStats
from chainwax.router.types import NodeSpec, Query

__all__ = ["Adaptive"]

DRAWS = 128
_SLOW_AFTER = 20
"""Answers after which a measured latency counts against a node's wanted one."""


class Adaptive:
    """The cheapest arm that is good enough, as far as is known."""

    def __init__(self, node: NodeSpec, stats: NodeStats, seed: int | None = None) -> None:
        self.node = node
        self._stats = stats
        self._random = np.random.default_rng(seed)
        self._known: tuple[int, tuple[int, ...]] | None = None
        self._chances: NDArray[np.float64] = np.zeros(0)
        self._cumulative: NDArray[np.float64] = np.zeros(0)

    def plan(self, query: Query, arms: Sequence[ArmState]) -> Plan:
        """Draw an arm; dearer ones follow it for the case that it fails or answers invalidly."""
        arms = self._quick_enough(arms)
        if len(arms) == 1:
            return Plan((arms[0],))
        known = (self._stats.version, tuple(s.index for s in arms))
        if known != self._known:
            self._chances = self._distribution(arms, self._random)
            self._cumulative = np.cumsum(self._chances)
            self._known = known
        drawn = int(np.searchsorted(self._cumulative, self._random.random() * self._cumulative[-1], "right"))
        drawn = min(drawn, len(arms) - 1)
        chosen = arms[drawn]
        return Plan((chosen, *self._escalation(chosen, arms)), float(self._chances[drawn]))

    def choice(self) -> str | None:
        """The arm with the greatest probability now."""
        arms = self._quick_enough(self._stats.arms)
        if not arms:
            return None
        # Whoever looks must not change what is drawn next: a snapshot is taken at any time.
        looked = np.random.default_rng(0)
        return arms[int(np.argmax(self._distribution(arms, looked)))].key

    def state(self) -> dict[str, Any]:
        """The chances that are kept, and where the random generator stands."""
        return {
            "known": self._known,
            "chances": pack(self._chances),
            "random": self._random.bit_generator.state,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as :meth:`state` said."""
        known = state["known"]
        self._known = None if known is None else (known[0], tuple(known[1]))
        self._chances = unpack(state["chances"])
        self._cumulative = np.cumsum(self._chances)
        if "random" in state:
            self._random.bit_generator.state = state["random"]

    def _distribution(self, arms: Sequence[ArmState], chance: np.random.Generator) -> NDArray[np.float64]:
        """Probability of each arm, shape (arms,), sums to 1."""
        stats = self._stats
        index = [s.index for s in arms]
        draws = chance.beta(stats.right[index], stats.wrong[index], size=(DRAWS, len(index)))
        # The first arm is of the strongest tier that is there: it is good enough by definition.
        good = draws >= self.node.target * draws[:, :1]
        cheapest_first = [arms.index(s) for s in stats.by_cost(arms)]
        first_good = np.argmax(good[:, cheapest_first], axis=1)
        counts = np.bincount(first_good, minlength=len(arms))
        chances = np.zeros(len(arms))
        chances[cheapest_first] = counts / DRAWS
        return chances

    def _quick_enough(self, arms: Sequence[ArmState]) -> Sequence[ArmState]:
        wanted = self.node.latency
        if wanted is None:
            return arms
        quick = [
            s for s in arms if s.asked < _SLOW_AFTER or (s.instance.recorder.latency_p95() or 0.0) <= wanted
        ]
        return quick or arms

    def _escalation(self, chosen: ArmState, arms: Sequence[ArmState]) -> list[ArmState]:
        """Who is asked after ``chosen``: what is stronger by tier, up to the strongest, then the rest."""
        stronger = [s for s in reversed(arms) if s.rank < chosen.rank]
        return stronger or [s for s in arms if s is not chosen]
