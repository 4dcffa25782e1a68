"""The forms of a router, each on arms of known price and quality. No model is asked."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from chainwax.router import Arm, Attempt, Choice, Form, NodeSpec, Prompt, Query, Tier
from chainwax.router.errors import NoModelAllowed
from chainwax.router.learning.knowledge import Knowledge
from chainwax.router.policies import POLICIES, Adaptive, Direct, Parallel, Switched
from chainwax.router.stats import NodeStats


def instance(name: str, tier: Tier, price: float) -> Any:
    return SimpleNamespace(
        name=name,
        tier=tier,
        arms=(Arm(name),),
        price=SimpleNamespace(estimate=lambda i, o: price),
        backend=SimpleNamespace(simulated=False),
        recorder=SimpleNamespace(latency_p95=lambda: None),
    )


STRONG, MIDDLE, SMALL = (
    ("strong", Tier.strongest, 1.0),
    ("middle", Tier.standard, 0.1),
    ("small", Tier.local, 0.01),
)
QUERY = Query(None, "id", [])  # type: ignore[arg-type]  # no policy of these looks at the query


def stats_of(*models: tuple[str, Tier, float]) -> NodeStats:
    return NodeStats([instance(*m) for m in models])


def node(**options: Any) -> NodeSpec:
    return NodeSpec("n", Prompt("{text}"), Choice(["a", "b"]), **options)


def run(
    quality: dict[str, float], *, target: float, calls: int, seed: int, delay: int = 20
) -> dict[str, list[str]]:
    """Serve ``calls`` calls with scores that come ``delay`` calls late; the arms in order of use."""
    stats = stats_of(MIDDLE, SMALL, STRONG)
    policy = Adaptive(node(target=target), stats, seed)
    rng = random.Random(seed)
    late: list[tuple[Any, float]] = []
    used = []
    for _ in range(calls):
        plan = policy.plan(QUERY, stats.arms)
        arm = plan.arms[0]
        assert 0 < plan.propensity <= 1
        used.append(arm.key)
        late.append((arm, float(rng.random() < quality[arm.key])))
        if len(late) > delay:
            stats.learn(*late.pop(0))
    return {"used": used, "choice": [str(policy.choice())]}


def test_arms_stand_strongest_tier_first() -> None:
    assert [s.key for s in stats_of(SMALL, STRONG, MIDDLE).arms] == ["strong", "middle", "small"]


def test_adaptive_ends_on_the_cheapest_that_is_good_enough() -> None:
    """Nearly always: after 600 calls the middle one, which falls short by 0.02, may still pass for good."""
    quality = {"strong": 0.95, "middle": 0.9, "small": 0.97}
    ends = [run(quality, target=0.97, calls=600, seed=seed) for seed in range(10)]
    assert sum(one["choice"] == ["small"] for one in ends) >= 8
    late = [arm for one in ends for arm in one["used"][-100:]]
    assert late.count("small") > 600
    assert late.count("strong") < 250


@pytest.mark.parametrize("seed", range(5))
def test_adaptive_leaves_what_is_not_good_enough(seed: int) -> None:
    bad = run({"strong": 0.97, "middle": 0.6, "small": 0.3}, target=0.97, calls=600, seed=seed)
    assert bad["choice"] == ["strong"]
    # What the target leaves is used: (1 − 0.97) · 0.97 / (0.97 − 0.6), which is 16 of 200.
    assert bad["used"][-200:].count("small") <= 10
    assert bad["used"][-200:].count("middle") <= 30


@pytest.mark.parametrize("seed", range(5))
def test_adaptive_begins_with_the_strongest(seed: int) -> None:
    start = run({"strong": 1.0, "middle": 1.0, "small": 1.0}, target=0.99, calls=20, seed=seed)
    assert start["used"].count("strong") >= 9


def test_a_node_that_needs_the_strongest_gets_it_beside_others_that_do_not() -> None:
    """Many calls of three easy nodes drive the common price down; the hard node keeps its own target."""
    quality = {"easy": {"strong": 0.98, "middle": 0.98}, "hard": {"strong": 0.95, "middle": 0.75}}
    names = {"one": "easy", "two": "easy", "three": "easy", "four": "hard"}
    shared = Knowledge()
    stats = {name: NodeStats([instance(*m) for m in (STRONG, MIDDLE)], name, shared) for name in names}
    policies = {name: Adaptive(node(target=0.95), stats[name], seed) for seed, name in enumerate(names)}
    rng = random.Random(0)
    late: list[tuple[NodeStats, Any, float]] = []
    used: dict[str, list[str]] = {name: [] for name in names}
    for _ in range(1500):
        for name, ease in names.items():
            arm = policies[name].plan(QUERY, stats[name].arms).arms[0]
            used[name].append(arm.key)
            late.append((stats[name], arm, float(rng.random() < quality[ease][arm.key])))
            if len(late) > 50:
                of, scored, score = late.pop(0)
                of.learn(scored, score)
    served = {name: [quality[ease][arm] for arm in used[name][500:]] for name, ease in names.items()}
    # A twentieth of 0.95 may be lost: three quarters of the calls are the strongest's.
    assert sum(served["four"]) / len(served["four"]) > 0.935 * 0.95
    for name in ("one", "two", "three"):
        assert used[name][500:].count("strong") < 50


@pytest.mark.parametrize("seed", range(3))
def test_a_strongest_that_is_better_than_thought_is_found_out(seed: int) -> None:
    stats = stats_of(STRONG, MIDDLE)
    policy = Adaptive(node(target=0.95), stats, seed)
    for _ in range(10):
        stats.learn(stats.by_key["strong"], 0.8)
    for _ in range(200):
        stats.learn(stats.by_key["middle"], 0.8)
    used = []
    for _ in range(6000):
        arm = policy.plan(QUERY, stats.arms).arms[0]
        used.append(arm.key)
        stats.learn(arm, 0.98 if arm.key == "strong" else 0.8)
    assert used[-1000:].count("strong") > 500


@pytest.mark.parametrize(("right", "most", "least"), [(0.98, 400, 100), (0.3, 40, 0)])
def test_a_model_that_comes_late_is_tried_soon(right: float, most: int, least: int) -> None:
    """For the same price as another: a better one gets the calls, and a bad one next to none."""
    stats = stats_of(STRONG, MIDDLE)
    policy = Adaptive(node(target=0.95), stats, 1)
    quality = {"strong": 0.97, "middle": 0.93, "late": right}
    rng = random.Random(1)
    late: list[tuple[Any, float]] = []
    used = []
    for number in range(900):
        if number == 500:
            stats.add(instance("late", Tier.standard, 0.1))
        arm = policy.plan(QUERY, stats.arms).arms[0]
        used.append(arm.key)
        paid = {"strong": 1.0, "middle": 0.1, "late": 0.1}[arm.key]
        stats.asked(arm, Attempt(str(number), 1, arm.arm, cost_usd=paid), answered=True)
        late.append((arm, float(rng.random() < quality[arm.key])))
        if len(late) > 20:
            stats.learn(*late.pop(0))
    assert least <= used[500:].count("late") <= most


def test_propensities_are_the_frequencies() -> None:
    stats = stats_of(STRONG, MIDDLE, SMALL)
    policy = Adaptive(node(), stats, 7)
    for n in range(500):
        policy.plan(QUERY, stats.arms)  # until the price has settled
        stats.learn(stats.arms[n % 3], 1.0)
    plans = [policy.plan(QUERY, stats.arms) for _ in range(4000)]
    for state in stats.arms:
        mine = [p.propensity for p in plans if p.arms[0] is state]
        if mine:
            assert sum(mine) / len(mine) == pytest.approx(len(mine) / len(plans), abs=0.05)


def test_adaptive_escalates_to_stronger_tiers_in_turn() -> None:
    stats = stats_of(STRONG, MIDDLE, SMALL)
    small = stats.by_key["small"]
    for _ in range(200):
        stats.learn(small, 1.0)
        stats.learn(stats.by_key["middle"], 0.5)
    policy = Adaptive(node(), stats, 0)
    plan = [policy.plan(QUERY, stats.arms) for _ in range(50)][-1]
    assert [s.key for s in plan.arms] == ["small", "middle", "strong"]


def test_a_wanted_latency_rules_out_what_is_slow() -> None:
    stats = stats_of(STRONG, MIDDLE, SMALL)
    small = stats.by_key["small"]
    stats.learn(small, 1.0, 1000.0)
    small.asked = 100
    small.instance.recorder.latency_p95 = lambda: 9.0  # type: ignore[method-assign]
    policy = Adaptive(node(latency=1.0), stats, 0)
    assert {policy.plan(QUERY, stats.arms).arms[0].key for _ in range(200)} <= {"strong", "middle"}
    assert policy.choice() != "small"


def test_direct_is_fixed_and_says_when_its_model_is_gone() -> None:
    stats = stats_of(STRONG, MIDDLE, SMALL)
    assert [s.key for s in Direct(node(model="middle"), stats).plan(QUERY, stats.arms).arms] == ["middle"]
    assert Direct(node(), stats).choice() == "strong"
    with pytest.raises(NoModelAllowed, match=r"node 'n'.*'middle'"):
        Direct(node(model="middle"), stats).plan(QUERY, [stats.by_key["small"]])


def test_switched_goes_up_in_price() -> None:
    stats = stats_of(STRONG, MIDDLE, SMALL)
    assert [s.key for s in Switched(node(), stats).plan(QUERY, stats.arms).arms] == [
        "small",
        "middle",
        "strong",
    ]


def test_parallel_asks_all_and_answers_with_the_strongest() -> None:
    stats = stats_of(SMALL, STRONG, MIDDLE)
    plan = Parallel(node(), stats).plan(QUERY, stats.arms)
    assert plan.together
    assert plan.arms[0].key == "strong"
    assert {s.key for s in plan.arms} == {"strong", "middle", "small"}


def test_every_form_has_a_policy() -> None:
    assert set(POLICIES) == set(Form)


def test_a_revised_score_leaves_no_trace() -> None:
    stats = stats_of(STRONG, SMALL)
    before = (stats.right.copy(), stats.wrong.copy())
    small = stats.by_key["small"]
    stats.learn(small, 0.3)
    stats.learn(small, 0.3, -1.0)
    assert stats.right == pytest.approx(before[0])
    assert stats.wrong == pytest.approx(before[1])
    assert small.scored == 0
