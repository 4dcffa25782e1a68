"""What operators change while a manager runs: taken up at once, told, kept for those that start later."""

import logging
import sqlite3
import threading
import time
from contextlib import ExitStack, closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainwax.flows.testing import TestModel
from chainwax.router import (
    BackendBusy,
    Cancelled,
    ChainwaxError,
    Choice,
    Feedback,
    Form,
    FreeText,
    LLMManager,
    NodeSpec,
    Prompt,
    RecordingError,
    Rules,
    load_settings,
)
from chainwax.router.control import SETTINGS, Change, check_change, in_force
from chainwax.router.recording.controls import write_controls

PRICE = {"strong": 1e-4, "small": 0.0}
TIER = {"strong": "strongest", "small": "local"}


def spec(node="team", **options):
    answer = Choice(["a", "b"]) if options.pop("choose", False) else FreeText()
    return NodeSpec(node, Prompt("{text}"), answer, flow="flow", **options)


@pytest.fixture
def make():
    with ExitStack() as stack:

        def manager(*nodes, recording=None, share=None, models=None, **more):
            backends = {"strong": TestModel("a"), "small": TestModel("a"), **(models or {})}
            settings = load_settings(
                run={"recording": recording, "seed": 1},
                models={
                    name: {
                        "tier": TIER[name],
                        "backend": "simulated",
                        "input_cost_per_token": PRICE[name],
                        "output_cost_per_token": PRICE[name],
                        "retries": 1,
                        "limit": 2,
                    }
                    for name in PRICE
                },
                **more,
            )
            made = LLMManager(settings, backends=backends, **({} if share is None else {"share": share}))
            stack.callback(made.close)
            made.begin_run("flow", "run", nodes=nodes or [spec()])
            return made

        yield manager


def node(manager, name="team"):
    return manager.interfaces["flow", name]


def say(manager, *changes, live=True):
    """Changes of the flow, each (setting, value) or (setting, value, node), taken up on return."""

    async def hear():
        manager.control.hear([Change("flow", *change, time=5.0) for change in changes], live)

    manager.run(hear())


class Asked:
    """Calls under way."""

    def __init__(self, manager, count, name="team", first=0):
        interface = node(manager, name)
        self.results = []
        self._left = threading.Semaphore(0)
        self._count = count
        queries = [interface.bind({"text": f"t{n}"}, position=f"p{n}") for n in range(first, first + count)]
        interface.submit(queries, self._done)

    def _done(self, query, result):
        self.results.append(result)
        self._left.release()

    def all(self):
        for _ in range(self._count):
            assert self._left.acquire(timeout=20), "a call hangs"
        return self.results


def arms(manager, count=20, **more):
    return [result.arm.model for result in Asked(manager, count, **more).all()]


def decisions(path):
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT decision_kind, node, detail, time FROM decisions").fetchall()


# -- one thing at a time --------------------------------------------------------------------------


def test_a_target_changes_the_choice_and_what_was_learned_stays(make):
    manager = make(spec(form=Form.adaptive, target=0.99))
    for n in range(200):  # the small one is right in 90 of 100
        manager.feedback([Feedback("team", 1.0, f"a{n}", arm="strong")])
        manager.feedback([Feedback("team", float(n % 10 != 0), f"b{n}", arm="small")])
    manager.settle()
    assert arms(manager).count("strong") > 15
    known = [state.scored for state in node(manager).router.stats.arms]
    say(manager, ("target", 0.7))
    assert node(manager).node.target == 0.7
    assert arms(manager, first=20) == ["small"] * 20
    assert [state.scored for state in node(manager).router.stats.arms] == known
    say(manager, ("target", None))
    assert arms(manager, first=40).count("strong") > 15


def test_a_budget_can_be_cut_and_raised(make):
    manager = make(spec(form=Form.direct, model="strong"), spec("other", form=Form.direct, model="strong"))
    assert arms(manager) == ["strong"] * 20
    say(manager, ("budget", 0.0, "team"))
    errors = {type(result.error).__name__ for result in Asked(manager, 5, first=20).all()}
    assert errors == {"NoModelAllowed"}  # only its own model would do, and that one costs
    assert arms(manager, name="other") == ["strong"] * 20
    say(manager, ("budget", 100.0, "team"))
    assert arms(manager, first=30) == ["strong"] * 20


def test_a_budget_is_shared_by_the_processes(make):
    from chainwax.router.share import Share

    manager = make(share=Share(1, 4))
    say(manager, ("budget", 10.0))
    assert node(manager).node.budget == 2.5


