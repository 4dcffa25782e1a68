"""One target for a flow's end result: split so that a dollar buys the same everywhere."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from chainwax.connectors import InProcessBus
from chainwax.flows import ConfigError, Flow
from chainwax.flows.testing import TestModel, run_flow
from chainwax.router import CallRef, Feedback, FreeText, LLMManager, NodeSpec, Prompt, load_settings

Make = Callable[..., LLMManager]
NODES = ("a", "b", "c")


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as stack:

        def manager(run: dict[str, Any], **options: Any) -> LLMManager:
            prices = {"strong": ("strongest", 1e-4), "small": ("local", 1e-6)}
            settings = load_settings(
                run={"recording": None, "seed": 1, **run},
                models={
                    name: {
                        "tier": tier,
                        "backend": "simulated",
                        "input_cost_per_token": price,
                        "output_cost_per_token": price,
                    }
                    for name, (tier, price) in prices.items()
                },
                **options,
            )
            made = LLMManager(settings, backends={n: TestModel() for n in prices}, bus=InProcessBus())
            stack.callback(made.close)
            nodes = [
                NodeSpec(name, Prompt("{text}"), FreeText(), depth=depth) for depth, name in enumerate(NODES)
            ]
            made.begin_run("flow", "run", nodes=nodes)
            return made

        yield manager


def targets(manager: LLMManager) -> dict[str, float]:
    return {node: one.router.node.target for (_, node), one in manager.interfaces.items()}


def learn(manager: LLMManager, quality: dict[str, float], items: int = 1500) -> None:
    """End scores of paths whose arms are drawn at random; ``quality`` is that of the small model."""
    rng = random.Random(5)
    for n in range(items):
        arms = {node: rng.choice(["strong", "small"]) for node in quality}
        right = all(rng.random() < (quality[k] if arm == "small" else 0.95) for k, arm in arms.items())
        path = tuple(CallRef(node, f"{node}{n}", arm) for node, arm in arms.items())
        last = path[-1]
        manager.feedback([Feedback("c", float(right), last.call_id, arm=last.arm, source="end", path=path)])
    manager.settle()


def test_at_first_each_node_has_the_same_part(make: Make) -> None:
    manager = make(run={"flow_target": 0.9})
    assert targets(manager) == dict.fromkeys(NODES, pytest.approx(0.9 ** (1 / 3)))


def test_a_dollar_goes_where_it_buys_most_and_the_whole_stays(make: Make) -> None:
    """Of a and c the small model is good enough, of b it is not: the targets say so."""
    manager = make(run={"flow_target": 0.9})
    learn(manager, {"a": 0.94, "b": 0.5, "c": 0.94})
    found = targets(manager)
    assert found["a"] < 0.94 / 0.95
    assert found["c"] < 0.94 / 0.95
    assert found["b"] > 0.5 / 0.95


def test_a_node_with_a_target_of_its_own_keeps_it(make: Make) -> None:
    manager = make(run={"flow_target": 0.9}, nodes={"b": {"target": 0.7}})
    learn(manager, {"a": 0.94, "b": 0.5, "c": 0.94}, 200)
    assert targets(manager)["b"] == 0.7


def test_the_split_is_saved_and_given_back(make: Make) -> None:
    manager, other = make(run={"flow_target": 0.9}), make(run={"flow_target": 0.9})
    learn(manager, {"a": 0.94, "b": 0.5, "c": 0.94}, 400)
    assert other.load_state(manager.save_state())
    assert targets(other) == targets(manager)


def test_a_flow_may_say_its_target_and_the_configuration_wins() -> None:
    flow = Flow("f", target=0.8)
    flow.source("in").query("a", "{text}").query("b", "{text}").sink("out")
    assert {spec.flow_target for spec in flow.specs().values()} == {0.8}
    out = run_flow(flow, [{"text": "x"}])
    assert out.snapshot["interfaces"]["a"]["router"]["target"] == pytest.approx(0.8**0.5)


@pytest.mark.parametrize("target", [0, 1.1, "high", float("nan")])
def test_an_impossible_target_is_refused(target: Any) -> None:
    with pytest.raises(ConfigError, match="flow 'f': its target must be above 0 and at most 1"):
        Flow("f", target=target)
