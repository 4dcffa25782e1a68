"""``switched``: what it reads off answers, what it learns from their scores, and when it goes on."""

from __future__ import annotations

import json
import math
import random
import time
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainwax.router import Arm, Feedback, FreeText, NodeSpec, Prompt, Query, Tier
from chainwax.router.learning.answers import (
    ANSWER,
    PROMPT,
    Standard,
    answer_features,
    prompt_features,
    prompt_text,
)
from chainwax.router.learning.arithmetic import sums
from chainwax.router.learning.costs import CostGuess
from chainwax.router.learning.logistic import Logistic, sigmoid
from chainwax.router.policies import Switched, Watching
from chainwax.router.stats import NodeStats
from chainwax.router.types import Attempt, Usage

# -- sums --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "2 + 2 = 4", "7×8=56", "so 3 boxes of 4 are 3 * 4 = 12.", "10 / 3 = 3.33", "10 / 3 = 3",
        "1/3 = 0.333",
        "19 / 5 = 3 remainder 4", "$5 + $3 = $8", "1,200 + 300 = 1,500", "1.200 + 300 = 1.500", "-5 + 3 = -2",
        "200 × 15% = 30", "x = 5 - 3 = 2", "16 * 3 = 48 - 3 = 45", "0.1 + 0.2 = 0.3", "−3 − 4 = −7",
    ],
)  # fmt: skip
def test_sums_that_add_up(text: str) -> None:
    right, wrong = sums(text)
    assert right >= 1
    assert wrong == 0


@pytest.mark.parametrize(
    "text", ["2 + 2 = 5", "7 × 8 = 54 apples", "total: 12 + 30 = 41.", "1,200 + 300 = 1,400", "3 * 4 = 12.5"]
)
def test_sums_that_do_not(text: str) -> None:
    assert sums(text) == (0, 1)


@pytest.mark.parametrize(
    "text",
    [
        "2x + 3 - 1 = 7", "n - 1 = 5", "f(3) - 1 = 2", "(2+3) * 4 = 20", "2 * (3+4) = 14", "2^3 + 1 = 9",
        "100 + 10% = 110", "a = 3 * 4 == 12", "1,5 + 1,5 = 3", "5 + 3 = 8x", "2020-21 = season",
        "12:30 + 1 = 13",
        "log 2 + 1 = 9", "10 mod 3 + 1 = 2", "sqrt(16) + 2 = 6", "5! + 1 = 121", "3 + 4i = 5",
        "0x10 + 1 = 17",
        "1 500 + 1 = 1 501", "v1.2 + 3 = 4", "8 / 2(2+2) = 16", "1e3 + 1 = 1001", "5 / 0 = 0", "= = =", "x=1",
        "y 3 - 1 = 7", "2023-11-05 = today",
    ],
)  # fmt: skip
def test_what_is_no_plain_sum_is_not_called_wrong(text: str) -> None:
    assert sums(text)[1] == 0


@given(st.integers(-999, 999), st.integers(0, 999), st.sampled_from("+-*"))
def test_right_sums_are_never_called_wrong(a: int, b: int, sign: str) -> None:
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    assert sums(f"It is {a} {sign} {b} = {value:,}.") == (1, 0)
    assert sums(f"It is {a} {sign} {b} = {value + 1}.") == (0, 1)


# -- features ----------------------------------------------------------------------------------------

