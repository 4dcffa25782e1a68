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

    __slots__ = ("_brought", "_prior", "keeps", "level", "mean", "own")

    def __init__(self, level: tuple[float, float]) -> None:
        """``level`` is its prior mean and variance."""
        self.mean: NDArray[np.float64] = np.array([level[0]])
        """The level's, and each arm's difference's."""
        self.own: NDArray[np.float64] = np.zeros(1)
        """Variance of an arm's difference where the level is known."""
        self.keeps: NDArray[np.float64] = np.ones(1)
        self.level = level[1]
        """Variance of the level."""
        self._prior: NDArray[np.float64] = np.array([level[1]])
        self._brought = 0.0

    def __len__(self) -> int:
        return len(self.mean)

    def add(self, mean: float, variance: float) -> None:
        """One more arm, whose difference has this prior; its variance is above 0."""
        self.mean = np.append(self.mean, mean)
        self.own = np.append(self.own, variance)
        self.keeps = np.append(self.keeps, 1.0)
        self._prior = np.append(self._prior, variance)

    def variance_of(self, place: int) -> float:
        """Of the sum of the level and one arm's difference; for place 0 the level's."""
        keeps = self.keeps.item(place)
        return self.level * keeps * keeps + self.own.item(place)

    def learn(self, place: int, move: float, precision: float) -> None:
        """An arm's sum was seen: it moves by its variance times ``move``, and is surer by ``precision``."""
        self.shift(place, move)
        prior, keeps = self._prior.item(place), self.keeps.item(place)
        now = 1.0 / (1.0 / keeps + precision * prior)
        self._brought += (keeps - now) / prior
        self.keeps[place] = now
        self.own[place] = prior * now
        self._reckon_level()

    def shift(self, place: int, move: float) -> None:
        """Move by an arm's variance times ``move``; nothing is known better for it."""
        mean = self.mean
        share = move * self.level * self.keeps.item(place)
        # What the arm's difference takes, the others give back, as far as the level explained them.
        mean += share * (self.keeps - 1.0)
        mean[0] += share
        mean[place] += move * self.own.item(place)

    def forget(self, place: int, variance: float) -> None:
        """Be as unsure of an arm's difference as ``variance`` says, if it was surer; its mean stays."""
        if self.own[place] >= variance:
            return
        self._brought -= (1.0 - self.keeps.item(place)) / self._prior.item(place)
        self._prior[place] = self.own[place] = variance
        self.keeps[place] = 1.0
        self._reckon_level()

    def _reckon_level(self) -> None:
        self.level = 1.0 / (1.0 / self._prior.item(0) + self._brought)

    def state(self) -> list[Any]:
        """All of it, JSON-ready, to the last bit."""
        return [pack(np.stack((self.mean, self.own, self._prior, self.keeps))), self._brought, self.level]

    def restore(self, state: list[Any], to: NDArray[np.intp]) -> None:
        """Know what :meth:`state` gave; ``to`` are where its columns are by now."""
        rows, self._brought, self.level = unpack(state[0]), state[1], state[2]
        to = to[: rows.shape[1]]
        self.mean[to], self.own[to], self._prior[to], self.keeps[to] = rows
