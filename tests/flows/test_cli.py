"""The commands, in this process: what they print, their exit codes, one line for each mistake."""

import json
import socket

import pytest

FLOW = """
from chainwax.flows import Flow
flow = Flow("support")
tickets = flow.source("tickets")
team = tickets.choose("team", "Which team?\\n\\n{text}", ["billing", "technical", "other"])
hard = team.filter("hard", lambda item: item["team"] == "technical")
hard.feedback("sent", lambda item: float(item["team"] == item["right"]), about="team").sink("out")
"""

CONFIG = """
[run]
seed = 1
[models.big]
tier = "strongest"
backend = "simulated"
input_cost_per_token = 2.5e-6
output_cost_per_token = 1e-5
simulation = {accuracy = 1.0, latency = 0.0, truth = "truth.jsonl"}
[models.small]
tier = "local"
backend = "simulated"
input_cost_per_token = 1e-7
output_cost_per_token = 4e-7
simulation = {accuracy = 0.6, latency = 0.0, truth = "truth.jsonl"}
"""

RUN = ("run", "support.py", "--source", "tickets=in.jsonl", "--sink", "out=out.jsonl")


@pytest.fixture
def place(folder):
    """A folder with a flow, 60 items and two simulated models; the process is in it."""
    (folder / "support.py").write_text(FLOW)
    (folder / "chainwax.toml").write_text(CONFIG)
    with (folder / "in.jsonl").open("w") as items, (folder / "truth.jsonl").open("w") as truth:
        for n in range(60):
            right = ("technical", "billing", "other")[n % 3]
            items.write(json.dumps({"id": f"t{n}", "text": f"ticket {n}", "right": right}) + "\n")
            truth.write(json.dumps({"id": f"t{n}", "answers": {"team": right}}) + "\n")
    return folder


@pytest.fixture
def cli(place, cli):
    """The command, in that folder."""
    return cli


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# -- run ------------------------------------------------------------------------------------------


def test_run_prints_a_table_and_writes_the_sink(cli, place):
    code, out, _ = cli(*RUN)
    assert code == 0
    assert out.startswith("flow support finished: 60 items, 60 calls, $")
    assert "simulated" in out.splitlines()[0]
    assert "big*" in out
    assert "\x1b" not in out
    assert len((place / "out.jsonl").read_text().splitlines()) >= 15


def test_run_json_is_the_last_line_and_the_table_goes_to_stderr(cli):
    code, out, err = cli(*RUN, "--json", "--run-id", "mine")
    assert code == 0
    assert len(out.splitlines()) == 1
    result = json.loads(out)
    assert result["run"] == "mine"
    assert result["nodes"]["team"]["kind"] == "choose"
    assert sum(result["nodes"]["team"]["calls"].values()) == result["calls"] == 60
    assert result["strongest_only_usd"] > result["cheapest_only_usd"] > 0
    assert result["simulated"] == ["big", "small"]
    assert "flow support finished" in err


def test_a_sink_on_stdout_is_not_mixed_with_the_table(cli):
    code, out, err = cli("run", "support.py", "--source", "tickets=in.jsonl", "--sink", "out=-")
    assert code == 0
    assert all(json.loads(line)["team"] == "technical" for line in out.splitlines())
    assert "flow support finished" in err


def test_run_again_with_the_same_id_asks_nothing_again(cli):
    cli(*RUN, "--run-id", "mine")
    code, out, err = cli(*RUN, "--run-id", "mine", "--json")
    assert code == 0
    assert "run mine is finished already" in err
    assert json.loads(out)["calls"] == 60


def test_run_with_a_plot(cli, place):
    code, _, err = cli(*RUN, "--plot", "plot.png")
    assert code == 0
    assert "plot: plot.png" in err
    assert (place / "plot.png").stat().st_size > 10_000


