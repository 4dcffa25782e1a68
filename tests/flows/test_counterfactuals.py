"""Counterfactuals over compiled flows: the strongest's answer in place of one, and what depends on it."""

from __future__ import annotations

import math
import random
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from bytewax.testing import run_main
from hypothesis import given
from hypothesis import strategies as st

from chainwax.connectors import InProcessBus, ItemsSource, ListSink
from chainwax.flows import Flow
from chainwax.flows.graph import Stream
from chainwax.flows.testing import Outputs, TestModel, run_flow
from chainwax.router import (
    BackendDown,
    CallRef,
    Feedback,
    FeedbackKind,
    LLMManager,
    Settings,
    load_settings,
)
from chainwax.router.credit import rights, shares, split
from chainwax.router.recording.reader import RecordingReader

PRICES = {"strong": 1e-5, "small": 1e-6}
ITEMS = 400


def settings_for(share: float, nodes: dict[str, Any] | None = None, **run: Any) -> Settings:
    """The small model everywhere, and the strong one for counterfactuals alone."""
    return load_settings(
        run={"recording": None, "seed": 1, **run},
        models={
            name: {
                "tier": "strongest" if name == "strong" else "local",
                "backend": "simulated",
                "input_cost_per_token": price,
                "output_cost_per_token": price,
                "retries": 0,
            }
            for name, price in PRICES.items()
        },
        defaults={"form": "direct", "model": "small", "counterfactual": share},
        nodes=nodes or {},
    )


def answers(**weak: float) -> Callable[[str], str]:
    """The small model: wrong at some nodes, so often."""

    def answer(prompt: str) -> str:
        node, n = prompt.split()[:2]
        return "wrong" if random.Random(f"{node} {n}").random() < weak.get(node, 0.0) else "right"

    return answer


def run(
    flow: Flow,
    small: Any,
    *,
    strong: Any = "right",
    share: float = 1.0,
    items: int = ITEMS,
    nodes: dict[str, Any] | None = None,
    **more: Any,
) -> tuple[Outputs, dict[str, TestModel]]:
    models = {"strong": TestModel(strong), "small": TestModel(small)}
    settings = settings_for(share, nodes, **more)
    return run_flow(flow, [{"n": n} for n in range(items)], models=models, settings=settings), models


def arm(out: Outputs, node: str, name: str = "small") -> dict[str, Any]:
    known: dict[str, Any] = out.snapshot["interfaces"][node]["router"]["arms"][name]
    return known


def asked(model: TestModel) -> Counter[str]:
    return Counter(request.query.node.id for request in model.requests)


def both_right(item: dict[str, Any]) -> bool:
    return bool(item["a"] == item["b"] == "right")


def chain(
    depends: bool = False,
    then: Callable[[Stream], Stream] = lambda stream: stream,
    end: Callable[[Any], Any] = both_right,
) -> Flow:
    flow = Flow("f")
    first = then(flow.source("in").query("a", "a {n}"))
    first.query("b", "b {n} {a}" if depends else "b {n}").feedback("end", end).sink("out")
    return flow


