"""Dead letters on the command line: listed, shown, and retried without paying or writing twice."""

import json
import sqlite3
import time

import pytest

from chainwax.connectors import StopSwitch
from chainwax.flows import Flow
from chainwax.flows.letters import since_when
from chainwax.flows.retry import _entries, refusal
from chainwax.operators.window import Sliding, Tumbling
from chainwax.router import ConfigError
from chainwax.router.recording.letters import Letter

FLOW = """
from pathlib import Path
from chainwax.flows import Flow

def look(item):
    if item["n"] in (1, 4) and not Path("mended").exists():
        raise ValueError(f"not [red]yet[/red] \\x1b[31m{item['n']}")
    return {**item, "seen": True}

def after(item):
    if item["n"] == 4 and Path("broken-below").exists():
        raise KeyError("below")
    return item

flow = Flow("support")
team = flow.source("tickets").choose("team", "Which team?\\n\\n{text}", ["billing", "other"])
team.sink("all")
mood = team.map("look", look).map("after", after).choose("mood", "Angry? {text}", ["yes", "no"])
mood.feedback("sent", lambda item: 1.0, about=["team", "mood"]).sink("out")
"""

CONFIG = """
[run]
seed = 1
[defaults]
form = "direct"
[models.big]
tier = "strongest"
backend = "simulated"
input_cost_per_token = 2.5e-6
output_cost_per_token = 1e-5
simulation = {accuracy = 1.0, latency = 0.0, truth = "truth.jsonl"}
"""

RUN = ("run", "f.py", "--source", "tickets=in.jsonl", "--sink", "out=out.jsonl")
BOTH = (*RUN, "--sink", "all=all.jsonl", "--run-id", "monday")
RETRY = ("dead-letters", "retry", "f.py", "--sink", "out=again.jsonl")
LIST = ("dead-letters", "list")


@pytest.fixture
def place(folder):
    """A folder with a flow, six items and a simulated model; the process is in it."""
    (folder / "f.py").write_text(FLOW)
    (folder / "chainwax.toml").write_text(CONFIG)
    write_items(folder)
    return folder


@pytest.fixture
def cli(place, cli):
    """The command, in that folder."""
    return cli


def write_items(place, extra=""):
    answers = {"team": "billing", "mood": "no", "say": "hello"}
    with (place / "in.jsonl").open("w") as items, (place / "truth.jsonl").open("w") as truth:
        for n in range(6):
            items.write(json.dumps({"id": f"t{n}", "n": n, "text": f"ticket {n}", "time": 60 * n}) + "\n")
            truth.write(json.dumps({"id": f"t{n}", "answers": answers}) + "\n")
        items.write(extra)


def listed(cli, *args):
    return json.loads(cli.good(*LIST, "--json", *args))["letters"]


def retried(cli, *args):
    return json.loads(cli.good(*RETRY, "--json", *args))


def ask(sql, *values):
    db = sqlite3.connect("chainwax.db")
    try:
        return db.execute(sql, values).fetchall()
    finally:
        db.close()


def attempts(node):
    return ask("SELECT count(*) FROM attempts WHERE node = ?", node)[0][0]


