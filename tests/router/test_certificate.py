"""The certificate of a target: its claims by simulation, what it takes, and the router."""

from __future__ import annotations

import itertools
import json
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainwax.connectors import InProcessBus
from chainwax.flows.testing import TestModel
from chainwax.router import (
    BackendDown,
    CallResult,
    Choice,
    Feedback,
    Form,
    LLMManager,
    NodeSpec,
    Prompt,
    Query,
    Rules,
    load_settings,
)
from chainwax.router.certificate import ALPHA, Certificate, Certified, certified_flow

# -- what it claims ----------------------------------------------------------------------------------


def pairs(
    certificate: Certificate, rng: random.Random, own: float, strong: float, differ: float
) -> Iterator[None]:
    """Pairs without end: models that differ at that share, where one of them is right, else both are."""
    for n in itertools.count():
        differs = rng.random() < differ
        strongest = differs and certificate.coin()
        chance = (strong if strongest else own) if differs else 1.0
        name = f"{id(rng)}/{n}"
        certificate.paired(name, "x", differ=differs, strongest=strongest)
        certificate.learn(name, "x", float(rng.random() < chance))
        yield


def says(certificate: Certificate, stream: Iterator[None], n: int) -> list[Certified]:
    return [certificate.status for _ in itertools.islice(stream, n)]


@pytest.mark.parametrize("target", [0.9, 0.99])
def test_exactly_at_the_target_it_is_seldom_called_either(target: float) -> None:
    # margin = (1 − differ)·(1 − q) + differ·(own − q·strong) = 0: the hardest case for both claims.
    differ, strong = 0.3, 0.6
    own = target * strong - (1 - differ) * (1 - target) / differ
    ever = {Certified.met: 0, Certified.not_met: 0}
    for seed in range(150):
        certificate = Certificate(target, 1.0, seed=seed)
        stream = pairs(certificate, random.Random(seed), own, strong, differ)
        seen = set(says(certificate, stream, 400))
        for status in ever:
            ever[status] += status in seen
    assert ever[Certified.met] <= 150 * ALPHA
    # The bound on what was lately so is one on the mean time to a false alarm: 400 of at least 1,000.
    assert ever[Certified.not_met] <= 150 * ALPHA * 2


def test_what_is_clear_is_soon_called_so() -> None:
    above, below = [], []
    for seed in range(20):
        for own, found, wanted in ((0.7, above, Certified.met), (0.3, below, Certified.not_met)):
            certificate = Certificate(0.99, 1.0, seed=seed)
            said = says(certificate, pairs(certificate, random.Random(seed), own, 0.5, 0.4), 2500)
            assert wanted in said
            assert not set(said) & ({Certified.met, Certified.not_met} - {wanted})
            found.append(said.index(wanted))
    # Four of five at a margin of 0.09 or −0.07.
    assert sorted(above)[15] < 1000
    assert sorted(below)[15] < 1500


def test_the_bounds_hold_the_mean_margin_at_all_times() -> None:
    differ, own, strong, q = 0.3, 0.5, 0.6, 0.95
    margin = (1 - differ) * (1 - q) + differ * (own - q * strong)
    missed = 0
    for seed in range(60):
        certificate = Certificate(q, 1.0, seed=seed)
        for number, _ in enumerate(
            itertools.islice(pairs(certificate, random.Random(seed), own, strong, differ), 300)
        ):
            if number % 20 == 0 and certificate.epoch == 1:
                low, high = certificate.bounds()
                if not low <= margin <= high:
                    missed += 1
                    break
    assert missed <= 60 * 2 * ALPHA
    assert high - low < 0.5


def test_a_drift_takes_it_back_though_the_mean_is_still_above() -> None:
    certificate = Certificate(0.95, 1.0, seed=1)
    rng = random.Random(1)
    assert says(certificate, pairs(certificate, rng, 0.7, 0.5, 0.4), 3000)[-1] is Certified.met
    said = says(certificate, pairs(certificate, rng, 0.2, 0.6, 0.4), 900)
    assert Certified.not_met in said  # 900 pairs at −0.12 after 3,000 at +0.12: the mean is well above 0
    # And what has got good again is met again, in an epoch of its own.
    assert certificate.epoch > 1
    assert says(certificate, pairs(certificate, rng, 0.8, 0.5, 0.4), 2000)[-1] is Certified.met


