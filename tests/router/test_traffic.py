"""Traffic as part of the choice: a slow, good model is left out, and so is one whose queue is long."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from chainwax.flows.testing import TestModel
from chainwax.router import CallResult, FreeText, LLMManager, NodeSpec, Prompt, Query, load_settings

PRICES = {"strong": 1e-6, "middle": 1e-5, "small": 1e-4}
"""The strongest is the cheapest: nothing but its speed speaks against it."""


def manager_of(models: dict[str, TestModel], **options: Any) -> LLMManager:
    tiers = {"strong": "strongest", "middle": "standard", "small": "local"}
    settings = load_settings(
        run={"recording": None, "seed": 1},
        models={
            name: {
                "tier": tiers[name],
                "backend": "simulated",
                "input_cost_per_token": PRICES[name],
                "output_cost_per_token": PRICES[name],
                **options,
            }
            for name in models
        },
    )
    manager = LLMManager(settings, backends=models)
    manager.begin_run("flow")
    return manager


def asked(manager: LLMManager, node: NodeSpec, count: int, *, pause: float = 0.0) -> list[str]:
    """The models that served ``count`` calls, which are made one after the other with a pause between."""
    interface = manager.register(node)
    served: list[str] = []
    done = threading.Event()

    def take(query: Query, result: CallResult) -> None:
        assert result.error is None
        assert result.arm is not None
        served.append(result.arm.model)
        if len(served) == count:
            done.set()

    for n in range(count):
        interface.submit([interface.bind({"text": str(n)}, position=f"{time.monotonic()}/{n}")], take)
        time.sleep(pause)
    assert done.wait(20)
    return served


def test_a_slow_good_model_gives_way_to_a_quick_one() -> None:
    models = {"strong": TestModel(latency=0.05), "middle": TestModel()}
    node = NodeSpec("n", Prompt("{text}"), FreeText(), latency=0.02)
    with manager_of(models) as manager:
        served = asked(manager, node, 60, pause=0.06)
        time.sleep(1.1)  # the latency of the last minute is looked up once a second
        later = asked(manager, node, 20)
    assert served[:10] == ["strong"] * 10
    assert later == ["middle"] * 20


def test_where_all_are_too_slow_the_choice_is_as_without() -> None:
    models = {"strong": TestModel(latency=0.02), "middle": TestModel(latency=0.02)}
    node = NodeSpec("n", Prompt("{text}"), FreeText(), latency=0.001)
    with manager_of(models) as manager:
        for model in ("strong", "middle"):
            assert model in asked(manager, node, 30)
            time.sleep(1.1)  # the latency of the last minute is looked up once a second
        assert asked(manager, node, 20) == ["strong"] * 20


@pytest.mark.parametrize("latency", [0.5, None])
def test_under_congestion_the_next_good_one_serves_and_the_first_comes_back(
    latency: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chainwax.router.traffic._PATIENCE", 0.5)
    models = {"strong": TestModel(latency=0.1), "middle": TestModel()}
    node = NodeSpec("n", Prompt("{text}"), FreeText(), latency=latency)
    with manager_of(models, limit=1) as manager:
        asked(manager, node, 22)
        time.sleep(1.1)
        burst = asked(manager, node, 40)
        time.sleep(0.2)
        calm = asked(manager, node, 5, pause=0.15)
    assert burst.count("middle") > 25
    assert 3 <= burst.count("strong") <= 12
    assert calm == ["strong"] * 5
