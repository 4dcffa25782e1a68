"""``chainwax control``: what is written, what is refused, and what a run in its own process makes of it."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest

from chainwax.flows.control import parse_words
from chainwax.router import ConfigError, RecordingError, UnknownName
from chainwax.router.recording import RecordingReader

FLOW = """
from chainwax.flows import Flow
flow = Flow("support")
tickets = flow.source("tickets")
tickets.choose("team", "Which team? {text}", ["billing", "other"], form="direct", deny=["third"]).sink("out")
"""

MODEL = """
[models.{name}]
tier = "{tier}"
backend = "simulated"
limit = 2
input_cost_per_token = 1e-6
output_cost_per_token = 1e-6
simulation = {{latency = 0.02, latency_spread = 0, truth = "in.jsonl"}}
"""

RUN = ("run", "support.py", "--source", "tickets=in.jsonl", "--sink", "out=out.jsonl")


@pytest.fixture
def place(folder):
    tiers = {"big": "strongest", "small": "local", "third": "local"}
    text = "[run]\nepoch_seconds = 0.2\n"
    (folder / "support.py").write_text(FLOW)
    (folder / "chainwax.toml").write_text(
        text + "".join(MODEL.format(name=name, tier=tier) for name, tier in tiers.items())
    )
    write_items(folder, 20)
    return folder


@pytest.fixture
def cli(place, cli):
    """The command, in that folder."""
    return cli


def write_items(place, count):
    with (place / "in.jsonl").open("w") as items:
        for n in range(count):
            items.write(json.dumps({"id": f"t{n}", "text": f"{n}", "answers": {"team": "billing"}}) + "\n")


def arms(place):
    try:
        with closing(RecordingReader(place / "chainwax.db")) as reader:
            return [arm for (arm,) in reader._all("SELECT arm FROM calls ORDER BY rowid", ())]
    except RecordingError:
        return []  # it is being made


# -- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["target=0.97"], [("target", 0.97)]),
        (["budget=5", "pause"], [("budget", 5.0), ("paused", True)]),
        (["pin", "small", "resume"], [("pin", "small"), ("paused", False)]),
        (["pin=small"], [("pin", "small")]),
        (["unpin", "target=default"], [("pin", None), ("target", None)]),
        ([], []),
    ],
)
def test_what_an_operator_types(words, meant):
    assert list(parse_words(words)) == meant


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["targt=0.9"], "did you mean 'target='"),
        (["stop"], "unknown change 'stop'"),
        (["paus"], "did you mean 'pause'"),
        (["target"], "target=NUMBER"),
        (["budget="], "budget=NUMBER"),
        (["target=high"], "'high' is no number"),
        (["pin"], "pin MODEL"),
    ],
)
def test_words_that_say_nothing(words, why):
    with pytest.raises((ConfigError, UnknownName), match=why):
        list(parse_words(words))


# -- what can be known here -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("suport", "target=0.9"), "unknown flow in 'chainwax.db': 'suport': did you mean 'support'?"),
        (
            ("support", "--node", "tem", "pause"),
            "node of the flow 'support': 'tem': did you mean 'team'?",
        ),
        (("support", "pin", "smal"), "unknown model 'smal': did you mean 'small'?"),
        (("support", "target=1.5"), "target '1.5' is not above 0 and at most 1"),
        (("support", "budget=-1"), "is below 0"),
        (("support", "budget=nan"), "is no number"),
        (("support", "--recording", "nope.db"), "no recording 'nope.db'"),
        (("suport.py", "pause"), "did you mean 'support.py'?"),
        (("support.py", "--node", "tickets", "pause"), "unknown LLM node of the flow 'support': 'tickets'"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(cli, args, why):
    cli.good(*RUN)
    assert why in cli.mistake("control", *args)
    assert "nothing is changed" in cli.good("control", "support")


def test_nothing_runs_and_there_is_no_recording(cli):
    assert "no recording 'chainwax.db'" in cli.mistake("control", "support", "pause")


def test_what_is_in_force_is_shown_until_it_is_taken_back(cli, caplog):
    cli.good(*RUN)
    said = cli.good("control", "support", "--node", "team", "target=0.5", "pin", "small")
    assert "flow support, node team: target 0.5" in said
    assert "nothing of it runs now" in said
    shown = json.loads(cli.good("control", "support.py", "--json"))
    assert [(c["node"], c["setting"], c["value"]) for c in shown["in_force"]] == [
        ("team", "target", 0.5),
        ("team", "pin", "small"),
    ]
    assert shown["running"] == []
    # The next run follows it, and says so.
    assert "small* 20" in cli.good(*RUN)
    assert "node 'team': pin small, as an operator said before" in caplog.text
    changed = json.loads(cli.good("control", "support", "unpin", "target=default", "--json"))["changed"]
    assert [(c["setting"], c["value"]) for c in changed] == [("pin", None), ("target", None)]
    assert "nothing is changed" in cli.good("control", "support")


# -- a run that runs ------------------------------------------------------------------------------


class Running:
    """``chainwax run`` in a process of its own."""

    def __init__(self, place, *more):
        self._place = place
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CHAINWAX_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "chainwax.flows.cli", *RUN, *more],
            cwd=place,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def until(self, what, seconds=30):
        end = time.monotonic() + seconds
        while not what(arms(self._place)):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end, "it did not come to pass in time"
            time.sleep(0.02)

    def end(self, number=None):
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_is_pinned_paused_stopped_and_goes_on(cli, place, processes):
    write_items(place, 800)
    options = ("--state", "state", "--run-id", "r", "--processes", str(processes))
    with Running(place, *options) as run:
        run.until(lambda found: len(found) > 10)
        said = cli.mistake("control", "support", "pin", "third")
        assert "node 'team' may not ask 'third': it may ask big, small" in said
        assert "running now: r" in cli.good("control", "support", "pin", "small")
        run.until(lambda found: found[-1:] == ["small"])
        cli.good("control", "support", "pause")
        before = 0
        while before != (before := len(arms(place))):
            time.sleep(2.2)  # it looks every two seconds
        assert before < 800
        code, _, err = run.end(signal.SIGINT)
        assert code == 130, err
        assert "node 'team': paused, as an operator said" in err
    # What was asked is answered, what waited is not; nothing is lost when the run goes on.
    assert len(arms(place)) == before
    cli.good("control", "support", "resume")
    config = place / "chainwax.toml"
    config.write_text(config.read_text().replace("latency = 0.02", "latency = 0.0"))
    with Running(place, *options) as run:
        code, _, err = run.end()
        assert code == 0, err
    assert len(arms(place)) == 800
    ids = [json.loads(line)["id"] for line in (place / "out.jsonl").read_text().splitlines()]
    assert sorted(ids) == sorted(f"t{n}" for n in range(800))


def test_a_stream_that_ends_while_it_is_paused_waits(cli, place):
    cli.good(*RUN, "--run-id", "before")
    cli.good("control", "support", "pause")
    with Running(place, "--run-id", "r") as run:
        time.sleep(2.5)
        assert run.process.poll() is None
        cli.good("control", "support", "resume")
        code, _, err = run.end()
        assert code == 0, err
    assert len(arms(place)) == 40
