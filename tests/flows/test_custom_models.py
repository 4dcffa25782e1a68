"""``chainwax models train | promote | rollback | history`` over a recording of a real run."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest
from typer.testing import CliRunner

from chainwax.flows.cli import app
from chainwax.flows.load import load_flow
from chainwax.flows.testing import TestModel, run_flow
from chainwax.router import ChainwaxError, load_settings
from chainwax.router.custom.loopback import LoopbackProvider

pytest.importorskip("sklearn")
FLOW = """
from chainwax.flows import Flow
from chainwax.operators import Score

flow = Flow("desk")
team = flow.source("tickets").choose("team", "{text}", choices=["billing", "technical"])
team.feedback("check", lambda item: Score(item["team"] == item["right"], item["right"])).sink("out")
"""
CONFIG = """
[run]
recording = "desk.db"
seed = 1
[models.big]
tier = "strongest"
url = "http://127.0.0.1:9/v1"
model = "-"
input_cost_per_token = 1e-6
output_cost_per_token = 1e-6
[custom]
folder = "models"
least = 50
"""


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "desk.py").write_text(FLOW, encoding="utf-8")
    (tmp_path / "chainwax.toml").write_text(CONFIG, encoding="utf-8")
    items = []
    for n in range(120):
        right = ("billing", "technical")[n % 2]
        word = {"billing": "invoice refund", "technical": "crash error"}[right].split()[n // 2 % 2]
        items.append({"text": f"ticket {n} about a {word}", "right": right})
    model = TestModel(lambda text: "billing" if "in" in text else "technical")
    run_flow(load_flow("desk.py"), items, models={"big": model}, settings=load_settings("chainwax.toml"))
    return tmp_path


def call(*words, fails=False):
    result = CliRunner().invoke(app, ["models", *words])
    if fails:
        assert isinstance(result.exception, ChainwaxError), result.output
        return str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output


def test_the_whole_life_by_hand(desk):
    assert "no model of its own was ever made" in call("history", "desk.py", "team")
    made = json.loads(call("train", "desk.py", "team", "--json"))
    assert (made["what"], made["model"]) == ("custom_trained", "team-1")
    assert made["held_out"]["accuracy"] > 0.9
    second = json.loads(call("train", "desk.py", "team", "--json"))
    assert second["model"] == "team-2"
    promoted = json.loads(call("promote", "desk.py", "team", "team-1", "--json"))
    assert promoted["parent"] is None
    assert json.loads(call("promote", "desk.py", "team", "--json"))["parent"] == "team-1"
    assert "serving now: team-2" in call("history", "desk.py", "team")
    assert json.loads(call("rollback", "desk.py", "team", "--why", "worse", "--json"))["parent"] == "team-1"
    shown = call("history", "desk.py", "team")
    assert "serving now: team-1" in shown
    assert "worse" in shown
    told = json.loads(call("history", "desk.py", "team", "--json"))
    assert [card["name"] for card in told["models"]] == ["team-1", "team-2"]
    with closing(sqlite3.connect(desk / "desk.db")) as db:
        kinds = [k for (k,) in db.execute("SELECT decision_kind FROM decisions WHERE node = 'team'")]
    assert kinds.count("custom_promoted") == 2
    assert kinds.count("custom_taken_back") == 1


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        (
            [f"ticket {n}" for n in range(10)],
            "10 questions with a right answer, and 50 are wanted: of 10 calls",
        ),
        # Each question comes twice, and it is said differently what is right.
        (
            [f"ticket {n // 2}" for n in range(200)],
            "0 questions with a right answer, .* 100 questions have contr",
        ),
    ],
)
def test_ten_rows_and_contradictions_make_no_model(desk, texts, why):
    (desk / "desk.db").unlink()
    items = [{"text": text, "right": ("billing", "technical")[n % 2]} for n, text in enumerate(texts)]
    big = TestModel("billing")
    run_flow(load_flow("desk.py"), items, models={"big": big}, settings=load_settings("chainwax.toml"))
    said = json.loads(call("train", "desk.py", "team", "--json"))
    assert said["what"] == "custom_not_trained"
    assert re.search(why, said["why"]), said["why"]
    assert "has no model of its own" in call("promote", "desk.py", "team", fails=True)


PROVIDER = """
[trainers.provider]
url = "{url}"
model = "gpt-4o-mini-2024-07-18"
provider = "them"
key_env = "DESK_KEY"
poll_seconds = 0.01
training_cost_per_token = 3e-6
input_cost_per_token = 1e-9
output_cost_per_token = 1e-9
[nodes.team]
target = 0.4
"""


@pytest.fixture
def provider(desk, monkeypatch):
    monkeypatch.setenv("DESK_KEY", "sk-of-the-desk-0123456789")
    with LoopbackProvider(key="sk-of-the-desk-0123456789") as server:
        (desk / "chainwax.toml").write_text(CONFIG + PROVIDER.format(url=server.url), encoding="utf-8")
        yield server


def test_a_providers_model_is_trained_promoted_asked_and_taken_back(desk, provider):
    made = json.loads(call("train", "desk.py", "team", "--trainer", "provider", "--json"))
    # The tuned model gives the commonest answer to what it was never shown: half of them are right.
    assert (made["what"], made["model"]) == ("custom_trained", "team-1"), made
    (job,) = provider.jobs.values()
    assert job.fields["status"] == "succeeded"
    assert provider.files == {}  # what was uploaded is away again
    promoted = json.loads(call("promote", "desk.py", "team", "--json"))
    assert (promoted["what"], promoted["model"]) == ("custom_promoted", "team-1")
    (card,) = json.loads(call("history", "desk.py", "team", "--json"))["models"]
    assert card["trainer"] == "provider"
    assert card["price"]["training_usd"] == pytest.approx(3e-6 * job.fields["trained_tokens"])
    before = len(asked(provider))
    # Right by the tuned model, or the watch over it takes it back before the hand does.
    items = [{"text": f"later {n} about an invoice", "right": "billing"} for n in range(60)]
    big = TestModel("billing")
    out = run_flow(load_flow("desk.py"), items, models={"big": big}, settings=load_settings("chainwax.toml"))
    assert out.snapshot["interfaces"]["team"]["router"]["arms"]["team-1"]["asked"] > 0
    assert len(asked(provider)) > before
    call("rollback", "desk.py", "team", "--why", "dear")
    before = len(asked(provider))
    run_flow(load_flow("desk.py"), items, models={"big": big}, settings=load_settings("chainwax.toml"))
    assert len(asked(provider)) == before
    for file in desk.rglob("*"):
        assert not file.is_file() or b"sk-of-the-desk" not in file.read_bytes()


def asked(provider):
    return [seen for seen in provider.seen if seen.path.endswith("/chat/completions")]


def test_no_text_goes_to_a_provider_that_the_node_denies(desk, provider):
    with (desk / "chainwax.toml").open("a", encoding="utf-8") as file:
        file.write('deny = ["provider:them"]\n')
    said = json.loads(call("train", "desk.py", "team", "--trainer", "provider", "--json"))
    assert said["what"] == "custom_not_trained"
    assert "do not let a custom model be trained on provider:them" in said["why"]
    assert provider.seen == []


def test_mistakes_are_told(desk):
    assert "did you mean 'team'" in call("train", "desk.py", "taem", fails=True)
    assert "has no model of its own" in call("promote", "desk.py", "team", fails=True)
    assert "no model of its own serves" in call("rollback", "desk.py", "team", fails=True)
    assert "there is no recording" in call("history", "desk.py", "team", "--recording", "no.db", fails=True)
    said = json.loads(call("train", "desk.py", "team", "--trainer", "haed", "--json"))
    assert said["what"] == "custom_not_trained"
    assert "did you mean 'head'" in said["why"]


def test_models_alone_still_shows_them(desk):
    assert "big" in call("--no-health")
    assert json.loads(call("--json", "--no-health"))["models"]["big"]["tier"] == "strongest"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            '[nodes.team]\ncustom = "auto"\ntrainer = "haed"',
            "nodes.team.trainer: unknown trainer 'haed': did you",
        ),
        ('[defaults]\ntrainer = "haed"\ncustom = "auto"', "unknown trainer 'haed': did you mean 'head'?"),
        ("[trainers.haed]\nmost = 99", "unknown trainer 'haed': did you mean 'head'?"),
        ("[trainers.head]\nmots = 99", "'mots': did you mean 'most'?"),
        ('[trainers.provider]\nurl = "http://127.0.0.1:9/v1"', "trainers.provider.model: Field required"),
    ],
)
def test_a_trainer_that_cannot_be_made_is_told_before_a_run_begins(desk, more, said):
    with (desk / "chainwax.toml").open("a", encoding="utf-8") as file:
        file.write(more + "\n")
    (desk / "tickets.jsonl").write_text('{"text": "an invoice", "right": "billing"}\n', encoding="utf-8")
    for command in ("check", "run"):
        words = [command, "desk.py", "--source", "tickets=tickets.jsonl", "--sink", "out=out.jsonl"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code != 0
        assert said in f"{result.output}{result.exception}"


def test_an_own_model_that_serves_is_not_shown_as_unusable(desk):
    call("train", "desk.py", "team")
    call("promote", "desk.py", "team")
    items = [{"text": f"later {n} about an invoice", "right": "billing"} for n in range(40)]
    run_flow(
        load_flow("desk.py"),
        items,
        models={"big": TestModel("billing")},
        settings=load_settings("chainwax.toml"),
    )
    shown = call("--no-health")
    assert "team-1" in shown
    assert "cannot be used" not in shown


SLOW = """
import time
from chainwax.router.custom import HERE, TRAINERS

