"""The report: its numbers, how it reads at 80 and at 120 columns, and the plot."""

import io
import json
from contextlib import closing

import pytest
from bytewax.testing import run_main
from rich.console import Console

from chainwax.connectors import InProcessBus, ItemsSource, ListSink, Record
from chainwax.flows import Flow
from chainwax.flows.plot import plot_run
from chainwax.flows.progress import Progress, counted, elapsed, money
from chainwax.flows.report import make_report, print_report
from chainwax.flows.tally import Tally
from chainwax.flows.testing import TestModel
from chainwax.router import LLMManager, RecordingError, load_settings
from chainwax.router.recording import RecordingReader
from chainwax.router.recording.totals import (
    ArmTotals,
    Letters,
    NodeTotals,
    items_of,
    letters_of,
    timeline,
    totals,
)

COSTS = {"big": 0.01, "mid": 0.002, "tiny": 0.0}


def router(choice="tiny", mode="enforce", **more):
    return {
        "router": {
            "target": 0.99,
            "choice": choice,
            "mode": mode,
            "call_usd": COSTS,
            "arms": {name: {"simulated": name == "big"} for name in COSTS},
            "certificate": {"status": "not yet known"},
            **more,
        }
    }


def report(**changes):
    snapshot = {
        "run": "abc123",
        "certified": {"support": {"status": "not met"}},
        "interfaces": {
            "team": router(),
            "draft": router(
                "big", "observe", would_choose="tiny", observed={"cost_usd": 1.0, "would_cost_usd": 0.25}
            ),
            "quiet": router("mid"),
        },
    }
    of_nodes = {
        "team": NodeTotals(
            100, 2, 90, 81.0, {"tiny": ArmTotals(90, 95, 0.0), "big": ArmTotals(10, 10, 0.2, simulated=True)}
        ),
        "draft": NodeTotals(100, 0, 0, 0.0, {"big": ArmTotals(100, 100, 1.0, simulated=True)}),
    }
    given = {
        "flow": "support",
        "status": "finished",
        "seconds": 12.0,
        "items": 120,
        "letters": Letters(2, "team", "BackendDown", "node 'team': no route\nto host"),
        "totals": of_nodes,
        "recording": "run.db",
    } | changes
    return make_report(snapshot, {"team": "choose", "draft": "query", "quiet": "query"}, **given)


def shown(made, width):
    out = io.StringIO()
    print_report(made, Console(file=out, width=width, highlight=False))
    return out.getvalue()


def test_the_figures_of_a_node():
    team, draft, quiet = report().nodes
    assert team.calls == {"tiny": 90, "big": 10}
    assert list(team.calls) == ["tiny", "big"]
    assert team.cost_usd == pytest.approx(0.2)
    assert team.quality == pytest.approx(0.9)
    assert team.quality_low < 0.9 < team.quality_high
    assert (team.scores, team.errors) == (90, 2)
    # Measured in the run where it was asked (0.02 a call), from the price where it was not.
    assert team.strongest_only_usd == pytest.approx(100 * 0.02)
    assert (team.cheapest, team.cheapest_only_usd) == ("tiny", 0.0)
    assert draft.would_choose == "tiny"
    assert draft.would_save_usd == pytest.approx(0.75)
    assert quiet.calls == {}
    assert quiet.quality is None


def test_the_whole():
    made = report()
    assert made.calls == 200
    assert made.cost_usd == pytest.approx(1.2)
    assert made.simulated == ("big",)
    as_json = made.as_json()
    assert json.loads(json.dumps(as_json, allow_nan=False)) == as_json
    assert as_json["first_error"]["error"] == "BackendDown"
    assert as_json["nodes"]["team"]["calls"] == {"tiny": 90, "big": 10}


@pytest.mark.parametrize("width", [80, 120])
def test_it_reads_at_either_width(width):
    text = shown(report(), width)
    table = text.splitlines()[2:-4]
    assert max(map(len, table)) <= width
    assert "\x1b" not in text
    assert "…" not in text
    for needed in ("tiny 90", "big* 10", "2 failed", "[0.82–0.95]", "no score", "$1.20", "save", "$0.750"):
        assert needed in text, needed
    assert "partly simulated" in text.splitlines()[0]
    assert "* simulated" in text
    assert "2 dead letters, all in run.db; the first: node 'team': BackendDown: no route to host" in text


def test_without_a_simulated_model_the_word_is_not_there():
    of_nodes = {"team": NodeTotals(1, 0, 0, 0.0, {"tiny": ArmTotals(1, 1, 0.0)})}
    made = report(totals=of_nodes, letters=Letters(), recording=None)
    # What was not asked has a part in the estimates, and says so below the table only.
    assert "simulated" not in shown(made, 80).splitlines()[0]
    assert "dead letter" not in shown(made, 80)


def test_reused_answers_are_told():
    of_nodes = {"team": NodeTotals(5, 0, 0, 0.0, {"mid": ArmTotals(5, 5, 0.01, 4, 0.008)})}
    text = shown(report(totals=of_nodes), 120)
    assert "4 answers are from the earlier recording: $0.00800 of the cost was not paid again" in text


