"""What a local node is asked stays here, over whole flows: compiled, run twice, scored, and trained on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from bytewax.testing import run_main
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from chainwax.connectors import InProcessBus, ItemsSource, ListSink
from chainwax.flows import Flow
from chainwax.flows.testing import TestModel
from chainwax.operators.feedback import Score
from chainwax.router import BackendDown, BackendRefused, LLMManager, load_settings
from chainwax.router.custom import TRAINERS, Dataset, Place, TrainerFailed

SECRET = "s3cr3t"
NEAR = {"near": ("local", "me", "here"), "closer": ("local", "me", "here")}
FAR = {
    "strong": ("strongest", "them", "there"),
    "other": ("strongest", "others", "elsewhere"),
    "middle": ("standard", "others", "there"),
    "tuned": ("custom", "them", "there"),
}
MODELS = NEAR | FAR
PRICE = {"strong": 1e-4, "other": 5e-5, "middle": 1e-5, "tuned": 1e-7, "near": 1e-6, "closer": 1e-8}
LOCAL: list[dict[str, list[str]]] = [
    {"allow": ["local"]},
    {"allow": ["provider:me"]},
    {"allow": ["near", "model:closer"]},
    {"allow": ["local", "strong"], "deny": ["provider:them"]},
    {"deny": ["provider:them", "provider:others"]},
    {"deny": ["region:there", "region:elsewhere"]},
    {"deny": ["strongest", "standard", "custom"]},
]
ANSWERS = {
    "right": "yes",
    "wrong": "no",
    "garbage": "neither of the two",
    "down": [BackendDown("away")],
    "refuses": [BackendRefused("no")],
    "now and then": ["yes", BackendDown("away"), "no", "what?", "yes"],
}
PLACES = [{"provider": "them", "region": "there"}, {"provider": "others", "region": "elsewhere"}]
"""Where somebody else's trainer is."""
SHARES = st.sampled_from([0.0, 0.3, 1.0])
NODE = st.fixed_dictionaries(
    {
        "form": st.sampled_from(["adaptive", "switched", "parallel", "direct"]),
        "target": st.sampled_from([0.5, 0.99, 1.0]),
        "certify": SHARES,
        "counterfactual": SHARES,
        "agreement": st.sampled_from([0.0, 0.95]),
        "mode": st.sampled_from(["enforce", "enforce", "observe"]),
        "observe_share": SHARES,
    },
    optional={"budget": st.sampled_from([1e-5, 1.0]), "latency": st.just(1e-6)},
)
Told = list[tuple[Place, str]]


class Spy:
    """A trainer whose place is known, and which makes nothing."""

    name = "spy"

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.place = Place(options.get("provider", ""), options.get("region", ""))


@contextmanager
def training(place: dict[str, str]) -> Iterator[Told]:
    """Notes what goes to a trainer, and where that is."""
    told: Told = []

    def train(name: str, maker: Any, options: Any, dataset: Dataset, *_: Any) -> None:
        told.append((maker(options).place, str([*dataset.train, *dataset.held_out])))
        raise TrainerFailed("it only looks")

    with (
        patch.dict(TRAINERS, {"spy": Spy}),
        patch("chainwax.router.custom.lifecycle.train_apart", train),
    ):
        yield told


def flow_of(shape: str, ends: str, rules: Mapping[str, list[str]]) -> Flow:
    """A private node and two others, whose prompts have nothing of what it is asked or answers."""
    flow = Flow("f")
    stream = flow.source("in")
    order = {"first": "pab", "middle": "apb", "last": "abp", "beside": "apb"}[shape]

    def each(item: dict[str, Any]) -> dict[str, Score]:
        right = "yes" if item["n"] % 2 else "no"
        return {node: Score(float(item[node] == right), right) for node in "pab"}

    scored: dict[str, Any] = {"end": lambda item: item["n"] % 3 != 0, "each": each}
    for node in order:
        if node == "p":
            stream = stream.choose("p", "{private}: is it?", ["yes", "no"], **rules)
        else:
            stream = stream.choose(node, f"{node} {{n}}: is it?", ["yes", "no"])
        stream = stream.map(f"after_{node}", lambda item: dict(item))
        if shape == "beside" and node == "a":
            yes, no = stream.branch("side", lambda item: item["a"] == "yes")
            stream = yes.merge("both", no)
    if ends != "none":
        stream = stream.feedback("end", scored[ends])
    stream.sink("out")
    return flow


def leaks(models: Mapping[str, TestModel]) -> list[str]:
    return [name for name in FAR if any(SECRET in str(r.query.messages) for r in models[name].requests)]


def stream_once(
    flow: Flow, config: dict[str, Any], models: Mapping[str, TestModel], run: str, items: list[Any]
) -> None:
    """Run the flow, and have each node train whatever it may."""
    settings = load_settings(**config)
    with LLMManager(settings, bus=InProcessBus(), backends=dict(models)) as manager:
        manager.begin_run(flow.id, run, nodes=flow.specs().values())
        source = ItemsSource(items, key="n", batch_size=3)
        run_main(
            flow.compile({"in": source}, {"out": ListSink([])}, dead_letters=ListSink([]), manager=manager)
        )
        manager.settle()
        assert manager.custom is not None
        for node in manager.custom.nodes.values():
            manager.run(node.train(1))


