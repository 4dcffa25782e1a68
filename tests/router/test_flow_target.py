"""One target for a flow's end result: split so that a dollar buys the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from chainwax.connectors import InProcessBus
from chainwax.flows import ConfigError, Flow
from chainwax.flows.testing import TestModel, run_flow
from chainwax.router import CallRef, Feedback, FreeText, LLMManager, NodeSpec, Prompt, Query, load_settings
from chainwax.router.policies.adaptive import Adaptive

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


def test_at_first_each_node_has_the_same_part(make: Make) -> None:
    manager = make(run={"flow_target": 0.9})
    assert targets(manager) == dict.fromkeys(NODES, pytest.approx(0.9 ** (1 / 3)))


def flow_of(target: float | None = 0.9) -> Flow:
    flow = Flow("f", target=target)
    stream = flow.source("in")
    for node in NODES:
        stream = stream.choose(node, f"{node} {{n}}", ["right", "wrong"])
    stream.feedback("end", lambda item: all(item[node] == "right" for node in NODES)).sink("out")
    return flow


def small(prompt: str) -> str:
    """Right about nearly everything at a and c; at b about half."""
    node, number = prompt.split()[-2:]
    right = int(number) % 2 if node == "b" else int(number) % 20
    return "right" if right else "wrong"


def ran(items: int = 1200, **nodes: Any) -> dict[str, Any]:
    """What each router knows, after end scores alone."""
    prices = {"strong": ("strongest", 1e-4), "small": ("local", 1e-6)}
    settings = load_settings(
        run={"recording": None, "seed": 1},
        models={
            name: {
                "tier": tier,
                "backend": "simulated",
                "input_cost_per_token": p,
                "output_cost_per_token": p,
            }
            for name, (tier, p) in prices.items()
        },
        nodes=nodes,
    )
    models = {"strong": TestModel("right"), "small": TestModel(small)}
    out = run_flow(flow_of(), [{"n": n} for n in range(items)], models=models, settings=settings)
    return {node: one["router"] for node, one in out.snapshot["interfaces"].items()}


def test_a_dollar_goes_where_it_buys_most_and_the_product_stays() -> None:
    """Of a and c the small model is good enough, of b it is not: the strongest is asked there."""
    routers = ran()
    asked = {node: router["arms"]["small"]["asked"] for node, router in routers.items()}
    found = {node: router["target"] for node, router in routers.items()}
    assert math.prod(found.values()) == pytest.approx(0.9, abs=0.01)
    assert min(asked["a"], asked["c"]) > 2 * asked["b"]
    assert routers["b"]["arms"]["strong"]["asked"] > 2 * asked["b"]


def test_a_node_with_a_target_of_its_own_keeps_it() -> None:
    routers = ran(200, b={"target": 0.7})
    assert routers["b"]["target"] == 0.7


def test_a_policy_that_cannot_tell_what_it_bought_keeps_an_equal_part(make: Make) -> None:
    manager = make(run={"flow_target": 0.9}, defaults={"form": "switched"})
    path = tuple(CallRef(node, f"{node}1", "small") for node in NODES)
    for n in range(50):
        told = [replace(ref, call_id=f"{ref.node}{n}") for ref in path]
        manager.feedback([Feedback("c", 1.0, f"c{n}", arm="small", source="end", path=tuple(told))])
    manager.settle()
    assert targets(manager) == dict.fromkeys(NODES, pytest.approx(0.9 ** (1 / 3)))


def test_paths_that_are_shorter_than_the_flow_ask_less_of_each_node(make: Make) -> None:
    manager = make(run={"flow_target": 0.9})
    for n in range(50):  # no item goes further than b
        path = tuple(CallRef(node, f"{node}{n}", "small") for node in ("a", "b"))
        manager.feedback([Feedback("b", 1.0, f"b{n}", arm="small", source="end", path=path)])
    manager.settle()
    assert targets(manager)["a"] == targets(manager)["b"] == pytest.approx(0.9**0.5)


def test_the_split_is_saved_and_given_back(make: Make) -> None:
    manager, other = make(run={"flow_target": 0.9}), make(run={"flow_target": 0.9})
    for n in range(50):
        path = tuple(CallRef(node, f"{node}{n}", "small") for node in ("a", "b"))
        manager.feedback([Feedback("b", 1.0, f"b{n}", arm="small", source="end", path=path)])
    manager.settle()
    assert other.load_state(manager.save_state())
    assert targets(other) == targets(manager)


def test_a_flow_may_say_its_target_and_the_configuration_wins() -> None:
    flow = Flow("f", target=0.8)
    flow.source("in").query("a", "{text}").query("b", "{text}").sink("out")
    assert {spec.flow_target for spec in flow.specs().values()} == {0.8}
    out = run_flow(flow, [{"text": "x"}])
    assert out.snapshot["interfaces"]["a"]["router"]["target"] == pytest.approx(0.8**0.5)


def test_a_node_that_may_lose_next_to_nothing_is_not_dearer_for_it(make: Make) -> None:
    manager = make(run={"flow_target": 0.9})
    router = manager.interfaces["flow", "a"].router
    policy = router.policy
    assert isinstance(policy, Adaptive)
    for number in range(64):
        query = Query(router.node, str(number), [{"role": "user", "content": "x"}])
        policy.plan(query, router.stats.arms)
    policy._price().value = 1e-9  # what others want is next to nothing
    price = policy.price
    policy.node = replace(policy.node, target=0.9999)  # what the split leaves it
    assert policy.price == pytest.approx(price)


def planned(manager: LLMManager, node: str, calls: int) -> list[str]:
    router = manager.interfaces["flow", node].router
    queries = (Query(router.node, str(n), [{"role": "user", "content": "x"}]) for n in range(calls))
    return [router.policy.plan(query, router.stats.arms).arms[0].key for query in queries]


def test_at_the_flows_beginning_the_probation_alone_says_how_often_the_strongest_is_asked(make: Make) -> None:
    shared, own = make(run={"flow_target": 0.5}), make(run={}, defaults={"target": 0.5 ** (1 / 3)})
    assert "small" in planned(own, "a", 8)
    assert "small" in planned(shared, "a", 8)
    # Later a node of which nothing is known is another matter.
    knowledge = shared.interfaces["flow", "b"].router.stats.knowledge
    while not knowledge.probation.over:
        knowledge.probation.heard(1.0, 1.0)
    assert planned(shared, "b", 8) == ["strong"] * 8


@pytest.mark.parametrize("target", [0, 1.1, "high", float("nan")])
def test_an_impossible_target_is_refused(target: Any) -> None:
    with pytest.raises(ConfigError, match="flow 'f': its target must be above 0 and at most 1"):
        Flow("f", target=target)