def test_the_coin_is_no_bias() -> None:
    rng = random.Random(3)
    certificate = Certificate(0.9, 1.0, seed=3)
    own, strong, differ = 0.8, 0.6, 0.5
    for _ in itertools.islice(pairs(certificate, rng, own, strong, differ), 20_000):
        pass
    margin = (1 - differ) * 0.1 + differ * (own - 0.9 * strong)
    assert certificate.as_json()["margin"] == pytest.approx(margin, abs=0.03)


def test_the_share_goes_down_once_it_is_known_or_when_it_never_will_be() -> None:
    certificate = Certificate(0.9, 0.5, seed=1)
    assert certificate.share_now == 0.5
    says(certificate, pairs(certificate, random.Random(1), 0.9, 0.1, 0.5), 500)
    assert certificate.status is Certified.met
    assert certificate.share_now == pytest.approx(0.1)
    unscored = Certificate(0.9, 0.5, seed=1)
    for n in range(20_000):
        unscored.paired(str(n), "x", differ=True, strongest=False)
    assert unscored.share_now == pytest.approx(0.1)
    assert unscored.status is Certified.unknown


def test_a_flow_is_met_where_each_node_is_at_its_part_of_the_error() -> None:
    one, other = Certificate(0.9, 1.0, seed=1), Certificate(0.9, 1.0, seed=2)
    stream = pairs(one, random.Random(1), 0.9, 0.1, 0.5)
    while one.status is not Certified.met:
        next(stream)
    assert certified_flow([one]) is Certified.met
    assert certified_flow([one, Certified.met]) is Certified.met
    assert certified_flow([one, other]) is Certified.unknown
    assert certified_flow([one, Certified.unknown]) is Certified.unknown
    says(other, pairs(other, random.Random(2), 0.9, 0.1, 0.5), 500)
    # Two claims take more evidence than one: the first has just enough for one.
    assert certified_flow([one, other]) is Certified.unknown
    says(one, stream, 300)
    assert certified_flow([one, other]) is Certified.met
    says(other, pairs(other, random.Random(2), 0.0, 0.9, 0.9), 200)
    assert certified_flow([one, other]) is Certified.not_met
    assert certified_flow([]) is Certified.unknown


# -- what it takes -----------------------------------------------------------------------------------

SCORE = st.floats(0.0, 1.0)
KIND = st.sampled_from([(False, False), (False, True), (True, False), (True, True)])


@given(st.lists(st.tuples(KIND, SCORE, st.lists(SCORE, max_size=3)), max_size=12))
def test_a_revised_score_replaces_the_earlier(
    calls: list[tuple[tuple[bool, bool], float, list[float]]],
) -> None:
    revised, plain = Certificate(0.95, 1.0), Certificate(0.95, 1.0)
    for certificate in (revised, plain):
        for n, ((differ, strongest), _, _) in enumerate(calls):
            certificate.paired(str(n), "x", differ=differ, strongest=strongest)
    for n, (_, score, later) in enumerate(calls):
        revised.learn(str(n), "x", score)
        for before, after in itertools.pairwise([score, *later]):
            revised.learn(str(n), "x", after, before)
        plain.learn(str(n), "x", later[-1] if later else score)
    assert revised.scored == plain.scored == len(calls)
    assert revised.bounds() == pytest.approx(plain.bounds(), abs=1e-6)
    assert json.loads(json.dumps(revised.as_json(), allow_nan=False)) == revised.as_json()


def test_a_million_scores_of_one_call_are_one() -> None:
    certificate = Certificate(0.95, 1.0, seed=1)
    certificate.paired("one", "x", differ=True, strongest=False)
    for _ in range(20_000):
        certificate.learn("one", "x", 1.0)
    assert certificate.scored == 1
    assert certificate.status is Certified.unknown


def test_what_was_no_pair_says_nothing() -> None:
    certificate = Certificate(0.95, 1.0, arms=["x"])
    certificate.paired("one", "x", differ=True, strongest=False)
    assert not certificate.learn("other", "x", 1.0)
    assert not certificate.learn("one", "y", 1.0)  # of the answer that was not served
    certificate.renew()
    assert not certificate.learn("one", "x", 1.0)  # of what was served before
    assert certificate.scored == 0


