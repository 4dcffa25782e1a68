"""Health, readiness and metrics of a run: real processes, signals and HTTP."""

import contextlib
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from bisect import bisect_right

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from chainwax.flows.merged import merged
from chainwax.flows.metrics import Look, exposition
from chainwax.flows.progress import Counts
from chainwax.flows.serve import Address, address_of
from chainwax.flows.testing import TestModel
from chainwax.router import ConfigError, Feedback, LLMManager, Settings, load_settings
from chainwax.router.recorder import BUCKETS, LLMInterfaceRecorder, _Durations

FLOW = """
from chainwax.flows import Flow
flow = Flow("sort")
team = flow.source("tickets").choose("team", "Which team? {text}", ["billing", "technical"], form="direct")
told = team.feedback("handled", lambda item: item["team"] == item["answers"]["team"], about=["team"])
told.sink("sorted")
"""
CONFIG = """
[run]
epoch_seconds = 0.2
max_in_flight = 4
[defaults]
model = "strong"
[models.strong]
tier = "strongest"
backend = "simulated"
input_cost_per_token = 2e-6
output_cost_per_token = 8e-6
simulation = { accuracy = 1, truth = "tickets.jsonl", latency = 0.2, latency_spread = 0 }
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "sort.py").write_text(FLOW)
    (tmp_path / "chainwax.toml").write_text(CONFIG)
    with (tmp_path / "tickets.jsonl").open("w") as file:
        for n in range(400):
            team = ("billing", "technical")[n % 2]
            file.write(json.dumps({"id": f"t{n}", "text": f"ticket {n}", "answers": {"team": team}}) + "\n")
    return tmp_path


class Run:
    """A command in a process of its own, and what it serves."""

    def __init__(self, place, *arguments, environment=None, serve="0"):
        clean = {k: v for k, v in os.environ.items() if not k.startswith("CHAINWAX_") and k != "PORT"}
        serve = ["--serve", serve] if serve else []
        self.log = place / f"log-{time.monotonic_ns()}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "chainwax.flows.cli", *arguments, *serve],
                cwd=place,
                env=clean | (environment or {}),
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    @property
    def url(self):
        end = time.monotonic() + 30
        while not (found := re.search(r"http://\S+?:\d+/", self.log.read_text())):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, "it says no address"
            time.sleep(0.01)
        return found[0]

    def get(self, path, accept=""):
        """Status and text; (0, "") where nobody answers."""
        request = urllib.request.Request(self.url.rstrip("/") + path, headers={"Accept": accept})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def wait(self, condition, what):
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, f"{what}: {self.log.read_text()}"
            time.sleep(0.01)

    def value(self, name, **labels):
        """The sum of a metric's samples with those labels."""
        found = [
            sample.value
            for family in parse(self.get("/metrics")[1])
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        return sum(found) if found else None

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(60)


@contextlib.contextmanager
def running(place, *arguments, **more):
    run = Run(place, *arguments, **more)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.kill()
        run.process.wait()


BOUND = ["--source", "tickets=tickets.jsonl?batch_size=2", "--sink", "sorted=sorted.jsonl"]


def test_ready_while_it_runs_and_not_from_the_first_signal_on(place):
    with running(place, "run", "sort.py", *BOUND) as run:
        run.wait(lambda: run.get("/readyz")[0] == 200, "never ready")
        assert run.get("/healthz") == (200, '{"alive": true}')
        code, text = run.get("/")
        assert (code, json.loads(text)["flow"], json.loads(text)["state"]) == (200, "sort", "running")
        assert run.get("/nothing")[0] == 404
        run.wait(lambda: (run.value("chainwax_in_flight", model="strong") or 0) > 0, "nothing in flight")
        run.process.send_signal(signal.SIGTERM)
        seen = []
        while (answer := run.get("/readyz"))[0]:
            seen.append(answer)
        # It was draining for as long as its last calls took, and was alive meanwhile.
        assert seen[-1] == (503, '{"ready": false, "state": "draining"}')
        assert run.process.wait(60) == 143


def test_a_signal_while_it_starts_ends_it_too(place):
    # Nobody answers there, and a topic's bus is waited for.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        bus = {"KIND": "kafka", "SERVERS": f"127.0.0.1:{silent.getsockname()[1]}", "CATCH_UP_SECONDS": "60"}
        environment = {f"CHAINWAX_BUS__{name}": value for name, value in bus.items()}
        with running(place, "run", "sort.py", *BOUND, environment=environment) as run:
            assert run.get("/readyz") == (503, '{"ready": false, "state": "starting"}')
            assert run.get("/healthz")[0] == 200
            assert "chainwax_ready 0.0" in run.get("/metrics")[1]
            assert run.end() == 143, run.log.read_text()


def test_metrics_are_those_of_the_run(place):
    environment = {
        "CHAINWAX_NODES__TEAM__BUDGET": "5",
        "CHAINWAX_MODELS__STRONG__SIMULATION__LATENCY": "0.01",
    }
    source = ["--source", "tickets=tickets.jsonl?limit=40", "--source", "wait=wait.jsonl?speed=1x"]
    (place / "wait.jsonl").write_text(
        '{"id": "a", "time": "2026-01-01T00:00:00Z"}\n{"id": "b", "time": "2026-01-01T01:00:00Z"}\n'
    )
    (place / "sort.py").write_text(FLOW + '\nflow.source("wait").sink("waited")\n')
    sinks = ["--sink", "sorted=sorted.jsonl", "--sink", "waited=waited.jsonl"]
    with running(place, "run", "sort.py", *source, *sinks, environment=environment) as run:
        run.wait(lambda: run.value("chainwax_scores", node="team") == 40, "not all are scored")
        simulated = {"simulated": "true"}
        assert (
            run.value("chainwax_calls_total", node="team", arm="strong", tier="strongest", **simulated) == 40
        )
        assert run.value("chainwax_quality", node="team", bound="mean", **simulated) == 1
        assert run.value("gen_ai_client_token_usage_count", gen_ai_token_type="input") == 40
        name = "gen_ai_client_operation_duration_seconds"
        assert run.value(f"{name}_count", gen_ai_operation_name="chat", **simulated) == 40
        assert run.value(f"{name}_bucket", le="+Inf") == 40
        assert run.value(f"{name}_bucket", le="0.01") < 40
        spent = run.value("chainwax_cost_dollars_total", node="team", **simulated)
        assert spent == pytest.approx(run.value("chainwax_budget_spent_dollars", node="team", **simulated))
        assert spent > 0
        assert run.value("chainwax_budget_dollars", node="team") == 5
        assert run.value("chainwax_dead_letters_total") == 0
        assert run.value("chainwax_items_total") >= 40
        assert run.value("chainwax_choice", arm="strong") == 1
        text = run.get("/metrics", accept="application/openmetrics-text; version=1.0.0")[1]
        assert text.endswith("# EOF\n")
        assert {family.name for family in parse_openmetrics(text)} >= {"chainwax_calls", name}
        assert run.end() == 143


def test_one_address_tells_for_all_processes_and_of_a_death(place):
    arguments = ["run", "sort.py", *BOUND, "--processes", "2", "--state", "state"]
    with running(place, *arguments) as run:
        assert run.get("/readyz")[0] == 503  # the processes have just been started
        run.wait(lambda: run.get("/readyz")[0] == 200, "never ready")
        run.wait(lambda: (run.value("chainwax_calls_total") or 0) > 6, "no calls")
        assert run.value("chainwax_processes") == 2
        assert run.value("chainwax_in_flight_limit") == 16
        members = subprocess.run(
            ["pgrep", "-P", str(run.process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        os.kill(int(members[-1]), signal.SIGKILL)
        run.wait(lambda: run.get("/readyz")[0] == 503, "it did not notice")
        run.wait(lambda: run.get("/readyz")[0] == 200, "it did not start again")
        run.wait(lambda: (run.value("chainwax_calls_total") or 0) > 0, "no calls")
        run.process.send_signal(signal.SIGINT)
        run.wait(lambda: run.get("/readyz")[0] in (503, 0), "still ready")
        assert run.process.wait(60) == 130


def test_a_port_that_is_taken_is_an_error_of_one_line(place):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with running(place, "run", "sort.py", *BOUND, serve=address) as run:
            assert run.process.wait(60) == 2
            wanted = (
                f"error: health and metrics cannot be served at {address}: another program listens there\n"
            )
            assert run.log.read_text() == wanted
    assert not (place / "sorted.jsonl").exists()


def test_the_port_may_come_from_the_environment(monkeypatch):
    settings = Settings()
    monkeypatch.delenv("PORT", raising=False)
    assert address_of(None, settings) is None
    monkeypatch.setenv("PORT", "8080")
    assert address_of(None, settings) == Address("127.0.0.1", 8080)
    assert address_of("0.0.0.0:9000", settings) == Address("0.0.0.0", 9000)
    assert address_of("[::1]:9000", settings) == Address("::1", 9000)
    assert str(Address("::1", 9000)) == "[::1]:9000"
    monkeypatch.setenv("CHAINWAX_SERVE__HOST", "0.0.0.0")
    assert address_of(None, load_settings()) == Address("0.0.0.0", 8080)
    monkeypatch.setenv("CHAINWAX_SERVE__PORT", "9090")
    assert address_of(None, load_settings()) == Address("0.0.0.0", 9090)


@pytest.mark.parametrize("wrong", ["", ":80", "host:", "host:http", "65536", "-1", "host:80:x", "٣"])
def test_what_is_no_address_is_refused(wrong):
    with pytest.raises(ConfigError, match="--serve"):
        address_of(wrong, Settings())


def test_what_is_no_port_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("PORT", "http")
    with pytest.raises(ConfigError, match="environment variable PORT: 'http' is no port"):
        address_of(None, Settings())


# -- what the numbers are made of ---------------------------------------------------------------------


@given(st.lists(st.floats(0, 200), max_size=60))
def test_buckets_hold_what_was_at_most_so_long(seconds):
    durations = _Durations()
    for one in seconds:
        durations.add(one)
    found = list(durations.buckets().values())
    # A bound is as exact as the sketch: what lies within a hundredth of it may be on either side.
    low = [sum(one <= bound * 0.98 for one in seconds) for bound in BUCKETS]
    high = [bisect_right(sorted(seconds), bound * 1.02) for bound in BUCKETS]
    assert all(a <= b <= c for a, b, c in zip(low, found, high, strict=True))
    assert found == sorted(found)


def snapshot(scores, settings):
    with LLMManager(settings, backends={"strong": TestModel("yes")}) as manager:
        interface = manager.get_model(node="team")
        for n, score in enumerate(scores):
            interface.query(f"question {n}")
            manager.feedback([Feedback("team", score, call_id=f"{n}", arm="strong", source="t")])
        manager.settle()
        return manager.snapshot()


def test_processes_together_tell_their_sums(tmp_path):
    settings = load_settings(
        run={"recording": None},
        models={
            "strong": {
                "tier": "strongest",
                "backend": "simulated",
                "input_cost_per_token": 1e-6,
                "output_cost_per_token": 1e-6,
            }
        },
    )
    both = merged([snapshot([1.0, 1.0, 1.0], settings), snapshot([0.0], settings)])
    text = exposition(Look("running", "flow", "1", 2, Counts(items=4), both))[0].decode()
    samples = {s.name + str(s.labels.get("bound", "")): s.value for f in parse(text) for s in f.samples}
    assert samples["chainwax_calls_total"] == 4
    assert samples["chainwax_qualitymean"] == 0.75
    assert samples["chainwax_scores"] == 4
    assert samples["gen_ai_client_operation_duration_seconds_count"] == 4
    assert samples["chainwax_call_seconds_count"] == 4


def test_names_from_elsewhere_cannot_break_the_text():
    recorder = LLMInterfaceRecorder()
    hostile = 'a"b\\\n}{'
    model = {
        "tier": "local",
        "simulated": False,
        "provider": hostile,
        "asked_for": hostile,
        "api": "chat",
        "in_flight": 0,
        "waiting": 0,
        "limit": 1,
        "uptime": {
            **dict.fromkeys(
                ("attempts", "reused", "validation_failures", "input_tokens", "output_tokens"), 0
            ),
            "errors_by_class": {hostile: 1},
            "latency_s": recorder.snapshot()["uptime"]["waited_s"],
            "first_token_s": recorder.snapshot()["uptime"]["waited_s"],
        },
    }
    look = Look("running", hostile, "1", 1, Counts(), {"run": hostile, "models": {hostile: model}})
    families = {family.name: family for family in parse(exposition(look)[0].decode())}
    assert families["chainwax_attempt_errors"].samples[0].labels["error_type"] == hostile
    assert families["chainwax_run_info"].samples[0].labels["flow"] == hostile


# -- simulated models elsewhere ------------------------------------------------------------------------


def test_simulated_models_of_another_process_answer_by_their_truth_and_are_marked(place):
    with running(place, "simulate", environment={"OPENAI_API_KEY": ""}) as model:
        environment = {
            "CHAINWAX_MODELS__STRONG__SIMULATION__URL": f"{model.url}v1",
            "CHAINWAX_MODELS__STRONG__SIMULATION__ACCURACY": "0",  # the server's own counts
        }
        bound = ["--source", "tickets=tickets.jsonl?limit=20", "--sink", "sorted=sorted.jsonl"]
        with running(place, "run", "sort.py", *bound, environment=environment, serve="") as run:
            assert run.process.wait(60) == 0, run.log.read_text()
            assert "simulated models strong at" in model.log.read_text()
        assert model.end() == 0
    lines = [json.loads(line) for line in (place / "sorted.jsonl").read_text().splitlines()]
    assert len(lines) == 20
    assert all(line["team"] == line["answers"]["team"] for line in lines)
    with contextlib.closing(sqlite3.connect(place / "chainwax.db")) as recording:
        assert recording.execute("SELECT count(*), min(simulated) FROM attempts").fetchone() == (20, 1)


@pytest.mark.parametrize(
    ("config", "arguments", "wanted"),
    [
        (CONFIG, [], "nobody says where to listen: add --serve PORT"),
        (
            CONFIG.replace("simulated", "llamacpp"),
            ["--serve", "0"],
            "no model of the configuration is simulated",
        ),
    ],
)
def test_what_cannot_be_simulated_is_told(place, config, arguments, wanted):
    (place / "chainwax.toml").write_text(config)
    with running(place, "simulate", *arguments, serve="") as run:
        assert run.process.wait(60) == 2
        assert wanted in run.log.read_text()
