"""The price of quality: what one point of it is worth, where nobody says so but a target or a pace.

A call is worth most where ``price · expected score − cost`` is greatest. The last calls are kept with what
was drawn and expected of each arm, so that it can be reckoned what any price would have come to: the price in
force is the least that keeps the target, or the greatest that keeps the pace (the dual of the constraint,
solved on a sample of the stream, anew every few calls). So it follows the stream, and needs no step size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chainwax.router.learning import kernel
from chainwax.router.learning.packed import pack, unpack

__all__ = ["FIRST", "Price"]

_KEPT = 256
"""Calls that are kept."""
_EVERY = 16
"""Calls between two solutions, at most; the first calls solve each time."""
_RANGE = (math.log(1e-8), math.log(1e5))
"""Logarithms of the least and the greatest price, in dollars a point."""
_ROUNDS = 26
FIRST = 8
"""Calls before a target has a solution, where nothing else is known."""
_AHEAD = 200.0
"""Calls over which a pace that was missed is made up for."""


class Price:
    """One price, of all nodes that want the same; dollars a point of quality (a right answer for a wrong)."""

    def __init__(self) -> None:
        self.value = 0.0
        """0.0 before it was solved."""
        self.calls = 0
        self.spent = 0.0
        """Dollars of the calls that were told."""
        self._drawn: NDArray[np.float64] = np.zeros((0, 0))
        self._mean: NDArray[np.float64] = np.zeros((0, 0))
        self._cost: NDArray[np.float64] = np.zeros((0, 0))
        self._wanted: NDArray[np.float64] = np.zeros(0)
        self._solved = 0

    def note(
        self,
        places: NDArray[np.intp],
        drawn: NDArray[np.float64],
        mean: NDArray[np.float64],
        cost: NDArray[np.float64],
        wanted: float,
        arms: int,
    ) -> None:
        """Keep a call: of the arms in columns ``places``, what was drawn, expected, and their dollars.

        Columns are 1 to ``arms``. ``wanted`` is the score that a call should get, on average over the calls;
        a price for a pace does not need it.
        """
        row = self.calls % _KEPT
        if row >= self._drawn.shape[0] or arms >= self._drawn.shape[1]:
            self._grow(row, arms)
        width = self._drawn.shape[1]
        kernel.note(self._drawn, self._mean, self._cost, row, width, places, drawn, mean, cost)
        self._wanted[row] = wanted
        self.calls += 1

    @property
    def wanted(self) -> float:
        """What the last calls should get, on average; there was one."""
        return float(self._wanted[: min(self.calls, _KEPT)].mean())

    def for_target(self, fallback: float) -> float:
        """The least price at which the calls get what was wanted of them, on what is expected.

        ``fallback`` is the price before so many calls that it can be solved; 0.0 where the arms are known.
        """
        if fallback and self.calls < FIRST:
            return fallback
        if self._due():
            wanted = self.wanted

            def keeps(price: float) -> bool:
                return self._at(price)[0] >= wanted

            self.value = self._solve(keeps, least=True)
        return self.value

    def for_pace(self, pace: float) -> float:
        """The greatest price at which a call costs ``pace`` dollars or less, on average so far."""
        if self._due():
            wanted = max(pace + (pace * (self.calls - 1) - self.spent) / _AHEAD, 0.0)

            def keeps(price: float) -> bool:
                return self._at(price)[1] <= wanted

            self.value = self._solve(keeps, least=False)
        return self.value

    def _due(self) -> bool:
        if self.value and self.calls - self._solved < min(_EVERY, self.calls // 8):
            return False
        self._solved = self.calls
        return True

    def _at(self, price: float) -> tuple[float, float]:
        """Expected score and dollars of a call at a price."""
        kept = min(self.calls, _KEPT)
        return kernel.worth(self._drawn, self._mean, self._cost, kept, self._drawn.shape[1], price)

    def _solve(self, keeps: Any, *, least: bool) -> float:
        low, high = _RANGE
        for _ in range(_ROUNDS):
            middle = (low + high) / 2.0
            if keeps(math.exp(middle)) == least:
                high = middle
            else:
                low = middle
        return math.exp(high if least else low)

    def _grow(self, row: int, top: int) -> None:
        rows = min(_KEPT, max(16, 2 * self._drawn.shape[0])) if row >= self._drawn.shape[0] else 0
        more = (max(rows - self._drawn.shape[0], 0), max(top + 1 - self._drawn.shape[1], 0))
        pad = ((0, more[0]), (0, more[1]))
        self._drawn = np.pad(self._drawn, pad, constant_values=-np.inf)
        self._mean = np.pad(self._mean, pad)
        self._cost = np.pad(self._cost, pad)
        self._wanted = np.pad(self._wanted, pad[0])

    def state(self) -> dict[str, Any]:
        """All of it, JSON-ready, to the last bit; columns are those of the flow's knowledge."""
        arrays = (self._drawn, self._mean, self._cost, self._wanted)
        return {
            "value": self.value,
            "calls": self.calls,
            "solved": self._solved,
            "spent": self.spent,
            "kept": [pack(array) for array in arrays],
        }

    def restore(self, state: Mapping[str, Any], columns: NDArray[np.intp]) -> None:
        """Know what :meth:`state` gave; ``columns`` are where its columns are by now."""
        self.value, self.calls, self._solved = state["value"], state["calls"], state["solved"]
        self.spent = state["spent"]
        drawn, mean, cost, self._wanted = (unpack(packed) for packed in state["kept"])
        to = columns[: drawn.shape[1]]
        shape = (drawn.shape[0], int(to.max()) + 1 if len(to) else 0)
        self._drawn, self._mean, self._cost = np.full(shape, -np.inf), np.zeros(shape), np.zeros(shape)
        self._drawn[:, to], self._mean[:, to], self._cost[:, to] = drawn, mean, cost