def test_memory_is_bounded() -> None:
    certificate = Certificate(0.95, 1.0)
    for n in range(25_000):
        certificate.paired(str(n), "x", differ=False, strongest=False)
    assert len(certificate.state()["pairs"]) == 20_000


def test_a_new_prompt_version_never_takes_the_certificate() -> None:
    certificate = Certificate(0.9, 1.0, arms=["small"], about="v1", seed=1)
    says(certificate, pairs(certificate, random.Random(1), 0.9, 0.1, 0.5), 500)
    assert certificate.status is Certified.met
    saved = json.loads(json.dumps(certificate.state()))
    # Saved and loaded it goes on as it would have.
    same = Certificate(0.9, 1.0, arms=["small"], about="v1", seed=9)
    same.restore(saved)
    assert same.as_json() == certificate.as_json()
    assert [same.draw() for _ in range(50)] == [certificate.draw() for _ in range(50)]
    # As another version of the prompt, as another arm before or after, with another target: it does not.
    for other in (
        Certificate(0.9, 1.0, arms=["small"], about="v2"),
        Certificate(0.9, 1.0, arms=["small", "small[prompt=v2]"], about="v1"),
        Certificate(0.8, 1.0, arms=["small"], about="v1"),
    ):
        other.restore(saved)
        assert other.status is Certified.unknown
        assert (other.scored, other.epoch) == (0, 2)
    assert certificate.serves("small") is False
    assert certificate.serves("small[prompt=v2]") is True
    assert certificate.status is Certified.unknown


def test_the_error_of_all_epochs_together_is_bounded() -> None:
    certificate = Certificate(0.9, 1.0)
    spent = 0.0
    for _ in range(1000):
        spent += certificate.alpha
        certificate.renew()
    assert 0.95 * ALPHA < spent <= ALPHA


# -- the router --------------------------------------------------------------------------------------


@pytest.fixture
def asked() -> Iterator[Callable[..., Any]]:
    """Ask a node in rounds: the small model always answers ``small``'s, the strong one ``strong``'s."""
    managers = []

    def ask(
        rounds: int, score: Callable[[str], float], **options: Any
    ) -> tuple[LLMManager, list[CallResult]]:
        models = {
            "strong": options.pop("strong", TestModel("a")),
            "small": options.pop("small", TestModel("b")),
        }
        price = {"input_cost_per_token": 1e-5, "output_cost_per_token": 1e-5}
        settings = load_settings(
            run={"recording": None, "seed": 1},
            models={
                "strong": {"tier": "strongest", "backend": "simulated", "retries": 0, **price},
                "small": {
                    "tier": "local",
                    "backend": "simulated",
                    "input_cost_per_token": 0.0,
                    "output_cost_per_token": 0.0,
                },
            },
        )
        manager = LLMManager(settings, backends=models, bus=InProcessBus())
        managers.append(manager)
        manager.begin_run("flow", "run")
        spec = NodeSpec(
            "node",
            Prompt("{text}"),
            Choice(["a", "b"]),
            **{"form": Form.direct, "model": "small", "certify": 0.5, **options},
        )
        node = manager.register(spec)
        results: list[CallResult] = []
        for number in range(rounds):
            left = threading.Semaphore(0)
            batch: list[CallResult] = []

            def done(query: Query, result: CallResult) -> None:
                batch.append(result)  # noqa: B023
                left.release()  # noqa: B023

            node.submit([node.bind({"text": "x"}, position=f"{number}/{n}") for n in range(50)], done)
            for _ in range(50):
                assert left.acquire(timeout=20)
            manager.feedback(
                [Feedback("node", score(r.value), r.call_id, arm=r.ref.arm) for r in batch if r.error is None]
            )
            manager.settle()
            results += batch
        return manager, results

    yield ask
    for manager in managers:
        manager.close()


def decisions(manager: LLMManager) -> list[str]:
    bus = manager._bus
    assert isinstance(bus, InProcessBus)
    return [d.kind for d in bus.decisions]


