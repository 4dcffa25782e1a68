"""Models that come, go and change their price while calls are made."""

from __future__ import annotations

import asyncio
import threading

import pytest

from chainwax.router import (
    Choice,
    ConfigError,
    Feedback,
    Form,
    FreeText,
    LLMManager,
    ModelConfig,
    NodeSpec,
    Prompt,
    Rules,
    Tier,
    Usage,
    load_settings,
)
from chainwax.router.backends import Health, Reply
from chainwax.router.errors import BackendDown


class Backend:
    simulated = False
    batch_max = 1

    def __init__(self, text="yes", seconds=0.0):
        self.text, self.seconds = text, seconds
        self.asked = self.answered = 0
        self.closed = self.down = False

    async def start(self):
        return None

    async def generate(self, request):
        assert not self.closed
        self.asked += 1
        await asyncio.sleep(self.seconds)
        if self.down:
            raise BackendDown("gone")
        self.answered += 1
        return Reply(self.text, Usage(100, 10))

    async def generate_batch(self, requests):
        raise AssertionError

    async def health(self):
        return Health(True)

    async def close(self):
        self.closed = True


def config(tier="standard", cost=1e-6, **more):
    return ModelConfig(
        tier=tier, url="http://127.0.0.1:9/v1", model="-", input_cost_per_token=cost,
        output_cost_per_token=cost, **more,
    )  # fmt: skip


def manager(backends, **tiers):
    models = {name: config(tier).model_dump() for name, tier in tiers.items()}
    return LLMManager(load_settings(run={"recording": "", "seed": 1}, models=models), backends=backends)


def node(id="n", form=Form.adaptive, **more):
    return NodeSpec(id, Prompt("{value}"), Choice(["yes", "no"]), form=form, **more)


def ask(face, count=1, prefix="q"):
    done: list = []
    event = threading.Event()
    queries = [face.bind(f"{prefix}{n}", position=f"{prefix}{n}") for n in range(count)]

    def take(_, result):
        done.append(result)
        if len(done) == count:
            event.set()

    face.submit(queries, take)
    return done, event


def test_a_model_that_comes_is_asked_and_one_that_goes_is_not():
    one, two = Backend(), Backend()
    with manager({"one": one}, one="strongest") as m:
        face = m.register(node(form=Form.parallel))
        assert m.add_model("two", config(), two) == ["n"]
        assert [s.key for s in face.router.stats.arms] == ["one", "two"]
        face.query("hello")
        assert (one.asked, two.asked) == (1, 1)
        m.withdraw_model("two", why="test")
        face.query("hello again")
        assert (one.asked, two.asked) == (2, 1)
        m.settle()
    assert two.closed


def test_what_is_in_flight_on_a_withdrawn_model_finishes_and_none_fails():
    slow, other = Backend(seconds=0.2), Backend()
    with manager({"slow": slow, "other": other}, slow="strongest", other="standard") as m:
        m.instances["slow"].queue.limit = 4
        face = m.register(node(form=Form.direct))  # the strongest, without being set to it
        done, all_done = ask(face, 20)
        while slow.asked < 4:
            pass
        m.withdraw_model("slow")
        more, more_done = ask(face, 5, "later")
        assert more_done.wait(5)
        assert {r.arm.model for r in more} == {"other"}
        assert not slow.closed
        assert all_done.wait(10)
        assert [r.error for r in (*done, *more) if r.error] == []
        assert {r.arm.model for r in done} == {"slow"}
        m.settle()
    assert slow.closed
    assert slow.answered == 20


def test_a_call_whose_model_dies_while_it_is_withdrawn_goes_to_another():
    dying, other = Backend(seconds=0.1), Backend("no")
    dying.down = True
    with manager({"dying": dying, "other": other}, dying="strongest", other="standard") as m:
        face = m.register(node(form=Form.direct))
        done, all_done = ask(face)
        while not dying.asked:
            pass
        m.withdraw_model("dying")
        assert all_done.wait(10)
        assert done[0].error is None
        assert done[0].value == "no"
        assert dying.asked == 1  # not again


def test_hammering_coming_and_going_fails_no_call():
    backends = {f"m{i}": Backend(seconds=0.002) for i in range(3)}
    with manager(backends, m0="strongest", m1="standard", m2="local") as m:
        faces = [m.register(node(f"n{form}", form)) for form in Form]
        waiting = [ask(face, 200) for face in faces]
        for round in range(10):
            m.withdraw_model("m1")
            m.add_model(f"new{round}", config("custom"), Backend(seconds=0.002))
            m.add_model("m1", config("standard"), Backend(seconds=0.002))
            m.withdraw_model(f"new{round}")
            if round == 5:
                m.withdraw_model("m0")
            waiting += [ask(face, 20, f"r{round}") for face in faces]
        results = []
        for done, event in waiting:
            assert event.wait(20)
            results += done
        assert [r.error for r in results if r.error is not None] == []
        assert len(results) == 4 * 200 + 10 * 4 * 20