def test_observe_mode_says_what_would_have_been_saved(cli, place):
    change(place / "chainwax.toml", "[run]", '[nodes.team]\nmode = "observe"\n[run]')
    code, out, _ = cli(*RUN)
    assert code == 0
    assert "observing:" in out


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("run", "support.py"), "add --source tickets=FILE.jsonl --sink out=OUT.jsonl"),
        (("run", "support.py", "--source", "ticket=in.jsonl"), "did you mean 'tickets'?"),
        (("run", "support.py", "--sink", "outt=x.jsonl"), "did you mean 'out'?"),
        (("run", "support.py", "--source", "in.jsonl"), "--source NAME=URI"),
        ((*RUN, "--sink", "out=b.jsonl"), "'out' is given twice"),
        ((*RUN[:2], "--source", "tickets=inn.jsonl", *RUN[4:]), "did you mean 'in.jsonl'?"),
        ((*RUN[:2], "--source", "tickets=in.jsonl?spede=1x", *RUN[4:]), "did you mean 'speed'?"),
        ((*RUN[:4], "--sink", "out=in.jsonl"), "source 'tickets' is this file already"),
        ((*RUN[:4], "--sink", "out=out.csv"), "'.csv'"),
        ((*RUN[:4], "--sink", "out=kafkaa:x"), "unknown sink scheme 'kafkaa'"),
        ((*RUN, "--dead-letters", "out.jsonl"), "sink 'out' is this file already"),
        ((*RUN, "--config", "nope.toml"), "no configuration file 'nope.toml'"),
        ((*RUN, "--speed", "fast"), "speed 'fast' is not a pace"),
        ((*RUN, "--plot", "plot.gif"), ".png, .svg or .pdf"),
        ((*RUN, "--plot", "nowhere/plot.png"), "there is no folder 'nowhere'"),
        ((*RUN, "--state", "in.jsonl"), "--state in.jsonl: cannot be used"),
        (("run", "suport.py"), "did you mean 'support.py'?"),
        (("replay", "support.py", "--recording", "old.db"), "no recording 'old.db'"),
        (("export", "old.db", "out.csv"), ".jsonl"),
        (("import", "nope.jsonl", "new.db"), "nope.jsonl"),
        (("graph", "support.py", "--format", "png"), "known: mermaid, svg"),
        (("models", "--recording", "nope.db"), "no recording 'nope.db'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(cli, args, said):
    assert said in cli.mistake(*args)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seed = 1", "sed = 1", "chainwax.toml: unknown key 'run.sed': did you mean 'seed'?"),
        ("[run]", "[rum]", "chainwax.toml: unknown key 'rum': did you mean 'run'?"),
        ('"strongest"', '"strongst"', "models.big.tier: Input should be 'strongest'"),
        ("[run]", "[run", "chainwax.toml: no valid TOML"),
        ("[run]", "[nodes.tem]\ntarget = 0.9\n[run]", "no LLM node of this name: did you mean 'team'?"),
        ("[run]", '[nodes.team]\nallow = ["lokal"]\n[run]', "node 'team', allow:"),
        ("[run]", '[nodes.team]\nmodel = "bog"\n[run]', "did you mean 'big'?"),
        (
            "[run]",
            '[nodes.team]\ndeny = ["big", "small"]\n[run]',
            "node 'team': its allow and deny leave none",
        ),
        ("input_cost_per_token = 2.5e-6", "", "models.big.input_cost_per_token"),
        ('"truth.jsonl"', '"truht.jsonl"', "truht.jsonl"),
        ("accuracy = 0.6", "accuracy = {draft = 0.6}", "has neither 'team' nor 'default'"),
        ("seed = 1", 'recording = "in.jsonl"', "in.jsonl"),
    ],
)
def test_a_mistake_in_the_configuration_is_one_line(cli, place, old, new, said):
    change(place / "chainwax.toml", old, new)
    assert said in cli.mistake(*RUN)


