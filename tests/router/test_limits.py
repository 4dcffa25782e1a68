"""What many processes may do together: slots, requests and tokens a minute, budgets."""

import asyncio
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from chainwax.flows.testing import TestModel
from chainwax.router import ConfigError, FreeText, LLMManager, NodeSpec, Prompt, load_settings
from chainwax.router.hub import LEASE, Ask, Bucket, Hub
from chainwax.router.purse import Purse
from chainwax.router.share import Away, OwnHub, Reply, Share


class Process:
    """Does what a process must: it keeps to what it was told."""

    def __init__(self, name):
        self.name = name
        self.slots = self.in_flight = self.waiting = 0
        self.got = 0

    def report(self, hub, total, now):
        ask = Ask(total, floor=self.in_flight, want=self.in_flight + self.waiting)
        self.slots = hub.exchange(self.name, {"m": ask}, now)["m"].slots
        self.begin()

    def begin(self):
        begun = max(0, min(self.waiting, self.slots - self.in_flight))
        self.waiting -= begun
        self.in_flight += begun
        self.got += begun

    def end(self, count):
        self.in_flight -= min(count, self.in_flight)
        self.begin()


@settings(max_examples=60, deadline=None)
@given(total=st.integers(1, 9), count=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_slots_hold_at_every_moment_and_everyone_gets_a_turn(total, count, seed):
    chance = random.Random(seed)
    hub, now = Hub(), 1.0
    processes = [Process(f"p{n}") for n in range(count)]
    json = TypeAdapter(Hub)
    for _ in range(400):
        now += chance.random() * 0.03  # all of it within one lease
        one = chance.choice(processes)
        match chance.randrange(4):
            case 0:
                one.waiting += chance.randrange(5)
                one.begin()
            case 1:
                one.end(chance.randrange(4))
            case 2:
                hub = json.validate_json(json.dump_json(hub))  # as Redis keeps it
            case 3:
                one.report(hub, total, now)
        assert sum(p.in_flight for p in processes) <= total
    # All want more than there is, and nobody waits for ever.
    for one in processes:
        one.waiting, one.got = 10_000, 0
    for _ in range(count * 40):
        now += 0.1
        for one in processes:
            one.end(1)
            one.report(hub, total, now)
            assert sum(p.in_flight for p in processes) <= total
    assert min(p.got for p in processes) > 0


def test_what_a_dead_process_held_is_lent_to_others_after_its_lease():
    hub = Hub()
    assert hub.exchange("dead", {"m": Ask(4, want=4)}, 1.0)["m"].slots == 4
    assert hub.exchange("live", {"m": Ask(4, want=4)}, 2.0)["m"].slots == 0
    assert hub.exchange("live", {"m": Ask(4, want=4)}, 1.0 + LEASE)["m"].slots == 0
    assert hub.exchange("live", {"m": Ask(4, want=4)}, 1.1 + LEASE)["m"].slots == 4


@settings(max_examples=40, deadline=None)
@given(per_minute=st.integers(1, 400), seed=st.integers(0, 10**6))
def test_in_no_minute_are_there_more_requests_than_allowed(per_minute, seed):
    chance = random.Random(seed)
    hub, now = Hub(), 1.0
    begun = []
    while now < 200:
        for name in ("a", "b"):
            ask = Ask(1000, want=50, requests_per_minute=per_minute, permits=chance.randrange(60))
            begun += [now] * hub.exchange(name, {"m": ask}, now)["m"].permits
        now += chance.random()
    for n, first in enumerate(begun):
        assert sum(1 for t in begun[n:] if t < first + 60) <= per_minute
    # And not many less, over a minute that was wanted throughout.
    assert sum(1 for t in begun if 61 <= t < 181) >= 2 * 0.85 * per_minute - 4


def test_tokens_are_charged_as_estimated_and_settled_when_they_are_known():
    hub, now, tokens, answered, open_ = Hub(), 1.0, 0, 0, 0
    spent = []
    while now < 300:
        ask = Ask(100, want=20, tokens_per_minute=60_000, permits=20, answered=answered, tokens=tokens)
        open_ += hub.exchange("a", {"m": ask}, now)["m"].permits
        now += 0.25
        # Each takes 1,000, four times what is guessed before the first.
        answered, tokens = answered + open_, tokens + 1000 * open_
        spent += [now] * open_
        open_ = 0
    after = [t for t in spent if t > 60]  # the first ones were guessed wrong
    for first in after:
        assert 1000 * sum(1 for t in after if first <= t < first + 60) <= 60_000 * 1.02
    assert len(after) * 1000 > 0.85 * 4 * 60_000 * 0.9


def test_a_bucket_of_less_than_one_a_minute_begins_empty():
    bucket = Bucket(0.5)
    assert not bucket.take(1.0)
    assert not bucket.take(60.0)
    assert bucket.take(122.0)


def test_processes_together_spend_a_budget_and_hardly_more():
    total = {}
    purses = [Purse(1.0) for _ in range(4)]

    def refresh(n):
        async def hear():
            purses[n].heard(total.get(n, 0.0), sum(total.values()), 4)

        return hear

    async def run():
        chance = random.Random(1)
        busy = list(range(4))
        for n, purse in enumerate(purses):
            purse.refresh = refresh(n)
        while busy:
            n = chance.choice(busy)
            await purses[n].room(lambda n=n: total.get(n, 0.0))
            if not purses[n].left(total.get(n, 0.0)):
                busy.remove(n)
                continue
            total[n] = total.get(n, 0.0) + 0.003

    asyncio.run(run())
    # One that heard long ago may spend what it was left with then; the manager hears twice a second.
    assert 1.0 <= sum(total.values()) < 1.13


def make(tmp_path, model, **config):
    options = {"tier": "local", "backend": "simulated", "input_cost_per_token": 0.01}
    options |= {"output_cost_per_token": 0.0, **config}
    return load_settings(run={"recording": tmp_path / "run.db"}, models={"only": options})


def ask(manager, texts, **node):
    interface = manager.register(NodeSpec("node", Prompt("{text}"), FreeText(), **node))
    results = []
    queries = [interface.bind({"text": text}, item_key=text, position=text) for text in texts]
    interface.submit(queries, lambda query, result: results.append(result))
    end = time.monotonic() + 20
    while len(results) < len(queries):
        assert time.monotonic() < end
        time.sleep(0.005)
    return results


def test_a_minute_holds_for_one_process_alone(tmp_path):
    model = TestModel()
    with LLMManager(make(tmp_path, model, requests_per_minute=60), backends={"only": model}) as manager:
        begun = time.monotonic()
        results = ask(manager, "abcdefgh")
        # Six at once, then 55 a minute.
        assert time.monotonic() - begun > 2 * 60 / 55 - 0.1
    assert len(results) == len(model.prompts) == 8
    assert not any(result.error for result in results)


def test_tokens_of_a_minute_hold_for_one_process_alone(tmp_path):
    model = TestModel(lambda text: text)
    # What is guessed before anything is known is right: 264 tokens each. Three go, the next in two seconds.
    settings = make(tmp_path, model, tokens_per_minute=7920)
    with LLMManager(settings, backends={"only": model}) as manager:
        begun = time.monotonic()
        assert len(ask(manager, [f"{n}" + "x" * 530 for n in range(4)])) == 4
        assert time.monotonic() - begun > 1.0


def test_a_spent_budget_stays_spent_when_the_run_goes_on(tmp_path):
    for start in range(3):
        model = TestModel()
        manager = LLMManager(make(tmp_path, model), backends={"only": model})
        manager.begin_run("flow", "run")
        # Each answer costs 0.01 for its one token in.
        results = [ask(manager, [f"{start}{n}"], budget=0.025)[0] for n in range(3)]
        manager.close()
        assert [r.error is None for r in results] == [[True, True, True], [False] * 3, [False] * 3][start]


def test_a_process_without_a_slot_is_an_error_where_nobody_lends(tmp_path):
    with pytest.raises(
        ConfigError, match=r"model 'only' has 2 slots, and 3 processes ask it: with \[redis\]"
    ):
        LLMManager(make(tmp_path, None, limit=2), share=Share(2, 3))
    model = TestModel(slots=2)
    with LLMManager(make(tmp_path, model), backends={"only": model}, share=Share(2, 3)) as manager:
        (result,) = ask(manager, "a")
        assert "has 2 slots, and 3 processes" in str(result.error)
        assert not model.prompts


class Flaky(OwnHub):
    """A lender that may be away."""

    lends_slots = True

    def __init__(self):
        super().__init__()
        self.away = False

    async def exchange(self, report):
        if self.away:
            raise Away("the lender is away")
        hub = self._hub.exchange(report.process, report.asks, time.monotonic())
        return Reply(hub, report.spent, 2)


def test_while_the_lender_is_away_nothing_is_asked_and_then_the_run_stops(tmp_path):
    model, lender = TestModel(latency=0.01), Flaky()
    settings = make(tmp_path, model, limit=4)
    settings = settings.model_copy(
        update={"redis": settings.redis.model_copy(update={"patience_seconds": 2.0})}
    )
    manager = LLMManager(settings, backends={"only": model}, lender=lender)
    stopped = []
    manager.on_fatal = lambda: stopped.append(True)
    manager.begin_run("flow", "run")
    assert len(ask(manager, "abcdefgh")) == 8
    assert model.most_at_once <= 4
    lender.away = True
    time.sleep(0.7)
    asked = len(model.prompts)
    results = ask(manager, "xyz")  # returns because the run is given up
    assert [type(r.error).__name__ for r in results] == ["Cancelled"] * 3
    assert len(model.prompts) == asked
    assert stopped == [True]
    with pytest.raises(Exception, match="the lender is away; it was away for 2 s"):
        manager.close()