HOSTILE = [
    "", " ", "\x00" * 50_000, "=" * 500_000, "1+" * 300_000 + "=1", "a" * 2_000_000, "\ud800" * 100,
    "🙂" * 100_000,
    "[" * 200_000, '{"a":' * 50_000, "- \n" * 100_000, "might " * 100_000, "1,111" * 100_000, "\n" * 500_000,
    "1 = " * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_cost_little_and_give_numbers(text: str) -> None:
    begun = time.process_time()
    prompt = prompt_text([{"role": "user", "content": text}])
    features = [
        prompt_features(prompt),
        answer_features(prompt, text, before=text, logprob=math.nan),
        answer_features("", text, logprob=-math.inf),
    ]
    assert time.process_time() - begun < 1.0
    assert [len(f) for f in features] == [len(PROMPT), len(ANSWER), len(ANSWER)]
    assert all(np.isfinite(f).all() for f in features)


@given(st.text(), st.text(), st.none() | st.floats() | st.text())
def test_any_text_gives_numbers(prompt: str, answer: str, more: Any) -> None:
    said = more if isinstance(more, str) else None
    logprob = more if isinstance(more, float) else None
    assert np.isfinite(answer_features(prompt, answer, before=said, logprob=logprob)).all()
    assert np.isfinite(prompt_features(prompt)).all()


def test_prompts_of_parts_and_of_nonsense() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url"}, "x", {"text": 3}]
    assert prompt_text([{"content": "s"}, {"content": parts}, {"content": None}, {}]) == "s\na"


def test_what_an_answer_is_like_shows() -> None:
    def of(answer: str, **more: Any) -> dict[str, float]:
        return dict(zip(ANSWER, answer_features("How much is 3 * 4?", answer, **more), strict=True))

    assert of("3 * 4 = 12")["right"] > 0
    assert of("3 * 4 = 13")["wrong"] > 0
    assert of("I think it might be 12")["hedges"] > of("It is 12")["hedges"] == 0
    assert of("I'm sorry, I cannot say.")["refusals"] > 0
    assert of("12", before="12")["same"] == 1
    assert of("12", before="13")["same"] == 0
    assert of("12", logprob=-0.5)["logprob"] == -0.5
    assert of("a word " * 50)["cut"] == 1
    assert of("yes") != of("no")  # what a short answer says is told apart


def test_standardised_features_are_comparable() -> None:
    standard = Standard(2)
    rng = np.random.default_rng(1)
    taken = np.array([standard.take(np.array([rng.normal(500, 50), 7.0])) for _ in range(500)])
    assert abs(taken[100:, 0].mean()) < 0.2
    assert 0.7 < taken[100:, 0].std() < 1.3
    assert (taken[:, 1] == 0).all()  # what never changes tells nothing
    assert np.abs(taken).max() <= 3


# -- the regression ----------------------------------------------------------------------------------


def test_the_regression_learns_and_knows_how_sure_it_is() -> None:
    rng = np.random.default_rng(2)
    model = Logistic(4)
    model.add("a", 0.5)
    x = np.array([1.0, 1.0, 0.0, 0.0])
    unsure = model.predict("a", x)[1]
    for _ in range(2000):
        seen = np.concatenate(([1.0], rng.normal(size=3)))
        model.learn("a", seen, float(rng.random() < sigmoid(0.5 + 1.5 * seen[1])))
    mean, deviation = model.predict("a", x)
    assert mean == pytest.approx(2.0, abs=0.5)
    assert deviation < unsure / 3
    assert np.linalg.eigvalsh(model.cover).min() > -1e-12


def test_a_revised_score_moves_the_weights_back() -> None:
    once, revised, never = Logistic(3), Logistic(3), Logistic(3)
    x = np.array([1.0, 1.0, -1.0])
    for model, score in ((once, 1.0), (never, 0.0), (revised, 0.0)):
        model.add("a", 0.5)
        model.learn("a", x, score)
    revised.revise("a", x, 1.0)
    assert revised.predict("a", x)[0] == pytest.approx(once.predict("a", x)[0], abs=1e-3)
    assert revised.predict("a", x)[0] > never.predict("a", x)[0]


def test_what_one_arm_is_scored_tells_of_the_others_and_of_itself_most() -> None:
    model = Logistic(1)
    for arm, quality in (("strong", 0.9), ("small", 0.5)):
        model.add(arm, quality)
    model.add("small", 0.99)  # it is there already
    one = np.array([1.0])
    for _ in range(30):
        model.learn("strong", one, 0.5)
    assert model.guess("strong", one) == pytest.approx(0.5, abs=0.05)
    assert 0.1 < model.guess("small", one) < 0.3
    assert model.doubt("small") > model.doubt("strong")
    model.add("late", 0.67)
    assert 0.2 < model.guess("late", one) < 0.5
    for _ in range(100):
        model.learn("small", one, 0.9)
    assert model.guess("small", one) > 0.8
    assert model.guess("strong", one) < 0.75


# -- what a call will cost ---------------------------------------------------------------------------


def test_a_cost_is_guessed_from_what_goes_with_it() -> None:
    rng = np.random.default_rng(3)
    costs = CostGuess(3)
    at = [np.array([1.0, 1.0, 0.0]), np.array([1.0, -1.0, 0.0])]
    assert [costs.guess(x, 0.01) for x in at] == [0.01, 0.01]
    for _ in range(400):
        x = np.concatenate(([1.0], rng.normal(size=2)))
        costs.learn(x, 0.01 * math.exp(0.5 * x[1] + 0.1 * rng.normal()), 0.0113)
    high, low = (costs.guess(x, 0.0113) for x in at)
    assert high == pytest.approx(0.01 * math.exp(0.5), rel=0.1)
    assert low == pytest.approx(0.01 * math.exp(-0.5), rel=0.1)


@pytest.mark.parametrize("cost", [0.0, 1e-30, 1e30])
def test_costs_of_nothing_and_of_a_fortune_do_no_harm(cost: float) -> None:
    costs = CostGuess(2)
    x = np.array([1.0, 3.0])
    for _ in range(50):
        costs.learn(x, cost, 0.01)
    assert math.isfinite(costs.guess(x, 0.01))
    assert costs.guess(x, 0.01) >= 0.0
    assert costs.guess(x, 0.0) == 0.0


def test_it_goes_on_where_that_is_cheap() -> None:
    """Both models are the same on all items, and long answers cost ten times as much as short ones."""
    stats = stats_of(("strong", Tier.strongest, 1.0), ("small", Tier.local, 0.02))
    spec = NodeSpec("n", Prompt("{text}"), FreeText(), target=0.85)
    policy, rng = Switched(spec, stats, 1), random.Random(1)
    went_on: dict[bool, list[bool]] = {True: [], False: []}
    for n in range(1500):
        long = rng.random() < 0.5
        query = Query(spec, str(n), [{"role": "user", "content": "What?"}])
        plan = policy.plan(query, stats.arms)
        for state in plan.arms:
            cost = (0.02 if state.key == "small" else 1.0) * (1.8 if long else 0.2)
            attempt = Attempt(str(n), 1, state.arm, text="so " * (200 if long else 20), cost_usd=cost)
            attempt.propensity = 1.0
            stats.asked(state, attempt, True)
            if policy.escalate(query, plan, state, attempt, "so") is None:
                break
        if plan.arms[0].key == "small" and n >= 500:
            went_on[long].append(state.key == "strong")
        score = rng.random() < (0.9 if state.key == "strong" else 0.6)
        policy.learn(Feedback("n", float(score), str(n), arm=state.key), None)
    long_share, short_share = (sum(went_on[long]) / len(went_on[long]) for long in (True, False))
    assert short_share > long_share + 0.3


# -- the policy --------------------------------------------------------------------------------------

MODELS = (("strong", Tier.strongest, 1.0), ("middle", Tier.standard, 0.1), ("small", Tier.local, 0.02))


def stats_of(*models: tuple[str, Tier, float]) -> NodeStats:
    return NodeStats(
        [
            SimpleNamespace(  # type: ignore[misc]
                name=name,
                tier=tier,
                arms=(Arm(name),),
                price=SimpleNamespace(estimate=lambda i, o, price=price: price),
                backend=SimpleNamespace(simulated=False),
            )
            for name, tier, price in models
        ]
    )


def says(model: str, right: bool, rng: random.Random) -> str:
    """A model that often shows when it is wrong."""
    if model == "strong" or rng.random() < 0.1:
        return "The answer is plain and stands here."
    return "The answer is plain and stands here." if right else "I think that it might perhaps be so, maybe."


def serve(
    chances: dict[str, float],
    *,
    target: float,
    calls: int = 2500,
    seed: int = 1,
    feedback: float = 1.0,
    worth: float | None = None,
) -> dict[str, Any]:
    """Serve calls whose scores come 30 late; quality and cost of the second half, and who served."""
    stats = stats_of(*(m for m in MODELS if m[0] in chances))
    spec = NodeSpec("n", Prompt("{text}"), FreeText(), target=target, worth=worth)
    policy = Switched(spec, stats, seed)
    rng = random.Random(seed)
    late: deque[Feedback] = deque()
    used: dict[str, int] = {}
    quality = cost = 0.0
    propensities = []
    for n in range(calls):
        query = Query(spec, str(n), [{"role": "user", "content": f"Question {n}?"}])
        plan = policy.plan(query, stats.arms)
        left = list(plan.arms)
        while True:
            state = left.pop(0)
            right = rng.random() < chances[state.key]
            price = next(p for name, _, p in MODELS if name == state.key)
            attempt = Attempt(
                str(n), 1, state.arm, text=says(state.key, right, rng), usage=Usage(10, 10), cost_usd=price
            )
            attempt.propensity = plan.propensity
            stats.asked(state, attempt, True)
            cost += price if n >= calls // 2 else 0.0
            further = policy.escalate(query, plan, state, attempt, attempt.text)
            if further not in left:
                break
            del left[: left.index(further)]
        propensities.append(attempt.propensity)
        used[state.key] = used.get(state.key, 0) + 1
        quality += float(right) if n >= calls // 2 else 0.0
        stats.served(state)
        if rng.random() < feedback:
            late.append(Feedback("n", float(right), str(n), arm=state.key))
        if len(late) > 30:
            policy.learn(late.popleft(), None)
    half = calls - calls // 2
    return {
        "quality": quality / half,
        "cost": cost / half,
        "used": used,
        "propensities": propensities,
        "policy": policy,
    }


@pytest.mark.parametrize("seed", range(3))
def test_it_keeps_what_is_right_and_goes_on_from_what_is_not(seed: int) -> None:
    out = serve({"strong": 0.95, "small": 0.6}, target=0.97, seed=seed)
    # 0.95 · 0.97 = 0.92; the small model alone gives 0.6, a coin between the two 0.92 at a cost of 0.93.
    assert out["quality"] > 0.89
    assert out["cost"] < 0.75
    assert all(0 < p <= 1 for p in out["propensities"])


@pytest.mark.parametrize("seed", range(3))
def test_a_chain_of_three_leaves_out_what_does_not_pay(seed: int) -> None:
    out = serve({"strong": 0.95, "middle": 0.9, "small": 0.05}, target=0.97, seed=seed)
    assert out["quality"] > 0.89
    assert out["cost"] < 0.6
    assert out["used"].get("small", 0) < 150


def test_a_lower_target_costs_less() -> None:
    costs = [serve({"strong": 0.95, "small": 0.5}, target=t)["cost"] for t in (0.5, 0.8, 0.99)]
    assert costs == sorted(costs)
    assert costs[0] < 0.1


@pytest.mark.parametrize("target", [0.99, 1.0])
def test_without_feedback_it_does_not_send_everything_to_the_cheapest(target: float) -> None:
    used = serve({"strong": 0.95, "small": 0.5}, target=target, calls=600, feedback=0.0)["used"]
    assert used["strong"] > 500


def test_it_goes_on_learning_with_a_fifth_of_the_scores() -> None:
    out = serve({"strong": 0.95, "small": 0.6}, target=0.97, calls=4000, feedback=0.2)
    assert out["quality"] > 0.88
    assert out["cost"] < 0.85


def test_what_a_point_of_quality_is_worth_may_be_stated() -> None:
    costs = [
        serve({"strong": 0.95, "small": 0.5}, target=0.99, worth=worth)["cost"] for worth in (0.1, 3.0, 100.0)
    ]
    assert costs[0] < 0.15  # the strongest costs 1.0, and is better by 0.45
    assert costs[0] < costs[1] < costs[2]


def test_prices_of_zero_do_no_harm() -> None:
    stats = stats_of(("strong", Tier.strongest, 0.0), ("small", Tier.local, 0.0))
    spec = NodeSpec("n", Prompt("{text}"), FreeText())
    policy = Switched(spec, stats, 1)
    for n in range(200):
        query = Query(spec, str(n), [{"role": "user", "content": "x"}])
        plan = policy.plan(query, stats.arms)
        attempt = Attempt(str(n), 1, plan.arms[0].arm, text="a", propensity=plan.propensity)
        policy.escalate(query, plan, plan.arms[0], attempt, "a")
        policy.learn(Feedback("n", 1.0, str(n), arm=plan.arms[0].key), None)


def test_scores_of_unknown_calls_and_arms_and_a_million_for_one() -> None:
    stats = stats_of(*MODELS)
    spec = NodeSpec("n", Prompt("{text}"), FreeText())
    policy = Switched(spec, stats, 1)
    query = Query(spec, "one", [{"role": "user", "content": "x"}])
    plan = policy.plan(query, stats.arms)
    policy.learn(Feedback("n", 1.0, "never asked", arm="small"), None)
    policy.learn(Feedback("n", 1.0, "one", arm="nobody"), None)
    key = plan.arms[0].key
    for _ in range(5000):
        policy.learn(Feedback("n", 1.0, "one", arm=key), None)
    assert policy._by_answer.counts[key] == 1
    assert isinstance(policy, Watching)
    assert json.dumps(policy.choice()) == "null"


def test_memory_is_bounded() -> None:
    stats = stats_of(*MODELS)
    spec = NodeSpec("n", Prompt("{text}"), FreeText())
    policy = Switched(spec, stats, 1)
    for n in range(10_050):
        policy.plan(Query(spec, str(n), [{"role": "user", "content": "x"}]), stats.arms)
    assert len(policy._calls) == 10_000 - 1_250 + 50  # an eighth goes where there is no more room
    assert str(10_049) in policy._calls