def test_scores_of_a_withdrawn_model_are_no_harm_and_count_when_it_comes_back():
    with manager({"one": Backend(), "two": Backend()}, one="strongest", two="standard") as m:
        face = m.register(node())
        m.withdraw_model("two")
        m.feedback([Feedback("n", 1.0, call_id="c", arm="two"), Feedback("n", 0.0, call_id="d", arm="one")])
        m.settle()
        stats = face.router.stats
        assert stats.by_key["two"].scored == 1
        index = stats.by_key["two"].index
        m.add_model("two", config(), Backend())
        assert stats.by_key["two"].index == index
        assert [s.key for s in stats.arms] == ["one", "two"]
        assert [s.rank for s in stats.arms] == [0, 1]
        assert stats.right[index] == 3.0
        face.router.snapshot()


def test_a_model_of_some_nodes_is_no_other_nodes_model():
    with manager({"one": Backend()}, one="strongest") as m:
        a, b = m.register(node("a")), m.register(node("b"))
        private = m.register(node("c", rules=Rules(deny=("custom",))))
        assert m.add_model("mine", config("custom"), Backend(), nodes=["a", "later", "c"]) == ["a"]
        assert [s.key for s in a.router.stats.arms] == ["one", "mine"]
        assert [s.key for s in b.router.stats.arms] == ["one"]
        assert [s.key for s in private.router.stats.arms] == ["one"]
        assert [s.key for s in m.register(node("later")).router.stats.arms] == ["one", "mine"]
        assert [s.key for s in m.register(node("other")).router.stats.arms] == ["one"]


def test_the_last_model_and_a_nodes_fixed_one_stay():
    with manager({"one": Backend(), "two": Backend()}, one="strongest", two="standard") as m:
        m.register(node("fixed", Form.direct, model="two"))
        m.register(node("narrow", rules=Rules(allow=("one",))))
        with pytest.raises(ConfigError, match="node 'fixed' is set to the model 'two'"):
            m.withdraw_model("two")
        with pytest.raises(ConfigError, match="node 'narrow' has no other model than 'one'"):
            m.withdraw_model("one")
        with pytest.raises(ConfigError, match="unknown model 'tow': did you mean 'two'"):
            m.withdraw_model("tow")
        with pytest.raises(ConfigError, match="there is a model 'one' already"):
            m.add_model("one", config(), Backend())


def test_a_changed_price_counts_at_once_and_what_was_paid_stays_paid():
    with manager({"one": Backend(), "two": Backend()}, one="strongest", two="standard") as m:
        face = m.register(node(form=Form.parallel))
        for n in range(4):
            face.query(f"hello {n}")
        stats = face.router.stats
        one = stats.by_key["one"]
        assert stats.mean_cost(one) == pytest.approx(110e-6)
        m.set_price("one", input_cost_per_token=1e-7, output_cost_per_token=1e-7)
        assert stats.mean_cost(one) == pytest.approx(11e-6)
        assert one.as_json()["cost_usd"] == pytest.approx(440e-6)
        assert stats.by_cost(stats.arms)[0] is one
        with pytest.raises(ConfigError, match=r"model 'one': input_cost_per_token -1\.0 is no price"):
            m.set_price("one", input_cost_per_token=-1.0)


def test_what_came_and_went_is_decided_and_told():
    told = []
    with manager({"one": Backend()}, one="strongest") as m:
        m.register(node())
        m.announce = told.append
        m.add_model("two", config("custom"), Backend())
        m.set_price("two", input_cost_per_token=5e-6)
        m.withdraw_model("two", why="no use")
    assert [(d.kind, d.detail["model"]) for d in told] == [
        ("model_added", "two"), ("price_changed", "two"), ("model_withdrawn", "two"),
    ]  # fmt: skip
    assert told[0].detail["nodes"] == ["n"]
    assert told[2].detail["why"] == "no use"


def test_models_may_come_before_the_manager_runs_and_have_limits_by_the_minute():
    m = manager({"one": Backend()}, one="strongest")
    m.add_model("two", config(requests_per_minute=600), Backend())
    with m:
        face = m.register(NodeSpec("n", Prompt("{value}"), FreeText(), form=Form.parallel))
        m.add_model("three", config(Tier.local, requests_per_minute=600), Backend())
        face.query("hello")
        assert m.instances["three"].backend.answered == 1
