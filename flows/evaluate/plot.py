"""A picture of an evaluation: accuracy against cost, and both over the stream."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from chainwax.flows.evaluate.evaluation import BEST_FIXED, CHEAPEST, MIX, ROUTER, STRONGEST, Evaluation
from chainwax.flows.evaluate.show import how, simulated_words
from chainwax.flows.progress import money

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_evaluation"]

_COLOURS = {
    STRONGEST: "#b2182b",
    CHEAPEST: "#4d9221",
    BEST_FIXED: "#762a83",
    MIX: "0.35",
    ROUTER: "#2166ac",
}


def plot_evaluation(evaluation: Evaluation, out: Path) -> None:
    """Draw it. Raises OSError where ``out`` cannot be written."""
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 6), layout="constrained", dpi=150)
        grid = figure.add_gridspec(2, 2, width_ratios=(1, 1))
        simulated = simulated_words(evaluation)
        title = f"Flow '{evaluation.flow}': {evaluation.items:,} items"
        # A figure of a simulated model is never shown without that word.
        figure.suptitle(f"{title}, {simulated} models" if simulated else title, fontsize=12)
        _draw_routings(figure.add_subplot(grid[:, 0]), evaluation)
        accuracy = figure.add_subplot(grid[0, 1])
        cost = figure.add_subplot(grid[1, 1], sharex=accuracy)
        _draw_curves(accuracy, cost, evaluation)
        figure.savefig(out)


def _draw_routings(axes: Axes, evaluation: Evaluation) -> None:
    corners = evaluation.hull
    # Straight in dollars, and so a curve where the axis is logarithmic.
    between = [np.linspace(a, b, 50) for (a, _), (b, _) in pairwise(corners)]
    costs = np.concatenate([*between, np.array([corners[-1][0]])])
    axes.plot(
        costs,
        np.interp(costs, [cost for cost, _ in corners], [accuracy for _, accuracy in corners]),
        color="0.6",
        linewidth=1,
        label="random mixes of fixed models",
        zorder=1,
    )
    for row in evaluation.rows:
        figure = row.accuracy
        axes.errorbar(
            row.cost_usd,
            figure.value,
            yerr=[[max(0.0, figure.value - figure.low)], [max(0.0, figure.high - figure.value)]],
            marker="D" if row.name == ROUTER else "x" if row.name == MIX else "o",
            markersize=8 if row.name == ROUTER else 6,
            capsize=3,
            linestyle="none",
            color=_COLOURS.get(row.name, "#e08214"),
            label=f"{row.name}: {figure.value:.3f}, {money(row.cost_usd)}",
            zorder=3 if row.name == ROUTER else 2,
        )
    spent = [row.cost_usd for row in evaluation.rows]
    if min(spent) > 0 and max(spent) > 5 * min(spent):
        axes.set_xscale("log")
    axes.set_xlabel("cost of the stream in dollars")
    axes.set_ylabel(f"accuracy\n({how(evaluation)})")
    axes.grid(alpha=0.25)
    axes.legend(loc="best", fontsize=8, framealpha=0.9)


def _draw_curves(accuracy: Axes, cost: Axes, evaluation: Evaluation) -> None:
    items = [moment.items for moment in evaluation.curve]
    for at, name in enumerate(evaluation.curve_names):
        style: dict[str, Any] = {"color": _COLOURS[name], "linewidth": 2 if name == ROUTER else 1.2}
        shares = [moment.accuracy[at] for moment in evaluation.curve]
        accuracy.plot(items, [float("nan") if s is None else s for s in shares], label=name, **style)
        if name == STRONGEST:
            continue
        ratios = [
            moment.cost_usd[at] / moment.cost_usd[0] if moment.cost_usd[0] else float("nan")
            for moment in evaluation.curve
        ]
        cost.plot(items, ratios, label=name, **style)
    accuracy.set_ylabel("accuracy, over a window")
    accuracy.tick_params(labelbottom=False)
    accuracy.grid(alpha=0.25)
    accuracy.legend(loc="best", fontsize=8)
    cost.set_ylabel("cost of the strongest's,\nover a window")
    cost.set_xlabel("items of the stream")
    cost.set_ylim(bottom=0)
    cost.yaxis.set_major_formatter(PercentFormatter(1.0))
    cost.yaxis.set_major_locator(MaxNLocator(5))
    cost.grid(alpha=0.25)
    cost.legend(loc="best", fontsize=8)