def test_a_pin_answers_with_that_model_and_is_taken_back(make):
    manager = make(spec(form=Form.parallel))
    say(manager, ("pin", "small"))
    assert arms(manager) == ["small"] * 20
    assert manager.snapshot()["interfaces"]["team"]["control"] == {"pin": "small"}
    policy = node(manager).router.policy
    say(manager, ("pin", None))
    assert node(manager).router.policy is not policy
    assert arms(manager, first=20) == ["strong"] * 20
    assert "control" not in manager.snapshot()["interfaces"]["team"]


def test_a_pinned_model_that_asks_for_a_pause_is_waited_for(make):
    strong = TestModel([BackendBusy("slow down", retry_after=0.3), *["a"] * 50])
    manager = make(spec(form=Form.adaptive), models={"strong": strong})
    say(manager, ("pin", "strong"))
    begun = time.monotonic()
    assert arms(manager, 6) == ["strong"] * 6
    assert time.monotonic() - begun > 0.25


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("smal", "there is no model 'smal': did you mean 'small'?"),
        ("small", "its allow and deny do not let it ask 'small': it may ask strong"),
    ],
)
def test_a_pin_that_cannot_be_is_refused_with_a_decision(make, tmp_path, caplog, model, why):
    nodes = spec(rules=Rules(deny=("tier:local",))), spec("free", form=Form.direct)
    manager = make(*nodes, recording=tmp_path / "r.db")
    say(manager, ("pin", "strong", "team"), ("pin", model))
    assert arms(manager) == ["strong"] * 20
    assert arms(manager, name="free") == (["small"] * 20 if model == "small" else ["strong"] * 20)
    assert why in caplog.text
    manager.close()
    told = decisions(tmp_path / "r.db")
    assert next(one[:2] for one in told if why in one[2]) == ("control_refused", "team")


def test_a_node_that_is_not_there_is_refused_with_the_nearest(make, caplog):
    manager = make(spec(), spec("mood"))
    say(manager, ("target", 0.5, "tem"))
    assert "no LLM node 'tem': did you mean 'team'?" in caplog.text
    assert node(manager).node.target == 0.99


