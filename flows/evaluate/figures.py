"""What is reckoned from scores and costs: intervals, the hull of fixed models, learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Hull", "Interval", "Mix", "Moment", "Table", "learning_curve"]

_RESAMPLES = 1000
_MEMORY = 8_000_000
"""Numbers that are held at once while resampling."""
_LEAST_WINDOW = 50

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(slots=True)
class Table:
    """Scores and costs by variant and by item of the stream, in the order of the stream.

    ``scores``, ``weights`` and ``costs`` have the shape (variants, items): sums of weighted scores, of the
    weights, and of dollars. What a variant did about one item belongs together, so items are what is drawn.
    """

    scores: Floats
    weights: Floats
    costs: Floats

    def accuracy(self) -> Floats:
        """By variant; nan where nothing was scored."""
        weights = self.weights.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self.scores.sum(axis=1) / weights)

    def resampled(self, seed: int = 0) -> tuple[Floats, Floats]:
        """Accuracy and cost of each variant in 1,000 resamples, each of shape (resamples, variants).

        The bootstrap (Efron 1979), paired: a resample draws items with replacement, the same ones for all
        variants.
        """
        random = np.random.default_rng(seed)
        items = self.scores.shape[1]
        accuracies, costs = [], []
        at_once = max(1, min(_RESAMPLES, _MEMORY // max(items, 1)))
        for begin in range(0, _RESAMPLES, at_once):
            count = min(at_once, _RESAMPLES - begin)
            drawn = random.integers(items, size=(count, items))
            times = np.stack([np.bincount(row, minlength=items) for row in drawn]).astype(float)
            with np.errstate(invalid="ignore", divide="ignore"):
                accuracies.append((times @ self.scores.T) / (times @ self.weights.T))
            costs.append(times @ self.costs.T)
        return np.concatenate(accuracies), np.concatenate(costs)


def interval(value: float, resampled: Floats) -> Interval:
    """The percentile interval of a figure from its resamples."""
    known = resampled[np.isfinite(resampled)]
    if not known.size:
        return Interval(value, value, value)
    low, high = np.quantile(known, (0.025, 0.975))
    return Interval(value, float(low), float(high))


class Mix(NamedTuple):
    """Two fixed variants, and the share of the items that the second of them gets."""

    first: int
    second: int
    share: float

    def of(self, values: Floats) -> Floats:
        """What the mix is expected to have, of what its variants have; the last axis is the variants'."""
        return np.asarray((1 - self.share) * values[..., self.first] + self.share * values[..., self.second])


class Hull:
    """The most accuracy that fixed models have at a cost, where each item is left to one of two by chance.

    No mix is cheaper than the cheapest of them; where more may be spent than the best costs, the best does.
    """

    def __init__(self, costs: Sequence[float], accuracies: Sequence[float]) -> None:
        points = sorted(zip(costs, accuracies, range(len(costs)), strict=True), key=lambda p: (p[0], -p[1]))
        self._corners: list[tuple[float, float, int]] = []
        for cost, accuracy, which in points:
            if self._corners and accuracy <= self._corners[-1][1]:
                continue  # dearer, and no better
            while len(self._corners) > 1 and self._is_below(cost, accuracy):
                self._corners.pop()
            self._corners.append((cost, accuracy, which))

    def _is_below(self, cost: float, accuracy: float) -> bool:
        (c0, a0, _), (c1, a1, _) = self._corners[-2:]
        return (a1 - a0) * (cost - c0) <= (accuracy - a0) * (c1 - c0)

    @property
    def corners(self) -> list[tuple[float, float]]:
        """Cost and accuracy, cheapest first."""
        return [(cost, accuracy) for cost, accuracy, _ in self._corners]

    def at(self, cost: float) -> Mix:
        """The mix that is expected to cost so much."""
        corners = self._corners
        if cost <= corners[0][0]:
            return Mix(corners[0][2], corners[0][2], 0.0)
        for (c0, _, first), (c1, _, second) in pairwise(corners):
            if cost <= c1:
                return Mix(first, second, (cost - c0) / (c1 - c0))
        return Mix(corners[-1][2], corners[-1][2], 0.0)


class Moment(NamedTuple):
    """Where a variant stands after so many items, over the last ones."""

    items: int
    accuracy: tuple[float | None, ...]
    """By variant."""
    cost_usd: tuple[float, ...]
    """For an item, by variant."""


def learning_curve(table: Table, points: int = 100) -> list[Moment]:
    """Accuracy and cost by variant over windows of the stream, each of a twentieth of it or of 50 items."""
    items = table.scores.shape[1]
    window = min(items, max(_LEAST_WINDOW, items // 20))
    if not window:
        return []
    sums = [np.pad(np.cumsum(part, axis=1), ((0, 0), (1, 0))) for part in _parts(table)]
    ends = np.unique(np.linspace(window, items, min(points, items - window + 1)).astype(int))
    moments = []
    for end in ends:
        scores, weights, costs = (part[:, end] - part[:, end - window] for part in sums)
        accuracy = tuple(float(s / w) if w else None for s, w in zip(scores, weights, strict=True))
        moments.append(Moment(int(end), accuracy, tuple(float(c) / window for c in costs)))
    return moments


def _parts(table: Table) -> tuple[Floats, Floats, Floats]:
    return table.scores, table.weights, table.costs
