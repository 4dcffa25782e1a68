"""Whether scores are still what is expected: a change that came of itself is noticed, and learned anew.

For each arm two sums run, of how far its scores lie below what was expected of them and how far above, in
deviations, less what chance brings (CUSUM; Page 1954). Without a change one of them passes the bar about once
in 10,000 scores; an arm that is right at 0.7 of what it was is found within about twenty.
"""

from __future__ import annotations

import math
from typing import Any

__all__ = ["Drift"]

_ALLOWED = 0.25
"""What each score may be off by, in deviations."""
_BAR = 14.0
_LEAST = 0.15
"""Least deviation of a score that is taken."""


class Drift:
    """The sums of one node's arms."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def heard(self, arm: str, expected: float, score: float) -> float | None:
        """A score has come; how many deviations it is off in all, where the arm is no longer what it was."""
        off = (score - expected) / max(math.sqrt(expected * (1.0 - expected)), _LEAST)
        below, above = self._sums.get(arm, (0.0, 0.0))
        below, above = max(below - off - _ALLOWED, 0.0), max(above + off - _ALLOWED, 0.0)
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
