"""Logistic regression that learns one score at a time and knows how sure it is.

A Gaussian posterior over the weights, moved by one Newton step for each score (the Laplace approximation of
Spiegelhalter and Lauritzen 1990); scores may be anything in [0, 1]. All arms of a node share one: what they
have in common (how hard a prompt is, what an answer looks like) is learned from the scores of all of them,
and each has a term of its own.
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
_COMMON = 1.0
"""Prior variance of what all arms have in common."""
_OWN = 0.25
"""Prior variance of an arm's own term."""
_WANDER = 2e-5
"""What each score adds to a variance, as a share of the prior's, for weights may drift."""


class Logistic:
    """The weights of ``size`` features, of which the first is 1, and a term for each arm that is named."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.weights: NDArray[np.float64] = np.zeros(size)
        self._prior: NDArray[np.float64] = np.array([_COMMON, *[_SPREAD] * (size - 1)])
        self.cover: NDArray[np.float64] = np.diag(self._prior)
        self.counts: dict[str, int] = {}
        """Scores of each arm; an arm's place is its own among them."""
        self._places: dict[str, int] = {}

    def add(self, arm: str, quality: float) -> None:
        """Know an arm, whose score is guessed to be ``quality``, in (0, 1), before the first; once."""
        if arm in self._places:
            return
        old = len(self.weights)
        self._places[arm] = old
        self.counts[arm] = 0
        self.weights = np.append(self.weights, logit(quality))
        self._prior = np.append(self._prior, _OWN)
        cover = np.zeros((old + 1, old + 1))
        cover[:old, :old] = self.cover
        cover[old, old] = _OWN
        self.cover = cover

    def predict(self, arm: str, features: NDArray[np.float64]) -> tuple[float, float]:
        """Mean and deviation of the log-odds of the arm's score."""
        x = self._with_arm(arm, features)
        return float(self.weights @ x), math.sqrt(max(float(x @ self.cover @ x), 0.0))

    def guess(self, arm: str, features: NDArray[np.float64]) -> float:
        """The arm's expected score."""
        return sigmoid(float(self.weights[: self.size] @ features) + float(self.weights[self._places[arm]]))

    def doubt(self, arm: str) -> float:
        """Deviation of the log-odds that are the arm's own."""
        place = self._places[arm]
        return math.sqrt(max(float(self.cover[place, place]), 0.0))

    def learn(self, arm: str, features: NDArray[np.float64], score: float, weight: float = 1.0) -> None:
        """One Newton step towards a score in [0, 1], which counts as ``weight`` scores."""
        x = self._with_arm(arm, features)
        guess = sigmoid(float(self.weights @ x))
        along = self.cover @ x
        # A guess that is all but certain must still be able to learn that it is wrong.
        curve = weight * max(guess * (1.0 - guess), 0.02)
        along_all = along / (1.0 + curve * float(x @ along))
        self.cover -= curve * np.outer(along_all, along)
        self.weights += along_all * (weight * (score - guess))
        self.counts[arm] += 1
        variances = self.cover.diagonal()
        wandered = np.minimum(variances + _WANDER * self._prior, self._prior)
        np.fill_diagonal(self.cover, np.maximum(variances, wandered))

    def revise(self, arm: str, features: NDArray[np.float64], by: float) -> None:
        """A score that was learned has changed by ``by``: the step that it made changes in proportion."""
        self.weights += (self.cover @ self._with_arm(arm, features)) * by

    def _with_arm(self, arm: str, features: NDArray[np.float64]) -> NDArray[np.float64]:
        x = np.zeros(len(self.weights))
        x[: self.size] = features
        x[self._places[arm]] = 1.0
        return x

    def state(self) -> list[Any]:
        """All that was learned, JSON-ready."""
        return [pack(self.weights), pack(self.cover), pack(self._prior), self._places, self.counts]

    def restore(self, state: list[Any]) -> None:
        """Know what :meth:`state` gave. Raises ValueError where that had other features."""
        size = len(unpack(state[0])) - len(state[3])
        if size != self.size:
            raise ValueError(f"{size} features, not {self.size}")
        self.weights, self.cover, self._prior = (unpack(packed) for packed in state[:3])
        self._places, self.counts = dict(state[3]), dict(state[4])


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
