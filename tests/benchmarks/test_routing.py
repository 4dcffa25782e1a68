"""The arithmetic of the routing benchmark, and what its stream lets a policy see and pay."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _frontier import apgr, call_share, frontier_at, hull, hull_at, margins
from _recorded import Outcome, Recorded, RecordedItem, read_recording, settings_for, stream, synthetic
from routing import running_ratio, sweep

WEAK, STRONG = 0.2, 0.8


def test_a_hull_is_concave_and_ends_at_the_best() -> None:
    points = [(1.0, 0.2), (2.0, 0.3), (3.0, 0.8), (4.0, 0.7), (5.0, 0.9), (1.5, 0.1)]
    assert hull(points) == [(1.0, 0.2), (3.0, 0.8), (5.0, 0.9)]
    # A mixture costs what its parts do; below the cheapest and above the best nothing changes.
    assert hull_at(np.array([0.5, 2.0, 4.0, 9.0]), points) == pytest.approx([0.2, 0.5, 0.85, 0.9])


def test_of_two_models_at_one_price_the_better_counts() -> None:
    assert hull([(1.0, 0.5), (1.0, 0.7), (1.0, 0.6)]) == [(1.0, 0.7)]


def test_a_frontier_is_linear_in_the_logarithm_and_flat_outside() -> None:
    runs = [(0.1, 0.9), (0.001, 0.3), (0.01, 0.7)]
    at = frontier_at(np.array([1e-4, 1e-3, 10**-2.5, 10**-1.5, 1.0]), runs)
    assert at == pytest.approx([0.3, 0.3, 0.5, 0.8, 0.9])


def test_no_hull_is_taken_of_the_runs() -> None:
    assert frontier_at(np.array([0.01]), [(0.001, 0.9), (0.01, 0.2), (0.1, 0.95)]) == pytest.approx([0.2])


def test_margins_of_a_mixture_are_the_curvature_between_its_runs_alone() -> None:
    fixed = [(0.001, 0.2), (0.1, 0.8)]
    costs = np.geomspace(0.001, 0.1, 2001)
    mixture = list(zip(costs, hull_at(costs, fixed), strict=True))
    assert margins(mixture, fixed) == pytest.approx(np.zeros(50), abs=1e-5)
    better = [(cost, reward + 0.05) for cost, reward in mixture]
    assert margins(better, fixed) == pytest.approx(np.full(50, 0.05), abs=1e-5)


def test_margins_end_at_the_best_model_and_not_at_the_dearest() -> None:
    fixed = [(0.001, 0.2), (0.01, 0.9), (0.1, 0.5)]
    # Above the best model's cost a run may be as bad as it likes.
    runs = [(0.001, 0.2), (0.01, 0.9), (0.0100001, 0.0)]
    assert margins(runs, fixed)[-1] == pytest.approx(0.0, abs=1e-9)


def test_a_free_model_has_a_place_on_the_axis() -> None:
    margin = margins([(0.0, 0.5), (0.01, 0.9)], [(0.0, 0.5), (0.01, 0.9)])
    assert np.isfinite(margin).all()
    assert margin[0] == pytest.approx(0.0, abs=1e-3)


def test_random_routing_recovers_half_of_the_gap() -> None:
    line = [(share / 10, WEAK + (STRONG - WEAK) * share / 10) for share in range(11)]
    assert apgr(line, WEAK, STRONG) == pytest.approx(0.5)
    assert call_share(0.5, line, WEAK, STRONG) == pytest.approx(0.5)
    assert call_share(0.8, line, WEAK, STRONG) == pytest.approx(0.8)


def test_perfect_routing_recovers_more() -> None:
    # The strong model is better at 60 % of the items, and is asked for those first.
    perfect = [(0.0, WEAK), (0.6, STRONG), (1.0, STRONG)]
    assert apgr(perfect, WEAK, STRONG) == pytest.approx(0.7)
    assert call_share(0.5, perfect, WEAK, STRONG) == pytest.approx(0.3)


def test_what_no_run_reached_counts_as_the_end_did() -> None:
    # Asked at 20 to 40 % of the items alone: 0.2 · 0.5 + 0.2 · 0.75 + 0.6 · 1 of the gap.
    assert apgr([(0.4, STRONG), (0.2, 0.5)], WEAK, STRONG) == pytest.approx(0.2 * 0.5 + 0.2 * 0.75 + 0.6)
    assert call_share(0.8, [(0.2, 0.3), (0.4, 0.4)], WEAK, STRONG) is None


def test_the_running_ratio_is_the_lowest_after_two_hundred_items() -> None:
    best = np.ones(1000)
    own = np.ones(1000)
    own[:100] = 0.0  # at item 200 half of all is right, and it gets better from there
    assert running_ratio([own], [best]) == pytest.approx(0.5)
    own[:] = 1.0
    own[500:600] = 0.0
    assert running_ratio([own, best], [best, best]) == pytest.approx(500 / 600)
    assert running_ratio([own[:199]], [best[:199]]) is None


def outcomes(**rewards: float) -> dict[str, Outcome]:
    costs = {"small": 0.001, "middle": 0.01, "large": 0.1}
    return {model: Outcome(reward, costs[model], None, f"says {model}") for model, reward in rewards.items()}


def two_nodes(items: int = 300) -> Recorded:
    """The small model is right at one node and wrong at the other."""
    made = []
    for n in range(items):
        node = "easy" if n % 2 else "hard"
        right = 1.0 if n % 2 else 0.0
        made.append(RecordedItem(f"i{n}", node, f"question {n}", outcomes(small=right, large=1.0)))
    return Recorded("two", made)


def test_all_that_is_asked_is_paid_and_the_shares_are_right() -> None:
    recorded = two_nodes()
    ledger = stream(recorded, settings_for(recorded, 0, {"form": "parallel"}))
    assert ledger.gained.sum() >= 290  # alone, the small one is tried at the hard node
    asked = ledger.asked
    both = asked["large"] & asked["small"]
    assert both[:60].all()  # until it is settled who will do at either node
    assert not both[-100:].any()
    assert ledger.paid == pytest.approx(0.1 * asked["large"] + 0.001 * asked["small"])


@pytest.mark.parametrize("form", ["adaptive", "switched"])
def test_a_policy_learns_from_the_stream(form: str) -> None:
    recorded = two_nodes(1800)
    ledger = stream(recorded, settings_for(recorded, 0, {"form": form}))
    late = [model for item, model in zip(ledger.items, ledger.used, strict=True) if item.node == "easy"][
        -200:
    ]
    assert late.count("small") > 100
    assert ledger.gained.mean() > 0.95


def test_without_feedback_and_with_feedback_that_comes_too_late_nothing_is_learned() -> None:
    recorded = two_nodes(400)
    settings = settings_for(recorded, 0, {"form": "adaptive"})
    silent = stream(recorded, settings, share=0.0)
    late = stream(recorded, settings, delay=400)
    assert silent.used == late.used
    assert silent.used != stream(recorded, settings).used


def test_the_same_seed_gives_the_same_run() -> None:
    recorded = synthetic(400)
    for form in ("adaptive", "switched"):
        one, two = (stream(recorded, settings_for(recorded, 3, {"form": form}), seed=3) for _ in range(2))
        assert one.used == two.used
        assert (one.paid == two.paid).all()


def test_what_was_learned_before_is_used_and_not_measured() -> None:
    recorded = two_nodes(300)
    settings = settings_for(recorded, 0, {"form": "adaptive"})
    cold, warm = stream(recorded, settings), stream(recorded, settings, warm=two_nodes(900))
    assert len(warm.paid) == 300
    assert warm.paid.sum() < cold.paid.sum()


def test_an_item_that_nobody_answers_gains_nothing() -> None:
    recorded = two_nodes(100)
    nothing = {node: {"budget": 0.0} for node in recorded.nodes}
    ledger = stream(recorded, settings_for(recorded, 0, {}, nodes=nothing))
    assert ledger.paid.sum() == 0
    assert ledger.gained.sum() == 0


def test_tiers_go_by_price_alone() -> None:
    items = [RecordedItem("a", "n", "?", outcomes(small=1.0, large=0.0, middle=0.5))]
    recorded = Recorded("r", items)
    assert recorded.models == ["large", "middle", "small"]
    tiers = {name: model.tier.value for name, model in settings_for(recorded, 0, {}).models.items()}
    assert tiers == {"large": "strongest", "middle": "standard", "small": "local"}


def test_flat_costs_are_the_mean_of_each_model() -> None:
    items = [RecordedItem(f"i{n}", "n", "?", {"a": Outcome(1.0, float(n), None, "")}) for n in range(3)]
    recorded = Recorded("flat", items)
    assert [item.outcomes["a"].cost for item in recorded.flat().items] == [1.0] * 3
    assert [item.outcomes["a"].cost for item in recorded.items] == [0.0, 1.0, 2.0]


def test_one_model_alone_is_a_recording_too() -> None:
    recorded = Recorded("one", [RecordedItem("a", "n", "?", outcomes(large=0.7))] * 3)
    ledger = stream(recorded, settings_for(recorded, 0, {"form": "adaptive"}))
    assert ledger.gained.mean() == pytest.approx(0.7)


@pytest.mark.parametrize(("models", "policy"), [(3, "adaptive"), (2, "adaptive"), (2, "switched")])
def test_the_sweep_has_eleven_values_from_the_price_list(models: int, policy: str) -> None:
    recorded = synthetic(50) if models == 3 else two_nodes(50)
    for item in recorded.items:
        item.outcomes = dict(list(item.outcomes.items())[:models])
    recorded = Recorded("few", recorded.items)
    before = sweep(recorded, policy)
    assert len({str(setting) for setting in before}) == 11
    assert before[0].flat == (models == 2 and policy == "adaptive")
    for item in recorded.items:
        for outcome in item.outcomes.values():
            outcome.reward = 1.0 - outcome.reward  # what nobody knows before the run changes nothing
    assert sweep(recorded, policy) == before


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def row(n: int, **changes: Any) -> dict[str, Any]:
    outcome = {"reward": 1.0, "cost_usd": 0.1, "input_tokens": None, "output_tokens": None, "response": None}
    return {
        "id": f"r{n}",
        "node": "n",
        "prompt": "?",
        "outcomes": {"a": outcome, "b": {**outcome, "reward": 0.0, **changes}},
    }


def test_a_text_that_is_not_recorded_tells_nothing(tmp_path: Path) -> None:
    recorded = read_recording(write(tmp_path / "r.jsonl.gz", [row(n) for n in range(50)]))
    texts = [o.response for item in recorded.items for o in item.outcomes.values()]
    assert len(set(texts)) == 100
    assert len({len(text) for text in texts}) == 1


@pytest.mark.parametrize("bad", [{"reward": None}, {"cost_usd": None}, {"reward": 1.5}, {"cost_usd": -1.0}])
def test_items_with_an_unknown_outcome_are_left_out(tmp_path: Path, bad: dict[str, Any]) -> None:
    recorded = read_recording(write(tmp_path / "r.jsonl.gz", [row(0), row(1, **bad), row(2)]))
    assert [item.id for item in recorded.items] == ["r0", "r2"]
    assert recorded.left_out == 1


def test_a_recording_without_outcomes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no item has a reward and a cost of every model"):
        read_recording(write(tmp_path / "r.jsonl.gz", [{"id": "a", "node": "n", "outcomes": {}}]))
    (tmp_path / "bad.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(SystemExit, match=r"bad\.jsonl\.gz"):
        read_recording(tmp_path / "bad.jsonl.gz")
    with pytest.raises(SystemExit, match=r"gone\.jsonl"):
        read_recording(tmp_path / "gone.jsonl")
