"""Credit: the score of an item's end result reaches every call on its path, and finds the weak node."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainwax.connectors import InProcessBus
from chainwax.flows.testing import TestModel
from chainwax.router import (
    CallRef,
    Feedback,
    FreeText,
    LLMManager,
    NodeSpec,
    Prompt,
    load_settings,
)
from chainwax.router.credit import LONGEST, shares, split

Make = Callable[..., LLMManager]


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as stack:

        def manager(recording: Path | None = None, run: str = "run") -> LLMManager:
            settings = load_settings(
                run={"recording": recording, "seed": 1},
                models={
                    name: {
                        "tier": tier,
                        "backend": "simulated",
                        "input_cost_per_token": price,
                        "output_cost_per_token": price,
                    }
                    for name, tier, price in (("strong", "strongest", 1e-4), ("small", "local", 1e-6))
                },
            )
            backends = {name: TestModel() for name in ("strong", "small")}
            made = LLMManager(settings, backends=backends, bus=InProcessBus())
            stack.callback(made.close)
            nodes = [NodeSpec(name, Prompt("{text}"), FreeText()) for name in ("a", "b", "c")]
            made.begin_run("flow", run, nodes=nodes)
            return made

        yield manager


def path_of(number: int, **arms: str) -> tuple[CallRef, ...]:
    return tuple(CallRef(node, f"{node}{number}", arm) for node, arm in arms.items())


def scored(number: int, score: float, path: tuple[CallRef, ...], **more: Any) -> Feedback:
    last = path[-1]
    return Feedback(last.node, score, last.call_id, arm=last.arm, source="end", path=path, **more)


def beta(manager: LLMManager, node: str, arm: str) -> tuple[float, float]:
    stats = manager.interfaces["flow", node].router.stats
    index = stats.by_key[arm].index
    return float(stats.right[index]), float(stats.wrong[index])


class TestShares:
    @given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
    def test_at_the_truth_nothing_moves_on_average(self, expected: list[float]) -> None:
        bounded = [min(max(p, 0.05), 0.98) for p in expected]
        whole = 1.0
        for p in bounded:
            whole *= p
        for p, share in zip(bounded, shares(expected), strict=True):
            assert 0.0 < share.weight <= 1.0 + 1e-9
            step = whole * share.weight * (1.0 / share.others - p) - (1.0 - whole) * share.weight * p
            assert step == pytest.approx(0.0, abs=1e-9)

    @given(st.lists(st.floats(0.05, 0.98), min_size=1, max_size=6), st.booleans())
    def test_a_step_is_one_of_expectation_maximisation(self, expected: list[float], right: bool) -> None:
        whole = 1.0
        for p in expected:
            whole *= p
        for p, share in zip(expected, shares(expected), strict=True):
            posterior = 1.0 if right else 1.0 - (1.0 - p) / (1.0 - whole)
            step = share.weight * (right / share.others - p)
            assert step == pytest.approx(posterior - p, abs=1e-9)

    def test_a_lone_call_gets_the_whole_score(self) -> None:
        assert shares([0.7]) == [(1.0, pytest.approx(1.0))]

    def test_no_call_is_beyond_doubt(self) -> None:
        assert all(share.weight > 0.0 for share in shares([1.0, 1.0, 1.0]))

    def test_blame_falls_on_the_doubtful(self) -> None:
        sure, doubtful = shares([0.95, 0.5])
        assert doubtful.weight > 5 * sure.weight

    def test_of_a_very_long_path_the_last_calls_count(self) -> None:
        path = tuple(CallRef("a", str(n), "x") for n in range(LONGEST + 50))
        told = split(scored(0, 1.0, path), lambda ref: 0.9)
        assert [one.call_id for one in told] == [str(n) for n in range(50, LONGEST + 50)]

    def test_calls_that_nobody_knows_are_left_out(self) -> None:
        told = split(scored(0, 1.0, path_of(0, a="x", b="y")), lambda ref: 0.9 if ref.node == "b" else None)
        assert [(one.node, one.weight) for one in told] == [("b", pytest.approx(1.0))]


class TestLearning:
    def test_every_call_of_the_path_learns(self, make: Make) -> None:
        manager = make()
        manager.feedback([scored(0, 0.0, path_of(0, a="small", b="strong", c="small"))])
        manager.settle()
        assert beta(manager, "a", "small")[1] > 1.0
        assert beta(manager, "b", "strong")[1] > 1.0
        # The strongest is trusted most, and blamed least.
        assert beta(manager, "b", "strong")[1] - 1.0 < beta(manager, "a", "small")[1] - 1.0

    def test_a_revised_score_takes_the_earlier_shares_back(self, make: Make) -> None:
        once, twice = make(run="once"), make(run="twice")
        path = path_of(0, a="small", b="small")
        once.feedback([scored(0, 1.0, path)])
        twice.feedback([scored(0, 0.0, path)])
        twice.settle()
        twice.feedback([scored(0, 1.0, path)])
        once.settle()
        twice.settle()
        # The second time the calls are expected to get what the first score made of them.
        right, wrong = beta(twice, "a", "small")
        scores = twice.interfaces["flow", "a"].router.stats.by_key["small"].scored
        assert right + wrong == pytest.approx(2.0 + scores)
        assert right / (right + wrong) > 0.5 < beta(once, "a", "small")[0] / sum(beta(once, "a", "small"))

    def test_a_late_start_knows_the_same(self, make: Make, tmp_path: Path) -> None:
        rng = random.Random(1)
        first = make(tmp_path / "run.db")
        told = []
        for n in range(60):
            path = path_of(
                n, **{node: rng.choice(["strong", "small"]) for node in ("a", "b", "c")[: 2 + n % 2]}
            )
            told.append(scored(n, float(rng.random() < 0.6), path, time=1000.0 + n))
        first.feedback(told)
        first.settle()
        known = {node: beta(first, node, "small") for node in ("a", "b", "c")}
        first.close()
        second = make(tmp_path / "run.db", "other")
        second.settle()
        assert {node: beta(second, node, "small") for node in known} == known

    def test_the_weak_node_is_found_by_end_scores_alone(self, make: Make) -> None:
        quality = {"a": 0.95, "b": 0.6, "c": 0.95}
        rng = random.Random(3)
        manager = make()
        for n in range(1500):
            arms = {node: rng.choice(["strong", "small"]) for node in quality}
            right = all(
                rng.random() < (quality[node] if arm == "small" else 0.95) for node, arm in arms.items()
            )
            manager.feedback([scored(n, float(right), path_of(n, **arms))])
        manager.settle()
        lost = {}
        for node in quality:
            router = manager.interfaces["flow", node].router
            strong, small = router.expected("strong"), router.expected("small")
            assert strong is not None
            assert small is not None
            lost[node] = 1.0 - small / strong
        assert lost["b"] == pytest.approx(1 - 0.6 / 0.95, abs=0.08)
        assert abs(lost["a"]) < 0.07
        assert abs(lost["c"]) < 0.07

    def test_weights_that_are_none_are_refused(self, make: Make) -> None:
        manager = make()
        path = path_of(0, a="small", b="small")
        manager.feedback([scored(0, 1.0, path, weight=w) for w in (-0.1, 1.1, float("nan"))])
        manager.settle()
        assert manager.refused_feedback == 3

    def test_a_path_of_unknown_nodes_is_refused(self, make: Make) -> None:
        manager = make()
        manager.feedback([scored(0, 1.0, path_of(0, x="small", y="small"))])
        manager.settle()
        assert manager.refused_feedback == 1
