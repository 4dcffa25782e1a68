"""``chainwax evaluate``: each routing measured, answers bought once, and mistakes told."""

import json
import random
import sqlite3
from contextlib import closing

import numpy as np
import pytest
from rich.console import Console

from chainwax.flows.evaluate.evaluation import BEST_FIXED, CHEAPEST, MIX, ROUTER, STRONGEST, evaluate
from chainwax.flows.evaluate.figures import Hull, Table, learning_curve
from chainwax.flows.evaluate.labels import FieldLabels, Origins, read_labels, worth
from chainwax.flows.evaluate.similarity import Measure
from chainwax.flows.evaluate.variants import Stream
from chainwax.flows.load import load_flow
from chainwax.router import ConfigError, load_settings
from chainwax.router.recording.rows import RecordedItem

AGENT = """
import chainstream as cs
class Triage(cs.agent.Agent):
    def __init__(self):
        super().__init__("triage")
        self.mails = cs.get_stream(self, "mails")
        self.urgent = cs.create_stream(self, "urgent")
        self.llm = cs.llm.get_model("Text")
        self.count = 0
    def start(self):
        def is_urgent(mail):
            if self.llm.query(cs.llm.make_prompt(mail["text"], "Urgent? y or n")) == "y":
                return mail
        def team(mail):
            self.count += 1
            said = self.llm.query(cs.llm.make_prompt(mail["text"], "Which team?"))
            self.urgent.add_item({"n": self.count, "id": mail["id"], "team": said})
        self.mails.for_each(is_urgent).for_each(team)
"""
FLOW = """
from chainwax.flows import Flow
flow = Flow("support")
tickets = flow.source("mails")
team = tickets.choose("team", "Which team? {text}", ["billing", "other"])
team.feedback("routed", score=lambda item: item["team"] == item["right"], about=["team"])
team.sink("out")
"""
CONFIG = """
[run]
seed = 1
[defaults]
target = 0.95
[models.big]
tier = "strongest"
backend = "simulated"
input_cost_per_token = 1e-5
output_cost_per_token = 1e-5
simulation = {latency = 0, truth = "mails.jsonl", accuracy = 0.97}
[models.small]
tier = "local"
backend = "simulated"
input_cost_per_token = 1e-6
output_cost_per_token = 1e-6
[models.small.simulation]
latency = 0
truth = "mails.jsonl"
accuracy = {triage-is_urgent = 0.97, team = 0.97, default = 0.4}
"""


@pytest.fixture
def place(folder):
    (folder / "agent.py").write_text(AGENT)
    (folder / "flow.py").write_text(FLOW)
    (folder / "chainwax.toml").write_text(CONFIG)
    chance = random.Random(1)
    with (folder / "mails.jsonl").open("w") as mails:
        for n in range(150):
            team = chance.choice(["billing", "other"])
            answers = {"triage-is_urgent": "y" if n % 3 else "n", "triage-team": team, "team": team}
            row = {"id": f"m{n}", "text": f"mail number {n}", "right": team, "answers": answers}
            mails.write(json.dumps(row) + "\n")
    return folder


def run(cli, *args, flow="agent.py"):
    code, out, err = cli("evaluate", flow, "--source", "mails=mails.jsonl", *args)
    assert code == 0, err
    return json.loads(out.splitlines()[-1]) if "--json" in args else out + err


def bought(place):
    with closing(sqlite3.connect(place / "evaluation.db")) as db:
        return db.execute("SELECT count(*) FROM attempts WHERE reused = 0").fetchone()[0]