def config_of(folder: Path, nodes: dict[str, Any], place: dict[str, str], **run: Any) -> dict[str, Any]:
    return {
        "run": {"recording": str(folder / "run.db"), **run},
        "models": {
            name: {
                "tier": tier,
                "backend": "simulated",
                "provider": provider,
                "region": region,
                "input_cost_per_token": PRICE[name],
                "output_cost_per_token": PRICE[name],
                "retries": 0,
            }
            for name, (tier, provider, region) in MODELS.items()
        },
        "defaults": {"custom": "auto", "trainer": "spy"},
        "nodes": nodes,
        "custom": {"folder": str(folder / "models"), "least": 10, "held_out": 0.2},
        "trainers": {"spy": place},
    }


@given(st.data())
@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_nothing_that_a_flow_does_carries_a_local_nodes_text_elsewhere(data: st.DataObject) -> None:
    draw = data.draw
    rules = draw(st.sampled_from(LOCAL))
    place = draw(st.sampled_from([*PLACES, {}]))
    nodes = {node: draw(NODE) for node in "pab"}
    in_flow = draw(st.booleans())  # the rules may stand in the flow or in the configuration
    if not in_flow:
        nodes["p"] |= rules
    ends = draw(st.sampled_from(["each", "each", "end", "none"]))
    shape = draw(st.sampled_from(["first", "middle", "last", "beside"]))
    flow = flow_of(shape, ends, rules if in_flow else {})
    models = {
        name: TestModel(ANSWERS[draw(st.sampled_from([*["right"] * 3 * (name in NEAR), *sorted(ANSWERS)]))])
        for name in MODELS
    }
    items = [{"n": n, "private": f"{SECRET} {n}"} for n in range(24)]
    with tempfile.TemporaryDirectory() as folder, training(place) as told:
        config = config_of(Path(folder), nodes, place, seed=draw(st.integers(0, 99)))
        stream_once(flow, config, models, "one", items[:12])
        # The same run again, or another one of the same recording: what is there is used once more.
        stream_once(flow, config, models, draw(st.sampled_from(["one", "two"])), items)
    assert leaks(models) == []
    for where, texts in told:
        assert not where.provider or SECRET not in texts, where


@pytest.mark.parametrize("how", ["asked", "trained"])
def test_the_check_would_see_a_leak(how: str, tmp_path: Path) -> None:
    free = {"form": "direct", "model": "strong" if how == "asked" else "near"}
    models = {name: TestModel("yes") for name in MODELS}
    place = {"provider": "them"}
    flow = flow_of("first", "each", {})
    items = [{"n": n, "private": f"{SECRET} {n}"} for n in range(40)]
    with training(place) as told:
        config = config_of(tmp_path, dict.fromkeys("pab", free), place, seed=1)
        stream_once(flow, config, models, "one", items)
    assert leaks(models) == (["strong"] if how == "asked" else [])
    if how == "trained":
        assert any(where.provider == "them" and SECRET in texts for where, texts in told)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place["provider"])
@pytest.mark.parametrize("rules", LOCAL)
def test_no_training_set_of_a_local_node_goes_elsewhere(
    rules: dict[str, list[str]], place: dict[str, str], tmp_path: Path
) -> None:
    models = {name: TestModel("yes") for name in MODELS}
    items = [{"n": n, "private": f"{SECRET} {n}"} for n in range(24)]
    with training(place) as told:
        config = config_of(tmp_path, {"p": rules}, place, seed=1)
        stream_once(flow_of("middle", "each", {}), config, models, "one", items)
    assert told  # of the others
    assert not any(SECRET in texts for _, texts in told)
    assert leaks(models) == []


@pytest.mark.parametrize("rules", LOCAL)
def test_counterfactuals_of_a_local_node_ask_the_best_that_is_here(
    rules: dict[str, list[str]], tmp_path: Path
) -> None:
    """Where all others fail too: what may be asked in place of a node is what the node may ask."""
    fixed = {"form": "direct", "model": "closer", "counterfactual": 1.0}
    models = {name: TestModel("no" if name == "closer" else "yes") for name in MODELS}
    flow = Flow("f")
    asked = flow.source("in").choose("p", "{private}", ["yes", "no"], **rules)
    both = asked.choose("a", "a {n} {p}", ["yes", "no"], **rules)
    both.feedback("end", lambda item: item["p"] == item["a"] == "yes").sink("out")
    items = [{"n": n, "private": f"{SECRET} {n}"} for n in range(300)]
    config = config_of(tmp_path, dict.fromkeys("pa", fixed), {}, seed=1)
    with training({}):
        stream_once(flow, config, models, "one", items)
    assert leaks(models) == []
    assert len(models["near"].requests) > 0  # the strongest that it may ask, and no other
    assert all(not models[name].requests for name in FAR)
