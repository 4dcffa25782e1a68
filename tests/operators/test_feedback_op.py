"""The feedback operator: scores find their way back to the calls, and change the choice."""

from __future__ import annotations

from typing import Any

import bytewax.operators as op
import pytest
from bytewax.dataflow import Dataflow
from bytewax.testing import TestingSink, TestingSource, run_main

import chainwax.operators as lop
from chainwax.flows.testing import TestModel
from chainwax.router import CallRef, LLMManager

from .conftest import Make, items


def score_with(
    manager: LLMManager, score: Any, source: list[Any], about: list[str]
) -> tuple[list[Any], list[Any]]:
    oks: list[Any] = []
    errs: list[Any] = []
    flow = Dataflow("flow")
    up = op.input("in", flow, TestingSource(source))
    out = lop.feedback("judge", up, score, about=about, manager=manager)
    op.output("oks", out.oks, TestingSink(oks))
    op.output("errs", out.errs, TestingSink(errs))
    run_main(flow)
    manager.settle()
    return oks, errs


def answered(manager: LLMManager, count: int) -> list[lop.Item]:
    oks: list[Any] = []
    flow = Dataflow("flow")
    up = op.input("in", flow, TestingSource(items(count)))
    out = lop.query("ask", up, "{text}", manager=manager)
    op.output("oks", out.oks, TestingSink(oks))
    op.output("errs", out.errs, TestingSink([]))
    run_main(flow)
    return oks


def test_scores_reach_the_arm_that_answered(make_manager: Make) -> None:
    manager = make_manager(TestModel("good"))
    source = answered(manager, 20)
    oks, errs = score_with(manager, lambda item: item["n"] % 2 == 0, source, ["ask"])
    assert errs == []
    assert [i.value for i in oks] == [i.value for i in source]
    router = manager.snapshot()["interfaces"]["ask"]["router"]
    assert router["scores"] == 20
    assert router["quality"] == pytest.approx(0.5)
    assert router["arms"]["model0"]["score"] == pytest.approx(0.5)


def test_a_second_score_of_the_same_source_revises_the_first(make_manager: Make) -> None:
    manager = make_manager(TestModel())
    source = answered(manager, 5)
    for value in (0.0, 1.0):
        score_with(manager, lambda item, value=value: value, source, ["ask"])
    router = manager.snapshot()["interfaces"]["ask"]["router"]
    assert router["scores"] == 5
    assert router["quality"] == 1.0


@pytest.mark.parametrize("bad", [2.0, -0.1, float("nan"), "much", object()])
def test_a_score_that_is_none_is_a_dead_letter(make_manager: Make, bad: Any) -> None:
    manager = make_manager(TestModel())
    source = answered(manager, 2)
    oks, errs = score_with(manager, lambda item: bad if item["n"] else 1.0, source, ["ask"])
    assert len(oks) == 1
    assert len(errs) == 1
    assert errs[0].node == "judge"


def test_a_function_that_fails_costs_its_item_only(make_manager: Make) -> None:
    manager = make_manager(TestModel())
    oks, errs = score_with(manager, lambda item: 1 / item["n"], answered(manager, 3), ["ask"])
    # 1/2 is a score, 1/1 too, and 1/0 is none
    assert [i.value["n"] for i in oks] == [1, 2]
    assert [e.error for e in errs] == ["ZeroDivisionError"]


def test_scores_by_node_none_and_unasked_nodes(make_manager: Make) -> None:
    manager = make_manager(TestModel())
    source = answered(manager, 4)
    oks, errs = score_with(
        manager,
        lambda item: {"ask": None if item["n"] == 0 else 0.25, "never": 1.0},
        source,
        ["ask", "never"],
    )
    assert (len(oks), errs) == (4, [])
    assert manager.snapshot()["interfaces"]["ask"]["router"]["scores"] == 3


def test_feedback_about_nodes_and_calls_that_nobody_knows_is_counted(make_manager: Make) -> None:
    manager = make_manager(TestModel())
    source = answered(manager, 2)
    source[0].calls = (CallRef("nobody", "x", "model0"),)
    score_with(manager, lambda item: 1.0, source, ["ask", "nobody"])
    assert manager.refused_feedback == 1


def test_feedback_changes_the_choice(make_manager: Make) -> None:
    # The dear model is right, the cheap one is wrong: the router must end with the dear one …
    dear, cheap = TestModel("right"), TestModel("wrong")
    manager = make_manager(dear, cheap)
    for _ in range(10):
        source = answered(manager, 30)
        score_with(manager, lambda item: item["ask"] == "right", source, ["ask"])
        manager.run_id += "+"  # the same items again, as other calls
    assert manager.snapshot()["interfaces"]["ask"]["router"]["choice"] == "model0"
    before = len(cheap.prompts)
    answered(manager, 60)
    assert len(cheap.prompts) - before <= 6
    # … and where both are right, with the cheap one.
    other = make_manager(TestModel("right"), TestModel("right"), run_id="two")
    for _ in range(10):
        score_with(other, lambda item: item["ask"] == "right", answered(other, 30), ["ask"])
        other.run_id += "+"
    assert other.snapshot()["interfaces"]["ask"]["router"]["choice"] == "model1"