def test_agents_with_labels(place, cli):
    found = run(cli, "--labels", "answers", "--json", "--plot", "plot.png", "--late", "5")
    assert (place / "plot.png").stat().st_size > 20_000
    routings = found["routings"]
    assert list(routings) == [STRONGEST, CHEAPEST, BEST_FIXED, MIX, ROUTER]
    assert routings[BEST_FIXED]["models"] == {"triage-is_urgent": "small", "triage-team": "big"}
    dear, cheap, best, router = (routings[n] for n in (STRONGEST, CHEAPEST, BEST_FIXED, ROUTER))
    assert dear["accuracy"]["value"] > 0.93 > cheap["accuracy"]["value"]
    assert cheap["cost_usd"] < best["cost_usd"] < dear["cost_usd"]
    assert cheap["accuracy"]["low"] < cheap["accuracy"]["value"] < cheap["accuracy"]["high"]
    assert dear["accuracy_to_strongest"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert dear["outputs"] == {"exact": 1.0, "fields": 1.0, "aligned": 1.0}
    assert cheap["outputs"]["exact"] < cheap["outputs"]["fields"] < cheap["outputs"]["aligned"] < 1
    # The mix costs what the router does, and is made of the two.
    assert routings[MIX]["cost_usd"] == pytest.approx(router["cost_usd"])
    share = (router["cost_usd"] - cheap["cost_usd"]) / (dear["cost_usd"] - cheap["cost_usd"])
    mixed = cheap["accuracy"]["value"] + share * (dear["accuracy"]["value"] - cheap["accuracy"]["value"])
    assert routings[MIX]["accuracy"]["value"] == pytest.approx(mixed)
    assert found["margin"]["value"] == pytest.approx(router["accuracy"]["value"] - mixed)
    assert found["simulated"] == ["big", "small"]
    assert found["items"] == 150
    assert sum(found["nodes"]["triage-is_urgent"]["arms"].values()) == 150
    assert [moment["items"] for moment in found["curve"]][-1] <= 150
    # No answer was bought twice, and a second evaluation buys no fixed model's again.
    with closing(sqlite3.connect(place / "evaluation.db")) as db:
        twice = "SELECT content_key FROM attempts WHERE reused = 0 GROUP BY content_key HAVING count(*) > 1"
        assert db.execute(twice).fetchall() == []
    before = bought(place)
    again = run(cli, "--labels", "mails.jsonl", "--json")
    assert again["routings"][STRONGEST]["paid_usd"] == again["routings"][CHEAPEST]["paid_usd"] == 0
    assert again["routings"][STRONGEST]["accuracy"] == dear["accuracy"]
    assert again["routings"][STRONGEST]["cost_usd"] == pytest.approx(dear["cost_usd"])
    assert bought(place) - before < 20


def test_the_router_hears_of_labels_late_and_by_the_way_of_all_feedback(place, cli):
    run(cli, "--labels", "answers", "--json", "--late", "20")
    with closing(sqlite3.connect(place / "evaluation.db")) as db:
        said = db.execute(
            "SELECT run, node, count(*), count(DISTINCT call_id) FROM feedback WHERE feedback_kind = 'label' "
            "GROUP BY 1, 2 ORDER BY 3"
        ).fetchall()
        (order,) = db.execute("SELECT min(rowid) FROM feedback").fetchone()
    assert len({run for run, *_ in said}) == 1  # nobody teaches a model that is fixed
    assert [count for *_, count, _ in said] == [calls for *_, calls in said]
    assert said[-1][2] == 150
    assert order


def test_against_the_strongest_models_outputs(place, cli):
    found = run(cli, "--reference", "strongest", "--json")
    assert (found["against"], found["measure"]) == ("reference", "aligned")
    dear, cheap = found["routings"][STRONGEST], found["routings"][CHEAPEST]
    assert dear["accuracy"]["value"] == 1.0
    assert cheap["accuracy"]["value"] == pytest.approx(cheap["outputs"]["aligned"])
    exact = run(cli, "--reference", "strongest", "--measure", "exact", "--json")
    assert exact["routings"][CHEAPEST]["accuracy"]["value"] == pytest.approx(cheap["outputs"]["exact"])


def test_a_flows_own_feedback_and_what_is_printed(place, cli):
    text = run(cli, flow="flow.py")
    assert "answers by the flow's own feedback, simulated models" in text
    assert "router*" in text
    assert "small*" in text
    assert "95 % by the paired bootstrap" in text
    text = run(cli, "--labels", "right", "--measure", "exact", flow="flow.py")
    assert "answers by their labels, exact match, simulated" in text
    text = run(cli, "--labels", "team=right", flow="flow.py")
    assert "answers by their labels, share of equal fields" in text


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "no feedback node: say what is right by --labels, or --reference strongest"),
        (("--labels", "none.jsonl"), "--labels none.jsonl: there is no such file"),
        (("--labels", "other"), "--labels other: no item has such a field: known: "),
        (("--labels", "id"), "it is written NODE=id, once for each"),
        (("--labels", "triage-teem=answers"), "did you mean 'triage-team'?"),
        (("--labels", "a=b", "--labels", "a=c"), "'a' is given twice"),
        (("--labels", "a=b", "--labels", "c"), "is written FILE, FIELD or"),
        (("--labels", "answers", "--reference", "strongest"), "give one of them"),
        (("--reference", "strong"), "did you mean 'strongest'?"),
        (("--labels", "answers", "--measure", "exakt"), "did you mean 'exact'?"),
        (("--labels", "answers", "--plot", "plot.gif"), "a plot is .png, .svg or .pdf"),
        (("--labels", "answers", "--plot", "no/plot.png"), "there is no folder 'no'"),
        (("--labels", "agent.py"), "no valid JSON"),
    ],
)
def test_mistakes(place, cli, args, said):
    code, _, err = cli("evaluate", "agent.py", "--source", "mails=mails.jsonl", *args)
    assert code == 2
    assert said in err


