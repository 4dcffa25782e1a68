"""What the router makes of recorded outcomes: quality and cost against every fixed model.

A recording is streamed once in its order (other seeds shuffle it), learning included. A policy sees a model's
response only if it asked it and a reward only for the answer that was used, late, and pays for all that it
asks. It is told prices (their mean) and the tiers' order by price, never which model is best: ``strongest``
in the result is the model with the highest mean reward, known in hindsight alone.

    python benchmarks/routing.py [--recording FILE] [--warm FILE] [--measure-from N]
        [--policy adaptive|switched|parallel] [--target 0.99] [--feedback-delay 50] [--feedback-share 1.0]
        [--seeds 3] [--plot build/routing-NAME.png]

* ``at_target``: a run at ``--target``, mean over seeds; its ratios are to the strongest.
* ``worst_running_ratio``: the lowest, from item 200 on and over all seeds, of the cumulative reward at target
  over the strongest's on the same items.
* ``frontier``: the mean over seeds of exactly 11 runs at the values of :func:`sweep`, fixed beforehand.
* ``mean_hull_margin``, ``worst_hull_margin``: frontier less the hull of the fixed models, at 50 costs.
* ``apgr``, ``cpt50``, ``cpt80``: as RouteLLM defines them, for two models; the x-axis is the share of items
  for which the strong model was asked at all. RouteLLM counts calls and not their tokens, so in the runs of
  the sweep over two models each call of a model is charged the mean of that model's calls.

With ``--measure-from N`` all of these count from the Nth item on. Without ``--recording`` a small synthetic
one is streamed, whose models are simulated.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _contract import report, say
from _frontier import Point, apgr, call_share, frontier_at, hull, hull_at, margins
from _recorded import Recorded, read_recording, settings_for, stream, synthetic
from numpy.typing import NDArray

RUNS = 11
SETTLED = 200
"""Items from which on a running ratio says something."""
BUILD = Path(__file__).parent.parent / "build"


@dataclass(frozen=True)
class Setting:
    """What one run asks of the router: keys of ``[defaults]``, and of ``[nodes.ID]``."""

    defaults: dict[str, Any]
    nodes: dict[str, dict[str, Any]]
    flat: bool = False
    """Whether each call of a model is charged the mean of that model's."""


def sweep(recorded: Recorded, policy: str) -> list[Setting]:
    """The values of the frontier's runs, from what is known before the first item: the price list.

    What a point of quality is worth, from a thirtieth of the dearest's cost of an item to three hundred times
    that. Of two models ``adaptive`` is told instead what an item may cost on average, evenly from the cheaper
    one's to the dearer one's, as shares of the calls. (``parallel`` has no choice: its runs are all alike.)
    """
    # Where all models are free, nothing is saved at any worth.
    high = max(recorded.prices.values()) or 1.0
    if policy == "adaptive" and len(recorded.models) == 2:
        low = max(min(recorded.prices.values()), high * 1e-6)
        paces = [low + (high - low) * step / (RUNS - 1) for step in range(RUNS)]
        return [Setting({"pace": pace}, {}, flat=True) for pace in paces]
    return [Setting({"worth": high * 10 ** (-1.5 + 4 * step / (RUNS - 1))}, {}) for step in range(RUNS)]


@dataclass
class Run:
    """What came of one run: one number an item that is measured."""

    paid: NDArray[np.float64]
    gained: NDArray[np.float64]
    asked: dict[str, float]
    """Share of the items for which each model was asked."""
    used: dict[str, float]


_recorded: Recorded
_warm: Recorded | None
_options: argparse.Namespace


def _begin(recorded: Recorded, warm: Recorded | None, options: argparse.Namespace) -> None:
    global _recorded, _warm, _options
    _recorded, _warm, _options = recorded, warm, options


def _run(setting: Setting, seed: int) -> Run:
    defaults = {"form": _options.policy, **setting.defaults}
    recorded = _recorded.flat() if setting.flat else _recorded
    ledger = stream(
        recorded,
        settings_for(recorded, seed, defaults, setting.nodes),
        seed=seed,
        delay=_options.feedback_delay,
        share=_options.feedback_share,
        warm=_warm,
    )
    measured = slice(_options.measure_from, None)
    used = ledger.used[measured]
    return Run(
        ledger.paid[measured],
        ledger.gained[measured],
        {model: float(asked[measured].mean()) for model, asked in ledger.asked.items()},
        {model: used.count(model) / len(used) for model in _recorded.models},
    )