def test_each_change_is_a_decision_in_log_and_recording(make, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    manager = make(spec(), spec("mood"), recording=tmp_path / "r.db")
    say(manager, ("target", 0.9), ("budget", 1.0, "team"))
    say(manager, ("target", 0.9))  # as another process of the run would say it: once is enough
    manager.close()
    assert sorted(decisions(tmp_path / "r.db")) == [
        ("control", "mood", '{"set":"target","value":0.9}', 5.0),
        ("control", "team", '{"set":"budget","value":1.0}', 5.0),
        ("control", "team", '{"set":"target","value":0.9}', 5.0),
    ]
    assert "control: node 'team'" in caplog.text


def test_the_last_one_wins_whatever_it_was_said_of(make):
    manager = make(spec(), spec("mood"))
    say(manager, ("target", 0.5, "team"), ("target", 0.6))
    assert (node(manager).node.target, node(manager, "mood").node.target) == (0.6, 0.6)
    say(manager, ("target", 0.7, "team"))
    assert (node(manager).node.target, node(manager, "mood").node.target) == (0.7, 0.6)
    say(manager, ("target", None))
    assert (node(manager).node.target, node(manager, "mood").node.target) == (0.99, 0.99)


def test_made_up_nodes_do_not_fill_the_memory(make):
    manager = make()
    say(manager, *((("target", 0.5, f"n{n}")) for n in range(1500)))
    assert len(manager.control._said) <= 1000


# -- pause ----------------------------------------------------------------------------------------


def test_a_pause_asks_nothing_new_and_loses_nothing(make):
    strong = TestModel("a", latency=0.05)
    manager = make(spec(form=Form.direct, model="strong"), models={"strong": strong})
    asked = Asked(manager, 30)
    while len(strong.prompts) < 4:
        time.sleep(0.005)
    say(manager, ("paused", True))
    sent = len(strong.prompts)
    time.sleep(0.3)
    # What was on its way is finished; what waited for a slot goes on waiting.
    assert len(strong.prompts) == sent < 30
    assert len(asked.results) == sent
    more = Asked(manager, 5, first=30)
    time.sleep(0.1)
    assert len(strong.prompts) == sent
    say(manager, ("paused", False))
    assert all(result.error is None for result in asked.all() + more.all())
    assert len(strong.prompts) == 35


def test_a_paused_node_holds_up_no_other(make):
    manager = make(spec(form=Form.direct), spec("mood", form=Form.direct))
    say(manager, ("paused", True, "team"))
    waiting = Asked(manager, 10)
    assert arms(manager, name="mood") == ["strong"] * 20
    assert not waiting.results
    say(manager, ("paused", False))
    assert len(waiting.all()) == 10


def test_the_end_of_a_run_gives_back_what_a_pause_holds(make):
    strong = TestModel("a")
    manager = make(spec(form=Form.direct), models={"strong": strong})
    say(manager, ("paused", True))
    asked = Asked(manager, 10)
    time.sleep(0.05)
    manager.stop_waiting()
    assert {type(result.error) for result in asked.all()} == {Cancelled}
    assert {type(result.error) for result in Asked(manager, 3, first=10).all()} == {Cancelled}
    assert strong.prompts == []


@pytest.mark.parametrize("drain", [True, False, "sent"])
def test_a_paused_manager_can_be_closed(make, drain):
    manager = make(spec(form=Form.parallel))
    say(manager, ("paused", True))
    asked = Asked(manager, 10)
    manager.close(drain=drain)
    assert {type(result.error) for result in asked.all()} == {Cancelled}


# -- by the recording -----------------------------------------------------------------------------


def test_a_running_manager_hears_of_changes_through_its_recording(make, tmp_path, monkeypatch):
    monkeypatch.setattr("chainwax.router.manager._SNAPSHOT_SECONDS", 0.05)
    path = tmp_path / "r.db"
    manager = make(recording=path)
    write_controls(path, [Change("flow", "target", 0.8, time=1.0), Change("other", "target", 0.1, time=1.0)])
    deadline = time.monotonic() + 20
    while node(manager).node.target != 0.8:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    write_controls(path, [Change("flow", "target", 0.7, "team", time=2.0)])
    while node(manager).node.target != 0.7:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_starts_later_follows_what_is_in_force_and_says_so(make, tmp_path, caplog):
    path = tmp_path / "r.db"
    make(recording=path).close()
    pins = [Change("flow", "pin", "strong", time=1.0), Change("flow", "pin", "small", time=2.0)]
    write_controls(path, [*pins, Change("flow", "target", 0.5, "late", time=3.0)])
    manager = make(recording=path)
    manager.register(spec("late"))
    assert arms(manager) == ["small"] * 20
    assert arms(manager, name="late") == ["small"] * 20
    assert node(manager, "late").node.target == 0.5
    assert caplog.text.count("as an operator said before") == 1  # of the node that was there
    manager.close()
    assert ("control", "team", '{"set":"pin","value":"small"}', 2.0) in decisions(path)


def test_a_pin_that_the_configuration_no_longer_knows_does_not_keep_a_run_from_starting(make, tmp_path):
    path = tmp_path / "r.db"
    make(recording=path).close()
    write_controls(path, [Change("flow", "pin", "gone", time=1.0)])
    assert len(arms(make(recording=path))) == 20


@pytest.mark.parametrize(
    "rows",
    ["{", "7", '[7, {"number": 1}]', '[{"number": 1, "setting": "x", "node": "", "value": 1, "time": 0}]'],
)
def test_a_spoilt_row_costs_only_itself(make, tmp_path, rows):
    path = tmp_path / "r.db"
    make(recording=path).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("INSERT INTO meta VALUES ('control:flow', ?)", (rows,))
        db.commit()
    manager = make(recording=path)
    assert node(manager).node.target == 0.99
    write_controls(path, [Change("flow", "target", 0.8, time=1.0)])
    assert node(make(recording=path)).node.target == 0.8


def test_changes_need_a_recording(tmp_path):
    with pytest.raises(RecordingError, match=r"no recording .*nope\.db"):
        write_controls(tmp_path / "nope.db", [Change("flow", "target", 0.8)])


# -- what a change may be -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value", "why"),
    [
        ("targt", 0.5, "did you mean 'target'"),
        ("target", 0.0, "above 0"),
        ("target", 1.01, "at most 1"),
        ("target", True, "no number"),
        ("target", "0.5", "no number"),
        ("budget", -1, "below 0"),
        ("budget", float("nan"), "no number"),
        ("budget", float("inf"), "no number"),
        ("pin", 7, "no model's name"),
        ("pin", "", "no model's name"),
        ("pin", "x" * 501, "no model's name"),
        ("paused", 1, "neither true nor false"),
    ],
)
def test_a_value_that_no_flow_could_follow_is_refused(setting, value, why):
    with pytest.raises(ChainwaxError, match=why):
        check_change(Change("flow", setting, value))


CHANGES = st.builds(
    Change,
    st.just("flow"),
    st.sampled_from(SETTINGS),
    st.sampled_from([None, False, True, 0, 0.5]),
    st.sampled_from(["", "a", "b"]),
)


@given(st.lists(CHANGES, max_size=12))
def test_what_is_in_force_says_the_same_as_all_that_was_said(changes):
    def state(said):
        out = {}
        for change in said:
            for name in [change.node] if change.node else ["a", "b"]:
                gone = change.value is None or change.value is False
                out[name, change.setting] = None if gone else change.value
        return {key: value for key, value in out.items() if value is not None}

    left = in_force(changes)
    assert state(left) == state(changes)
    assert len({(change.node, change.setting) for change in left}) == len(left)
