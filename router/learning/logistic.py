"""Logistic regression that learns one score at a time and knows how sure it is.

A Gaussian posterior over the weights, moved by one Newton step for each score (the Laplace approximation of
Spiegelhalter and Lauritzen 1990); scores may be anything in [0, 1].
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chainwax.router.learning.packed import pack, unpack

__all__ = ["Logistic", "logit", "sigmoid"]

_SPREAD = 0.05
"""Prior variance of a weight on a standardised feature."""
_BIAS = 1.0
"""Prior variance of the bias."""
_WANDER = 2e-5
"""What each score adds to a variance, as a share of the prior's, for weights may drift."""


class Logistic:
    """The weights of ``size`` features and a bias; ``quality``, in (0, 1), is the guess without a score."""

    def __init__(self, size: int, quality: float) -> None:
        self.weights: NDArray[np.float64] = np.zeros(size + 1)
        self.weights[0] = logit(quality)
        self._prior: NDArray[np.float64] = np.array([_BIAS, *[_SPREAD] * size])
        self._wander = _WANDER * self._prior
        self._diagonal = np.diag_indices(size + 1)
        self.cover: NDArray[np.float64] = np.diag(self._prior)
        self.n = 0

    def predict(self, features: NDArray[np.float64]) -> tuple[float, float]:
        """Mean and deviation of the score's log-odds; ``features`` begin with a 1 for the bias."""
        return float(self.weights @ features), math.sqrt(max(float(features @ self.cover @ features), 0.0))

    def learn(self, features: NDArray[np.float64], score: float) -> None:
        """One Newton step towards a score in [0, 1]."""
        guess = sigmoid(float(self.weights @ features))
        along = self.cover @ features
        # A guess that is all but certain must still be able to learn that it is wrong.
        curve = max(guess * (1.0 - guess), 0.02)
        along_all = along / (1.0 + curve * float(features @ along))
        self.cover -= curve * np.outer(along_all, along)
        self.weights += along_all * (score - guess)
        self.n += 1
        variances = self.cover[self._diagonal]
        self.cover[self._diagonal] = np.maximum(variances, np.minimum(variances + self._wander, self._prior))

    def revise(self, features: NDArray[np.float64], by: float) -> None:
        """A score that was learned has changed by ``by``: the step that it made changes in proportion."""
        self.weights += (self.cover @ features) * by

    def state(self) -> list[Any]:
        """All that was learned, JSON-ready."""
        return [pack(self.weights), pack(self.cover), self.n]

    def restore(self, state: list[Any]) -> None:
        """Know what :meth:`state` gave. Raises ValueError where that had other features."""
        weights, cover = unpack(state[0]), unpack(state[1])
        if weights.shape != self.weights.shape or cover.shape != self.cover.shape:
            raise ValueError(f"{len(weights)} weights, not {len(self.weights)}")
        self.weights, self.cover, self.n = weights, cover, state[2]


def sigmoid(x: float) -> float:
    """1 / (1 + exp(−x)), for any x.

    >>> sigmoid(-1000.0), sigmoid(0.0), sigmoid(1000.0)
    (0.0, 0.5, 1.0)
    """
    if x < -700.0:
        return 0.0
    return 1.0 / (1.0 + math.exp(-x))


def logit(p: float) -> float:
    """The log-odds of ``p``, held within ±7.

    >>> logit(0.5), round(logit(1.0), 3)
    (0.0, 7.0)
    """
    if not 0.0 < p < 1.0:
        return -7.0 if p <= 0.0 else 7.0
    return min(max(math.log(p / (1.0 - p)), -7.0), 7.0)