def run_all(
    recorded: Recorded, warm: Recorded | None, options: argparse.Namespace
) -> tuple[list[Run], list[list[Run]]]:
    """The runs at target, one a seed, and those of the sweep, by value and seed."""
    settings = [Setting({"target": options.target}, {}), *sweep(recorded, options.policy)]
    jobs = [(setting, seed) for setting in settings for seed in range(options.seeds)]
    begun = time.monotonic()
    done: list[Run] = []
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # for the processes to come: they fill the cores by themselves
    with ProcessPoolExecutor(
        max_workers=min(2, os.cpu_count() or 1),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(recorded, warm, options),
    ) as pool:
        for run in pool.map(_run, *zip(*jobs, strict=True)):
            done.append(run)
            if len(done) % options.seeds == 0:
                last = done[-options.seeds :]
                say(
                    f"{len(done)} of {len(jobs)} runs, {time.monotonic() - begun:.0f} s: reward "
                    f"{np.mean([r.gained.mean() for r in last]):.4f} at "
                    f"${np.mean([r.paid.mean() for r in last]):.7f} an item; answered by "
                    + ", ".join(
                        f"{model} {np.mean([r.used[model] for r in last]):.0%}" for model in recorded.models
                    )
                )
    by_setting = [done[at : at + options.seeds] for at in range(0, len(done), options.seeds)]
    return by_setting[0], by_setting[1:]


def fixed_models(recorded: Recorded, options: argparse.Namespace) -> dict[str, list[NDArray[np.float64]]]:
    """Each model alone: its rewards on the measured items of each seed's order, and its costs last."""
    orders = [recorded.in_order(seed)[options.measure_from :] for seed in range(options.seeds)]
    return {
        model: [
            *(np.array([item.outcomes[model].reward for item in order]) for order in orders),
            np.array([item.outcomes[model].cost for order in orders for item in order]),
        ]
        for model in recorded.models
    }


