"""A level that all arms share and each arm's own difference from it: a Gaussian belief, exact and small.

A score tells of the sum of the level and one arm's difference. So the precision of the belief is an arrow (a
diagonal, and one row), and its covariance needs but one number an arm: with ``w`` the precision that an arm's
scores have brought and ``v`` the prior variance of its difference, the arm ``keeps`` 1 / (1 + w·v) of what
the prior left open, and the level's variance ``c`` is 1 / (1/v₀ + Σ w/(1 + w·v)). That the level and the
differences become correlated is what makes an arm's scores move the others the less, the better it is known.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from chainwax.router.learning.packed import pack, unpack

__all__ = ["Pooled"]


class Pooled:
    """Arrays have the shape (arms + 1,): the level first, then each arm's difference."""

    __slots__ = ("_brought", "_keeps", "_level", "_prior", "mean", "own")

    def __init__(self, level: tuple[float, float]) -> None:
        """``level`` is its prior mean and variance."""
        self.mean: NDArray[np.float64] = np.array([level[0]])
        self.own: NDArray[np.float64] = np.zeros(1)
        """Variance of an arm's difference where the level is known."""
        self._prior: NDArray[np.float64] = np.array([level[1]])
        self._keeps: NDArray[np.float64] = np.ones(1)
        self._brought = 0.0
        self._level = level[1]
        """Variance of the level."""

    def __len__(self) -> int:
        return len(self.mean)

    def add(self, mean: float, variance: float, arms: int = 1) -> None:
        """More arms, whose difference has this prior; its variance is above 0."""
        self.mean = np.append(self.mean, np.full(arms, mean))
        self._prior = np.append(self._prior, np.full(arms, variance))
        self.own = np.append(self.own, np.full(arms, variance))
        self._keeps = np.append(self._keeps, np.ones(arms))

    def variance(self) -> NDArray[np.float64]:
        """Of the sum of the level and each arm's difference; in column 0 the level's."""
        return self._level * np.square(self._keeps) + self.own

    def variance_of(self, place: int) -> float:
        """Of the sum of the level and one arm's difference."""
        keeps = self._keeps[place]
        return float(self._level * keeps * keeps + self.own[place])

    def learn(self, place: int, move: float, precision: float) -> None:
        """An arm's sum was seen: it moves by its variance times ``move``, and is surer by ``precision``."""
        keeps = float(self._keeps[place])
        share = move * self._level * keeps
        # What the arm's difference takes, the others give back, as far as the level explained them.
        self.mean += share * (self._keeps - 1.0)
        self.mean[0] += share
        self.mean[place] += move * float(self.own[place])
        self._know(place, precision)

    def shift(self, place: int, move: float) -> None:
        """Move by an arm's variance times ``move``; nothing is known better for it."""
        self.learn(place, move, 0.0)

    def forget(self, place: int, variance: float) -> None:
        """Be as unsure of an arm's difference as ``variance`` says, if it was surer; its mean stays."""
        if self.own[place] >= variance:
            return
        prior = float(self._prior[place])
        self._brought -= (1.0 - float(self._keeps[place])) / prior
        self._prior[place] = self.own[place] = variance
        self._keeps[place] = 1.0
        self._level = 1.0 / (1.0 / float(self._prior[0]) + self._brought)

    def _know(self, place: int, precision: float) -> None:
        prior, keeps = float(self._prior[place]), float(self._keeps[place])
        now = 1.0 / (1.0 / keeps + precision * prior)
        self._brought += (keeps - now) / prior
        self._keeps[place] = now
        self.own[place] = prior * now
        self._level = 1.0 / (1.0 / float(self._prior[0]) + self._brought)

    def state(self) -> list[Any]:
        """All of it, JSON-ready, to the last bit."""
        return [pack(np.stack((self.mean, self.own, self._prior, self._keeps))), self._brought, self._level]

    def restore(self, state: list[Any], to: NDArray[np.intp]) -> None:
        """Know what :meth:`state` gave; ``to`` are where its columns are by now."""
        rows, self._brought, self._level = unpack(state[0]), state[1], state[2]
        to = to[: rows.shape[1]]
        self.mean[to], self.own[to], self._prior[to], self._keeps[to] = rows