class TestCredit:
    def test_the_weak_node_is_found_and_the_other_is_cleared(self) -> None:
        with_, _ = run(chain(), answers(b=0.4))
        without, models = run(chain(), answers(b=0.4), share=0.0)
        assert asked(models["strong"]) == {}

        def off(out: Outputs) -> float:
            return abs(arm(out, "a")["score"] - 1.0) + abs(arm(out, "b")["score"] - 0.6)

        # The end scores alone leave it open how much of the failures is whose.
        assert off(with_) < 0.5 * off(without)

    def test_where_both_are_weak_neither_is_blamed_alone(self) -> None:
        # Three times the items: which scores come before which calls is the loop's affair, and moves them.
        out, _ = run(chain(), answers(a=0.3, b=0.3), items=3 * ITEMS)
        assert arm(out, "a")["score"] == pytest.approx(0.72, abs=0.1)
        assert arm(out, "b")["score"] == pytest.approx(0.72, abs=0.1)

    def test_a_strongest_that_is_wrong_too_makes_the_node_no_worse(self) -> None:
        lost, _ = run(chain(), answers(b=0.4), strong="wrong")
        found, _ = run(chain(), answers(b=0.4))
        assert arm(lost, "b")["score"] > arm(found, "b")["score"] + 0.05

    @given(st.lists(st.floats(0.05, 0.98), min_size=2, max_size=6), st.floats(0.05, 0.98), st.data())
    def test_what_it_says_is_on_average_what_was_known(
        self, expected: list[float], instead: float, data: st.DataObject
    ) -> None:
        place = data.draw(st.integers(0, len(expected) - 1))
        whole = math.prod(expected)
        good = whole / expected[place] * (1.0 - expected[place]) * instead / (1.0 - whole)
        for before, bad_end, good_end in rights(expected, place, instead):
            assert good * good_end + (1.0 - good) * bad_end == pytest.approx(before)
            assert 0.0 <= bad_end <= 1.0

    def test_with_the_end_score_it_weighs_as_much_as_a_score_of_the_call(self) -> None:
        path = tuple(CallRef(node, node, "small") for node in "abc")
        right = {"a": 0.9, "b": 0.6, "c": 0.8}
        end = Feedback("c", 0.0, "c", path=path)
        told = Feedback(
            "b", 1.0, "b", kind=FeedbackKind.counterfactual, path=(*path, CallRef("b", "b", "strong"))
        )

        def expected(ref: CallRef) -> float:
            return 0.95 if ref.arm == "strong" else right[ref.node]

        parts = [split(one, expected) for one in (end, told)]
        for first, second in zip(*parts, strict=True):
            assert first.call_id == second.call_id
            assert first.weight + second.weight == pytest.approx(1.0)
            known = first.weight * first.learned + second.weight * second.learned
            assert known == pytest.approx(0.0 if first.node == "b" else 1.0)

    def test_of_a_path_that_nobody_knows_nothing_is_learned(self) -> None:
        path = (CallRef("a", "1", "small"), CallRef("b", "2", "small"))
        told = Feedback("a", 1.0, "1", kind=FeedbackKind.counterfactual, path=path)
        assert split(told, lambda ref: None) == []
        # What was asked in place of a call that is not on the path.
        strange = Feedback(
            "a", 1.0, "1", kind=FeedbackKind.counterfactual, path=(*path, CallRef("a", "9", "strong"))
        )
        assert split(strange, lambda ref: 0.5) == []
        assert len(shares([0.5])) == 1