def main() -> None:
    """Run all and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recording", type=Path)
    parser.add_argument("--warm", type=Path, help="a recording to learn from first")
    parser.add_argument("--measure-from", type=int, default=0, metavar="N")
    parser.add_argument("--policy", choices=("adaptive", "switched", "parallel"), default="adaptive")
    parser.add_argument("--target", type=float, default=0.99)
    parser.add_argument("--feedback-delay", type=int, default=50, help="items that a score is late")
    parser.add_argument("--feedback-share", type=float, default=1.0, help="share of items that get a score")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    recorded = synthetic() if options.recording is None else read_recording(options.recording)
    if not 0 <= options.measure_from < len(recorded.items):
        parser.error(f"--measure-from: the recording has {len(recorded.items)} items")
    if options.seeds < 1:
        parser.error("--seeds: at least 1")
    warm = None if options.warm is None else read_recording(options.warm, recorded.models)
    at_target, frontier = run_all(recorded, warm, options)

    alone = fixed_models(recorded, options)
    points = {
        model: (float(rows[-1].mean()), float(np.mean([r.mean() for r in rows[:-1]])))
        for model, rows in alone.items()
    }
    strongest = max(points, key=lambda model: (points[model][1], -points[model][0]))
    cheapest = min(points, key=lambda model: (points[model][0], -points[model][1]))
    runs = [
        (float(np.mean([r.paid.mean() for r in of])), float(np.mean([r.gained.mean() for r in of])))
        for of in frontier
    ]
    reward = float(np.mean([r.gained.mean() for r in at_target]))
    cost = float(np.mean([r.paid.mean() for r in at_target]))
    figures: dict[str, Any] = {}
    figures["worst_running_ratio"] = running_ratio([r.gained for r in at_target], alone[strongest][:-1])
    if figures["worst_running_ratio"] is None:
        figures["worst_running_ratio_why"] = f"fewer than {SETTLED} items are measured"
    margin = margins(runs, list(points.values()))
    for key, value in (("mean_hull_margin", margin.mean), ("worst_hull_margin", margin.min)):
        figures[key] = float(value()) if margin.size else None
        if not margin.size:
            figures[f"{key}_why"] = "the strongest model is free"
    figures |= routellm(frontier, runs, points, strongest, recorded.models)
    plot = options.plot or BUILD / f"routing-{recorded.name}-{options.policy}.png"
    draw(plot, recorded, options, points, runs, (cost, reward))
    report(
        "routing",
        simulated=recorded.models if recorded.simulated else [],
        recording=recorded.name,
        policy=options.policy,
        target=options.target,
        items=len(recorded.items) - options.measure_from,
        left_out=recorded.left_out,
        seeds=options.seeds,
        strongest={"model": strongest, "reward": points[strongest][1], "cost_usd": points[strongest][0]},
        cheapest={"model": cheapest, "reward": points[cheapest][1], "cost_usd": points[cheapest][0]},
        at_target={
            "reward": reward,
            "cost_usd": cost,
            "quality_ratio": reward / max(points[strongest][1], 1e-12),
            "cost_ratio": cost / max(points[strongest][0], 1e-12),
        },
        frontier=[{"cost_usd": p[0], "reward": p[1]} for p in runs],
        hull=[{"cost_usd": p[0], "reward": p[1]} for p in hull(list(points.values()))],
        models={
            model: {
                "cost_usd": p[0],
                "reward": p[1],
                "share_at_target": float(np.mean([r.used[model] for r in at_target])),
            }
            for model, p in points.items()
        },
        plot=os.path.relpath(plot),
        **figures,
    )


def running_ratio(
    gained: Sequence[NDArray[np.float64]], strongest: Sequence[NDArray[np.float64]]
) -> float | None:
    """The lowest ratio of two cumulative rewards from item :data:`SETTLED` on, over all seeds."""
    if len(gained[0]) < SETTLED:
        return None
    return min(
        float((np.cumsum(own) / np.maximum(np.cumsum(best), 1e-12))[SETTLED - 1 :].min())
        for own, best in zip(gained, strongest, strict=True)
    )


def routellm(
    frontier: Sequence[Sequence[Run]],
    runs: Sequence[Point],
    points: dict[str, Point],
    strongest: str,
    models: Sequence[str],
) -> dict[str, Any]:
    """``apgr``, ``cpt50``, ``cpt80``; None with the reason where they are not defined."""
    keys = ("apgr", "cpt50", "cpt80")
    weak = min(points[model][1] for model in models)
    strong = points[strongest][1]
    if len(models) != 2 or strong <= weak:
        why = f"defined for two models of unlike quality, and the recording has {len(models)}"
        return dict.fromkeys(keys) | {f"{key}_why": why for key in keys}
    shares = [
        (float(np.mean([r.asked[strongest] for r in of])), p[1]) for of, p in zip(frontier, runs, strict=True)
    ]
    out: dict[str, Any] = {"apgr": apgr(shares, weak, strong)}
    for key, part in (("cpt50", 0.5), ("cpt80", 0.8)):
        out[key] = call_share(part, shares, weak, strong)
        if out[key] is None:
            out[f"{key}_why"] = f"no run recovers {part:.0%} of the gap"
    return out


def draw(
    path: Path,
    recorded: Recorded,
    options: argparse.Namespace,
    points: dict[str, Point],
    runs: Sequence[Point],
    at_target: Point,
) -> None:
    """Cost and reward: fixed models, their hull, the frontier, the run at target."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained", dpi=150)
    axes = figure.subplots()
    shown = [p for p in (*points.values(), *runs, at_target) if p[0] > 0]
    low, high = min(p[0] for p in shown), max(p[0] for p in shown)
    costs = np.geomspace(low, max(high, low * 1.01), 300)
    axes.plot(
        costs, hull_at(costs, list(points.values())), color="grey", label="mixtures of fixed models (hull)"
    )
    axes.plot(costs, frontier_at(costs, runs), color="tab:blue", label=f"{options.policy}, {RUNS} runs")
    axes.scatter([p[0] for p in runs], [p[1] for p in runs], color="tab:blue", s=14)
    axes.scatter(
        at_target[0],
        at_target[1],
        color="tab:red",
        marker="*",
        s=90,
        zorder=3,
        label=f"at target {options.target:g}",
    )
    for model, (cost, reward) in points.items():
        axes.scatter(max(cost, low), reward, color="black", s=18, zorder=3)
        axes.annotate(
            model, (max(cost, low), reward), textcoords="offset points", xytext=(4, -10), fontsize=8
        )
    axes.set_xscale("log")
    axes.set_xlabel("dollars an item, all that was asked included")
    axes.set_ylabel("mean reward")
    simulated = ", all models simulated" if recorded.simulated else ""
    axes.set_title(f"{recorded.name}, {len(recorded.items):,} items, {options.seeds} seeds{simulated}")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
