"""The budget of one node, which all processes of a run spend from, at each of its starts."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

__all__ = ["Purse"]

_NOTHING = 1e-9
"""Dollars that are none: sums of floats are not exact."""


class Purse:
    """What is left of ``budget`` dollars.

    A process may spend a part of what was left when it last heard of the others; then it has to hear again.
    So all together overspend by no more than what is in flight when the budget comes to its end.
    """

    def __init__(self, budget: float, before: float = 0.0) -> None:
        self.budget = budget
        self.before = before
        """Dollars that the run spent before this process began."""
        self.refresh: Callable[[], Awaitable[None]] | None = None
        """Hears what others spent, where there are others."""
        self._elsewhere = before
        self._until = math.inf
        self._known = False

    def spent(self, spent: float) -> float:
        """Dollars of all, when this process has spent ``spent``."""
        return self._elsewhere + spent

    def left(self, spent: float) -> float:
        """Dollars that are left, when this process has spent ``spent``; 0.0 when there are none."""
        left = self.budget - self._elsewhere - spent
        return left if left > _NOTHING else 0.0

    def began_with(self, spent: float) -> None:
        """The run had spent at least so many dollars before this process began."""
        self.before = max(self.before, spent)
        self._elsewhere = max(self._elsewhere, self.before)

    def heard(self, spent: float, total: float, processes: int) -> None:
        """``processes`` have spent ``total`` by now in the whole run, this one ``spent`` of it."""
        # A lender that forgot, as a Redis that began anew, does not make spent money come back.
        self._known = True
        self._elsewhere = max(total - spent, self.before)
        self._until = math.inf if processes < 2 else spent + self.left(spent) / (2 * processes)

    async def room(self, spent: Callable[[], float]) -> None:
        """Wait until it is known whether there is anything left."""
        if self.refresh is None:
            return
        if not self._known:
            await self.refresh()
        while spent() >= self._until and self.left(spent()):
            await self.refresh()