class Slow:
    name, place = "slow", HERE
    def __init__(self, options): pass
    def fit(self, dataset, folder, progress, limits):
        (folder / "begun").touch()
        time.sleep(600)

TRAINERS["slow"] = Slow
"""


def test_ctrl_c_ends_a_training_by_hand_at_once(desk):
    (desk / "slow.py").write_text(SLOW, encoding="utf-8")
    flow = (desk / "desk.py").read_text(encoding="utf-8")
    (desk / "desk.py").write_text(f"import slow\n{flow}", encoding="utf-8")
    words = ["models", "train", "desk.py", "team", "--trainer", "slow"]
    command = [sys.executable, "-c", "from chainwax.flows.cli import main; main()", *words]
    env = {**os.environ, "PYTHONPATH": str(desk)}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        ends = time.monotonic() + 60
        while not list(desk.rglob("begun")):
            assert process.poll() is None
            assert time.monotonic() < ends
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        process.wait(20)
    assert process.returncode == 130
    assert "no model of its own was ever made" in call("history", "desk.py", "team")


def test_a_model_that_its_provider_withdraws_while_it_serves_fails_no_item(desk, provider):
    call("train", "desk.py", "team", "--trainer", "provider")
    call("promote", "desk.py", "team")
    provider.tuned.clear()
    before = len(asked(provider))
    items = [{"text": f"later {n} about an invoice", "right": "billing"} for n in range(60)]
    big = TestModel("billing")
    out = run_flow(load_flow("desk.py"), items, models={"big": big}, settings=load_settings("chainwax.toml"))
    assert [item["team"] for item in out["out"]] == ["billing"] * 60
    assert 0 < len(asked(provider)) - before < 60  # it was tried, and then left alone
    with closing(sqlite3.connect(desk / "desk.db")) as db:
        told = db.execute("SELECT detail FROM decisions WHERE decision_kind = 'model_down'").fetchall()
    assert any("team-1" in detail and "does not exist" in detail for (detail,) in told)
