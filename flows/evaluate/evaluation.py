"""All routings over one stream, and what is measured of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from chainwax.flows.evaluate.figures import Hull, Interval, Moment, Table, interval, learning_curve
from chainwax.flows.evaluate.labels import Origins, scored_by_flow, worth
from chainwax.flows.evaluate.similarity import Measure, aligned, alike
from chainwax.flows.evaluate.variants import Plan, Stream, Variant, run_variant
from chainwax.flows.graph import Flow
from chainwax.flows.replay import KnownAnswers
from chainwax.router import ConfigError, LLMManager, Settings
from chainwax.router.recording import RecordingReader, SqliteRecording
from chainwax.router.recording.totals import Answered

__all__ = [
    "BEST_FIXED",
    "CHEAPEST",
    "MIX",
    "ROUTER",
    "STRONGEST",
    "Evaluation",
    "NodeFigures",
    "Row",
    "evaluate",
]

STRONGEST = "strongest only"
CHEAPEST = "cheapest only"
BEST_FIXED = "best fixed"
MIX = "random mix"
ROUTER = "router"


@dataclass(frozen=True, slots=True)
class Candidates:
    """What the configuration lets each node ask, strongest tier first, and what each wants."""

    models: Mapping[str, Sequence[str]]
    targets: Mapping[str, float]
    all: Sequence[str]
    """All models that some node may ask, strongest tier first."""

    def plans(self) -> list[Plan]:
        """A plan for each model: it answers where it may, and elsewhere the node's strongest does."""
        plans: list[Plan] = []
        strongest = {node: models[0] for node, models in self.models.items()}
        for plan in [
            Plan(STRONGEST, strongest),
            *(
                Plan(
                    f"{model} only", {n: model if model in own else own[0] for n, own in self.models.items()}
                )
                for model in self.all
            ),
        ]:
            if all(plan.models != known.models for known in plans):
                plans.append(plan)
        return plans


@dataclass(slots=True)
class Row:
    """One routing, as it is reported."""

    name: str
    accuracy: Interval
    to_strongest: Interval
    """Its accuracy as a share of the strongest's."""
    cost_usd: float
    cost_to_strongest: Interval
    outputs: dict[Measure, float]
    """How alike its streams are to those of the strongest, by measure; empty for the mix and without any."""
    scored: int
    """Answers, or items of streams, that the accuracy is of."""
    calls: int
    paid_usd: float
    seconds: float
    models: Mapping[str, str] | None = None
    """The model of each node, where it is fixed."""


@dataclass(slots=True)
class NodeFigures:
    """One node under each routing."""

    id: str
    calls: dict[str, int]
    """By routing, as are the others."""
    accuracy: dict[str, float | None]
    cost_usd: dict[str, float]
    best_fixed: str
    arms: dict[str, int]
    """The router's answers by arm."""


@dataclass(slots=True)
class Evaluation:
    """What was found."""

    flow: str
    against: str
    """``labels``, ``scores`` (of the flow's own feedback) or ``reference``."""
    measure: Measure
    items: int
    rows: list[Row]
    """The mix and the router come last."""
    nodes: list[NodeFigures]
    hull: list[tuple[float, float]]
    """Cost and accuracy of the corners of the fixed models' hull, cheapest first."""
    margin: Interval
    """The router's accuracy less that of the random mix at equal cost."""
    curve: list[Moment]
    curve_names: list[str]
    simulated: tuple[str, ...]
    recording: str
    paid_usd: float
    """What all of it cost; each answer was bought once."""
    letters: dict[str, int] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        """The row of a routing."""
        return next(row for row in self.rows if row.name == name)


class _Slot(NamedTuple):
    """Something that is scored: an answer, or an item of a stream."""

    place: str
    score: float
    weight: float
    node: str = ""


