"""What is lost where only the end of a flow is scored, and what one target for the whole flow saves.

Compiled flows (a chain of three, a diamond, a filter then two) run through Bytewax with models that answer
from a recording: each node asks about an item of its own, from tasks of its own. The only score is the end
result's, the product of the rewards of all answers on the item's way (for rewards of 0 and 1: all are right).
It comes 50 items late, and for 30 % of the items never. Compared are

* ``own``: each node's own reward is told, as late and as often;
* ``shared``: the end score is told to each node of the path as it is;
* ``credit``: the end score is told once, and the router shares it out;
* ``flow``: as ``credit``, with one target for the flow instead of one for each node;
* the best fixed model for each node, known in hindsight.

``--counterfactual SHARE`` lets the router spend so much of what the calls cost on counterfactuals, where the
end score is shared out (``credit`` and ``flow``).

The node in the middle is the weak one: it gets the tasks at which the cheapest model loses most.

Keys, beside those of every benchmark, each the mean over the flows: ``saving_kept`` (the saving against the
strongest alone at equal end quality, as a share of ``own``'s; end qualities from 0.9 to 0.98 of the
strongest's, whose answers any way may be mixed with), ``gain_over_shared`` (that saving less
``shared``'s), ``weak_node_found_after`` (items from which on the router takes the weak node to lose most with
the cheapest model), ``flow_target_cost_ratio`` (cost of ``flow`` over ``credit``'s at equal end quality),
``fixed_cost_ratio`` (cost of ``credit`` over that of the cheapest mixture of two fixed choices with its end
quality). ``flows`` is an object: for each flow and way the costs and end qualities that were reached.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import random
import statistics
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from _contract import report, say
from bytewax.testing import run_main

from chainwax.connectors import InProcessBus, ItemsSource, ListSink
from chainwax.flows import Flow
from chainwax.flows.testing import TestModel
from chainwax.router import Feedback, FeedbackKind, LLMManager, Settings, Usage, load_settings
from chainwax.router.backends import Reply, Request

LATE = 50
MISSING = 0.3
LOOK = 25
"""Items between two looks at what the router takes the nodes to be."""
LEVELS = (0.9, 0.925, 0.95, 0.97, 0.98)
"""End qualities at which costs are compared, as shares of the strongest's: such as people ask for."""
TARGETS = (0.9, 0.95, 0.97, 0.98, 0.99, 0.994, 0.997, 0.9985)
"""Of each node: so far apart that every level lies among the end qualities which each way reaches."""
MODELS = 12
"""Models, the dearest first, among which fixed choices are looked for."""
PART = 1000
"""Tokens that an answer of a model's mean cost is made of."""
WAYS = ("own", "shared", "credit", "flow")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """One kind of flow; ``nodes`` in the order of the stream."""

    name: str
    nodes: tuple[str, ...]
    weak: str
    path: Callable[[int], tuple[str, ...]]
    """The nodes that item number n goes through."""
    filters: bool = False
    """Whether the first node says which items go on."""


SHAPES = (
    Shape("chain", ("a", "b", "c"), "b", lambda n: ("a", "b", "c")),
    Shape("diamond", ("a", "b", "c", "d"), "b", lambda n: ("a", "b" if n % 2 else "c", "d")),
    Shape("filter", ("a", "b", "c"), "b", lambda n: ("a", "b", "c"), filters=True),
)


class Recorded(TestModel):
    """A model that answers from the recording; what an answer is worth is not told to the router."""

    def __init__(self, name: str, world: World) -> None:
        super().__init__()
        self._name = name
        self._world = world

    async def generate(self, request: Request) -> Reply:
        """The recorded answer, or the name of it, at the recorded cost."""
        node, item = request.query.node.id, int(request.query.item_key)
        world = self._world
        outcome = world.row(node, item)["outcomes"][self._name]
        text = self._name
        if world.shape.filters and node == "a":
            right = outcome["reward"] >= 0.5
            text = "yes" if world.wanted(item) == right else "no"
        tokens = round(PART * outcome["cost_usd"] / world.price[self._name])
        return Reply(text, Usage(0, tokens), simulated=False)


class LateBus(InProcessBus):
    """Holds what flows say of an item until the item :data:`LATE` items later has come as far."""

    def __init__(self) -> None:
        super().__init__()
        self._held: deque[tuple[int, Feedback]] = deque()
        self._newest = 0
        self._guard = threading.Lock()

    def publish(self, feedback: Sequence[Feedback]) -> None:
        """Send feedback on, late."""
        with self._guard:
            at_once = [one for one in feedback if one.kind is not FeedbackKind.downstream]
            for one in feedback:
                if one.kind is FeedbackKind.downstream:
                    self._held.append((int(one.item_key), one))
                    self._newest = max(self._newest, int(one.item_key))
            while self._held and self._held[0][0] <= self._newest - LATE:
                at_once.append(self._held.popleft()[1])
            if at_once:
                super().publish(at_once)


