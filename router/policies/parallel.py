"""``parallel``: ask several at once while a node is new, and again when something looks wrong; else ask one.

Several at once: the strongest's answer is used, and the others are scored by whether they agree with it. When
enough was compared, scores have come, and the arm that :class:`Adaptive` would choose stays the same, that is
who chooses. A model that is new, or an arm whose scores fall below what they were, starts it again. Where no
score ever comes nobody would notice, and it goes on asking several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from chainwax.router.learning.drift import Drift
from chainwax.router.policies.adaptive import Adaptive
from chainwax.router.policies.base import Plan
from chainwax.router.stats import ArmState, NodeStats
from chainwax.router.types import Feedback, NodeSpec, Query

__all__ = ["Parallel"]

MOST = 4
"""Arms that are asked at once."""
_LEAST = 30
"""Calls asked of several, and scores heard meanwhile, before one is asked alone. As many scores of an arm say
what is usual of it."""
_SAME = 20
"""Calls over which the choice has to stay the same."""


class Parallel:
    """The strongest and the cheapest others at once, until it is clear who will do."""

    def __init__(self, node: NodeSpec, stats: NodeStats, seed: int | None = None) -> None:
        self.node = node
        self._stats = stats
        self._alone = Adaptive(node, stats, seed)
        self._known: set[str] = set()
        self._drift = Drift()
        self._usual: dict[str, tuple[int, float]] = {}
        """For each arm, how many scores its answers got and their mean."""
        self._several = True
        self._calls = self._scores = self._same = 0
        """Since several are asked: calls, scores, and calls since the choice changed."""
        self._choice: str | None = None
        self._news: tuple[str, str] | None = None

    def plan(self, query: Query, arms: Sequence[ArmState]) -> Plan:
        """Several at once, the strongest first; or as ``adaptive`` would where that is settled."""
        self._alone.node = self.node
        new = sorted({s.key for s in arms} - self._known)
        if new:
            self._known.update(new)
            self._begin(f"new: {', '.join(new)}")
        elif self._several and self._settled():
            self._several = False
            self._news = "asks_one", f"{self._choice} has been the choice for {self._same} calls"
        if self._several:
            self._calls += 1
            choice = self._alone.choice()
            self._same = self._same + 1 if choice == self._choice else 0
            self._choice = choice
            others = self._stats.by_cost(arms[1:])[: MOST - 1]
            # Where the strongest fails, the next one's answer is used: by tier, and not the cheapest one's.
            plan = Plan([arms[0], *sorted(others, key=lambda s: s.index)], together=True)
        else:
            plan = self._alone.plan(query, arms)
        news, self._news = self._news, None
        return replace(plan, news=news)

    def choice(self) -> str | None:
        """The strongest while several are asked."""
        if not self._several:
            return self._alone.choice()
        return self._stats.arms[0].key if self._stats.arms else None

    def learn(self, feedback: Feedback, earlier: float | None) -> None:
        """A score of a used answer has come; what lies below the usual long enough looks wrong."""
        if earlier is not None or feedback.weight < 1.0:
            return
        self._scores += 1
        n, mean = self._usual.get(feedback.arm, (0, 0.0))
        off = self._drift.heard(feedback.arm, mean, feedback.score) if n >= _LEAST else None
        if off is not None and off < 0:
            del self._usual[feedback.arm]
            self._begin(f"the scores of {feedback.arm} fell below {mean:.2f}")
        else:
            self._usual[feedback.arm] = n + 1, mean + (feedback.score - mean) / (n + 1)

    def state(self) -> dict[str, Any]:
        """How far it is, JSON-ready."""
        alone = self._alone.state()
        return {
            "random": alone.pop("random"),
            "alone": alone,
            "known": sorted(self._known),
            "drift": self._drift.state(),
            "usual": {arm: list(usual) for arm, usual in self._usual.items()},
            "several": [self._several, self._calls, self._scores, self._same, self._choice],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as :meth:`state` said."""
        drawn = {"random": state["random"]} if "random" in state else {}
        self._alone.restore({**state["alone"], **drawn})
        self._known = set(state["known"])
        self._drift.restore(state["drift"])
        self._usual = {arm: (n, mean) for arm, (n, mean) in state["usual"].items()}
        self._several, self._calls, self._scores, self._same, self._choice = state["several"]

    def _begin(self, why: str) -> None:
        self._several = True
        self._calls = self._scores = self._same = 0
        self._news = "asks_several", why

    def _settled(self) -> bool:
        return self._calls >= _LEAST and self._scores >= _LEAST and self._same >= _SAME