def key(item):
    return item["n"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- list and show --------------------------------------------------------------------------------


def test_list_shows_each_letter_and_counts_them(cli):
    cli.good(*BOTH)
    out = cli.good(*LIST)
    assert "in.jsonl:2" in out
    assert "in.jsonl:5" in out
    assert "[red]yet[/red]" in out  # what an error says is no markup
    assert "\x1b" not in out  # and steers no terminal
    assert out.splitlines()[-1] == "node look: 2 ValueError"


def test_list_as_json_and_narrowed_down(cli):
    cli.good(*BOTH)
    both = listed(cli)
    assert [x["id"] for x in both] == [1, 2]
    both.sort(key=lambda x: x["key"])  # the order in which they failed is not always the same
    assert [(x["node"], x["key"], x["value"]["n"]) for x in both] == [("look", "t1", 1), ("look", "t4", 4)]
    assert both[0]["parents"][0]["node"] == "team"
    assert both[0]["item_time"] == 60.0
    assert json.loads(cli.good(*LIST, "--json"))["counts"] == {"look": {"ValueError": 2}}
    assert len(listed(cli, "--node", "look", "--error", "ValueError", "--since", "1h", "--run", "all")) == 2
    assert listed(cli, "--since", "2999-01-01") == []
    assert listed(cli, "--since", "0s") == []
    assert len(listed(cli, "--since", "2001-01-01T00:00Z", "--run", "monday")) == 2


def test_latest_is_the_newest_run_that_has_any(cli, place):
    cli.good(*BOTH)
    (place / "mended").touch()
    cli.good(*RUN, "--sink", "all=all.jsonl", "--run-id", "tuesday")
    assert {x["run"] for x in listed(cli)} == {"monday"}
    assert cli.good(*LIST, "--run", "tuesday") == "no dead letters of run 'tuesday'\n"


def test_a_recording_without_letters_has_none(cli, place):
    (place / "mended").touch()
    cli.good(*BOTH)
    assert cli.good(*LIST) == "no dead letters in 'chainwax.db'\n"
    assert listed(cli, "--node", "whatever") == []
    assert "nothing to retry" in cli.good(*RETRY)
    assert "did you mean" not in cli.mistake("dead-letters", "show", "1")
    assert not (place / "again.jsonl").exists()


def test_show_tells_all_of_a_letter(cli, place):
    cli.good(*BOTH)
    number = str(next(x["id"] for x in listed(cli) if x["key"] == "t4"))
    out = cli.good("dead-letters", "show", number)
    assert f"dead letter {number} of run monday" in out
    assert "node      look" in out
    assert "after     team: call " in out
    assert '"text": "ticket 4"' in out
    assert "\x1b" not in out
    assert json.loads(cli.good("dead-letters", "show", number, "--json"))["value"]["n"] == 4


def test_a_large_list_shows_the_newest(cli, place, monkeypatch):
    monkeypatch.setattr("chainwax.flows.letters._SHOWN", 1)
    cli.good(*BOTH)
    out = cli.good(*LIST)
    assert out.count("in.jsonl:") == 1
    assert "the newest 1 of 2" in out


# -- retry ----------------------------------------------------------------------------------------


def test_retry_goes_on_where_it_failed_and_pays_and_writes_nothing_twice(cli, place):
    cli.good(*BOTH)
    assert (attempts("team"), attempts("mood")) == (6, 4)
    written = (place / "all.jsonl").read_bytes(), (place / "out.jsonl").read_bytes()
    (place / "mended").touch()

    out = cli.good(*RETRY)
    assert out.splitlines() == ["run monday: 2 dead letters retried: 2 succeeded, 0 failed again"]
    again = lines(place / "again.jsonl")
    assert [(item["n"], item["seen"], item["team"], item["mood"]) for item in sorted(again, key=key)] == [
        (1, True, "billing", "no"),
        (4, True, "billing", "no"),
    ]
    assert (attempts("team"), attempts("mood")) == (6, 6)
    assert ((place / "all.jsonl").read_bytes(), (place / "out.jsonl").read_bytes()) == written
    # The lineage came along: what is downstream could tell the node upstream how it did.
    scored = ask(
        "SELECT c.item_key FROM feedback f JOIN calls c USING (call_id)"
        " WHERE f.node = 'team' AND f.metric != 'failure' ORDER BY 1"
    )
    assert [key for (key,) in scored] == [f"t{n}" for n in range(6)]
    failed = ask("SELECT item_key FROM feedback WHERE node = 'team' AND metric = 'failure' ORDER BY 1")
    assert [key for (key,) in failed] == ["t1", "t4"]

    assert listed(cli) == []
    assert cli.good(*LIST) == "no dead letters of run 'monday'; 2 settled: see --all\n"
    assert len(listed(cli, "--all")) == 2
    assert "(settled)" in cli.good(*LIST, "--all")
    assert "settled   2" in cli.good("dead-letters", "show", "1")

    for more in ((), ("--id", "1")):
        code, out, _ = cli(*RETRY, *more)
        assert code == 0
        assert "nothing to retry" in out
    assert (attempts("team"), attempts("mood")) == (6, 6)
    assert lines(place / "again.jsonl") == again


def test_what_fails_again_stays_with_its_new_error(cli, place):
    cli.good(*BOTH)
    before = listed(cli)
    (place / "f.py").write_text(FLOW.replace("ValueError(f", "TypeError(f"))
    done = retried(cli)
    assert (done["retried"], done["succeeded"], done["failed_again"]) == (2, 0, 2)
    after = listed(cli)
    assert [x["id"] for x in after] == [x["id"] for x in before]
    assert [x["error"] for x in after] == ["TypeError"] * 2
    assert after[0]["time"] > before[0]["time"]
    assert [x["error"] for x in done["open"]] == ["TypeError"] * 2
    assert not (place / "again.jsonl").exists() or not lines(place / "again.jsonl")


def test_what_fails_further_down_is_a_letter_there(cli, place):
    cli.good(*BOTH)
    (place / "mended").touch()
    (place / "broken-below").touch()
    done = retried(cli)
    assert (done["retried"], done["succeeded"], done["failed_again"]) == (2, 1, 1)
    assert done["settled"] == [1, 2]
    assert [(x["id"], x["node"], x["error"]) for x in done["open"]] == [(3, "after", "KeyError")]
    assert [x["id"] for x in listed(cli)] == [3]
    (place / "broken-below").unlink()
    done = json.loads(cli.good("dead-letters", "retry", "f.py", "--sink", "out=third.jsonl", "--json"))
    assert done["succeeded"] == 1
    assert [item["n"] for item in lines(place / "third.jsonl")] == [4]


def test_a_part_that_fails_further_down_counts_for_the_whole(cli, place):
    (place / "f.py").write_text("""
from pathlib import Path
from chainwax.flows import Flow

def words(item):
    if not Path("mended").exists():
        raise ValueError("not yet")
    return item["text"].split()

flow = Flow("support")
flow.source("tickets").flat_map("words", words).map("number", lambda w: int(w) if w < "3" else "x" + 1
    if w == "5" else w).sink("out")
""")
    cli.good(*RUN)
    (place / "mended").touch()
    done = retried(cli)
    assert (done["retried"], done["succeeded"], done["failed_again"]) == (6, 5, 1)
    assert [(x["node"], x["position"]) for x in done["open"]] == [("number", "in.jsonl:6/1")]
    assert len(done["settled"]) == 6
    assert len(lines(place / "again.jsonl")) == 11


def test_retry_of_some(cli, place):
    cli.good(*BOTH)
    (place / "mended").touch()
    assert retried(cli, "--id", "2")["settled"] == [2]
    assert [x["id"] for x in listed(cli)] == [1]
    assert "nothing to retry" in cli.good(*RETRY, "--since", "2999-01-01")
    narrow = ("--node", "look", "--error", "ValueError", "--since", "1d", "--run", "monday")
    assert "1 succeeded" in cli.good(
        "dead-letters", "retry", "f.py", "--sink", "out=-.jsonl", *narrow, "--recording", "chainwax.db"
    )


def test_a_sink_on_stdout_is_not_mixed_with_the_report(cli, place):
    cli.good(*BOTH)
    (place / "mended").touch()
    code, out, err = cli("dead-letters", "retry", "f.py", "--sink", "out=-")
    assert code == 0
    assert sorted(json.loads(line)["n"] for line in out.splitlines()) == [1, 4]
    assert "2 succeeded" in err


def test_a_model_that_was_down_is_asked_in_the_retry(cli, place):
    (place / "mended").touch()
    down = 'tier = "strongest"\nurl = "http://127.0.0.1:9/v1"\nmodel = "m"\nretries = 0\n'
    down += "input_cost_per_token = 1e-6\noutput_cost_per_token = 1e-6\n"
    (place / "chainwax.toml").write_text(f'[defaults]\nform = "direct"\n[models.big]\n{down}')
    cli.good(*BOTH)
    assert {(x["node"], x["error"]) for x in listed(cli)} == {("team", "BackendDown")}
    assert "attempt   1 at big" in cli.good("dead-letters", "show", "1")
    (place / "chainwax.toml").write_text(CONFIG)
    # From this node on the sink 'all' can be reached, too.
    assert "--sink all=OUT.jsonl" in cli.mistake(*RETRY)
    done = retried(cli, "--sink", "all=all2.jsonl")
    assert (done["retried"], done["succeeded"]) == (6, 6)
    assert len(lines(place / "all2.jsonl")) == len(lines(place / "again.jsonl")) == 6


def test_an_answer_that_was_no_use_is_not_bought_again(cli, place):
    (place / "f.py").write_text("""
from pathlib import Path
from chainwax.flows import Flow
flow = Flow("support")
say = flow.source("tickets").query("say", "{text}", check=lambda text: Path("mended").exists())
say.sink("out")
""")
    cli.good(*RUN, "--run-id", "monday")
    assert attempts("say") == 6
    assert {x["error"] for x in listed(cli)} == {"AnswerInvalid"}
    assert retried(cli)["failed_again"] == 6
    assert attempts("say") == 6
    assert '  answer  "' in cli.good("dead-letters", "show", "1")  # what was answered then is still there
    (place / "mended").touch()
    done = json.loads(cli.good("dead-letters", "retry", "f.py", "--sink", "out=third.jsonl", "--json"))
    assert done["succeeded"] == 6
    assert attempts("say") == 6
    assert len(lines(place / "third.jsonl")) == 6


BATCHES = """
from pathlib import Path
from chainwax.flows import Flow
flow = Flow("support")

def count(values):
    if values[0]["n"] == 2 and not Path("mended").exists():
        raise ValueError("no")
    return {"ns": [v["n"] for v in values]}

pairs = flow.source("tickets").batch("pairs", size=2, seconds=5)
pairs.map("count", count).sink("out")
"""


def test_a_batch_that_failed_is_retried_as_a_whole(cli, place):
    (place / "f.py").write_text(BATCHES)
    cli.good(*RUN)
    assert [(x["value"]["n"], x["window_id"]) for x in listed(cli)] == [
        (2, listed(cli)[0]["window_id"]),
        (3, listed(cli)[0]["window_id"]),
    ]
    (place / "mended").touch()
    done = retried(cli, "--id", "2")
    assert done["settled"] == [1, 2]
    assert lines(place / "again.jsonl") == [{"ns": [2, 3]}]


def test_late_items_and_items_of_a_window_that_starts_empty(cli, place):
    (place / "f.py").write_text("""
from chainwax.flows import Flow, Tumbling
flow = Flow("support")
minutes = flow.source("tickets").key("one", lambda item: "k").window("w", Tumbling(60), by="event")
minutes.map("count", lambda values: {"ns": [v["n"] for v in values]}).sink("out")
""")
    write_items(place, json.dumps({"id": "late", "n": 99, "text": "x", "time": 1}) + "\n")
    cli.good(*RUN)
    assert [(x["node"], x["error"]) for x in listed(cli)] == [("w", "Late")]
    code, _, err = cli(*RETRY)
    assert code == 0
    assert "note: node 'w' (window) begins empty: it sees the retried items alone" in err
    assert lines(place / "again.jsonl") == [{"ns": [99]}]


def test_a_retry_does_not_end_a_run_that_goes_on(cli, place):
    cli.good(*BOTH)
    db = sqlite3.connect("chainwax.db")
    db.execute("UPDATE runs SET status = 'stopped', ended = 5.0")
    db.commit()
    db.close()
    (place / "mended").touch()
    cli.good(*RETRY)
    assert ask("SELECT status, ended FROM runs") == [("stopped", 5.0)]


def test_a_retry_that_fails_as_a_whole_settles_nothing(cli, place):
    cli.good(*BOTH)
    (place / "mended").touch()
    (place / "full.jsonl").symlink_to("/dev/full")
    code, out, err = cli("dead-letters", "retry", "f.py", "--sink", "out=full.jsonl")
    assert code == 1
    assert "cannot be written" in err
    assert "0 succeeded" in out
    assert len(listed(cli)) == 2
    assert attempts("mood") == 6
    assert retried(cli)["succeeded"] == 2
    assert attempts("mood") == 6  # they were answered then


def test_ctrl_c_lets_a_retry_drain(cli, place):
    cli.good(*BOTH)
    (place / "mended").touch()
    (place / "f.py").write_text(
        FLOW.replace(
            "def after(item):",
            "def after(item):\n    import os\n    item['n'] == 1 and os.kill(os.getpid(), 2)",
        )
    )
    code, out, err = cli(*RETRY)
    assert code == 130
    assert "2 succeeded" in out
    assert "the same command goes on with the letters that are left" in err
    assert "--state" not in err
    assert listed(cli) == []
    assert len(lines(place / "again.jsonl")) == 2


def test_what_was_not_begun_when_it_was_stopped_is_not_counted():
    stop = StopSwitch()
    letters = [letter(node="look", id=n) for n in range(1, 151)]
    source = _entries(flow_of_batches(), letters, stop)["look"]
    part = source.build_part("s", "letters", None)
    assert len(part.next_batch()) == 100
    stop.set()
    with pytest.raises(StopIteration):
        part.next_batch()
    assert source.sent == list(range(1, 101))


# -- what cannot be retried -----------------------------------------------------------------------


def letter(**changed):
    known = {
        "id": 1, "run": "r", "node": "look", "key": "k", "position": "f:1", "value": {}, "is_repr": False,
        "error": "E", "message": "", "attempts": (), "time": 1.0, **changed,
    }  # fmt: skip
    return Letter(**known)


def flow_of_batches():
    flow = Flow("f")
    source = flow.source("in")
    source.map("look", lambda x: x).query("ask", "{value}").sink("out")
    source.batch("pairs", size=2, seconds=1).map("pair", list).sink("out2")
    source.window("slide", Sliding(4, 2)).map("slid", list).sink("out3")
    source.window("tumble", Tumbling(4)).query("each", "{value}").feedback("fb", lambda x: 1).sink("out4")
    return flow


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"node": "ask"}, None),
        ({"node": "pair", "window_id": "pairs/1"}, None),
        ({"node": "each"}, None),
        ({"node": "fb"}, None),
        ({"node": "tumble"}, None),
        ({"node": "lok"}, "no such node: did you mean 'look'?"),
        ({"node": "in"}, "the source could not read it"),
        ({"is_repr": True}, "only its repr"),
        ({"node": "pair"}, "does not say which batch"),
        ({"node": "slid", "window_id": "slide/1"}, "windows that overlap"),
    ],
)
def test_which_letters_cannot_be_retried(changed, said):
    why = refusal(flow_of_batches(), letter(**changed))
    assert (why is None) if said is None else (why is not None and said in why)