class World:
    """The stream of one flow: which recorded item each node asks about for each item of the stream."""

    def __init__(self, rows: Sequence[Row], shape: Shape, items: int, seed: int) -> None:
        self.shape = shape
        self.items = items
        self.models = list(rows[0]["outcomes"])
        mean = {m: math.fsum(r["outcomes"][m]["cost_usd"] for r in rows) / len(rows) for m in self.models}
        self.models.sort(key=mean.__getitem__, reverse=True)
        self.price = {m: max(mean[m], 1e-12) for m in self.models}
        rng = random.Random(f"{seed}/{shape.name}")
        self._rows = {node: _cycled(pool, items, rng) for node, pool in self._pools(rows, rng).items()}
        self._wanted = [rng.random() < 0.7 for _ in range(items)]
        self.told = [rng.random() >= MISSING for _ in range(items)]

    def _pools(self, rows: Sequence[Row], rng: random.Random) -> dict[str, list[Row]]:
        """The rows of each node; the weak one gets the tasks at which the cheapest model loses most."""
        strongest, cheapest = self.models[0], self.models[-1]

        def lost(some: Sequence[Row]) -> float:
            return math.fsum(
                r["outcomes"][strongest]["reward"] - r["outcomes"][cheapest]["reward"] for r in some
            ) / len(some)

        tasks: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            tasks[row["node"]].append(row)
        if len(tasks) < 2 * len(self.shape.nodes):  # one task: the weak node gets the items instead
            tasks = {str(n): [row] for n, row in enumerate(rows)}
            ordered = sorted(tasks.values(), key=lambda t: lost(t) + rng.gauss(0.0, 0.5))
        else:
            ordered = sorted(tasks.values(), key=lost)
        others = [node for node in self.shape.nodes if node != self.shape.weak]
        pools: dict[str, list[Row]] = {node: [] for node in self.shape.nodes}
        part = len(rows) / len(pools)
        easy = (len(rows) - part) * 1.0
        given = 0
        for task in ordered:
            node = self.shape.weak if given >= easy else min(others, key=lambda o: len(pools[o]))
            pools[node] += task
            given += len(task)
        if not pools[self.shape.weak]:
            pools[self.shape.weak] = ordered[-1]
        return pools

    def row(self, node: str, item: int) -> Row:
        """What a node asks about for an item."""
        return self._rows[node][item]

    def wanted(self, item: int) -> bool:
        """Whether an item should pass the filter."""
        return self._wanted[item]

    def stream(self) -> list[dict[str, Any]]:
        """The items."""
        return [
            {"n": n, **{f"ask_{node}": self.row(node, n)["prompt"] for node in self.shape.nodes}}
            for n in range(self.items)
        ]

    def reward(self, node: str, item: int, answer: str) -> float:
        """What a node's answer is worth."""
        if self.shape.filters and node == "a":
            return float((answer == "yes") == self.wanted(item))
        return float(self.row(node, item)["outcomes"][answer]["reward"])

    def end(self, value: Mapping[str, Any]) -> float:
        """The end score: all answers on the path right."""
        n = value["n"]
        return math.prod(self.reward(node, n, value[node]) for node in self.shape.path(n))

    def fixed(self, choice: Mapping[str, str]) -> tuple[float, float]:
        """End quality and cost of one model for each node, over the whole stream."""
        cost = quality = 0.0
        for n in range(self.items):
            right = 1.0
            for node in self.shape.path(n):
                outcome = self.row(node, n)["outcomes"][choice[node]]
                cost += outcome["cost_usd"]
                if self.shape.filters and node == "a":
                    ok = outcome["reward"] >= 0.5
                    if ok != self.wanted(n):  # it is dropped: rightly, or not
                        right = float(ok)
                        break
                    right = float(ok)
                else:
                    right *= outcome["reward"]
            quality += right
        return quality / self.items, cost


def _cycled(pool: Sequence[Row], count: int, rng: random.Random) -> list[Row]:
    out: list[Row] = []
    while len(out) < count:
        out += rng.sample(pool, len(pool))
    return out[:count]


