"""Scores, prices, targets and budgets that are no use: the router says so, and serves with reason."""

from __future__ import annotations

import math
import random
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from chainwax.connectors import InProcessBus
from chainwax.flows.testing import TestModel
from chainwax.router import (
    BackendDown,
    BackendGarbled,
    BackendRefused,
    BudgetSpent,
    CallRef,
    CallResult,
    Choice,
    ConfigError,
    Decision,
    Feedback,
    FeedbackKind,
    LLMManager,
    NodeSpec,
    PriceUnknown,
    Prompt,
    Query,
    load_settings,
)
from chainwax.router.doubts import MOST, UNSCORED, ZEROS, Doubts
from chainwax.router.learning.context import NOTHING

PRICES = {"strong": 1e-4, "middle": 1e-5, "small": 1e-6}
TIERS = {"strong": "strongest", "middle": "standard", "small": "local"}
RIGHT = {"strong": 0.95, "middle": 0.85, "small": 0.6}
FORMS = ["adaptive", "switched", "parallel", "direct"]
SPEC = NodeSpec("node", Prompt("{text}"), Choice(["yes", "no"]), flow="flow")
Score = Callable[[int, bool], float | None]


def right(text: str) -> str:
    return "yes" if zlib.crc32(text.encode()) % 2 else "no"


def answers(model: str) -> Callable[[str], str]:
    def answer(text: str) -> str:
        lucky = random.Random(f"{model} {text}").random() < RIGHT[model]
        return right(text) if lucky else {"yes": "no", "no": "yes"}[right(text)]

    return answer