def test_letters_that_cannot_be_retried_are_named_and_the_others_retried(cli, place):
    (place / "f.py").write_text(FLOW.replace('return {**item, "seen": True}', "return object()", 1))
    write_items(place, '{"text": \n')
    cli.good(*BOTH)
    kinds = {x["node"]: x for x in listed(cli)}
    assert set(kinds) == {"tickets", "look", "after"}
    assert kinds["after"]["is_repr"]
    assert "only its repr" in cli.good("dead-letters", "show", str(kinds["after"]["id"]))
    said = cli.mistake(*RETRY, "--id", str(kinds["after"]["id"]))
    assert said.startswith(
        f"dead letter {kinds['after']['id']} (node 'after'): JSON could not hold its value"
    )
    assert "mend it there" in cli.mistake(*RETRY, "--node", "tickets")
    (place / "f.py").write_text(FLOW)
    (place / "mended").touch()
    code, out, err = cli(*RETRY)
    assert code == 0
    assert err.count("not retried: dead letter ") == 5
    assert "2 dead letters retried: 2 succeeded" in out
    assert len(listed(cli)) == 5


def test_a_flow_that_has_no_such_node(cli, place):
    cli.good(*BOTH)
    (place / "f.py").write_text(FLOW.replace('map("look"', 'map("loko"'))
    assert "no node" not in cli.mistake(*RETRY, "--node", "look")
    assert "unknown node of the flow 'support': 'look': did you mean 'loko'?" in cli.mistake(
        *RETRY, "--node", "look"
    )
    code, _, err = cli(*RETRY)
    assert code == 2
    assert err.count("the flow 'support' has no such node: did you mean 'loko'?") == 2


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((*LIST, "--run", "mondya"), "has no run 'mondya': did you mean 'monday'?"),
        (
            (*LIST, "--node", "lok"),
            "unknown node among the dead letters of run 'monday': 'lok': did you mean",
        ),
        ((*LIST, "--error", "ValueErorr"), "did you mean 'ValueError'?"),
        ((*LIST, "--since", "yesterday"), "--since yesterday: neither a span such as"),
        ((*LIST, "--since", "-2h"), "neither a span"),
        ((*LIST, "--since", "99999999999999h"), "neither a span"),
        ((*LIST, "--recording", "nope.db"), "no recording 'nope.db'"),
        ((*LIST, "--recording", "in.jsonl"), "in.jsonl"),
        (("dead-letters", "show", "22"), "unknown dead letter in 'chainwax.db': '22': did you mean '2'?"),
        (("dead-letters", "show", "9" * 40), "unknown dead letter"),
        (("dead-letters", "show", "0"), "unknown dead letter in 'chainwax.db': '0': known: 1, 2"),
        ((*RETRY, "--node", "lok"), "did you mean 'look'?"),
        ((*RETRY, "--error", "ValErr"), "did you mean 'ValueError'?"),
        ((*RETRY, "--id", "77"), "unknown dead letter"),
        ((*RETRY, "--run", "mondya"), "did you mean 'monday'?"),
        ((*RETRY[:3],), "add --sink out=OUT.jsonl"),
        ((*RETRY, "--sink", "all=x.jsonl"), "--sink all=x.jsonl: none of these letters can reach it"),
        ((*RETRY, "--sink", "ouut=x.jsonl"), "did you mean 'out'?"),
        ((*RETRY[:3], "--sink", "out=out.jsonl"), "would be begun anew with the retried items alone"),
        ((*RETRY[:3], "--sink", "out=chainwax.db"), "chainwax.db"),
        ((*RETRY, "--config", "nope.toml"), "no configuration file 'nope.toml'"),
        (("dead-letters", "retry", "g.py"), "did you mean 'f.py'?"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(cli, place, args, said):
    cli.good(*BOTH)
    before = (place / "out.jsonl").read_bytes()
    assert said in cli.mistake(*args)
    assert (place / "out.jsonl").read_bytes() == before
    assert len(ask("SELECT 1 FROM dead_letters WHERE settled IS NULL")) == 2


def test_letters_of_other_flows_and_of_two_runs(cli, place):
    cli.good(*BOTH)
    cli.good(*RUN, "--sink", "all=all.jsonl", "--run-id", "tuesday")
    said = cli.mistake(*RETRY, "--id", "1", "--id", "3")
    assert said == "these dead letters are of the runs monday, tuesday: retry one run at a time"
    (place / "f.py").write_text(FLOW.replace('Flow("support")', 'Flow("suport")'))
    assert "no run of the flow 'suport': did you mean 'support'?" in cli.mistake(*RETRY)
    assert "is one of the flow 'support', not of 'suport'" in cli.mistake(*RETRY, "--id", "1")


def test_without_a_recording_there_is_nothing_to_look_at(cli, place):
    (place / "chainwax.toml").write_text(CONFIG.replace("seed = 1", 'recording = ""'))
    assert "name one by --recording FILE" in cli.mistake(*LIST)
    assert "name one by --recording FILE" in cli.mistake(*RETRY)


def test_a_letter_that_somebody_spoiled_is_named(cli):
    cli.good(*BOTH)
    db = sqlite3.connect("chainwax.db")
    db.execute("UPDATE dead_letters SET value = '{' WHERE rowid = 2")
    db.commit()
    db.close()
    assert "dead letter 2 is malformed" in cli.mistake("dead-letters", "show", "2")


def test_a_recording_of_an_earlier_version_is_brought_up_to_date_by_a_run(cli, place):
    cli.good(*BOTH)
    db = sqlite3.connect("chainwax.db")
    for column in ("item_time", "window_id", "parents", "settled"):
        db.execute(f"ALTER TABLE dead_letters DROP COLUMN {column}")
    db.commit()
    db.close()
    assert "earlier chainwax" in cli.mistake(*LIST)
    cli.good(*RUN, "--sink", "all=all.jsonl", "--run-id", "tuesday")
    assert [x["parents"] for x in listed(cli, "--run", "monday")] == [[], []]
    assert len(listed(cli, "--run", "all")) == 4
    (place / "mended").touch()
    assert retried(cli, "--run", "monday")["succeeded"] == 2


@pytest.mark.parametrize(
    ("text", "ago"), [("30s", 30), ("5m", 300), ("2h", 7200), ("1.5d", 129_600), ("2w", 1_209_600)]
)
def test_spans(text, ago):
    assert since_when(text) == pytest.approx(time.time() - ago, abs=5)


def test_times():
    assert since_when(None) is None
    assert since_when("1970-01-01T00:01:00Z") == since_when("1970-01-01 00:01") == 60.0
    assert since_when("1970-01-01T02:01+02:00") == 60.0
    for bad in ("", "2", "h", "2y", "99999-01-01", "²h"):
        with pytest.raises(ConfigError, match="--since"):
            since_when(bad)