def evaluate(stream: Stream, console: Console, *, reference: bool = False) -> Evaluation:
    """Run a flow under each routing and measure them.

    With ``reference`` the outputs of the strongest model are what is right; else the stream's labels are, and
    without any the scores of the flow's own feedback nodes. Each variant is one run in the stream's
    recording; an answer that it holds already, of this evaluation or of an earlier one, is not bought again.

    Raises :class:`ConfigError` where there is nothing to measure by, and
    :class:`~chainwax.flows.evaluate.variants.Stopped`.
    """
    flow = stream.load()
    candidates = _candidates(flow, stream.settings)
    against = _against(stream, flow, reference)
    if not stream.recording.exists():
        stream.recording.parent.mkdir(parents=True, exist_ok=True)
        SqliteRecording(stream.recording).close()
    known = KnownAnswers(stream.recording)
    runs: list[Variant] = []
    origins: Origins | None = None

    def run(plan: Plan) -> Variant:
        number = len(runs) + 1
        console.print(f"{number}: {plan.name}", markup=False, highlight=False)
        runs.append(run_variant(stream, plan, known, origins, console))
        return runs[-1]

    run(candidates.plans()[0])
    origins = _origins(stream, runs[0])
    scorer = _Scorer(against, stream, origins, runs[0])
    if not scorer.slots(runs[0]):  # before more is paid for
        why = stream.labels.why_none(origins) if stream.labels is not None else _WHY[against]
        raise ConfigError(f"nothing of the flow '{flow.id}' can be scored: {why}")
    for plan in candidates.plans()[1:]:
        run(plan)
    fixed = list(runs)
    cheapest = _of_plan(_cheapest(candidates, fixed), runs, run)
    best = _of_plan(_best_fixed(candidates, fixed, scorer), runs, run)
    router = run(Plan(ROUTER, None))
    return _measured(flow, stream, scorer, runs, fixed, cheapest, best, router)


_WHY = {
    "scores": "its feedback nodes gave no score",
    "reference": "the strongest model's outputs are empty",
}


def _against(stream: Stream, flow: Flow, reference: bool) -> str:
    if reference:
        return "reference"
    nodes = list(flow.specs())
    if stream.labels is not None:
        stream.labels.check(nodes)
        return "labels"
    if not scored_by_flow(flow):
        raise ConfigError(
            f"flow '{flow.id}' has no feedback node: say what is right by --labels, or --reference strongest"
        )
    return "scores"


def _candidates(flow: Flow, settings: Settings) -> Candidates:
    alone = settings.model_copy(update={"run": settings.run.model_copy(update={"recording": None})})
    models: dict[str, list[str]] = {}
    targets: dict[str, float] = {}
    with LLMManager(alone) as manager:
        for id, spec in flow.specs().items():
            router = manager.register(spec).router
            models[id] = list(dict.fromkeys(state.instance.name for state in router.stats.arms))
            targets[id] = router.node.target
    if not models:
        raise ConfigError(f"flow '{flow.id}' has no LLM node: there is nothing to route")
    order: dict[str, None] = {}
    for own in sorted(models.values(), key=len, reverse=True):
        order |= dict.fromkeys(own)
    return Candidates(models, targets, list(order))


def _origins(stream: Stream, first: Variant) -> Origins:
    with closing(RecordingReader(stream.recording)) as reader:
        sources = [list(reader.read_items(first.run, name)) for name in reader.sources(first.run)]
    # Several streams are taken to go along side by side, each from its beginning to its end.
    placed = [(at / len(items), item) for items in sources for at, item in enumerate(items)]
    return Origins(item for _, item in sorted(placed, key=lambda pair: pair[0]))


def _of_plan(plan: Plan, runs: Sequence[Variant], run: Any) -> Variant:
    """The variant of a plan: where the same models were tried already, that one."""
    for known in runs:
        if known.plan.models == plan.models:
            return known
    return run(plan)  # type: ignore[no-any-return]


def _call_costs(answers: Sequence[Answered]) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    for one in answers:
        sums.setdefault(one.node, []).append(one.cost_usd)
    return {node: sum(costs) / len(costs) for node, costs in sums.items()}


def _cheapest(candidates: Candidates, fixed: Sequence[Variant]) -> Plan:
    costs = [(variant.plan.models or {}, _call_costs(variant.answers)) for variant in fixed]
    models = {}
    for node, own in candidates.models.items():
        measured = [(cost[node], own.index(plan[node]), plan[node]) for plan, cost in costs if node in cost]
        models[node] = min(measured)[2] if measured else own[-1]
    return Plan(CHEAPEST, models)


