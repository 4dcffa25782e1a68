"""Agreement without labels: two answers are the same where the flow makes the same of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from chainwax.flows import Flow
from chainwax.flows.testing import Outputs, TestModel, run_flow
from chainwax.router import load_settings

ITEMS = [{"text": f"letter {n}"} for n in range(200)]
Answer = Callable[[str], str]


def run(
    flow: Flow, strong: Answer, small: Answer, items: list[dict[str, str]] = ITEMS, **node: Any
) -> Outputs:
    price = {"backend": "simulated", "output_cost_per_token": 1e-6}
    settings = load_settings(
        run={"recording": None, "seed": 1},
        models={
            "strong": {"tier": "strongest", "input_cost_per_token": 1e-4, **price},
            "small": {"tier": "local", "input_cost_per_token": 1e-6, **price},
        },
        nodes={"mood": {"form": "direct", "model": "small", "agreement": 0.95, **node}},
    )
    models = {"strong": TestModel(strong), "small": TestModel(small)}
    return run_flow(flow, items, models=models, settings=settings)


def small_arm(out: Outputs) -> dict[str, Any]:
    arm: dict[str, Any] = out.snapshot["interfaces"]["mood"]["router"]["arms"]["small"]
    return arm


def mood(flow: Flow) -> Any:
    return flow.source("letters").query("mood", "{text}")


def test_wording_that_the_filter_does_not_care_about_is_agreement() -> None:
    flow = Flow("f")
    mood(flow).filter("bad", lambda item: "bad" in item["mood"]).sink("out")
    out = run(flow, lambda p: f"The mood of {p} is bad.", lambda p: f"bad, I'd say ({p})")
    assert small_arm(out)["scores"] > 10
    assert small_arm(out)["score"] == 1.0


def test_a_single_character_that_flips_the_filter_is_none() -> None:
    flow = Flow("f")
    mood(flow).filter("bad", lambda item: item["mood"].endswith("!")).sink("out")
    out = run(flow, lambda p: f"bad: {p}!", lambda p: f"bad: {p}.")
    assert small_arm(out)["scores"] > 10
    assert small_arm(out)["score"] == 0.0


def test_right_before_a_sink_the_text_itself_counts() -> None:
    flow = Flow("f")
    mood(flow).sink("out")
    assert small_arm(run(flow, lambda p: "bad", lambda p: "bad "))["score"] == 1.0
    assert small_arm(run(flow, lambda p: "bad", lambda p: "Bad"))["score"] == 0.0


def test_what_a_map_makes_of_the_answer_counts_and_not_its_text() -> None:
    flow = Flow("f")
    mood(flow).map("short", lambda item: {**item, "bad": "bad" in item["mood"]}).sink("out")
    assert small_arm(run(flow, lambda p: "so bad", lambda p: "bad!"))["score"] == 1.0
    assert small_arm(run(flow, lambda p: "so bad", lambda p: "good"))["score"] == 0.0


def test_the_next_model_is_not_asked_for_the_comparison() -> None:
    flow = Flow("f")
    mood(flow).branch("bad", lambda item: "bad" in item["mood"]).yes.query("answer", "{mood}").sink("out")
    out = run(flow, lambda p: "so bad", lambda p: "bad!")
    assert small_arm(out)["score"] == 1.0
    assert out.snapshot["interfaces"]["answer"]["uptime"]["queries"] == len(ITEMS)


def test_functions_with_side_effects_are_never_run_for_it() -> None:
    calls: list[str] = []
    lock = threading.Lock()

    def send(item: dict[str, Any]) -> dict[str, Any]:
        with lock:
            calls.append(item["mood"])
        return {"sent": True}

    flow = Flow("f")
    mood(flow).map("send", send, pure=False).sink("out")
    out = run(flow, lambda p: "so bad", lambda p: "bad!")
    assert calls == ["bad!"] * len(ITEMS)
    assert small_arm(out)["score"] == 0.0  # what is sent is the text


def test_a_function_that_fails_on_one_answer_alone_tells_them_apart() -> None:
    flow = Flow("f")
    mood(flow).map("number", lambda item: int(item["mood"])).sink("out")
    assert small_arm(run(flow, lambda p: "7", lambda p: "seven"))["score"] == 0.0
    assert small_arm(run(flow, lambda p: "7", lambda p: " 7 "))["score"] == 1.0


def test_the_share_falls_once_it_is_known() -> None:
    flow = Flow("f")
    mood(flow).filter("bad", lambda item: "bad" in item["mood"]).sink("out")
    sure = run(flow, lambda p: "bad", lambda p: "bad", target=0.5)
    unsure = run(flow, lambda p: "bad", lambda p: "bad", target=0.99)
    assert small_arm(sure)["scores"] < small_arm(unsure)["scores"]


def test_comparisons_are_charged_to_the_budget() -> None:
    flow = Flow("f")
    mood(flow).sink("out")
    free = run(flow, lambda p: "bad", lambda p: "bad")
    tight = run(flow, lambda p: "bad", lambda p: "bad", budget=2e-3)
    spent = free.snapshot["interfaces"]["mood"]["router"]["spent_usd"]
    assert spent > sum(a["cost_usd"] for a in [small_arm(free)])
    assert 0 < small_arm(tight)["scores"] < small_arm(free)["scores"]


@pytest.mark.parametrize("wanted", [0.0, None])
def test_nothing_is_asked_where_nobody_wants_it(wanted: float | None) -> None:
    flow = Flow("f")
    mood(flow).sink("out")
    assert small_arm(run(flow, lambda p: "bad", lambda p: "bad", agreement=wanted))["scores"] == 0


def test_scores_from_downstream_make_it_needless() -> None:
    def asked(*, scored: bool) -> int:
        flow = Flow("f")
        answered = mood(flow)
        (answered.feedback("read", lambda item: True) if scored else answered).sink("out")
        items = [{"text": f"letter {n}"} for n in range(800)]
        out = run(flow, lambda p: "bad", lambda p: "bad", items=items, target=0.99)
        strong: dict[str, Any] = out.snapshot["interfaces"]["mood"]["router"]["arms"]["strong"]
        return int(strong["asked"])

    # Only what was asked before the first score came is compared.
    assert asked(scored=True) < 0.5 * asked(scored=False)
