"""How many calls arms that are cheaper than the strongest may answer before their scores are there.

A score comes late. Until the first have come, all that speaks for a cheaper arm is its tier, and a stream
would be half over before it is known that its tier was wrong. So few answers may be open at first, and more
with every score that is about as good as the strongest's would have been: of good arms the number grows
severalfold within the time that a score takes, of bad ones hardly (a budget for exploring, kept as in
conservative bandits: Wu et al. 2016). What may be lost are end results, and the answers on an item's way can
lose but one together: the longer the way, the more of them may be open.
"""

from __future__ import annotations

from typing import Any

__all__ = ["Probation"]

_FREE = 300.0
"""Items whose answers may be open before anything is known, for all of a score that may be lost: three at
0.99."""
_MORE = 8.0
"""How many more for a score as good as the strongest's."""
_FAIR = 0.8
"""The share of the strongest's score that earns nothing; less takes away."""
_WORST = -2.0
"""The least that can be earned, so that what was bad once is tried again some day."""
_ALWAYS = 2.0
"""How many more for each call, whatever the scores say, for all of a score that may be lost."""
_ENDS = 50
"""Scores after which each arm is known well enough to be judged by what is expected of it."""


class Probation:
    """One count for all arms of a flow but the strongest."""

    __slots__ = ("_calls", "_earned", "_heard", "_open", "way")

    def __init__(self) -> None:
        self.way = 1
        """Calls on an item's longest way, as far as the flow's nodes are known."""
        self._calls = self._heard = self._open = 0
        self._earned = 0.0

    @property
    def over(self) -> bool:
        """Whether enough was heard."""
        return self._heard >= _ENDS

    def closed(self, target: float) -> bool:
        """Whether only the strongest may answer now, where so much of its quality is wanted."""
        lost = round(max(1.0 - target, 0.0), 6)
        free = _FREE * self.way + _ALWAYS * self._calls
        return not self.over and self._open >= lost * free + _MORE * self._earned

    def call(self, *, other: bool) -> None:
        """One more call, of the strongest or of another arm."""
        self._calls += 1
        self._open += other

    def heard(self, score: float, strongest: float) -> None:
        """A cheaper arm was scored, where ``strongest`` was to be expected of the strongest."""
        self._heard += 1
        self._open = max(self._open - 1, 0)
        share = min(score / strongest, 1.0) if strongest > 0.0 else 1.0
        self._earned = max(self._earned + (share - _FAIR) / (1.0 - _FAIR), _WORST)

    def state(self) -> list[Any]:
        """All of it, JSON-ready."""
        return [self._calls, self._heard, self._open, self._earned]

    def restore(self, state: list[Any]) -> None:
        """Know what :meth:`state` gave."""
        self._calls, self._heard, self._open, self._earned = state
