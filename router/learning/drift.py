"""Whether scores are still what is expected: a change that came of itself is noticed, and learned anew.

For each arm two sums run: how much likelier its scores are where it is right at 0.7 of what was expected of
it than where it is what it was, and the same where it is wrong at 0.7 of what was expected (logarithms of
likelihood ratios, never below 0: CUSUM; Page 1954). Without a change one of them passes the bar less than
once in some 10,000 scores (Lorden 1971); an arm that is right at 0.7 of what it was is found within about
twenty.
"""

from __future__ import annotations

import math
from typing import Any

__all__ = ["Drift"]

_LEFT = 0.7
"""What is looked for: so much is left of an arm's right answers, or of its wrong ones."""
_BAR = math.log(10_000.0)
_EDGE = 0.02
"""Expectations are taken to be at least so far from 0 and 1."""


class Drift:
    """The sums of one node's arms."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def heard(self, arm: str, expected: float, score: float) -> float | None:
        """A score has come; None, or how likely a change is where the arm is no longer what it was: the
        logarithm of a likelihood ratio, below 0 where it got worse.
        """
        right = min(max(expected, _EDGE), 1.0 - _EDGE)
        wrong = 1.0 - right
        below, above = self._sums.get(arm, (0.0, 0.0))
        less, fewer = _LEFT * right, _LEFT * wrong
        below += score * math.log(_LEFT) + (1.0 - score) * math.log((1.0 - less) / wrong)
        above += (1.0 - score) * math.log(_LEFT) + score * math.log((1.0 - fewer) / right)
        below, above = max(below, 0.0), max(above, 0.0)
        if below < _BAR and above < _BAR:
            self._sums[arm] = (below, above)
            return None
        self._sums[arm] = (0.0, 0.0)
        return -below if below >= _BAR else above

    def state(self) -> dict[str, Any]:
        """All sums, JSON-ready."""
        return {arm: list(sums) for arm, sums in self._sums.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Know what :meth:`state` gave."""
        self._sums = {arm: (below, above) for arm, (below, above) in state.items()}
