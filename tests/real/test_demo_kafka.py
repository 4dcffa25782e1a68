"""The demo over a real broker, on its first tickets and without its slow model: see ``make demo-kafka``."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from chainwax.flows.demo.over_kafka import demo_over_kafka
from chainwax.flows.demo.scorer import scores_of
from chainwax.flows.demo.support import flow
from chainwax.flows.demo.unscored import flow as unscored
from chainwax.flows.runner import run_job
from chainwax.router import ConfigError

HERE = Path(__file__).parent
TICKETS = Path(sys.modules[scores_of.__module__].__file__).with_name("tickets.jsonl")


def test_every_answer_is_scored_by_a_process_of_its_own(broker, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with demo_over_kafka(tmp_path / "out", broker.servers, Console(stderr=True)) as job:
        models = job.settings.models
        models = {**models, "local": models["local"].model_copy(update={"enabled": False})}
        nodes = {**job.settings.nodes, "draft": job.settings.nodes["draft"].model_copy(update={"deny": ()})}
        job.settings = job.settings.model_copy(update={"models": models, "nodes": nodes})
        job.sources = {"tickets": f"{job.sources['tickets']}&limit=15"}  # of each of two partitions
        outcome = run_job(job, Console(stderr=True), live=False)
    assert (outcome.exit_code, outcome.errors) == (0, [])
    report = outcome.report.as_json()
    assert (report["items"], report["errors"]) == (30, 0)
    assert set(report["simulated"]) == {"standard", "strong"}
    for node in ("language", "team", "mood", "urgent"):
        assert report["nodes"][node]["scores"] == 30
        assert report["nodes"][node]["quality"] > 0.5
    calls = {name: sum(node["calls"].values()) for name, node in report["nodes"].items()}
    assert report["nodes"]["fields"]["scores"] == report["nodes"]["draft"]["scores"] == calls["draft"] > 0
    with (
        pytest.raises(ConfigError, match=r"has the topic 'chainwax-demo\.drafts' of an earlier demo"),
        demo_over_kafka(tmp_path / "again", broker.servers, Console(stderr=True)),
    ):
        pass


def test_it_is_the_demo_without_its_feedback_nodes():
    assert unscored.specs().keys() == flow.specs().keys()
    gone = {name for name, node in flow.nodes.items() if name not in unscored.nodes}
    assert gone == {"handled", "repaired", "sent"}


def test_the_scores_are_those_that_the_demo_gives_itself():
    tickets = [json.loads(line) for line in TICKETS.read_text(encoding="utf-8").splitlines()]
    for ticket in tickets[:50]:
        right = ticket["answers"]
        sorted_ = ticket | {node: right[node] for node in ("language", "team", "mood", "urgent")}
        assert scores_of(sorted_) == dict.fromkeys(("language", "team", "mood", "urgent"), 1.0)
        assert scores_of(sorted_ | {"team": "nobody"})["team"] == 0.0
        answered = sorted_ | {"fields": right["fields"], "draft": right["draft"]}
        assert scores_of(answered) == {"fields": 1.0, "draft": 1.0}


def test_ctrl_c_ends_the_command_first_and_then_the_broker(broker):
    waits = "import signal, sys; print(sys.argv[1], flush=True); signal.pause()"
    command = [sys.executable, str(HERE / "broker.py"), sys.executable, "-c", waits, "{servers}"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    host, _, port = process.stdout.readline().strip().partition(":")
    socket.create_connection((host, int(port)), 5).close()
    os.killpg(process.pid, signal.SIGINT)
    process.stdout.close()
    assert process.wait(60) != 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), 5)
    assert not (HERE.parents[1] / "build" / "kafka" / f"run-{process.pid}").exists()