def test_a_key_that_is_not_set_is_named_before_anything_runs(cli, place, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY_HERE", raising=False)
    model = 'tier = "strongest"\nmodel = "gpt-4o"\nurl = "https://api.openai.com/v1"\n'
    model += 'key_env = "NO_SUCH_KEY_HERE"'
    (place / "chainwax.toml").write_text(f"[models.gpt]\n{model}\n")
    assert "models.gpt.key_env: the environment variable NO_SUCH_KEY_HERE is not set" in cli.mistake(*RUN)
    code, out, _ = cli("check", "support.py")
    assert code == 1
    assert "NO_SUCH_KEY_HERE is not set" in out
    (place / "chainwax.toml").write_text(f"[models.gpt]\n{model}\nsimulate_without_key = true\n")
    assert cli("check", "support.py")[0] == 0
    assert not (place / "chainwax.db").exists()


def test_no_model_at_all_is_said_in_one_line(cli, place):
    (place / "chainwax.toml").write_text("")
    assert "add a [models.NAME] section" in cli.mistake(*RUN)


def test_an_unknown_environment_variable_is_said(cli, monkeypatch):
    monkeypatch.setenv("CHAINWAX_RUM__SEED", "1")
    assert "CHAINWAX_RUM__SEED" in cli.mistake(*RUN)


def test_a_fault_in_the_users_file_is_a_line_and_a_traceback_only_with_debug(cli, place):
    (place / "support.py").write_text("\n1 / 0\n")
    assert cli.mistake(*RUN) == "support.py:2: ZeroDivisionError: division by zero"
    code, _, err = cli(*RUN, "--debug")
    assert code == 2
    assert "Traceback" in err


# -- check, graph ---------------------------------------------------------------------------------


def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "bind", refuse)


def test_check_has_a_line_for_each_node_and_connects_to_nothing(cli, place, monkeypatch):
    no_network(monkeypatch)
    code, out, _ = cli("check", "support.py", "--source", "tickets=in.jsonl", "--sink", "out=out.jsonl")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[:5]] == ["tickets", "team", "hard", "sent", "out"]
    assert "big*, small*" in out
    assert "source 'tickets': looked at 20 items" in out
    assert out.splitlines()[-1] == "all is well"
    assert not (place / "out.jsonl").exists()
    assert not (place / "chainwax.db").exists()


def test_check_finds_a_prompt_that_does_not_fit_the_items(cli, place):
    change(place / "support.py", "{text}", "{txt}")
    assert cli("check", "support.py")[0] == 0
    code, out, _ = cli("check", "support.py", "--source", "tickets=in.jsonl")
    assert code == 1
    assert "node 'team': the prompt names {txt}, which its items lack: did you mean 'text'?" in out
    assert out.splitlines()[-1] == "1 problem"


def test_check_finds_several_things_at_once(cli, place):
    change(place / "chainwax.toml", "[run]", '[nodes.tem]\n[nodes.team]\nallow = ["lokal"]\n[run]')
    code, out, _ = cli("check", "support.py", "--source", "ticket=in.jsonl", "--sink", "out=x.csv")
    assert code == 1
    for said in ("did you mean 'team'?", "node 'team', allow:", "did you mean 'tickets'?", "'.csv'"):
        assert said in out, said
    assert out.splitlines()[-1] == "4 problems"


def test_check_of_unreadable_and_hostile_sources(cli, place):
    (place / "junk.jsonl").write_bytes(b"\xff\x00" * 500 + b"\n" + b"[" * 100_000 + b"\n")
    code, out, _ = cli("check", "support.py", "--source", "tickets=junk.jsonl")
    assert code == 1
    assert "none of the first 2 items can be read" in out
    assert "junk.jsonl:1" in out
    (place / "empty.jsonl").write_text("")
    code, out, _ = cli("check", "support.py", "--source", "tickets=empty.jsonl")
    assert code == 0
    assert "none there" in out