class TestWhatIsAsked:
    def test_a_question_that_did_not_change_is_not_asked_again(self) -> None:
        _, models = run(chain(), answers(a=0.4))
        assert asked(models["strong"])["a"] > 20
        assert asked(models["small"]) == {"a": ITEMS, "b": ITEMS}

    def test_one_that_did_is_asked_of_the_arm_that_answered_before(self) -> None:
        # The small model is right at b where a was: what it says of the strongest's answer counts.
        def small(prompt: str) -> str:
            if prompt.startswith("b"):
                return prompt.split()[2]
            return answers(a=0.4)(prompt)

        out, models = run(chain(depends=True), small)
        quiet, _ = run(chain(depends=True), small, share=0.0)
        strong, again = asked(models["strong"]), asked(models["small"])
        assert strong["a"] > 5
        assert again["b"] - ITEMS == strong["a"]
        assert strong["b"] > 0  # b was suspected at first
        assert arm(out, "a")["score"] < arm(quiet, "a")["score"] - 0.02
        assert arm(out, "b")["score"] > arm(quiet, "b")["score"] + 0.02

    def test_only_what_leads_to_the_score_is_run_again(self) -> None:
        ran: Counter[str] = Counter()
        lock = threading.Lock()

        def counted(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
            def fn(item: dict[str, Any]) -> dict[str, Any]:
                with lock:
                    ran[name] += 1
                return {**item, name: True}

            return fn

        flow = Flow("f")
        first = flow.source("in").query("a", "a {n}")
        first.map("beside", counted("beside")).query("other", "other {n} {a}").sink("elsewhere")
        onward = first.map("between", counted("between")).query("b", "b {n}")
        onward.feedback("end", both_right).sink("out")
        _, models = run(flow, answers(a=0.4))
        # What nobody counts as an end is no agreement either: only counterfactuals run functions again.
        assert ran["between"] == ITEMS + asked(models["strong"])["a"]
        assert ran["beside"] == ITEMS
        assert asked(models["small"])["other"] == ITEMS

    def test_where_the_way_leads_through_a_side_effect_nothing_is_asked(self) -> None:
        sent: list[int] = []

        def send(item: dict[str, Any]) -> dict[str, Any]:
            sent.append(item["n"])
            return item

        flow = chain(then=lambda stream: stream.map("send", send, pure=False))
        _, models = run(flow, answers(a=0.4, b=0.1))
        assert sorted(sent) == list(range(ITEMS))
        assert asked(models["strong"])["a"] == 0
        assert asked(models["strong"])["b"] > 0  # behind it

    @pytest.mark.parametrize("how", ["batch", "stream", "stateful"])
    def test_what_cannot_be_run_again_is_not(self, how: str) -> None:
        flow = Flow("f")
        first = flow.source("in").query("a", "a {n}", stream=how == "stream")
        if how == "batch":
            first = first.batch("batch", size=4, seconds=1.0)
        elif how == "stateful":
            first = first.stateful_map("count", lambda state, item: (state, item))
        first.query("b", "b {n}").feedback("end", lambda item: item["b"] == "right").sink("out")
        _, models = run(flow, answers(b=0.4))
        assert asked(models["strong"])["a"] == 0

    def test_a_branch_that_the_item_takes_now_is_gone_along(self) -> None:
        flow = Flow("f")
        yes, no = flow.source("in").query("a", "a {n}").branch("ok", lambda item: item["a"] == "right")
        left, right = yes.query("b", "b {n}"), no.query("c", "c {n}")
        both = left.merge("both", right)
        both.feedback("end", lambda item: item["a"] == item.get("b", "wrong") == "right").sink("out")
        out, models = run(flow, answers(a=0.4))
        quiet, _ = run(flow, answers(a=0.4), share=0.0)
        again = asked(models["small"])
        assert again["b"] + again["c"] > ITEMS  # b is asked for items that never came to it
        # What it answers for those is nobody's: it is not scored.
        assert arm(out, "b")["score"] > 0.9
        assert arm(out, "a")["score"] < arm(quiet, "a")["score"] - 0.02

    def test_items_that_a_filter_drops_have_no_end_and_a_function_that_fails_is_a_bad_one(self) -> None:
        def dropped(stream: Stream) -> Stream:
            return stream.filter("some", lambda item: item["a"] == "wrong")

        def failing(stream: Stream) -> Stream:
            def use(item: dict[str, Any]) -> dict[str, Any]:
                if item["a"] == "right":
                    raise ValueError("so good it hurts")
                return item

            return stream.map("use", use)

        # Only wrong answers come to the end: right ones of the strongest's are dropped, or fail.
        for then, heard in ((dropped, False), (failing, True)):
            out, models = run(
                chain(then=then, end=lambda item: False), answers(a=0.9), nodes={"b": {"counterfactual": 0.0}}
            )
            assert asked(models["strong"])["a"] > 20
            assert (arm(out, "a")["scores"] > 0.0) is True
            quiet, _ = run(chain(then=then, end=lambda item: False), answers(a=0.9), share=0.0)
            assert (arm(out, "a")["scores"] > arm(quiet, "a")["scores"] + 1.0) is heard

    def test_a_score_that_fails_or_is_none_says_nothing(self) -> None:
        def end(item: dict[str, Any]) -> Any:
            if item["a"] == "right":
                raise ValueError("no score")
            return False

        out, models = run(chain(end=end), answers(a=0.9), nodes={"b": {"counterfactual": 0.0}})
        quiet, _ = run(chain(end=end), answers(a=0.9), share=0.0)
        assert asked(models["strong"])["a"] > 20
        assert arm(out, "a")["scores"] == pytest.approx(arm(quiet, "a")["scores"], rel=0.01)

    def test_a_strongest_that_fails_changes_nothing(self) -> None:
        out, models = run(chain(), answers(b=0.4), strong=[BackendDown("away")])
        quiet, _ = run(chain(), answers(b=0.4), share=0.0)
        assert len(models["strong"].requests) > 0
        assert len(out["out"]) == ITEMS
        assert arm(out, "b")["scores"] == pytest.approx(arm(quiet, "b")["scores"], rel=0.01)

    @pytest.mark.parametrize("why", ["no share", "served by the strongest", "named nodes", "observe"])
    def test_nothing_is_asked_where(self, why: str) -> None:
        flow = chain()
        nodes: dict[str, Any] = {}
        if why == "served by the strongest":
            nodes = {node: {"model": "strong"} for node in "ab"}
        elif why == "observe":
            nodes = {node: {"mode": "observe", "observe_share": 0.0} for node in "ab"}
        elif why == "named nodes":
            flow = Flow("f")
            both = flow.source("in").query("a", "a {n}").query("b", "b {n}")
            both.feedback("end", both_right, about=["a", "b"]).sink("out")
        share = 0.0 if why == "no share" else 1.0
        wrong = answers(b=0.5)
        _, models = run(flow, wrong, strong=wrong, share=share, nodes=nodes)
        total = sum((asked(model) for model in models.values()), Counter())
        assert total == {"a": ITEMS, "b": ITEMS}


class TestCosts:
    @pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
    def test_it_costs_no_more_than_its_share(self, share: float) -> None:
        out, _ = run(chain(), answers(a=0.2, b=0.4), share=share)
        quiet, _ = run(chain(), answers(a=0.2, b=0.4), share=0.0)
        spent = [sum(arm(one, node, "strong")["cost_usd"] for node in "ab") for one in (out, quiet)]
        served = sum(arm(quiet, node)["cost_usd"] for node in "ab")
        assert spent[1] == 0.0
        assert 0.4 * share * served < spent[0] <= share * served * 1.0001

    def test_what_is_run_again_counts_to_its_share_too(self) -> None:
        out, models = run(
            chain(depends=True), answers(a=0.4), share=0.5, nodes={"b": {"counterfactual": 0.0}}
        )
        again = asked(models["small"])["b"] - ITEMS
        assert again == asked(models["strong"])["a"] > 0
        paid = arm(out, "a", "strong")["cost_usd"] + arm(out, "b")["cost_usd"] * again / (ITEMS + again)
        assert paid <= 0.5 * arm(out, "a")["cost_usd"] * 1.05

    def test_it_is_charged_to_the_budget_and_stops_with_it(self) -> None:
        free, _ = run(chain(), answers(b=0.4))
        spent = free.snapshot["interfaces"]["b"]["router"]["spent_usd"]
        assert spent == pytest.approx(arm(free, "b")["cost_usd"] + arm(free, "b", "strong")["cost_usd"])
        tight, _ = run(chain(), answers(b=0.4), nodes={"b": {"budget": spent / 2}})
        assert tight.snapshot["interfaces"]["b"]["router"]["spent_usd"] <= spent / 2 * 1.1

    def test_a_strongest_that_was_asked_anyway_is_not_paid_twice(self) -> None:
        # With a certificate both answer each call, and a coin says whose answer is served.
        nodes = {"b": {"certify": 1.0, "target": 0.5}, "a": {"counterfactual": 0.0}}
        _, models = run(chain(), answers(b=0.5), nodes=nodes, items=100)
        texts = Counter(request.query.call_id for request in models["strong"].requests)
        assert max(texts.values()) == 1


def test_each_attempt_is_recorded_as_a_shadow_and_its_score_as_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    _, models = run(chain(depends=True), answers(a=0.4), recording=str(path))
    with closing(RecordingReader(path)) as reader:
        rows = list(reader.fold("f"))
    told = [row for row in rows if row.kind is FeedbackKind.counterfactual]
    assert 0 < len(told) <= len(models["strong"].requests)
    assert {row.source for row in told} == {"end"}


def test_a_failure_that_is_told_of_twice_is_looked_at_once() -> None:
    class Twice(InProcessBus):
        def publish(self, feedback: Any) -> None:
            super().publish([*feedback, *feedback])

    models = {"strong": TestModel("right"), "small": TestModel(answers(b=0.4))}
    flow = chain()
    with LLMManager(settings_for(1.0), bus=Twice(), backends=models) as manager:
        manager.begin_run(flow.id, nodes=flow.specs().values())
        source = ItemsSource([{"n": n} for n in range(50)], key="n")
        run_main(flow.compile({"in": source}, {"out": ListSink([])}, manager=manager))
        manager.settle()
    calls = Counter(request.query.call_id for request in models["strong"].requests)
    assert calls.total() > 0
    assert max(calls.values()) == 1
