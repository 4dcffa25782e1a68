"""An evaluation as a table for people and as JSON for programs."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from chainwax.flows.evaluate.evaluation import BEST_FIXED, CHEAPEST, MIX, ROUTER, STRONGEST, Evaluation, Row
from chainwax.flows.evaluate.figures import Interval
from chainwax.flows.evaluate.similarity import Measure
from chainwax.flows.progress import money

__all__ = ["as_json", "how", "print_evaluation", "simulated_words"]

_AGAINST = {
    "labels": "answers by their labels",
    "scores": "answers by the flow's own feedback",
    "reference": "outputs by those of the strongest model",
}
_HOW = {
    Measure.exact: "exact match",
    Measure.fields: "share of equal fields",
    Measure.aligned: "aligned similarity",
}
_CURVE_POINTS = 20


def how(evaluation: Evaluation) -> str:
    """What accuracy is, in words."""
    by = "" if evaluation.against == "scores" else f", {_HOW[evaluation.measure]}"
    return _AGAINST[evaluation.against] + by


def simulated_words(evaluation: Evaluation) -> str:
    """How much is simulated, to stand before a figure; empty where nothing is."""
    if not evaluation.simulated:
        return ""
    arms = {arm for node in evaluation.nodes for arm in node.arms}
    arms |= {model for row in evaluation.rows for model in (row.models or {}).values()}
    return "simulated" if arms <= set(evaluation.simulated) else "partly simulated"


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """The tables, and what has to be said below them."""
    simulated = simulated_words(evaluation)
    console.print(
        Text.assemble(
            "flow ",
            (evaluation.flow, "bold"),
            f" evaluated: {evaluation.items:,} items, {how(evaluation)}",
            f", {simulated} models" if simulated else "",
        ),
        soft_wrap=True,
    )
    console.print(
        Text(f"recorded in {evaluation.recording}, paid now {money(evaluation.paid_usd)} {simulated}", "dim"),
        soft_wrap=True,
    )
    console.print(_routings(evaluation))
    console.print(_nodes(evaluation))
    for line, style in _notes(evaluation):
        console.print(Text(line, style), soft_wrap=True)


def _routings(evaluation: Evaluation) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("routing", no_wrap=True)
    table.add_column("accuracy", no_wrap=True)
    table.add_column("accuracy to strongest", no_wrap=True)
    table.add_column("cost", justify="right", no_wrap=True)
    table.add_column("cost to\nstrongest", justify="right", no_wrap=True)
    table.add_column("outputs like the strongest's:\nexact · fields · aligned", no_wrap=True)
    marked = "*" if evaluation.simulated else ""
    for row in evaluation.rows:
        table.add_row(
            f"{row.name}{marked}",
            _within(row.accuracy),
            _within(row.to_strongest),
            money(row.cost_usd),
            _figure(row.cost_to_strongest.value),
            " · ".join(f"{row.outputs[measure]:.3f}" for measure in Measure) if row.outputs else "–",
            style="bold" if row.name == ROUTER else "",
        )
    return table


def _within(figure: Interval) -> str:
    if not math.isfinite(figure.value):
        return "–"
    return f"{figure.value:.3f} [{figure.low:.3f}–{figure.high:.3f}]"


def _nodes(evaluation: Evaluation) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("node", overflow="fold")
    for name in (STRONGEST, CHEAPEST, BEST_FIXED, ROUTER):
        table.add_column(f"{name}\naccuracy", justify="right")
    table.add_column("best fixed\nmodel", overflow="fold")
    table.add_column("router asked", overflow="fold")
    table.add_column("its cost to\nstrongest", justify="right")

    def marked(arm: str) -> str:
        return f"{arm}*" if arm in evaluation.simulated else arm

    for node in evaluation.nodes:
        dear = node.cost_usd[STRONGEST]
        table.add_row(
            node.id,
            *(_figure(node.accuracy[name]) for name in (STRONGEST, CHEAPEST, BEST_FIXED, ROUTER)),
            marked(node.best_fixed),
            "\n".join(f"{marked(arm)} {count:,}" for arm, count in node.arms.items()) or "none",
            _figure(node.cost_usd[ROUTER] / dear if dear else None),
        )
    return table


def _figure(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _notes(evaluation: Evaluation) -> list[tuple[str, str]]:
    router = evaluation.row(ROUTER)
    margin = evaluation.margin
    lines = [
        (
            f"{ROUTER} less {MIX} at equal cost: {margin.value:+.4f} [{margin.low:+.4f}–{margin.high:+.4f}] "
            f"accuracy, of {router.scored:,} scores",
            "bold",
        ),
        (
            "in brackets: 95 % by the paired bootstrap over the stream's items, 1,000 resamples; "
            f"{MIX}: what is expected of it, reckoned from the runs with one model",
            "dim",
        ),
        (f"{BEST_FIXED}: for each node the cheapest model that reached its target, in hindsight", "dim"),
        ("cost counts each variant as if it had been bought alone; each answer was bought once", "dim"),
    ]
    if evaluation.simulated:
        lines.append(
            ("* simulated, and so are the costs and scores that these models have a part in", "yellow")
        )
    if evaluation.letters:
        told = ", ".join(f"{name} {count:,}" for name, count in evaluation.letters.items())
        lines.append((f"dead letters, which count nowhere: {told}", "red"))
    return lines


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """For ``--json``: finite numbers, None for what is not known."""

    def figure(found: Interval) -> dict[str, float | None]:
        return {name: _finite(value) for name, value in found._asdict().items()}

    def of_row(row: Row) -> dict[str, Any]:
        return {
            "accuracy": figure(row.accuracy),
            "accuracy_to_strongest": figure(row.to_strongest),
            "cost_usd": row.cost_usd,
            "cost_to_strongest": figure(row.cost_to_strongest),
            "outputs": {measure.value: value for measure, value in row.outputs.items()},
            "scored": row.scored,
            "calls": row.calls,
            "paid_usd": row.paid_usd,
            "models": None if row.models is None else dict(row.models),
        }

    step = max(1, -(-len(evaluation.curve) // _CURVE_POINTS))
    cheap = evaluation.row(CHEAPEST).cost_usd
    return {
        "flow": evaluation.flow,
        "against": evaluation.against,
        "measure": evaluation.measure.value,
        "interval": "paired bootstrap over items, 1,000 resamples, 95 % percentiles",
        "items": evaluation.items,
        "routings": {row.name: of_row(row) for row in evaluation.rows},
        "margin": figure(evaluation.margin),
        "cost_to_cheapest": _finite(evaluation.row(ROUTER).cost_usd / cheap) if cheap else None,
        "hull": [{"cost_usd": cost, "accuracy": accuracy} for cost, accuracy in evaluation.hull],
        "nodes": {node.id: {k: v for k, v in asdict(node).items() if k != "id"} for node in evaluation.nodes},
        "curve": [
            {
                "items": moment.items,
                "accuracy": dict(zip(evaluation.curve_names, moment.accuracy, strict=True)),
                "cost_usd_an_item": dict(zip(evaluation.curve_names, moment.cost_usd, strict=True)),
            }
            for moment in evaluation.curve[::step]
        ],
        "paid_usd": evaluation.paid_usd,
        "dead_letters": evaluation.letters,
        "recording": evaluation.recording,
        "simulated": list(evaluation.simulated),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