def test_a_stream_that_never_ends_and_a_flow_without_models(place, cli):
    (place / "plain.py").write_text(
        "from chainwax.flows import Flow\nflow = Flow('plain')\nflow.source('mails').sink('out')\n"
    )
    code, _, err = cli("evaluate", "plain.py", "--source", "mails=mails.jsonl", "--reference", "strongest")
    assert (code, "has no LLM node: there is nothing to route" in err) == (2, True)


def test_one_model_alone_is_all_of_them(place):
    settings = load_settings("chainwax.toml")
    settings = settings.model_copy(update={"models": {"big": settings.models["big"]}})
    stream = Stream(
        load=lambda: load_flow("flow.py"),
        settings=settings,
        sources={"mails": "mails.jsonl"},
        recording=place / "one.db",
    )
    found = evaluate(stream, Console(quiet=True))
    assert [row.name for row in found.rows] == [STRONGEST, CHEAPEST, BEST_FIXED, MIX, ROUTER]
    assert found.margin.value == pytest.approx(0)
    assert len({row.cost_usd for row in found.rows}) == 1


# -- labels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "right", "score"),
    [
        ("Y.", "y", 1),
        ("no", "y", 0),
        ('{"order": "A", "n": 1}', {"order": "a", "n": 2}, 0.5),
        ("not JSON", {"order": "A"}, 0),
        ("[" * 100_000, ["a"], 0),
        ("7", 7, 1),
        ("true", True, 1),
        ({"order": "A"}, {"order": "A"}, 1),
    ],
)
def test_what_an_answer_is_worth(value, right, score):
    assert worth(value, right, Measure.fields) == score


def test_items_are_found_by_where_an_answer_came_from():
    items = [
        RecordedItem("a.jsonl:1", "", None, {"label": "x"}),
        RecordedItem("b/c?.jsonl:2", "", None, {"label": {"n": "y"}}),
        RecordedItem("a.jsonl:3", "", None, "repr", True),
    ]
    origins = Origins(items)
    labels = FieldLabels({"": "label"})
    labels.check(["n"])
    assert labels.of("n", "", "a.jsonl:1/0.0?1#", origins) == "x"
    assert labels.of("n", "", "b/c?.jsonl:2/3.1/0", origins) == "y"
    assert labels.of("n", "", "a.jsonl:3", origins) is None
    assert labels.of("n", "", "window:a.jsonl:1", origins) is None
    assert origins.place("window:w#1") == "window:w#1"
    labels.check(["n", "m"])
    assert labels.of("m", "", "a.jsonl:1", origins) is None  # whose answer would it be?
    with pytest.raises(ConfigError, match="is written FILE, FIELD"):
        read_labels(["=x"])


# -- figures ----------------------------------------------------------------------------------------


def test_the_hull_is_above_all_and_made_of_neighbours():
    hull = Hull([1.0, 2.0, 4.0, 3.0, 5.0], [0.5, 0.6, 0.9, 0.85, 0.9])
    assert hull.corners == [(1.0, 0.5), (3.0, 0.85), (4.0, 0.9)]
    accuracies = np.array([0.5, 0.6, 0.9, 0.85, 0.9])
    assert hull.at(2.0).of(accuracies) == pytest.approx(0.675)
    assert hull.at(0.1).of(accuracies) == 0.5
    assert hull.at(9.0).of(accuracies) == 0.9
    assert Hull([0.0], [0.4]).at(0.0).of(np.array([0.4])) == 0.4


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    chance = np.random.default_rng(3)
    held = 0
    for _ in range(100):
        scores = (chance.random((1, 300)) < 0.8).astype(float)
        table = Table(scores, np.ones_like(scores), np.ones_like(scores))
        low, high = np.quantile(table.resampled()[0][:, 0], (0.025, 0.975))
        held += low <= 0.8 <= high
    assert 87 <= held <= 100


def test_the_curve_is_of_windows_in_order():
    scores = np.concatenate([np.zeros((1, 100)), np.ones((1, 100))], axis=1)
    moments = learning_curve(Table(scores, np.ones_like(scores), 2 * np.ones_like(scores)))
    assert moments[0].accuracy == (0.0,)
    assert (moments[-1].items, moments[-1].accuracy, moments[-1].cost_usd) == (200, (1.0,), (2.0,))
    assert learning_curve(Table(*(np.zeros((1, 0)) for _ in range(3)))) == []
