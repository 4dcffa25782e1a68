"""A run in the background: its share, its budget, and how it makes room for a live one."""

import threading
import time
from contextlib import ExitStack

import pytest

from chainwax.flows.testing import TestModel
from chainwax.router import (
    BackendBusy,
    Cancelled,
    Form,
    FreeText,
    LLMManager,
    NodeSpec,
    Prompt,
    load_settings,
)
from chainwax.router.background import Background
from chainwax.router.share import Share

NODE = NodeSpec("team", Prompt("{text}"), FreeText(), flow="flow", form=Form.direct)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("chainwax.router.background._TICK_S", 0.02)
    monkeypatch.setattr("chainwax.router.manager._SNAPSHOT_SECONDS", 0.02)


@pytest.fixture
def make(tmp_path):
    with ExitStack() as stack:

        def manager(run, model, *, limit=8, share=1.0, **model_options):
            settings = load_settings(
                run={"recording": tmp_path / "r.db", "seed": 1},
                models={
                    "only": {
                        "tier": "strongest",
                        "backend": "simulated",
                        "input_cost_per_token": 0.001,
                        "output_cost_per_token": 0.0,
                        "limit": limit,
                        "retries": 1,
                        **model_options,
                    }
                },
            )
            made = LLMManager(settings, backends={"only": model}, share=Share(fraction=share))
            stack.callback(made.close)
            made.begin_run("flow", run, nodes=[NODE])
            return made

        yield manager


class Asked:
    """Calls under way."""

    def __init__(self, manager, count):
        interface = manager.interfaces["flow", "team"]
        self.results = []
        self._left = threading.Semaphore(0)
        self._count = count
        # Four characters for each token, and no two calls the same.
        queries = [interface.bind({"text": f"{n:040}"}, position=f"p{n}") for n in range(count)]
        interface.submit(queries, self._done)

    def _done(self, query, result):
        self.results.append(result)
        self._left.release()

    def all(self):
        for _ in range(self._count):
            assert self._left.acquire(timeout=20), "a call hangs"
        return self.results


def wait_for(what, seconds=20):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to pass in time"
        time.sleep(0.005)


def test_it_takes_its_share_of_the_limit_and_no_more(make):
    model = TestModel(latency=0.02)
    manager = make("back", model, limit=16, share=0.25)
    manager.background = Background(manager)
    assert all(result.error is None for result in Asked(manager, 100).all())
    assert 1 < model.most_at_once <= 4


def test_a_share_is_one_at_least_and_of_the_slots_that_a_server_tells(make):
    assert Share(fraction=0.1).slots(4) == 1
    assert Share(1, 2, 0.5).slots(16) == 4
    model = TestModel(latency=0.01, slots=8)
    manager = make("back", model, limit=None, share=0.5)
    manager.background = Background(manager)
    Asked(manager, 100).all()
    assert 1 < model.most_at_once <= 4


def test_it_asks_nothing_while_a_live_runs_calls_wait(make):
    live_model, model = TestModel(latency=0.05), TestModel(latency=0.005)
    live = make("live", live_model, limit=2)
    Asked(live, 1).all()
    manager = make("back", model)
    manager.background = background = Background(manager)
    waiting = Asked(live, 40)
    wait_for(lambda: background._live() == {"only": True})
    wait_for(lambda: manager.instances["only"].queue.limit == 0)
    asked = Asked(manager, 10)
    time.sleep(0.2)
    assert len(waiting.results) < 40
    assert model.prompts == []
    waiting.all()
    assert len(asked.all()) == 10


def test_two_in_the_background_do_not_wait_for_each_other(make):
    one, two = make("one", TestModel(latency=0.01), limit=1), make("two", TestModel(latency=0.01), limit=1)
    one.background, two.background = Background(one), Background(two)
    both = Asked(one, 20), Asked(two, 20)
    assert [len(asked.all()) for asked in both] == [20, 20]


def test_it_sees_that_the_server_has_no_room(make):
    manager = make("back", TestModel([BackendBusy("full", retry_after=0.01), "ok"]), limit=16)
    manager.background = background = Background(manager)
    room, queue = background._rooms["only"], manager.instances["only"].queue
    wait_for(lambda: queue.limit == 16)
    Asked(manager, 1).all()
    wait_for(lambda: room.refused == 1)
    wait_for(lambda: queue.limit == 16)


def test_a_slow_server_gets_half(make):
    manager = make("back", TestModel())
    background = manager.background = Background(manager)
    background.end()
    manager.settle()
    instance, room = manager.instances["only"], background._rooms["only"]

    class Said:
        def __init__(self, median, busy=0):
            self._median, self._busy = median, busy

        def snapshot(self):
            minute = {"latency_s": {"p50": self._median}, "attempts": 50}
            return {"minute": minute, "uptime": {"errors_by_class": {"BackendBusy": self._busy}}}

    def look(median, busy=0, live=False):
        async def give():
            instance.recorder = Said(median, busy)
            background._give_room(instance, room, live)

        manager.run(give())
        return instance.queue.limit

    room.given = instance.queue.limit = 4
    recorder = instance.recorder
    assert [look(0.5), look(0.4), look(0.7)] == [5, 6, 7]
    assert look(0.9) == 3  # more than twice the 0.4 of its best
    assert [look(0.9), look(0.9)] == [1, 1]
    assert look(0.5) == 2
    assert look(0.5, busy=1) == 1
    assert look(0.5, busy=1) == 2
    assert look(0.5, busy=1, live=True) == 0
    assert look(0.5, busy=1) == 1
    instance.recorder = recorder


def test_the_budget_stops_it_before_it_is_passed(make):
    # Ten tokens, a cent a call.
    model = TestModel(latency=0.005)
    manager = make("back", model)
    told = []
    manager.background = background = Background(manager, budget=0.255, on_spent=lambda: told.append(1))
    results = Asked(manager, 100).all()
    assert sum(result.error is None for result in results) == len(model.prompts) == 25
    assert {type(result.error) for result in results if result.error} == {Cancelled}
    assert background.exhausted
    assert background.spent == pytest.approx(0.25)
    assert told == [1]


def test_what_earlier_starts_paid_counts(make):
    model = TestModel()
    manager = make("back", model)
    manager.background = background = Background(manager, budget=0.255, spent=0.2)
    Asked(manager, 100).all()
    assert len(model.prompts) == 5
    assert background.spent == pytest.approx(0.25)


def test_a_budget_that_is_enough_stops_nothing(make):
    manager = make("back", TestModel())
    manager.background = background = Background(manager, budget=1.1)
    assert all(result.error is None for result in Asked(manager, 100).all())
    assert not background.exhausted


def test_a_closing_run_finishes_what_it_asked_though_a_live_one_needs_all(make):
    manager = make("back", TestModel(latency=0.01))
    manager.background = background = Background(manager)
    background._live = lambda: {"only": True}
    wait_for(lambda: manager.instances["only"].queue.limit == 0)
    asked = Asked(manager, 10)
    manager.close()
    assert all(result.error is None for result in asked.all())