def test_graph(cli, place):
    code, out, _ = cli("graph", "support.py")
    assert code == 0
    assert "flowchart" in out
    code, out, _ = cli("graph", "support.py", "--format", "svg", "-o", "flow.svg")
    assert (code, out) == (0, "")
    assert (place / "flow.svg").read_text().lstrip().startswith("<svg")


# -- models ---------------------------------------------------------------------------------------


def test_models_shows_tiers_prices_and_health(cli):
    code, out, _ = cli("models")
    assert code == 0
    for needed in ("big*", "strongest", "$2.5 / $10 (configuration)", "ok simulated", "* simulated"):
        assert needed in out, needed


def test_models_json_is_what_a_counted_run_did(cli):
    result = json.loads(cli(*RUN, "--json")[1])
    code, out, _ = cli("models", "--json", "--no-health")
    assert code == 0
    assert len(out.splitlines()) == 1
    described = json.loads(out)
    assert described["run"] == result["run"]
    attempts = {name: model["uptime"]["attempts"] for name, model in described["models"].items()}
    assert sum(attempts.values()) == 60
    assert attempts == result["nodes"]["team"]["calls"]
    spent = sum(model["uptime"]["cost_usd"] for model in described["models"].values())
    assert spent == pytest.approx(result["cost_usd"])
    team = described["interfaces"]["team"]
    assert (team["uptime"]["finished"], team["in_flight"], team["uptime"]["errors"]) == (60, 0, 0)
    assert team["uptime"]["choices"] == attempts
    scores = sum(model["uptime"]["scores"] for model in described["models"].values())
    assert scores == result["nodes"]["team"]["scores"] > 0
    for window in ("minute", "hour", "uptime"):
        assert described["models"]["big"][window]["latency_s"]["p95"] is not None


def test_models_never_shows_a_secret(cli, place, monkeypatch):
    monkeypatch.setenv("MY_SECRET_KEY", "sk-very-secret")
    (place / "chainwax.toml").write_text(
        """
[models.own]
tier = "standard"
model = "m"
url = "http://user:hidden@127.0.0.1:9/v1?token=alsohidden"
key_env = "MY_SECRET_KEY"
headers = {Authorization = "Bearer headersecret"}
"""
    )
    for args in (("models", "--json"), ("models",), ("models", "--json", "--no-health")):
        code, out, err = cli(*args)
        assert code == 0
        for secret in ("sk-very-secret", "hidden", "headersecret"):
            assert secret not in out + err
    own = json.loads(cli("models", "--json")[1])["models"]["own"]
    assert own["url"] == "http://127.0.0.1:9/v1"
    assert own["health"]["ok"] is False
    assert own["key"] == "MY_SECRET_KEY is set"


