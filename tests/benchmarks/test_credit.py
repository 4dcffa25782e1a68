"""The credit benchmark over real flows, small, and its arithmetic."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import credit
import pytest
from credit import SHAPES, World, cost_at, flow_of, frontier, saving
from credit import run as stream

ROOT = Path(__file__).parents[2]
NUMBERS = (
    "saving_kept",
    "gain_over_shared",
    "weak_node_found_after",
    "flow_target_cost_ratio",
    "fixed_cost_ratio",
)


def rows(count: int = 240) -> list[dict[str, Any]]:
    """Eight tasks; the cheap model is right at six of them and mostly wrong at two."""
    made = []
    for n in range(count):
        task = n % 8
        lucky = task < 6 or n % 3 == 0
        made.append(
            {
                "id": f"i{n}",
                "node": f"task{task}",
                "prompt": f"question {n} of task {task}",
                "outcomes": {
                    "dear": {"reward": 1.0, "cost_usd": 0.1},
                    "cheap": {"reward": float(lucky), "cost_usd": 0.001},
                },
            }
        )
    return made


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "small.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    return path


def test_it_measures_all_that_it_names_and_prints_one_line(recording: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "credit.py"), "--recording", str(recording)]
    command += ["--items", "120", "--targets", "0.9", "0.95", "--seeds", "1", "--counterfactual", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = done.stdout.splitlines()
    said = json.loads(line)
    assert said["benchmark"] == "credit"
    assert (said["items"], said["counterfactual"]) == (120, 0.2)
    for name in NUMBERS:
        assert isinstance(said[name], int | float), name
        assert math.isfinite(said[name]), name
    assert set(said["flows"]) == {shape.name for shape in SHAPES}
    assert {"version", "machine", "date", "simulated"} <= set(said)


@pytest.mark.parametrize(("content", "why"), [(None, "cannot be read"), ("{", "cannot be read")])
def test_a_recording_that_is_none_is_refused(tmp_path: Path, content: str | None, why: str) -> None:
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    command = [sys.executable, str(ROOT / "benchmarks" / "credit.py"), "--recording", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert why in done.stderr


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_the_weak_node_has_the_tasks_that_the_cheap_model_loses(shape: credit.Shape) -> None:
    world = World(rows(), shape, 200, seed=1)
    assert world.models == ["dear", "cheap"]

    def lost(node: str) -> float:
        of_all = [world.row(node, n)["outcomes"]["cheap"]["reward"] for n in range(200)]
        return 1.0 - math.fsum(of_all) / len(of_all)

    assert max(shape.nodes, key=lost) == shape.weak
    assert lost(shape.weak) > 0.5
    assert world.fixed(dict.fromkeys(shape.nodes, "dear"))[0] == 1.0
    # Another seed is another stream, the same one the same.
    again = World(rows(), shape, 200, seed=1)
    assert again.stream() == world.stream()
    assert World(rows(), shape, 200, seed=2).stream() != world.stream()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_run_goes_through_the_flow_and_is_paid(shape: credit.Shape) -> None:
    world = World(rows(), shape, 80, seed=1)
    told = stream(world, "credit", 1.0, 1)
    alone = world.fixed(dict.fromkeys(shape.nodes, "dear"))
    assert 0.5 < told.quality <= 1.0
    assert 0.0 < told.cost <= alone[1] * 1.5


def test_the_only_score_of_credit_is_that_of_the_end() -> None:
    world = World(rows(), SHAPES[0], 20, seed=1)
    ends = {way: list(flow_of(world, way, lambda n: None).nodes) for way in credit.WAYS}
    assert [n for n in ends["credit"] if n in ("end", "of_a", "of_b", "of_c")] == ["end"]
    assert [n for n in ends["own"] if n in ("end", "of_a", "of_b", "of_c")] == ["of_a", "of_b", "of_c"]


def test_savings_are_read_off_the_lower_hull() -> None:
    runs = [(0.8, 2.0), (0.9, 1.0), (1.0, 5.0), (0.95, 4.5)]
    assert frontier(runs) == [(0.9, 1.0), (1.0, 5.0)]
    assert cost_at(runs, 0.95) == pytest.approx(3.0)
    assert cost_at(runs, 0.5) == 1.0
    assert saving(runs, [0.9, 1.0], 5.0) == pytest.approx((0.8 + 0.0) / 2)