@pytest.mark.parametrize(
    ("dollars", "text"),
    [
        (0, "$0"),
        (0.0000123, "$0.000012"),
        (0.00099, "$0.00099"),
        (0.0123456, "$0.0123"),
        (0.5, "$0.500"),
        (1.005, "$1.00"),
        (12345.6, "$12,346"),
        (1e-12, "<$0.0000001"),
        (-0.5, "-$0.500"),
    ],
)
def test_money(dollars, text):
    assert money(dollars) == text


def test_elapsed():
    assert [elapsed(s) for s in (0.04, 59.9, 60, 3599, 3600 * 25)] == [
        "0.0 s",
        "59.9 s",
        "1:00 min",
        "59:59 min",
        "25:00 h",
    ]


MODELS = {
    name: {
        "tier": tier,
        "backend": "simulated",
        "input_cost_per_token": price,
        "output_cost_per_token": price,
    }
    for name, tier, price in (("big", "strongest", 1e-5), ("tiny", "local", 0.0))
}


def real_run(tmp_path, **run):
    """A small run with its recording: 40 items, two nodes, scores for one, one dead letter."""
    flow = Flow("small")
    team = flow.source("in").choose("team", "Which?\n\n{text}", ["billing", "technical"])
    asked = team.query("draft", "Answer {text}")
    asked.feedback("sent", lambda item: 1.0 if item["id"] % 4 else 0.0, about=["team"]).sink("out")
    settings = load_settings(
        run={"recording": tmp_path / "run.db", "seed": 1, **run},
        models=MODELS,
    )
    backends = {name: TestModel("billing", simulated=name == "big") for name in MODELS}
    items = [Record({"text": f"t{n}", "id": n}, str(n), f"in:{n}") for n in range(40)]
    items.append(Record({"no": "text"}, "x", "in:40"))
    out = []
    with LLMManager(settings, bus=InProcessBus(), backends=backends) as manager:
        manager.begin_run("small")
        run_main(flow.compile({"in": ItemsSource(items)}, {"out": ListSink(out)}, manager=manager))
    assert len(out) == 40
    return manager, tmp_path / "run.db"


def test_the_recording_and_the_manager_tell_the_same(tmp_path):
    manager, path = real_run(tmp_path)
    kinds = {"team": "choose", "draft": "query"}
    given = {"flow": "small", "status": "finished", "seconds": 1.0, "items": 41}
    with closing(RecordingReader(path)) as reader:
        recorded = totals(reader, manager.run_id)
        letters = letters_of(reader, manager.run_id)
        assert items_of(reader, manager.run_id) == 41
        moments = list(timeline(reader, manager.run_id))
    assert (letters.count, letters.node, letters.error) == (1, "team", "PromptFieldMissing")
    one = make_report(manager.snapshot(), kinds, letters=letters, totals=recorded, **given).as_json()
    other = make_report(manager.snapshot(), kinds, letters=letters, totals=None, **given).as_json()
    assert one == other | {"simulated": one["simulated"]}
    assert one["calls"] == 80 == len(moments)
    assert one["nodes"]["team"]["quality"] == pytest.approx(0.75)
    assert sum(m.cost_usd for m in moments) == pytest.approx(one["cost_usd"])
    assert {m.node: m.score is None for m in moments} == {"team": False, "draft": True}


def test_the_plot_is_drawn_and_says_simulated(tmp_path):
    manager, path = real_run(tmp_path)
    plot_run(path, manager.run_id, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    plot_run(path, manager.run_id, tmp_path / "plot.svg")
    # Text in an SVG is drawn as shapes; each is preceded by a comment with its words.
    words = (tmp_path / "plot.svg").read_text()
    for needed in ("simulated", "strongest only (estimated)", "cheapest only (estimated)", "target 0.99"):
        assert needed in words, needed


def test_a_plot_of_nothing_is_an_error(tmp_path):
    with LLMManager(load_settings(run={"recording": tmp_path / "run.db"}, models=MODELS)) as manager:
        manager.begin_run("empty")
        manager.recording.flush()
        with pytest.raises(RecordingError, match="has no answered call"):
            plot_run(tmp_path / "run.db", manager.run_id, tmp_path / "plot.png")
    with pytest.raises(RecordingError, match="has no run 'nope'"):
        plot_run(tmp_path / "run.db", "nope", tmp_path / "plot.png")


def test_progress_tells_plain_lines_where_nobody_watches(tmp_path):
    with LLMManager(load_settings(run={"recording": None}, models=MODELS)) as manager:
        out = io.StringIO()
        tally = Tally(items=1200, letters=3)
        with Progress(
            lambda: counted(manager, tally), console=Console(file=out, width=120), live=False, every=0.02
        ) as progress:
            while "items" not in out.getvalue():
                pass
            assert progress.seconds > 0
        line = out.getvalue().splitlines()[0]
        assert line.startswith("1,200 items · 0 calls (0.0/s) · 0 in flight · $0 · 3 errors · ")
        assert "\x1b" not in line


def test_progress_on_a_terminal_is_one_line_that_leaves_nothing(tmp_path):
    with LLMManager(load_settings(run={"recording": None}, models=MODELS)) as manager:
        out = io.StringIO()
        console = Console(file=out, width=60, force_terminal=True, legacy_windows=False)
        tally = Tally(items=5)
        with Progress(lambda: counted(manager, tally), console=console, live=True) as progress:
            progress.note("stopping")
            console.print(progress._line())
            assert len(progress._line().plain.splitlines()[0]) <= 56
        assert "stopping" in out.getvalue()