def flow_of(world: World, way: str, watch: Callable[[int], None]) -> Flow:
    """The flow, with its feedback said one way or another."""
    shape = world.shape

    def told(n: int) -> bool:
        watch(n)
        return world.told[n]

    def ask(stream: Any, node: str) -> Any:
        prompt = f"{{ask_{node}}}"
        first_filters = shape.filters and node == "a"
        out = stream.choose(node, prompt, ["yes", "no"]) if first_filters else stream.query(node, prompt)
        if way == "own":

            def own(value: dict[str, Any]) -> float | None:
                return world.reward(node, value["n"], value[node]) if told(value["n"]) else None

            out = out.feedback(f"of_{node}", own, about=[node])
        return out

    flow = Flow(shape.name)
    stream = flow.source("in")
    if shape.name == "diamond":
        left, right = ask(stream, "a").branch("side", lambda v: v["n"] % 2 == 1)
        stream = ask(ask(left, "b").merge("both", ask(right, "c")), "d")
    else:
        stream = ask(stream, "a")
        if shape.filters:
            stream = stream.filter("passed", lambda v: v["a"] == "yes")
        stream = ask(ask(stream, "b"), "c")
    if way != "own":

        def end(value: dict[str, Any]) -> float | None:
            return world.end(value) if told(value["n"]) else None

        stream = stream.feedback("end", end, about=list(shape.nodes) if way == "shared" else [])
    stream.sink("out")
    return flow


def settings_of(world: World, target: float, way: str, seed: int, counterfactual: float) -> Settings:
    """The models with their prices and their order, and the targets."""
    tiers = ["strongest", *["standard"] * (len(world.models) - 2), "local"]
    # The same for the end result: each node on the way its part, or one target that is split.
    steps = len(world.shape.path(0))
    wanted = {"flow_target": target**steps} if way == "flow" else {}
    return load_settings(
        run={"recording": None, "seed": seed, "max_in_flight": 16, **wanted},
        defaults={
            "form": "adaptive",
            "counterfactual": counterfactual,
            **({} if way == "flow" else {"target": target}),
        },
        models={
            name: {
                "tier": tier,
                "backend": "simulated",
                "input_cost_per_token": 0.0,
                "output_cost_per_token": world.price[name] / PART,
            }
            for name, tier in zip(world.models, tiers, strict=True)
        },
    )


@dataclass(frozen=True)
class Point:
    """What one run reached."""

    cost: float
    quality: float
    found: int | None
    """Items from which on the weak node was known."""


def run(world: World, way: str, target: float, seed: int, counterfactual: float = 0.0) -> Point:
    """Stream all items once."""
    shape = world.shape
    looks: list[tuple[int, str]] = []
    outputs: list[Any] = []
    settings = settings_of(world, target, way, seed, counterfactual)
    backends = {name: Recorded(name, world) for name in world.models}
    with LLMManager(settings, bus=LateBus(), backends=backends) as manager:

        def watch(n: int) -> None:
            if n >= LOOK * (len(looks) + 1):
                looks.append((n, weakest(manager, world)))

        flow = flow_of(world, way, watch)
        manager.begin_run(flow.id, nodes=flow.specs().values())
        source = ItemsSource(world.stream(), key="n", batch_size=8)
        run_main(flow.compile({"in": source}, {"out": ListSink(outputs)}, manager=manager))
        manager.settle()
        snapshot = manager.snapshot()
    cost = math.fsum(i["router"]["spent_usd"] for i in snapshot["interfaces"].values())
    right = math.fsum(world.end(value) for value in outputs)
    if shape.filters:
        there = {value["n"] for value in outputs}
        right += sum(not world.wanted(n) for n in range(world.items) if n not in there)
    found = None
    for n, weak in reversed(looks):
        if weak != shape.weak:
            break
        found = n
    return Point(cost, right / world.items, found)


def weakest(manager: LLMManager, world: World) -> str:
    """The node that the router takes to lose most where it asks the cheapest model."""
    lost = {}
    for (_, node), interface in manager.interfaces.items():
        strong, cheap = (interface.router.expected(m) for m in (world.models[0], world.models[-1]))
        assert strong is not None
        assert cheap is not None
        lost[node] = 1.0 - cheap / strong
    return max(lost, key=lost.__getitem__)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (quality, cost), the points on the lower hull: what a mixture of runs reaches at least cost."""
    hull: list[tuple[float, float]] = []
    for quality, cost in sorted(points, key=lambda p: (p[1], -p[0])):
        if hull and quality <= hull[-1][0]:
            continue
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (quality - hull[-1][0]) >= (
            cost - hull[-1][1]
        ) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append((quality, cost))
    return hull


def cost_at(points: Sequence[tuple[float, float]], quality: float) -> float:
    """The least cost at which a way reaches an end quality, where runs may be mixed."""
    hull = frontier(points)
    for (q0, c0), (q1, c1) in itertools.pairwise(hull):
        if q0 <= quality <= q1:
            return c0 + (c1 - c0) * (quality - q0) / (q1 - q0)
    return hull[0][1] if quality <= hull[0][0] else hull[-1][1]


def saving(points: Sequence[tuple[float, float]], at: Sequence[float], strongest: float) -> float:
    """Mean share of the strongest's cost that is saved at those end qualities."""
    return math.fsum(1.0 - cost_at(points, quality) / strongest for quality in at) / len(at)