def _best_fixed(candidates: Candidates, fixed: Sequence[Variant], scorer: _Scorer) -> Plan:
    """For each node the cheapest model that reached its target, as is known only now."""
    known = [(v.plan.models or {}, _call_costs(v.answers), scorer.by_node(v)) for v in fixed]
    models = {}
    for node, own in candidates.models.items():
        strongest = known[0][2].get(node)
        models[node] = own[0]
        if strongest is None:
            continue
        wanted = candidates.targets[node] * strongest - 1e-12
        good = [
            (cost[node], own.index(plan[node]), plan[node])
            for plan, cost, quality in known
            if node in cost and quality.get(node, -1.0) >= wanted
        ]
        models[node] = min(good)[2]
    return Plan(BEST_FIXED, models)


class _Scorer:
    """Scores what a variant did, against whatever says what is right."""

    def __init__(self, against: str, stream: Stream, origins: Origins, strongest: Variant) -> None:
        self.against = against
        self.origins = origins
        self._labels = stream.labels
        self._measure = stream.measure
        self._strongest = strongest
        self._said = {(a.node, a.position): a.value for a in strongest.answers}
        self._known: dict[str, list[_Slot]] = {}

    def slots(self, variant: Variant) -> list[_Slot]:
        """All that is scored of a variant."""
        known = self._known.get(variant.run)
        if known is None:
            found = self._outputs(variant) if self.against == "reference" else self._answers(variant)
            known = self._known[variant.run] = list(found)
        return known

    def by_node(self, variant: Variant) -> dict[str, float]:
        """Accuracy of each node's answers; against a reference, how alike they are to the strongest's."""
        sums: dict[str, tuple[float, int]] = {}
        for slot in self._agreeing(variant) if self.against == "reference" else self.slots(variant):
            total, count = sums.get(slot.node, (0.0, 0))
            sums[slot.node] = (total + slot.score, count + 1)
        return {node: total / count for node, (total, count) in sums.items()}

    def _answers(self, variant: Variant) -> Iterator[_Slot]:
        for one in variant.answers:
            score = one.score
            if self.against == "labels":
                assert self._labels is not None
                right = self._labels.of(one.node, one.item_key, one.position, self.origins)
                score = None if right is None else worth(one.value, right, self._measure)
            if score is not None:
                yield _Slot(self.origins.place(one.position), score, 1.0, one.node)

    def _outputs(self, variant: Variant) -> Iterator[_Slot]:
        for name, right in self._strongest.outputs.items():
            own = variant.outputs.get(name, [])
            for pair in aligned([k.value for k in right], [k.value for k in own], self._measure):
                kept = right[pair.reference] if pair.reference is not None else own[pair.output or 0]
                yield _Slot(self.origins.place(kept.position), pair.score, pair.weight)

    def _agreeing(self, variant: Variant) -> Iterator[_Slot]:
        for one in variant.answers:
            said = self._said.get((one.node, one.position))
            if said is not None:
                yield _Slot("", alike(one.value, said, self._measure), 1.0, one.node)


def _table(scorer: _Scorer, runs: Sequence[Variant]) -> Table:
    places: dict[str, None] = {}
    for variant in runs:
        places |= dict.fromkeys(scorer.origins.place(one.position) for one in variant.answers)
        places |= dict.fromkeys(slot.place for slot in scorer.slots(variant))
    numbers = {place: scorer.origins.number(place) for place in places}
    last = len(scorer.origins)
    order = sorted(places, key=lambda p: last if numbers[p] is None else numbers[p])  # type: ignore[arg-type,return-value]
    at = {place: number for number, place in enumerate(order)}
    scores, weights, costs = (np.zeros((len(runs), len(at))) for _ in range(3))
    for row, variant in enumerate(runs):
        for slot in scorer.slots(variant):
            scores[row, at[slot.place]] += slot.weight * slot.score
            weights[row, at[slot.place]] += slot.weight
        for one in variant.answers:
            costs[row, at[scorer.origins.place(one.position)]] += one.cost_usd
    return Table(scores, weights, costs)