class Bus(InProcessBus):
    """Keeps what is announced."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[Decision] = []

    def announce(self, decision: Decision) -> None:
        self.said.append(decision)


class Node:
    """A node with three models, and what became of its calls."""

    def __init__(
        self,
        stack: ExitStack,
        models: dict[str, Any] | None = None,
        prices: dict[str, float] | None = None,
        **node: Any,
    ) -> None:
        settings = load_settings(
            run={"id": "run", "recording": None, "seed": 7},
            models={
                name: {
                    "tier": TIERS[name],
                    "backend": "simulated",
                    "input_cost_per_token": price,
                    "output_cost_per_token": price,
                    "retries": 0,
                }
                for name, price in (prices or PRICES).items()
            },
            nodes={"node": node},
        )
        self.bus = Bus()
        backends = {name: TestModel(answers(name)) for name in PRICES} | (models or {})
        self.manager = LLMManager(settings, backends=backends, bus=self.bus)
        stack.callback(self.manager.close)
        self.manager.begin_run("flow", "run", nodes=[SPEC])
        self.interface = self.manager.register(SPEC)
        self.router = self.interface.router
        self.asked = 0

    def ask(self) -> tuple[CallResult, bool]:
        """One call, and whether its answer is right."""
        n, done, results = self.asked, threading.Event(), []
        self.asked += 1
        text = f"Is {n} it? {'Think! ' * (n % 5)}"

        def take(query: Query, result: CallResult) -> None:
            results.append(result)
            done.set()

        self.interface.submit([self.interface.bind({"text": text}, item_key=f"k{n}", position=f"p{n}")], take)
        assert done.wait(10), "a call hangs"
        return results[0], results[0].value == right(text)

    def go(self, calls: int, score: Score = lambda _, good: float(good)) -> Counter[str]:
        """How often each model, or each error, came of so many calls that are scored so."""
        served: Counter[str] = Counter()
        for n in range(calls):
            result, good = self.ask()
            served[result.arm.key if result.arm else type(result.error).__name__] += 1
            given = score(n, good)
            if result.arm is not None and given is not None:
                self.feedback(given, result)
            if n % 10 == 0:
                self.manager.settle()
        self.manager.settle()
        return served

    def feedback(self, score: Any, result: CallResult, **more: Any) -> None:
        arm = result.arm.key if result.arm else ""
        said = {"arm": arm, "source": "s", **more}
        self.manager.feedback([Feedback("node", score, result.call_id, **said)])

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [dict(d.detail) for d in self.bus.said if d.kind == kind]


@pytest.fixture
def make() -> Iterator[Callable[..., Node]]:
    with ExitStack() as stack:
        yield lambda **options: Node(stack, **options)


Make = Callable[..., Node]


# -- scores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_scores_that_are_none_change_nothing_and_are_told_now_and_then(
    make: Make, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    node = make(form=form)
    result, _ = node.ask()
    node.manager.settle()
    before = node.router.stats.state()
    bad = [math.nan, math.inf, -math.inf, -1e-9, 1.0000001, 1e300, "1", None, [1], "x" * 9999]
    for _ in range(100):
        for score in bad:
            node.feedback(score, result)
    node.manager.settle()
    assert node.router.stats.state() == before
    assert node.manager.refused_feedback == 1000
    lines = [r.getMessage() for r in caplog.records if "refused" in r.getMessage()]
    assert len(lines) == 10  # at 1, 2, 4 … 512
    assert "'node' refused: the score nan is not in [0, 1] (1 refused by now)" in lines[0]
    assert all(len(line) < 300 for line in lines)
    assert node.go(20).total() == 20


def test_scores_of_unknown_calls_nodes_and_arms_are_said_to_be(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    node = make(form="adaptive")
    result, _ = node.ask()
    node.manager.settle()
    before = node.router.stats.state()
    node.manager.feedback(
        [
            Feedback("node", 1.0, "no such call"),
            Feedback("other", 1.0, result.call_id, arm="strong"),
            Feedback("node", 1.0, "", item_key="nobody"),
            Feedback("node", 1.0),
        ]
    )
    node.manager.feedback([Feedback("node", 1.0, result.call_id, arm="no such arm")])
    node.manager.settle()
    assert node.router.stats.state() == before
    assert node.manager.refused_feedback == 4
    assert "nobody knows the call" in caplog.text
    assert "nobody knows the node" in caplog.text


@pytest.mark.parametrize("form", ["adaptive", "switched"])
def test_many_scores_for_one_call_count_as_a_few(make: Make, form: str) -> None:
    node = make(form=form, target=0.9)
    result, _ = node.ask()
    for n in range(10_000):
        node.feedback(1.0, result, source=f"s{n}")
        node.feedback(1.0, result, source="s", metric=f"m{n}")
    node.manager.settle()
    assert node.router.stats.served_scored == MOST
    assert node.router.snapshot()["ignored_scores"] == 20_000 - MOST
    assert node.told("scores_ignored") == [{"call": result.call_id, "scores": MOST}]
    # One that counted may still be revised.
    node.feedback(0.0, result, source="s0")
    node.manager.settle()
    assert node.router.stats.served_scores == MOST - 1
    assert node.go(50).total() == 50


def test_one_that_cannot_make_up_his_mind_leaves_one_score(make: Make) -> None:
    node = make(form="switched", target=0.9)
    result, _ = node.ask()
    for n in range(10_001):
        node.feedback(float(n % 2), result)
    node.feedback(0.25, result)
    node.manager.settle()
    stats = node.router.stats
    assert (stats.served_scored, stats.served_scores) == (1, pytest.approx(0.25))
    assert all(math.isfinite(q) for q in (*stats.right, *stats.wrong))


@pytest.mark.parametrize("form", ["adaptive", "switched"])
def test_sources_that_contradict_each_other_are_averaged(make: Make, form: str) -> None:
    node = make(form=form, target=0.9)
    for _ in range(300):
        result, good = node.ask()
        node.feedback(float(good), result, source="one")
        node.feedback(float(not good), result, source="other")
    node.manager.settle()
    assert node.router.stats.served_scores / node.router.stats.served_scored == pytest.approx(0.5)
    assert node.go(100, lambda *_: None).total() == 100


@pytest.mark.parametrize("form", ["adaptive", "switched"])
def test_scores_that_never_come(make: Make, form: str) -> None:
    node = make(form=form)
    served = node.go(600, lambda *_: None)
    assert served.total() == 600
    assert served["strong"] == max(served.values())
    assert served["small"] < 300
    assert node.told("no_scores") == [{"calls": UNSCORED}]


@pytest.mark.parametrize("form", ["direct", "parallel"])
def test_forms_that_need_no_scores_do_not_ask_for_them(make: Make, form: str) -> None:
    node = make(form=form)
    assert node.go(UNSCORED + 50, lambda *_: None) == {"strong": UNSCORED + 50}
    assert node.told("no_scores") == []


@pytest.mark.parametrize("form", FORMS)
def test_scores_that_are_all_0_are_no_reason_to_take_the_cheapest(make: Make, form: str) -> None:
    node = make(form=form, target=0.9)
    node.go(ZEROS + 20, lambda *_: 0.0)
    assert node.told("scores_all_zero") == [{"scores": ZEROS}]
    served = node.go(300, lambda *_: 0.0)
    assert served["strong"] > 240
    node.go(1, lambda *_: 1.0)
    assert node.told("scores_differ") == [{"scores": ZEROS}]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "c1", "c2", "other"]),
            st.sampled_from(["strong", "small", "", "?"]),
            st.floats(),
        ),
        max_size=60,
    ),
    st.sampled_from(["adaptive", "switched"]),
)
@hypothesis_settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_feedback_whatever_stops_a_router(said: list[tuple[str, str, float]], form: str) -> None:
    with ExitStack() as stack:
        node = Node(stack, form=form, target=0.9)
        known = {"c1": node.ask()[0].call_id, "c2": node.ask()[0].call_id}
        node.manager.feedback(
            [Feedback("node", score, known.get(call, call), arm=arm) for call, arm, score in said]
        )
        node.manager.settle()
        assert node.go(3).total() == 3
        stats = node.router.stats
        assert all(math.isfinite(q) and q > 0 for q in (*stats.right, *stats.wrong))


@given(
    st.lists(
        st.builds(
            Feedback,
            st.sampled_from(["node", "other", ""]),
            st.floats() | st.sampled_from([0.0, 1.0]),
            st.sampled_from(["c1", "c2", "gone", ""]),
            arm=st.sampled_from(["strong", "small", "", "?"]),
            kind=st.sampled_from(FeedbackKind),
            context=st.sampled_from(["", "AAAA", "é", "AAA"]),
            weight=st.floats() | st.sampled_from([0.0, 0.5, 1.0]),
            path=st.lists(
                st.builds(
                    CallRef,
                    st.sampled_from(["node", "node", "other"]),
                    st.sampled_from(["c1", "c2", "gone"]),
                    st.sampled_from(["strong", "middle", "small", "?"]),
                    st.sampled_from(["", "AAAA", "é"]),
                ),
                max_size=5,
            ).map(tuple),
        ),
        max_size=40,
    )
)
@hypothesis_settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_path_whatever_stops_a_router(said: list[Feedback]) -> None:
    with ExitStack() as stack:
        node = Node(stack, form="adaptive", target=0.9, counterfactual=1.0)
        calls = [node.ask()[0] for _ in range(2)]
        ids = {"c1": calls[0].call_id, "c2": calls[1].call_id}
        node.manager.feedback(
            [
                replace(
                    one,
                    call_id=ids.get(one.call_id, one.call_id),
                    path=tuple(replace(ref, call_id=ids.get(ref.call_id, ref.call_id)) for ref in one.path),
                )
                for one in said
            ]
        )
        node.manager.settle()
        assert node.go(3).total() == 3
        stats, knowledge = node.router.stats, node.router.stats.knowledge
        assert all(math.isfinite(q) and q > 0 for q in (*stats.right, *stats.wrong))
        scores, _ = knowledge.scores("node", NOTHING)
        assert all(0.0 < score < 1.0 for score in scores[1:])


def test_a_million_scores_for_one_call_are_taken_in_passing(make: Make) -> None:
    node = make(form="adaptive")
    result, _ = node.ask()
    node.manager.settle()
    begun = time.monotonic()
    arm = result.arm.key if result.arm else ""
    for n in range(10):
        said = (Feedback("node", 1.0, result.call_id, arm=arm, source=f"s{n} {k}") for k in range(100_000))
        node.manager.feedback(list(said))
    node.manager.settle()
    assert time.monotonic() - begun < 120
    assert node.router.stats.served_scored == MOST
    assert node.router.snapshot()["ignored_scores"] == 1_000_000 - MOST
    assert node.go(20).total() == 20


def test_what_is_odd_is_remembered_of_the_last_calls_only() -> None:
    doubts = Doubts("node")
    for n in range(30_000):
        assert doubts.takes(f"c{n}", "a") == (True, None)
    assert len(doubts.state()["counts"]) == 20_000
    assert doubts.answered(UNSCORED, 1.0) is None


# -- models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("error", [BackendRefused, BackendDown, BackendGarbled], ids=lambda e: e.__name__)
@pytest.mark.parametrize("failing", ["strong", "middle", "small"])
def test_a_model_that_always_fails(make: Make, form: str, error: type[Exception], failing: str) -> None:
    node = make(form=form, target=0.9, models={failing: TestModel([error("no such model")])})
    served = node.go(300)
    assert sum(served[name] for name in PRICES) >= 295  # a fixed model may fail until it is left alone
    assert served[failing] == 0
    assert served["small"] < 295 - 100
    asked = node.router.stats.by_key[failing].asked
    assert asked <= 6  # it is not asked for each call, only to fail
    if asked >= 5:
        (told,) = node.told("model_down")
        assert (told["model"], told["failures"]) == (failing, 5)
        assert "no such model" in told["last"]


@pytest.mark.parametrize("form", FORMS)
def test_where_all_fail_each_call_says_why(make: Make, form: str) -> None:
    broken = {name: TestModel([BackendRefused(f"{name} is gone")]) for name in PRICES}
    node = make(form=form, models=broken)
    for _ in range(20):
        result, _ = node.ask()
        assert result.value is None
        assert "is gone" in str(result.error)
    assert len(node.told("model_down")) == (1 if form == "direct" else 3) or form == "direct"


def test_a_model_that_comes_back_is_told_of(make: Make) -> None:
    node = make(
        form="direct", model="middle", models={"middle": TestModel([BackendDown("away")] * 5 + ["yes"] * 99)}
    )
    node.go(8)
    assert node.told("model_up") == [{"model": "middle"}]


# -- prices, targets, budgets ------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "prices", [dict.fromkeys(PRICES, 0.0), {**PRICES, "strong": 0.0}], ids=["all free", "strongest free"]
)
def test_prices_of_zero(make: Make, form: str, prices: dict[str, float]) -> None:
    served = make(form=form, prices=prices, target=0.9).go(200)
    assert served["strong"] > 150  # nothing is saved by another one


@pytest.mark.parametrize("form", FORMS)
def test_a_cheapest_that_is_free_does_not_get_everything(make: Make, form: str) -> None:
    served = make(form=form, prices={**PRICES, "small": 0.0}, target=0.99).go(400)
    assert served["small"] < 200


@pytest.mark.parametrize("price", [math.nan, math.inf, -1.0, "cheap"])
def test_a_price_that_is_none_is_refused_by_name(price: Any) -> None:
    model = {"tier": "local", "backend": "simulated", "output_cost_per_token": 0.0}
    with pytest.raises(ConfigError, match=r"models\.m\.input_cost_per_token"):
        load_settings(models={"m": {**model, "input_cost_per_token": price}})


def test_a_missing_price_is_refused_by_name() -> None:
    settings = load_settings(run={"recording": None}, models={"m": {"tier": "local", "backend": "simulated"}})
    with pytest.raises(PriceUnknown, match=r"models\.m\.input_cost_per_token"):
        LLMManager(settings)


@pytest.mark.parametrize("form", FORMS)
def test_a_target_that_no_model_meets(make: Make, form: str) -> None:
    node = make(form=form, target=1.0, certify=0.5)
    served = node.go(500)
    assert served.total() == 500
    assert served["strong"] > 250
    assert served["small"] < 150


@pytest.mark.parametrize("form", FORMS)
def test_a_latency_that_no_model_keeps(make: Make, form: str) -> None:
    served = make(form=form, target=0.95, latency=1e-6).go(200)
    assert sum(served[name] for name in PRICES) == 200
    assert served["small"] < 150


@pytest.mark.parametrize("form", FORMS)
def test_a_budget_that_is_spent_already(make: Make, form: str) -> None:
    node = make(form=form, budget=0.0)
    assert node.go(20) == {"BudgetSpent": 20}
    (told,) = node.told("budget_reached")
    assert told["goes_on_with"] == []
    result, _ = node.ask()
    assert isinstance(result.error, BudgetSpent)
    assert "its budget of $0 is spent" in str(result.error)


@pytest.mark.parametrize("form", ["adaptive", "switched", "parallel"])
def test_a_spent_budget_goes_on_with_what_is_free(make: Make, form: str) -> None:
    node = make(form=form, budget=0.0002, prices={**PRICES, "middle": 0.0, "small": 0.0}, target=0.9)
    served = node.go(300)
    assert served["BudgetSpent"] == 0
    assert served["middle"] > 200  # of those that are free the stronger one
    (told,) = node.told("budget_reached")
    assert told["goes_on_with"] == ["middle", "small"]