def test_a_good_model_is_certified_and_a_fair_part_is_paired(asked: Callable[..., Any]) -> None:
    manager, results = asked(10, lambda value: float(value == "b"))
    router = manager.snapshot()["interfaces"]["node"]["router"]
    assert router["certificate"]["status"] == "met"
    assert router["certificate"]["margin_low"] >= 0
    assert decisions(manager) == ["target_met"]
    assert manager.snapshot()["certified"] == {"flow": {"status": "met"}}
    # Where the two differed a coin served the strongest's answer; what was not paired is the small one's.
    assert 0.02 < sum(r.arm.model == "strong" for r in results) / len(results) < 0.3
    paid = [r for r in results if len(r.attempts) == 2]
    assert all(r.cost_usd > 0 for r in paid)
    assert 0.05 < len(paid) / len(results) < 0.5


def test_a_bad_model_falls_back_and_comes_back_when_it_got_good(asked: Callable[..., Any]) -> None:
    told = itertools.count()
    manager, results = asked(26, lambda value: float((value == "a") == (next(told) < 400)))
    assert [kind for kind in decisions(manager) if kind != "drift"] == ["target_not_met", "target_met"]
    before, after = results[350:400], results[-50:]
    # All but the paired calls went to the strongest; in the end none but the paired do.
    assert all(r.arm.model == "strong" for r in before if len(r.attempts) == 1)
    assert sum(r.arm.model == "strong" for r in before) > 25
    assert all(r.arm.model == "small" for r in after if len(r.attempts) == 1)


def test_a_flow_says_so_where_a_target_is_not_met(asked: Callable[..., Any]) -> None:
    manager, _ = asked(8, lambda value: float(value == "a"))
    assert manager.snapshot()["interfaces"]["node"]["router"]["certificate"]["status"] == "not met"
    assert manager.snapshot()["certified"] == {"flow": {"status": "not met"}}


def test_where_a_budget_is_set_it_wins(asked: Callable[..., Any]) -> None:
    manager, results = asked(8, lambda value: float(value == "a"), budget=100.0)
    assert manager.snapshot()["interfaces"]["node"]["router"]["certificate"]["status"] == "not met"
    assert all(r.arm.model == "small" for r in results[-50:] if len(r.attempts) == 1)


def test_without_feedback_nothing_is_known(asked: Callable[..., Any]) -> None:
    manager, _ = asked(2, lambda value: float("nan"))
    certificate = manager.snapshot()["interfaces"]["node"]["router"]["certificate"]
    assert certificate["status"] == "not yet known"
    assert (certificate["scored"], certificate["margin"]) == (0, None)
    assert manager.refused_feedback == 100


def test_the_strongest_alone_keeps_its_target_by_definition(asked: Callable[..., Any]) -> None:
    manager, _ = asked(1, lambda value: 0.0, model="strong", certify=0.0)
    assert manager.snapshot()["interfaces"]["node"]["router"]["certificate"] == {
        "status": "met",
        "why": "the strongest model answered every call",
    }


def test_a_strongest_that_is_down_pairs_nothing_and_costs_no_answer(asked: Callable[..., Any]) -> None:
    manager, results = asked(2, lambda value: 1.0, strong=TestModel([BackendDown("gone")]))
    assert {r.value for r in results} == {"b"}
    assert manager.snapshot()["interfaces"]["node"]["router"]["certificate"]["pairs"] == 0


def test_a_parallel_node_is_served_the_strongest_first_and_pairs_nothing(asked: Callable[..., Any]) -> None:
    manager, results = asked(1, lambda value: 1.0, form=Form.parallel, model=None)
    assert {r.arm.model for r in results} == {"strong"}  # several at once: the strongest's answer is used
    assert manager.snapshot()["interfaces"]["node"]["router"]["certificate"]["status"] == "met"


def test_pairs_and_fallback_never_reach_a_model_that_is_denied(asked: Callable[..., Any]) -> None:
    strong = TestModel("a")
    _, results = asked(3, lambda value: 0.0, strong=strong, rules=Rules(deny=("strong",)), certify=1.0)
    assert strong.prompts == []
    assert {r.value for r in results} == {"b"}


def test_bets_leave_some_capital_whatever_comes() -> None:
    worst = Certificate(1.0, 1.0)
    for score, strongest in itertools.product((0.0, 1.0), (False, True)):
        for n in range(2000):
            worst.paired(f"{score}{strongest}{n}", "x", differ=True, strongest=strongest)
            worst.learn(f"{score}{strongest}{n}", "x", score)
            assert np.isfinite(worst.bounds()).all()