def test_models_shows_those_that_cannot_be_used_and_the_others(cli, place, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with (place / "chainwax.toml").open("a") as file:
        file.write('[models.engine]\ntier = "local"\nbackend = "llamacpp"\n')
        file.write('[models.priceless]\ntier = "standard"\nurl = "https://x.test/v1"\nmodel = "m"\n')
        file.write('[models.off]\ntier = "local"\nbackend = "llamacpp"\nenabled = false\n')
    code, out, _ = cli("models", "--no-health")
    assert code == 0
    assert "chainwax[local]" in out
    assert "models.priceless.input_cost_per_token" in out
    assert "disabled" in out
    assert "big*" in out


def test_models_of_a_run_that_is_not_there(cli):
    cli(*RUN, "--run-id", "mine")
    assert "no run 'mime': did you mean 'mine'?" in cli.mistake("models", "--run", "mime", "--no-health")
    assert json.loads(cli("models", "--run", "mine", "--no-health", "--json")[1])["run"] == "mine"


# -- replay, export, import -----------------------------------------------------------------------


def test_replay_under_another_routing(cli, place):
    before = json.loads(cli(*RUN, "--json", "--run-id", "first")[1])
    change(place / "chainwax.toml", "[run]", '[nodes.team]\nform = "direct"\nmodel = "small"\n[run]')
    (place / "in.jsonl").unlink()
    code, out, _ = cli("replay", "support.py", "--recording", "chainwax.db", "--json")
    assert code == 0
    after = json.loads(out)
    assert (after["items"], after["calls"], after["recording"]) == (60, 60, "replay.db")
    assert after["nodes"]["team"]["calls"] == {"small": 60}
    assert after["cost_usd"] < before["cost_usd"]
    assert after["reused"] == 0


def test_replay_reuses_answers_at_their_price_and_says_so(cli):
    before = json.loads(cli(*RUN, "--json")[1])
    args = ("replay", "support.py", "--recording", "chainwax.db", "--sink", "out=o.jsonl", "--only-recorded")
    code, out, err = cli(*args, "--json", "--record-to", "again.db")
    assert code == 0
    after = json.loads(out)
    # What was answered is answered again by the same model, at the same cost, and nothing of it is paid.
    used = after["nodes"]["team"]["calls"]
    assert after["reused"] == sum(used.values()) == after["calls"] > 0
    assert after["reused_usd"] == pytest.approx(after["cost_usd"])
    assert after["cost_usd"] > 0
    assert "answers are from the earlier recording" in err
    # The router may wish for an answer that nobody gave: that one is an error, or another model's.
    assert after["calls"] + after["errors"] == 60 == before["calls"]


def test_replay_asks_what_is_not_recorded_unless_it_must_not(cli, place):
    cli(*RUN)
    change(place / "support.py", "Which team?", "Which department?")
    args = ("replay", "support.py", "--recording", "chainwax.db", "--sink", "out=o.jsonl", "--json")
    fresh = json.loads(cli(*args, "--reuse-answers")[1])
    assert (fresh["reused"], fresh["calls"], fresh["errors"]) == (0, 60, 0)
    none = json.loads(cli(*args, "--only-recorded")[1])
    assert (none["reused"], none["calls"], none["errors"]) == (0, 0, 60)
    assert "--only-recorded" in none["first_error"]["message"]


def test_replay_of_a_run_of_another_flow_or_without_items(cli, place):
    cli(*RUN, "--run-id", "mine")
    args = ("replay", "support.py", "--recording", "chainwax.db", "--sink", "out=o.jsonl")
    assert "did you mean 'mine'?" in cli.mistake(*args, "--run", "mime")
    change(place / "support.py", '"support"', '"other"')
    assert "no run of the flow 'other'" in cli.mistake(*args)
    assert "is one of the flow 'support'" in cli.mistake(*args, "--run", "mine")
    change(place / "support.py", '"other"', '"support"')
    change(place / "chainwax.toml", "[run]", "[run]\nrecord_items = false")
    cli(*RUN, "--run-id", "second")
    # The newest run has no items, so the one before is taken.
    assert cli(*args)[0] == 0
    assert "source of run 'second'" in cli.mistake(*args, "--run", "second")


@pytest.mark.parametrize("name", ["all.jsonl", "all.jsonl.gz", "all.parquet"])
def test_export_and_import_bring_back_the_same(cli, place, name):
    cli(*RUN, "--run-id", "mine")
    code, _, err = cli("export", "chainwax.db", name)
    assert code == 0
    rows = err.split()[0]
    code, _, err = cli("import", name, "copy.db")
    assert code == 0
    assert err.startswith(f"{rows} rows read")
    shown = json.loads(cli("models", "--recording", "copy.db", "--no-health", "--json")[1])
    assert set(shown["models"]) == {"big", "small"}
    assert "no run 'mime'" in cli.mistake("export", "chainwax.db", name, "--run", "mime")


def test_help_and_usage(cli):
    code, out, _ = cli("--help")
    assert code == 0
    for command in ("run", "replay", "check", "graph", "models", "export", "import"):
        assert command in out
    assert cli("run")[0] == 2
    assert cli("nonesuch")[0] == 2
