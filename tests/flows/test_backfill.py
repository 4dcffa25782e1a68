"""``chainwax backfill``: a range once, within its budget; and what a scheduler sees of a command."""

import json
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from chainwax.connectors import ItemsSource
from chainwax.connectors.uri import SOURCES, Kind

FLOW = """
from chainwax.flows import Flow
flow = Flow("support")
tickets = flow.source("tickets")
team = tickets.choose("team", "Which team? {text}", ["billing", "other"], form="direct")
team.filter("some", lambda item: True).sink("out")
"""

CONFIG = """
[models.big]
tier = "strongest"
backend = "simulated"
limit = 8
input_cost_per_token = 1e-5
output_cost_per_token = 1e-5
simulation = {latency = 0.002, latency_spread = 0, truth = "in.jsonl"}
"""

RANGE = ("support.py", "--source", "tickets=in.jsonl", "--sink", "out=out.jsonl")


@pytest.fixture
def place(folder):
    (folder / "support.py").write_text(FLOW)
    (folder / "chainwax.toml").write_text(CONFIG)
    with (folder / "in.jsonl").open("w") as items:
        for n in range(200):
            items.write(json.dumps({"id": f"t{n}", "text": f"{n:04}", "answers": {"team": "billing"}}) + "\n")
    return folder


@pytest.fixture
def cli(place, cli):
    """The command, in that folder."""
    return cli


def ids(place):
    return [json.loads(line)["id"] for line in (place / "out.jsonl").read_text().splitlines()]


def attempts(place):
    with closing(sqlite3.connect(place / "chainwax.db")) as db:
        return db.execute("SELECT count(*) FROM attempts WHERE reused = 0").fetchone()[0]


def result(out):
    """The result of ``--json``: the only line there is."""
    (line,) = out.splitlines()
    return json.loads(line)


# -- backfill -------------------------------------------------------------------------------------


def test_the_same_range_again_pays_nothing_again(cli, place):
    first = result(cli.good("backfill", *RANGE, "--json"))
    assert (first["status"], first["calls"]) == ("finished", 200)
    assert first["run"].startswith("backfill-")
    assert attempts(place) == 200
    code, out, err = cli("backfill", *RANGE, "--json")
    assert code == 0
    assert f"run {first['run']} is finished already" in err
    assert result(out)["run"] == first["run"]
    assert attempts(place) == 200
    assert sorted(ids(place)) == sorted(f"t{n}" for n in range(200))
    # Another range is another run.
    other = result(cli.good("backfill", *RANGE[:2], "tickets=in.jsonl?limit=5", *RANGE[3:], "--json"))
    assert other["run"] != first["run"]
    assert attempts(place) == 205


@pytest.mark.parametrize("state", [(), ("--state", "state")])
def test_the_budget_stops_it_cleanly_and_more_goes_on(cli, place, state):
    whole = result(cli.good("run", *RANGE, "--run-id", "live", "--json"))["cost_usd"]
    budget = whole * 0.4
    code, out, err = cli("backfill", *RANGE, *state, "--budget", f"{budget}", "--json")
    assert code == 3
    stopped = result(out)
    assert stopped["status"] == "stopped"
    assert 0.3 * whole < stopped["cost_usd"] <= budget * 1.001
    assert "is spent" in err
    assert err.splitlines()[-1].endswith("the same command with a larger one goes on")
    assert "Traceback" not in err
    # With no more to spend nothing more is asked.
    before = attempts(place)
    assert cli("backfill", *RANGE, *state, "--budget", f"{stopped['cost_usd']}")[0] == 3
    assert attempts(place) == before
    done = result(cli.good("backfill", *RANGE, *state, "--budget", f"{whole * 1.01}", "--json"))
    assert (done["status"], done["run"], done["calls"]) == ("finished", stopped["run"], 200)
    assert done["cost_usd"] == pytest.approx(whole)
    assert attempts(place) == 400
    assert sorted(ids(place)) == sorted(f"t{n}" for n in range(200))


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--budget", "0"), "--budget 0: is dollars, above 0"),
        (("--budget", "nan"), "--budget nan"),
        (("--share", "0"), "--share 0: is above 0 and at most 1"),
        (("--share", "1.5"), "--share 1.5"),
        (("--source", "tickets=x.jsonl"), "'tickets' is given twice"),
    ],
)
def test_a_mistake_is_one_line(cli, place, args, why):
    assert why in cli.mistake("backfill", *RANGE, *args)
    assert not (place / "chainwax.db").exists()


def test_a_source_that_never_ends_is_refused(cli, monkeypatch):
    class Endless(ItemsSource):
        ends = False

    kind = Kind(lambda path, **options: Endless([], name=path))
    monkeypatch.setitem(SOURCES, "endless", kind)
    said = cli.mistake("backfill", "support.py", "--source", "tickets=endless:t", "--sink", "out=out.jsonl")
    assert "source 'tickets' (endless:t) never ends: add to=" in said


def test_it_needs_a_recording(cli, place, monkeypatch):
    monkeypatch.setenv("CHAINWAX_RUN__RECORDING", "")
    assert "a backfill needs a recording" in cli.mistake("backfill", *RANGE)


# -- what a scheduler sees ------------------------------------------------------------------------


def test_a_finished_run_asked_for_by_its_id_is_not_run_again(cli, place):
    command = ("run", *RANGE, "--state", "state", "--run-id", "2026-03-01", "--json")
    first = result(cli.good(*command))
    (place / "out.jsonl").write_text("taken away already")
    code, out, err = cli(*command)
    assert code == 0
    assert err.splitlines()[0] == "run 2026-03-01 is finished already: nothing is done"
    again = result(out)
    assert {name: again[name] for name in ("run", "status", "items", "calls", "cost_usd")} == {
        name: first[name] for name in ("run", "status", "items", "calls", "cost_usd")
    }
    assert (place / "out.jsonl").read_text() == "taken away already"
    assert attempts(place) == 200
    several = result(cli.good(*command, "--processes", "2"))
    assert several["calls"] == 200
    # Without its id, or with another one, somebody means something else.
    assert "is finished: add --fresh" in cli.mistake(*command[:-3], "--json")
    assert "is finished: add --fresh" in cli.mistake(*command[:-2], "2026-03-02", "--json")
    said = cli.mistake("run", *RANGE[:-1], "out=b.jsonl", "--state", "state", "--run-id", "2026-03-01")
    assert "run 2026-03-01 is finished and has sinks out=out.jsonl, not out=b.jsonl" in said


def test_exit_codes_and_the_line_of_json(cli, place):
    code, out, err = cli("run", *RANGE, "--json")
    assert code == 0
    assert result(out)["status"] == "finished"
    assert err
    # Items that fail are dead letters, and no failure of the run.
    with (place / "in.jsonl").open("a") as items:
        items.write('{"id": "no text", "answers": {"team": "billing"}}\n')
    code, out, _ = cli("run", *RANGE, "--json")
    assert (code, result(out)["errors"], result(out)["status"]) == (0, 1, "finished")
    # A sink that cannot be written ends it, and there is a report still.
    (place / "full.jsonl").symlink_to("/dev/full")
    code, out, err = cli("run", *RANGE[:-1], "out=full.jsonl", "--json")
    assert (code, result(out)["status"]) == (1, "failed")
    assert "No space left" in err
    # A mistake says nothing on standard output.
    assert cli("run", "support.py", "--json")[:2] == (2, "")


def test_the_line_of_json_is_the_last_of_both_streams(place):
    # As Airflow's BashOperator reads them: together.
    command = [sys.executable, "-m", "chainwax.flows.cli", "run", *RANGE, "--json"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "finished"
