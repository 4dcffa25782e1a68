"""What a call will cost at a model, guessed from its prompt and from what another model answered.

A long answer costs more than a short one, and a model that was asked already tells how long it will be. The
logarithm of the cost is a Bayesian linear regression on features, learned answer by answer.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chainwax.router.learning.packed import pack, unpack

__all__ = ["CostGuess"]

_SPREAD = 0.05
"""Prior variance of a weight on a standardised feature."""
_NOISE = 0.25
"""Variance of the logarithm of a cost about its guess."""
_ENOUGH = 8
"""Answers from which on more than their mean is trusted."""
_RECENT = 0.02
"""Weight of the last answer in what the guesses are off by."""
_MOST = 1.5
"""A guess is at most e to this times the mean, and at least the mean divided by that."""


class CostGuess:
    """The cost of one arm's answers; features are ``size`` and begin with a 1."""

    def __init__(self, size: int) -> None:
        self.n = 0
        self.weights: NDArray[np.float64] = np.zeros(size)
        self.cover: NDArray[np.float64] = np.diag([1.0, *[_SPREAD] * (size - 1)])
        self._ratio = 1.0
        """Lately: cost over guess; the mean of a skewed cost is above e to the mean of its logarithm."""

    def guess(self, features: NDArray[np.float64], mean: float) -> float:
        """Dollars, where the arm's answers cost ``mean`` on average."""
        if self.n < _ENOUGH or mean <= 0.0:
            return mean
        return self._ratio * mean * math.exp(self._along(features, mean))

    def learn(self, features: NDArray[np.float64], cost: float, mean: float) -> None:
        """An answer cost so much; one that was free tells nothing of what others will cost."""
        if cost <= 0.0 or mean <= 0.0:
            return
        if self.n == 0:
            self.weights[0] = math.log(mean)
        if self.n >= _ENOUGH:
            ratio = cost / (mean * math.exp(self._along(features, mean)))
            self._ratio += _RECENT * (min(ratio, 10.0) - self._ratio)
        self.n += 1
        along = self.cover @ features
        step = along / (_NOISE + float(features @ along))
        self.weights += step * (math.log(cost) - float(self.weights @ features))
        self.cover -= np.outer(step, along)

    def state(self) -> list[Any]:
        """All that was learned, JSON-ready."""
        return [pack(self.weights), pack(self.cover), self.n, self._ratio]

    def restore(self, state: list[Any]) -> None:
        """Know what :meth:`state` gave."""
        self.weights, self.cover = unpack(state[0]), unpack(state[1])
        self.n, self._ratio = state[2], state[3]

    def _along(self, features: NDArray[np.float64], mean: float) -> float:
        return min(max(float(self.weights @ features) - math.log(mean), -_MOST), _MOST)
