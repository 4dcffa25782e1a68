"""The arithmetic of cost and quality: a hull of fixed models, a frontier of runs, and RouteLLM's measures.

Points are (cost, reward) with dollars an item and the mean reward, or (share, reward) with the share of items
for which the strong model was asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, float]

COSTS = 50
"""Costs at which frontier and hull are compared."""
_FREE = 1e-6
"""What a free model counts as, as a share of the dearest's cost: 0 has no logarithm."""


def hull(points: Sequence[Point]) -> list[Point]:
    """The upper concave hull, cheapest point first, up to the best: what mixing fixed models reaches.

    >>> hull([(1.0, 0.5), (2.0, 0.5), (3.0, 0.9), (4.0, 0.8)])
    [(1.0, 0.5), (3.0, 0.9)]
    """
    out: list[Point] = []
    for cost, reward in sorted(points, key=lambda p: (p[0], -p[1])):
        if out and reward <= out[-1][1]:
            continue
        while len(out) > 1 and _slope(out[-2], out[-1]) <= _slope(out[-1], (cost, reward)):
            out.pop()
        out.append((cost, reward))
    return out


def hull_at(costs: NDArray[np.float64], points: Sequence[Point]) -> NDArray[np.float64]:
    """The hull's reward at each cost: linear in cost, for a mixture costs what its parts do."""
    edge = hull(points)
    return np.interp(costs, [p[0] for p in edge], [p[1] for p in edge])


def frontier_at(costs: NDArray[np.float64], runs: Sequence[Point]) -> NDArray[np.float64]:
    """The runs' reward at each cost: linear in the logarithm of cost, the end's reward outside."""
    ordered = sorted(runs)
    least = _FREE * max(ordered[-1][0], 1e-300)
    return np.interp(np.log(costs), [np.log(max(p[0], least)) for p in ordered], [p[1] for p in ordered])


def margins(runs: Sequence[Point], fixed: Sequence[Point]) -> NDArray[np.float64]:
    """Frontier less hull at :data:`COSTS` costs from the cheapest's to the best's, evenly spaced in log."""
    strongest = max(fixed, key=lambda p: (p[1], -p[0]))[0]
    cheapest = min(p[0] for p in fixed)
    low = max(cheapest, _FREE * max(p[0] for p in fixed))
    if strongest <= 0:
        return np.zeros(0)  # all that is worth asking is free
    costs = np.geomspace(low, max(strongest, low), COSTS)
    return frontier_at(costs, runs) - hull_at(costs, fixed)


def apgr(runs: Sequence[Point], weak: float, strong: float) -> float:
    """Average performance gap recovered (RouteLLM, Ong et al. 2024).

    The mean over the share of strong calls from 0 to 1 of (reward - weak) / (strong - weak), linear between
    runs, the end's reward outside. ``strong`` must be above ``weak``.

    >>> round(apgr([(0.0, 0.2), (1.0, 0.8)], 0.2, 0.8), 6)
    0.5
    """
    ordered = sorted(runs)
    shares = np.array([0.0, *(p[0] for p in ordered), 1.0])
    rewards = np.array([ordered[0][1], *(p[1] for p in ordered), ordered[-1][1]])
    return float((np.trapezoid(rewards, shares) - weak) / (strong - weak))


def call_share(part: float, runs: Sequence[Point], weak: float, strong: float) -> float | None:
    """RouteLLM's CPT: the least share of strong calls that recovers ``part`` of the gap; None without one.

    >>> call_share(0.5, [(0.0, 0.2), (0.4, 0.8), (1.0, 0.9)], 0.2, 0.8)
    0.2
    """
    wanted = weak + part * (strong - weak)
    ordered = sorted(runs)
    if ordered[0][1] >= wanted:
        return ordered[0][0]
    for (a, low), (b, high) in pairwise(ordered):
        if high >= wanted:
            return float(a + (b - a) * (wanted - low) / (high - low))
    return None


def _slope(a: Point, b: Point) -> float:
    return (b[1] - a[1]) / max(b[0] - a[0], 1e-300)