def _measured(
    flow: Flow,
    stream: Stream,
    scorer: _Scorer,
    runs: Sequence[Variant],
    fixed: Sequence[Variant],
    cheapest: Variant,
    best: Variant,
    router: Variant,
) -> Evaluation:
    table = _table(scorer, runs)
    accuracy = table.accuracy()
    resampled, resampled_costs = table.resampled()
    spent = np.array([variant.cost_usd for variant in runs])
    hull = Hull([v.cost_usd for v in fixed], [float(a) for a in accuracy[: len(fixed)]])
    mix = hull.at(router.cost_usd)
    at_router = runs.index(router)

    def row(name: str, variant: Variant) -> Row:
        at = runs.index(variant)
        return Row(
            name,
            interval(float(accuracy[at]), resampled[:, at]),
            interval(_ratio(accuracy[at], accuracy[0]), resampled[:, at] / resampled[:, 0]),
            variant.cost_usd,
            interval(_ratio(spent[at], spent[0]), resampled_costs[:, at] / resampled_costs[:, 0]),
            _likenesses(runs[0], variant),
            len(scorer.slots(variant)),
            len(variant.answers),
            variant.paid_usd,
            variant.seconds,
            variant.plan.models,
        )

    named = _named(runs, fixed, cheapest, best)
    rows = [row(name, variant) for name, variant in named]
    mixed, mixed_costs = mix.of(resampled), mix.of(resampled_costs)
    rows.append(
        Row(
            MIX,
            interval(float(mix.of(accuracy)), mixed),
            interval(_ratio(mix.of(accuracy), accuracy[0]), mixed / resampled[:, 0]),
            float(mix.of(spent)),
            interval(_ratio(mix.of(spent), spent[0]), mixed_costs / resampled_costs[:, 0]),
            {},
            0,
            0,
            0.0,
            0.0,
        )
    )
    rows.append(row(ROUTER, router))
    margin = float(accuracy[at_router] - mix.of(accuracy))
    drawn = [0, runs.index(cheapest), at_router]
    return Evaluation(
        flow.id,
        scorer.against,
        stream.measure,
        router.items,
        rows,
        list(_nodes(scorer, [*named, (ROUTER, router)], best, router)),
        hull.corners,
        interval(margin, resampled[:, at_router] - mixed),
        learning_curve(Table(table.scores[drawn], table.weights[drawn], table.costs[drawn])),
        [STRONGEST, CHEAPEST, ROUTER],
        tuple(sorted({arm for variant in runs for arm in variant.simulated})),
        str(stream.recording),
        sum(variant.paid_usd for variant in runs),
        {variant.name: variant.letters for variant in runs if variant.letters},
    )


def _ratio(one: Any, other: Any) -> float:
    return float(one) / float(other) if other else 1.0 if not one else float("inf")


def _named(
    runs: Sequence[Variant], fixed: Sequence[Variant], cheapest: Variant, best: Variant
) -> list[tuple[str, Variant]]:
    """The fixed routings with what each is; one that is two things stands twice."""
    others = [(v.name, v) for v in fixed[1:] if v is not cheapest]
    return [(STRONGEST, runs[0]), *others, (CHEAPEST, cheapest), (BEST_FIXED, best)]


def _likenesses(strongest: Variant, variant: Variant) -> dict[Measure, float]:
    found = {}
    for measure in Measure:
        total = items = 0.0
        for name, right in strongest.outputs.items():
            for pair in aligned(
                [k.value for k in right], [k.value for k in variant.outputs.get(name, [])], measure
            ):
                total += pair.weight * pair.score
                items += pair.weight
        if items:
            found[measure] = total / items
    return found


def _nodes(
    scorer: _Scorer, named: Sequence[tuple[str, Variant]], best: Variant, router: Variant
) -> Iterator[NodeFigures]:
    qualities = {name: scorer.by_node(variant) for name, variant in named}
    for node in best.plan.models or {}:
        own = {name: [one for one in variant.answers if one.node == node] for name, variant in named}
        arms: dict[str, int] = {}
        for one in own[ROUTER]:
            arms[one.arm] = arms.get(one.arm, 0) + 1
        yield NodeFigures(
            node,
            {name: len(answers) for name, answers in own.items()},
            {name: qualities[name].get(node) for name in own},
            {name: sum(one.cost_usd for one in answers) for name, answers in own.items()},
            (best.plan.models or {})[node],
            dict(sorted(arms.items(), key=lambda pair: -pair[1])),
        )
