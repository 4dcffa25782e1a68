"""Credit over compiled flows: end scores reach the whole path, and failures further down count a little."""

from __future__ import annotations

from typing import Any

import pytest

from chainwax.flows import Flow
from chainwax.flows.testing import Outputs, TestModel, run_flow
from chainwax.router import Settings, load_settings


def settings_for(**nodes: Any) -> Settings:
    price = {"input_cost_per_token": 1e-6, "output_cost_per_token": 1e-6, "backend": "simulated"}
    return load_settings(
        run={"recording": None, "seed": 1},
        models={"strong": {"tier": "strongest", **price}, "small": {"tier": "local", **price}},
        nodes=nodes,
    )


def run(flow: Flow, items: list[Any], answers: Any, **nodes: Any) -> Outputs:
    models = {"strong": TestModel(answers), "small": TestModel(answers)}
    return run_flow(flow, items, models=models, settings=settings_for(**nodes))


def scores(out: Outputs, node: str) -> float:
    return sum(arm["scores"] for arm in out.snapshot["interfaces"][node]["router"]["arms"].values())


class TestEndScores:
    def test_one_score_of_the_item_is_shared_by_its_calls(self) -> None:
        flow = Flow("f")
        chain = flow.source("in").query("a", "{text}").query("b", "{text} {a}")
        chain.feedback("end", lambda item: True).sink("out")
        out = run(flow, [{"text": str(n)} for n in range(20)], "fine")
        assert 0 < scores(out, "a") < 20
        assert 0 < scores(out, "b") < 20

    def test_an_item_that_only_one_node_answered_scores_that_one_whole(self) -> None:
        flow = Flow("f")
        asked = flow.source("in").query("a", "{text}")
        asked.feedback("end", lambda item: True).sink("out")
        assert scores(run(flow, [{"text": str(n)} for n in range(20)], "fine"), "a") == 20

    def test_only_the_branch_that_an_item_took_is_scored(self) -> None:
        flow = Flow("f")
        first = flow.source("in").query("a", "{n}")
        yes, no = first.branch("even", lambda item: item["n"] % 2 == 0)
        left, right = yes.query("b", "{n}"), no.query("c", "{n}")
        left.merge("both", right).feedback("end", lambda item: item["n"] % 2 == 0).sink("out")
        out = run(flow, [{"n": n} for n in range(40)], "fine")
        quality = {node: out.snapshot["interfaces"][node]["router"]["quality"] for node in "bc"}
        assert quality["b"] > 0.9
        assert quality["c"] == 0.0

    def test_named_nodes_get_the_score_itself(self) -> None:
        flow = Flow("f")
        chain = flow.source("in").query("a", "{text}").query("b", "{text}")
        chain.feedback("end", lambda item: True, about=["a"]).sink("out")
        out = run(flow, [{"text": str(n)} for n in range(20)], "fine")
        assert (scores(out, "a"), scores(out, "b")) == (20, 0)

    def test_a_bad_score_of_an_item_goes_to_the_dead_letters(self) -> None:
        flow = Flow("f")
        flow.source("in").query("a", "{text}").query("b", "{text}").feedback("end", lambda item: 2).sink(
            "out"
        )
        out = run(flow, [{"text": "x"}], "fine")
        assert out.dead_letters[0]["message"] == "the score of the item must be in [0, 1], not 2"


class TestFailures:
    @pytest.mark.parametrize("blames", [True, False])
    def test_a_function_that_fails_on_an_answer_counts_a_little_against_it(self, blames: bool) -> None:
        def use(item: dict[str, Any]) -> dict[str, Any]:
            if blames:
                raise ValueError(item["a"])
            return item

        flow = Flow("f")
        flow.source("in").query("a", "{text}").map("use", use).sink("out")
        out = run(flow, [{"text": str(n)} for n in range(20)], "fine")
        assert scores(out, "a") == pytest.approx(20 * 0.2 if blames else 0.0)
        # Only failures are told, so they say nothing of how good the answers are on the whole.
        assert out.snapshot["interfaces"]["a"]["router"]["quality"] is None

    def test_an_invalid_answer_further_down_counts_against_the_calls_before(self) -> None:
        flow = Flow("f")
        flow.source("in").query("a", "{text}").choose("b", "{text} {a}", ["x", "y"]).sink("out")
        out = run(flow, [{"text": str(n)} for n in range(5)], "neither", b={"form": "switched"})
        assert len(out.dead_letters) == 5
        assert scores(out, "a") == pytest.approx(5 * 0.2)

    def test_a_model_that_is_down_is_nobodys_fault_upstream(self) -> None:
        flow = Flow("f")
        flow.source("in").query("a", "{text}").query("b", "b {a}").sink("out")
        strong = TestModel({"b fine": "x"})  # refuses all else
        small = TestModel("fine")
        out = run_flow(
            flow,
            [{"text": "t"}],
            models={"strong": strong, "small": small},
            settings=settings_for(
                a={"form": "direct", "model": "small"}, b={"form": "direct", "model": "strong"}
            ),
        )
        assert out.dead_letters == []
        refusing = TestModel({"nothing": "x"})
        out = run_flow(
            flow,
            [{"text": "t"}],
            models={"strong": refusing, "small": small},
            settings=settings_for(
                a={"form": "direct", "model": "small"}, b={"form": "direct", "model": "strong"}
            ),
        )
        assert out.dead_letters[0]["error"] == "BackendRefused"
        assert scores(out, "a") == 0