def _job(job: tuple[Path, int, int, int, str, float, float]) -> tuple[Point, tuple[float, float]]:
    """One run in a process of its own, and what the strongest alone would have reached."""
    recording, items, number, seed, way, target, counterfactual = job
    shape = SHAPES[number]
    world = World(read(recording), shape, items, seed)
    return run(world, way, target, seed, counterfactual), world.fixed(
        dict.fromkeys(shape.nodes, world.models[0])
    )


def _fixed(job: tuple[Path, int, int, int]) -> list[tuple[float, float]]:
    """End quality and cost of every choice of one model for each node."""
    recording, items, number, seed = job
    world = World(read(recording), SHAPES[number], items, seed)
    nodes = world.shape.nodes
    choices = itertools.product(world.models[:MODELS], repeat=len(nodes))
    return [world.fixed(dict(zip(nodes, choice, strict=True))) for choice in choices]


def read(recording: Path) -> list[Row]:
    """The recorded items."""
    opened = gzip.open if recording.suffix == ".gz" else open
    with opened(recording, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return statistics.fmean(q for q, _ in points), statistics.fmean(c for _, c in points)


def main() -> None:
    """Run all flows all ways and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recording", type=Path, required=True)
    parser.add_argument("--items", type=int, default=2400, help="of each stream")
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--counterfactual", type=float, default=0.0, metavar="SHARE")
    args = parser.parse_args()
    try:
        read(args.recording)
    except (OSError, ValueError) as error:
        sys.exit(f"credit: the recording cannot be read: {error}")
    seeds = range(1, args.seeds + 1)
    reached: dict[str, Any] = {}
    found: list[int] = []
    ratios: dict[str, list[float]] = defaultdict(list)
    # Bytewax may not be forked while it runs, and a run shall know nothing of the one before.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for number, shape in enumerate(SHAPES):
            asked = [(way, target) for way in WAYS for target in args.targets]
            jobs = [
                (args.recording, args.items, number, s, *one, args.counterfactual)
                for one in asked
                for s in seeds
            ]
            done = list(pool.map(_job, jobs))
            fixed_of = list(pool.map(_fixed, [(args.recording, args.items, number, s) for s in seeds]))
            fixed = [_mean(of_seeds) for of_seeds in zip(*fixed_of, strict=True)]
            strongest = _mean([alone for _, alone in done])
            points: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for k, (way, _) in enumerate(asked):
                runs = [point for point, _ in done[k * args.seeds : (k + 1) * args.seeds]]
                points[way].append(_mean([(p.quality, p.cost) for p in runs]))
                if way == "credit":
                    found += [args.items if p.found is None else p.found for p in runs]
            for way in WAYS:
                say(f"{shape.name}, {way}: " + ", ".join(f"{q:.4f} for ${c:.3f}" for q, c in points[way]))
            say(f"{shape.name}, strongest: {strongest[0]:.4f} for ${strongest[1]:.3f}")
            # Whoever wants to may always have the strongest everywhere.
            every = {way: [*of_way, strongest] for way, of_way in points.items()}
            at = [level * strongest[0] for level in LEVELS]
            kept = {way: saving(every[way], at, strongest[1]) for way in WAYS}
            ratios["saving_kept"].append(kept["credit"] / kept["own"])
            ratios["gain_over_shared"].append(kept["credit"] - kept["shared"])
            ratios["flow_target_cost_ratio"].append(_ratio(every["flow"], every["credit"], at))
            ratios["fixed_cost_ratio"].append(_ratio(every["credit"], fixed, at))
            reached[shape.name] = {
                "strongest": strongest,
                **{way: [(round(q, 5), round(c, 6)) for q, c in of_way] for way, of_way in points.items()},
                **{name: values[-1] for name, values in ratios.items()},
            }
    report(
        "credit",
        simulated=[],
        recording=args.recording.name,
        items=args.items,
        seeds=args.seeds,
        targets=args.targets,
        counterfactual=args.counterfactual,
        **{name: statistics.fmean(values) for name, values in ratios.items()},
        weak_node_found_after=statistics.fmean(found),
        flows=reached,
    )


def _ratio(
    one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]], at: Sequence[float]
) -> float:
    return math.fsum(cost_at(one, q) / cost_at(other, q) for q in at) / len(at)


if __name__ == "__main__":
    main()
