"""Cost and quality over the stream of a run, as a picture."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from chainwax.flows.progress import money
from chainwax.flows.report import call_costs
from chainwax.router.errors import RecordingError
from chainwax.router.recording import RecordingReader
from chainwax.router.recording.totals import Moment, NodeTotals, timeline, totals

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_run"]

_WINDOW = 50
"""Scores that the running quality is the mean of."""
_LEAST = 10
"""Scores from which a mean is drawn."""
_POINTS = 4000
"""Points of a line: more cannot be seen."""


def plot_run(recording: Path, run: str, out: Path) -> None:
    """Draw a run's cumulative cost, against one model alone, and its running quality by node.

    The x axis of both panels counts answered calls. Raises :class:`RecordingError` where the recording
    cannot be read or has no answered call of the run, and OSError where ``out`` cannot be written.
    """
    with closing(RecordingReader(recording)) as reader:
        info = reader.require_run(run)
        moments = list(timeline(reader, run))
        of_nodes = totals(reader, run)
        snapshot = reader.snapshot_of(run)
    if not moments or snapshot is None:
        raise RecordingError(f"run '{run}' in the recording '{recording}' has no answered call")
    simulated = any(moment.simulated for moment in moments)
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 6.5), layout="constrained", dpi=150)
        cost, quality = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        title = f"Flow '{info.flow}', run {run}: {len(moments):,} calls"
        # A figure of a simulated model is never shown without that word.
        if simulated:
            whole = all(moment.simulated for moment in moments)
            title += ", all answers simulated" if whole else ", some of the models simulated"
        figure.suptitle(title, fontsize=12)
        _draw_cost(cost, moments, _alone(snapshot, of_nodes))
        _draw_quality(quality, moments, snapshot)
        quality.set_xlabel("answered calls")
        quality.set_xlim(0, len(moments))
        figure.savefig(out)


def _alone(snapshot: Mapping[str, Any], of_nodes: Mapping[str, NodeTotals]) -> dict[str, tuple[float, float]]:
    """For each node the mean cost of a call at its strongest and at its cheapest model."""
    alone = {}
    for node, interface in snapshot["interfaces"].items():
        costs = list(call_costs(interface["router"], of_nodes.get(node, NodeTotals())).values())
        if costs:
            alone[node] = (costs[0], min(costs))
    return alone


def _draw_cost(axes: Axes, moments: Sequence[Moment], alone: Mapping[str, tuple[float, float]]) -> None:
    run, strongest, cheapest = [0.0], [0.0], [0.0]
    for moment in moments:
        dear, cheap = alone.get(moment.node, (0.0, 0.0))
        run.append(run[-1] + moment.cost_usd)
        strongest.append(strongest[-1] + dear)
        cheapest.append(cheapest[-1] + cheap)
    for values, label, style in (
        (strongest, "strongest only (estimated)", {"color": "#b2182b", "linestyle": "--"}),
        (run, "this run", {"color": "#2166ac", "linewidth": 2.2}),
        (cheapest, "cheapest only (estimated)", {"color": "#4d9221", "linestyle": "--"}),
    ):
        axes.plot(*_thinned(values), label=f"{label}: {money(values[-1])}", **style)
    axes.set_ylabel("cost so far")
    most = max(run[-1], strongest[-1], cheapest[-1])
    # As many decimals as two neighbouring ticks need to differ.
    decimals = max(0, math.ceil(-math.log10(most)) + 1) if most > 0 else 0
    axes.yaxis.set_major_formatter(FuncFormatter(lambda dollars, _: f"${dollars:,.{decimals}f}"))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    _legend(axes)


def _draw_quality(axes: Axes, moments: Sequence[Moment], snapshot: Mapping[str, Any]) -> None:
    scored = {moment.node for moment in moments if moment.score is not None}
    nodes = [node for node in snapshot["interfaces"] if node in scored]
    if len(nodes) > 1:
        x, y = _running([(i, m.score) for i, m in enumerate(moments, 1)])
        axes.plot(x, y, color="0.75", linewidth=4, label="all nodes")
    colours = mpl.colormaps["tab10"]
    for number, node in enumerate(nodes):
        x, y = _running([(i, m.score) for i, m in enumerate(moments, 1) if m.node == node])
        axes.plot(x, y, linewidth=1.2, color=colours(number % 10), label=node)
    for target in sorted({snapshot["interfaces"][node]["router"]["target"] for node in nodes}):
        # What is wanted is a share of the strongest model's quality, which is at most 1.
        axes.axhline(target, color="0.3", linestyle=":", linewidth=1.2, label=f"target {target:g}")
    if not nodes:
        axes.text(0.5, 0.5, "no score came back", transform=axes.transAxes, ha="center", color="grey")
    axes.set_ylabel(f"quality\n(mean of {_WINDOW} scores)")
    axes.set_ylim(top=1.01)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.25)
    if nodes:
        _legend(axes)


def _running(scores: Sequence[tuple[int, float | None]]) -> tuple[list[int], list[float]]:
    """The mean of the last scores at each call that has one."""
    window: deque[float] = deque(maxlen=_WINDOW)
    x, y = [], []
    for place, score in scores:
        if score is None:
            continue
        window.append(score)
        if len(window) >= _LEAST:
            x.append(place)
            y.append(sum(window) / len(window))
    step = -(-len(x) // _POINTS) or 1
    return x[::step], y[::step]


def _thinned(values: Sequence[float]) -> tuple[list[int], list[float]]:
    step = -(-len(values) // _POINTS)
    places = list(range(0, len(values), step))
    if places[-1] != len(values) - 1:
        places.append(len(values) - 1)  # the sums at the end are what people read
    return places, [values[place] for place in places]


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, frameon=False, fontsize=9)
