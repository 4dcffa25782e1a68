"""The manager, its interfaces and routers, over models in memory: what is asked, learned and recorded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from chainwax.connectors import InProcessBus
from chainwax.flows.testing import TestModel
from chainwax.router import (
    BackendBusy,
    BackendDown,
    BudgetSpent,
    CallResult,
    Choice,
    ConfigError,
    Feedback,
    FeedbackKind,
    Form,
    FreeText,
    LLMInterface,
    LLMManager,
    Mode,
    NodeSpec,
    Prompt,
    Query,
    Rules,
    Tier,
    UnknownModelType,
    UnknownName,
    load_settings,
)

Make = Callable[..., LLMManager]
PRICE = {"strong": 1e-4, "middle": 1e-5, "small": 0.0}
TIER = {"strong": Tier.strongest, "middle": Tier.standard, "small": Tier.local}


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as stack:

        def manager(recording: Path | None = None, run: str = "run", **options: Any) -> LLMManager:
            backends = {name: options.pop(name) for name in list(options) if name in PRICE}
            extra = options.pop("models", {})
            settings = load_settings(
                run={"recording": recording, "seed": 1},
                models={
                    name: {
                        "tier": TIER[name],
                        "backend": "simulated",
                        "input_cost_per_token": PRICE[name],
                        "output_cost_per_token": PRICE[name],
                        "provider": f"of-{name}",
                        "region": "eu" if name != "strong" else "us",
                        "retries": 2,
                        **extra.get(name, {}),
                    }
                    for name in backends
                },
                **options,
            )
            made = LLMManager(settings, backends=backends, bus=InProcessBus())
            stack.callback(made.close)
            made.begin_run("flow", run)
            return made

        yield manager


def spec(**options: Any) -> NodeSpec:
    answer = options.pop("answer", None) or FreeText()
    return NodeSpec(options.pop("id", "node"), Prompt("{text}"), answer, **options)


def ask(interface: LLMInterface, texts: list[str], timeout: float = 10.0) -> list[CallResult]:
    """Submit all at once; the results in order of the texts."""
    results: dict[str, CallResult] = {}
    left = threading.Semaphore(0)

    def done(query: Query, result: CallResult) -> None:
        results[query.call_id] = result
        left.release()

    queries = [interface.bind({"text": t}, item_key=f"k{n}", position=f"p{n}") for n, t in enumerate(texts)]
    interface.submit(queries, done)
    for _ in queries:
        assert left.acquire(timeout=timeout), "a call hangs"
    return [results[q.call_id] for q in queries]


# -- asking ------------------------------------------------------------------------------------------


def test_get_model_names_only_the_type(make: Make) -> None:
    manager = make(strong=TestModel("hello"), models={"strong": {"types": ["vision"]}})
    assert manager.get_model("text").query("say hello") == "hello"
    assert manager.get_model("Image + TEXT").query("see") == "hello"
    assert manager.get_model(["text", "image"]) is manager.get_model("vision")
    with pytest.raises(UnknownModelType, match="did you mean 'vision'"):
        manager.get_model("vison")
    with pytest.raises(ConfigError, match="no model serves the type 'transcription'"):
        manager.get_model("transcription")


def test_the_interface_does_not_execute_the_query(make: Make) -> None:
    model = TestModel(latency=0.05)
    interface = make(strong=model).register(spec())
    thread: list[str] = []
    interface.submit(
        [interface.bind({"text": "x"})], lambda q, r: thread.append(threading.current_thread().name)
    )
    assert model.prompts == []  # handed over, not executed
    deadline = time.monotonic() + 5
    while not thread and time.monotonic() < deadline:
        time.sleep(0.01)
    assert thread == ["chainwax-router"]


def test_higher_priority_is_served_first(make: Make) -> None:
    model = TestModel(latency=0.02)
    manager = make(strong=model, models={"strong": {"limit": 1}})
    low, high = manager.register(spec(id="low")), manager.register(spec(id="high", priority=5))
    left = threading.Semaphore(0)
    done = lambda q, r: left.release()  # noqa: E731
    low.submit([low.bind({"text": f"low{n}"}, position=str(n)) for n in range(5)], done)
    time.sleep(0.01)
    high.submit([high.bind({"text": f"high{n}"}, position=str(n)) for n in range(3)], done)
    for _ in range(8):
        assert left.acquire(timeout=5)
    assert model.prompts[0] == "low0"
    assert model.prompts[1:4] == ["high0", "high1", "high2"]
    assert model.most_at_once == 1


def test_a_batch_backend_gets_the_batch_as_one_request(make: Make) -> None:
    sizes: list[int] = []

    class Batching(TestModel):
        batch_max = 8

        async def generate_batch(self, requests: Any) -> Any:
            sizes.append(len(requests))
            return await super().generate_batch(requests)

    interface = make(strong=Batching(lambda t: t.upper())).register(spec())
    results = ask(interface, [f"t{n}" for n in range(16)])
    assert [r.value for r in results] == [f"T{n}" for n in range(16)]
    assert sizes == [8, 8]


# -- forms -------------------------------------------------------------------------------------------


def test_direct_asks_its_model_only(make: Make) -> None:
    strong, small = TestModel("a"), TestModel("b")
    interface = make(strong=strong, small=small).register(spec(form=Form.direct, model="small"))
    assert {r.value for r in ask(interface, ["x"] * 1 + ["y", "z"])} == {"b"}
    assert strong.prompts == []


def test_switched_escalates_when_an_answer_is_invalid(make: Make) -> None:
    answer = Choice(["yes", "no"])
    small = TestModel({"easy": "yes", "hard": "er …"})
    middle, strong = TestModel({"hard": "perhaps"}), TestModel("no")
    manager = make(strong=strong, middle=middle, small=small)
    # With so low a target what is guessed of the small model is enough: it is asked first, and served.
    node = manager.register(spec(form=Form.switched, answer=answer, target=0.1))
    easy, hard = ask(node, ["easy", "hard"])
    assert (easy.value, easy.arm.model if easy.arm else None) == ("yes", "small")
    assert (hard.value, hard.arm.model if hard.arm else None) == ("no", "strong")
    assert [(a.arm.model, a.invalid) for a in hard.attempts] == [
        ("small", True),
        ("middle", True),
        ("strong", False),
    ]
    assert hard.cost_usd == pytest.approx(sum(a.cost_usd for a in hard.attempts))
    manager.settle()
    arms = manager.snapshot()["interfaces"]["node"]["router"]["arms"]
    assert arms["small"]["invalid"] == 1
    assert arms["small"]["score"] == 0.0  # a failed validation counts against its arm


def test_switched_goes_on_from_a_doubtful_answer_and_keeps_it_where_nobody_else_can(make: Make) -> None:
    small, strong = TestModel("maybe"), TestModel(["sure", BackendDown("gone")])
    manager = make(strong=strong, small=small, models={"strong": {"retries": 0}})
    node = manager.register(spec(form=Form.switched, target=1.0))
    served, kept = (ask(node, [text])[0] for text in ("a", "b"))
    assert (served.value, served.arm.model if served.arm else None) == ("sure", "strong")
    assert [a.arm.model for a in served.attempts] == ["small", "strong"]
    assert served.cost_usd == pytest.approx(sum(a.cost_usd for a in served.attempts))
    assert (kept.value, kept.arm.model if kept.arm else None) == ("maybe", "small")
    assert all(0 < (a.propensity or 0) <= 1 for a in served.attempts)


def test_parallel_answers_with_the_strongest_and_learns_who_agrees(make: Make) -> None:
    manager = make(
        strong=TestModel(lambda t: f"{t} is fine"),
        middle=TestModel(lambda t: f"{t}  is\nfine"),  # the same words
        small=TestModel(lambda t: f"{t} is fine" if t == "t0" else "no idea"),
    )
    results = ask(manager.register(spec(form=Form.parallel)), [f"t{n}" for n in range(4)])
    assert [r.value for r in results] == [f"t{n} is fine" for n in range(4)]
    assert all(len(r.attempts) == 3 for r in results)
    manager.settle()
    router = manager.snapshot()["interfaces"]["node"]["router"]
    assert router["arms"]["middle"]["score"] == 1.0
    assert router["arms"]["small"]["score"] == 0.25
    assert router["scores"] == 0  # agreement is not quality that somebody downstream saw


def test_parallel_goes_on_when_one_is_down(make: Make) -> None:
    manager = make(
        strong=TestModel([BackendDown("gone")]), small=TestModel("here"), models={"strong": {"retries": 0}}
    )
    (result,) = ask(manager.register(spec(form=Form.parallel)), ["x"])
    assert result.value == "here"


def test_observe_serves_todays_model_and_only_watches(make: Make) -> None:
    strong, small = TestModel("same"), TestModel("same")
    manager = make(strong=strong, small=small)
    node = manager.register(spec(mode=Mode.observe, observe_share=0.5, target=0.9))
    results = ask(node, [f"t{n}" for n in range(60)])
    manager.settle()
    assert {r.arm.model for r in results if r.arm} == {"strong"}
    assert len(strong.prompts) == 60
    assert 10 < len(small.prompts) < 50  # the share, not all
    router = manager.snapshot()["interfaces"]["node"]["router"]
    assert router["choice"] == "strong"
    assert router["would_choose"] == "small"
    assert router["arms"]["small"]["score"] == 1.0
    assert router["observed"]["calls"] == 60
    assert 0 < router["observed"]["would_cost_usd"] < router["observed"]["cost_usd"]
    assert sum(r.cost_usd for r in results) == pytest.approx(router["observed"]["cost_usd"])


def test_choices_carry_their_propensity(make: Make) -> None:
    manager = make(strong=TestModel(), small=TestModel())
    results = ask(manager.register(spec()), [f"t{n}" for n in range(50)])
    for result in results:
        assert result.attempts[0].propensity is not None
        assert 0 < result.attempts[0].propensity <= 1


# -- rules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        (Rules(allow=("local",)), {"small"}),
        (Rules(allow=("tier:local", "model:middle")), {"small", "middle"}),
        (Rules(deny=("strongest",)), {"small", "middle"}),
        (Rules(deny=("region:us",)), {"small", "middle"}),
        (Rules(deny=("provider:of-small", "middle")), {"strong"}),
        (Rules(allow=("local", "strong"), deny=("strong",)), {"small"}),
    ],
)
@pytest.mark.parametrize("form", list(Form))
def test_allow_and_deny_hold_on_every_form_and_on_escalation(
    make: Make, rules: Rules, left: set[str], form: Form
) -> None:
    # Every answer is invalid, so that every form goes as far as it can.
    models = {name: TestModel("garbage") for name in PRICE}
    node = make(**models).register(spec(rules=rules, form=form, answer=Choice(["yes", "no"])))
    for result in ask(node, [f"t{n}" for n in range(10)]):
        assert result.error is not None
    assert {name for name, model in models.items() if model.prompts} <= left
    if form is not Form.direct:
        assert {name for name, model in models.items() if model.prompts} == left


def test_rules_that_name_nothing_are_refused(make: Make) -> None:
    manager = make(strong=TestModel(), small=TestModel())
    with pytest.raises(UnknownName, match=r"node 'a', allow: tier or model 'locl'.*did you mean 'local'"):
        manager.register(spec(id="a", rules=Rules(allow=("locl",))))
    with pytest.raises(ConfigError, match="must start with one of tier"):
        manager.register(spec(id="a", rules=Rules(deny=("country:us",))))
    with pytest.raises(ConfigError, match="node 'a': its allow and deny leave none of strong, small"):
        manager.register(spec(id="a", rules=Rules(allow=("custom",))))


def test_the_configuration_tightens_what_the_flow_says(make: Make) -> None:
    manager = make(
        strong=TestModel(),
        middle=TestModel(),
        small=TestModel(),
        defaults={"deny": ["strong"], "allow": ["standard", "local"], "target": 0.9},
        nodes={"node": {"target": 0.8, "priority": 7}},
    )
    node = manager.configured(spec(target=0.5, rules=Rules(allow=("local",), deny=("region:us",))))
    assert (node.target, node.priority) == (0.8, 7)
    assert node.rules == Rules(
        ("local",), ("region:us", "strong")
    )  # the default did not open what the flow closed
    assert manager.configured(spec(id="other")).target == 0.9
    with pytest.raises(UnknownName, match=r"node 'node': model 'stronk'.*did you mean 'strong'"):
        manager.configured(spec(model="stronk"))


# -- failures ----------------------------------------------------------------------------------------


def test_what_may_pass_is_tried_again_and_what_it_took_is_recorded(make: Make) -> None:
    model = TestModel([BackendDown("once"), "fine"])
    (result,) = ask(make(strong=model).register(spec()), ["x"])
    assert result.value == "fine"
    assert [a.error for a in result.attempts] == ["BackendDown: once", None]
    assert [a.number for a in result.attempts] == [1, 2]


def test_retry_after_closes_the_queue_for_everybody(make: Make) -> None:
    model = TestModel([BackendBusy("slow down", retry_after=0.3), "ok", "ok", "ok"])
    manager = make(strong=model, models={"strong": {"limit": 1}})
    begun = time.monotonic()
    results = ask(manager.register(spec()), ["a", "b", "c"])
    assert [r.value for r in results] == ["ok"] * 3
    assert time.monotonic() - begun >= 0.3
    assert len(model.prompts) == 4


def test_a_model_that_asks_for_a_long_pause_is_passed_over(make: Make) -> None:
    strong = TestModel([BackendBusy("come back tomorrow", retry_after=3600.0)])
    manager = make(strong=strong, small=TestModel("ok"))
    begun = time.monotonic()
    assert ask(manager.register(spec()), ["a"])[0].value == "ok"
    assert ask(manager.register(spec(id="b")), ["b"])[0].value == "ok"
    assert time.monotonic() - begun < 5
    assert len(strong.prompts) <= 1


def test_a_model_that_is_down_is_left_alone_for_a_while(make: Make) -> None:
    strong = TestModel([BackendDown("gone")])
    manager = make(strong=strong, small=TestModel("ok"), models={"strong": {"retries": 0}})
    node = manager.register(spec())
    for _ in range(10):
        assert {r.value for r in ask(node, [f"t{n}" for n in range(5)])} == {"ok"}
    asked = len(strong.prompts)
    assert 5 <= asked <= 10  # five failures in a row, and those that were in flight with the fifth
    assert {r.value for r in ask(node, [f"u{n}" for n in range(20)])} == {"ok"}
    assert len(strong.prompts) == asked


def test_where_nothing_answers_the_error_says_what_each_said(make: Make) -> None:
    manager = make(
        strong=TestModel([BackendDown("first")]),
        small=TestModel([BackendDown("second")]),
        models={"strong": {"retries": 0}, "small": {"retries": 0}},
    )
    (result,) = ask(manager.register(spec()), ["x"])
    assert isinstance(result.error, BackendDown)
    assert "first" in str(result.error)
    assert "second" in str(result.error)
    assert manager.snapshot()["interfaces"]["node"]["last_error"]["error"] == "BackendDown"


def test_a_spent_budget_stops_what_costs_and_says_so(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "chainwax")
    text = "x" * 400  # 100 tokens: a cent
    dear = make(strong=TestModel("ok"))
    node = dear.register(spec(budget=0.05))
    for _ in range(3):
        results = ask(node, [f"{text}{n}" for n in range(3)])
    assert isinstance(results[-1].error, BudgetSpent)
    assert "budget of $0.05 is spent" in str(results[-1].error)
    assert sum("budget_reached" in m for m in caplog.messages) == 1
    free = make(strong=TestModel("ok"), small=TestModel("ok"), run="free")
    results = [
        r for _ in range(4) for r in ask(free.register(spec(budget=0.02)), [f"{text}{n}" for n in range(5)])
    ]
    assert all(r.value == "ok" for r in results)  # what is free goes on


# -- feedback and the recorders ----------------------------------------------------------------------


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -0.01, 1.01, "high", None])
def test_hostile_scores_are_refused_and_counted(make: Make, score: Any) -> None:
    manager = make(strong=TestModel())
    (result,) = ask(manager.register(spec()), ["x"])
    manager.feedback([Feedback("node", score, result.call_id, arm="strong")])
    manager.settle()
    assert manager.refused_feedback == 1
    assert manager.snapshot()["interfaces"]["node"]["router"]["scores"] == 0


def test_feedback_by_call_or_by_item_key_alone_finds_its_arm(make: Make, tmp_path: Path) -> None:
    manager = make(tmp_path / "r.db", strong=TestModel())
    results = ask(manager.register(spec()), ["a", "b"])
    manager.feedback([Feedback("", 1.0, results[0].call_id), Feedback("node", 0.0, item_key="k1")])
    manager.settle()
    router = manager.snapshot()["interfaces"]["node"]["router"]
    assert (router["scores"], router["quality"]) == (2, 0.5)


def test_feedback_finds_a_node_that_is_not_of_the_runs_flow(make: Make) -> None:
    manager = make(strong=TestModel())
    (result,) = ask(manager.register(spec(id="alone", flow="another")), ["x"])
    manager.feedback([Feedback("alone", 1.0, result.call_id, arm="strong")])
    manager.settle()
    assert manager.refused_feedback == 0
    assert manager.snapshot()["interfaces"]["alone"]["router"]["scores"] == 1
    # Two nodes of one name: nobody can say which is meant.
    manager.register(spec(id="alone", flow="a third"))
    manager.feedback([Feedback("alone", 1.0, result.call_id, arm="strong")])
    manager.settle()
    assert manager.refused_feedback == 1


def test_the_recorders_count_what_was_done(make: Make, tmp_path: Path) -> None:
    model = TestModel(["fine", BackendDown("no"), "fine", "fine", "bad", "fine", "fine"])
    manager = make(tmp_path / "r.db", strong=model, models={"strong": {"retries": 1, "limit": 1}})
    node = manager.register(spec(answer=FreeText(lambda t: t != "bad")))
    results = ask(node, [f"t{n}" for n in range(6)])
    failed = [r for r in results if r.error is not None]
    assert len(failed) == 1
    manager.feedback([Feedback("node", 0.5, r.call_id, arm="strong") for r in results if r.error is None])
    manager.settle()
    snapshot = manager.snapshot()
    tokens = sum(max(1, len(p) // 4) for p in model.prompts)
    for window in ("minute", "hour", "uptime"):
        instance = snapshot["models"]["strong"][window]
        assert instance["attempts"] == len(model.prompts) == 7
        assert instance["errors_by_class"] == {"BackendDown": 1, "AnswerInvalid": 1}
        assert instance["validation_failures"] == 1
        assert instance["input_tokens"] == tokens - 1  # the failed attempt told of no tokens
        assert instance["output_tokens"] == 6
        assert instance["cost_usd"] == pytest.approx(PRICE["strong"] * (tokens - 1 + 6))
        assert instance["score"] == pytest.approx(5 * 0.5 / 6)  # five scores and the failed validation's 0
        assert instance["scores"] == 6
        assert instance["latency_s"]["p95"] < 1
        interface = snapshot["interfaces"]["node"][window]
        assert interface["queries"] == interface["finished"] == 6
        assert interface["errors"] == 1
        assert interface["choices"] == {"strong": 6}
        assert interface["waited_s"]["p50"] is not None
    assert snapshot["interfaces"]["node"]["in_flight"] == 0
    assert snapshot["interfaces"]["node"]["rate_per_s"] > 0
    assert snapshot["interfaces"]["node"]["last_error"]["error"] == "AnswerInvalid"


def test_a_later_run_starts_from_what_was_learned(make: Make, tmp_path: Path) -> None:
    first = make(tmp_path / "r.db", strong=TestModel("a"), small=TestModel("a"))
    node = first.register(spec(target=0.9))
    for _ in range(10):
        results = ask(node, [f"t{n}" for n in range(20)])
        first.feedback(
            [Feedback("node", 1.0, r.call_id, arm=r.arm.key, time=1.0) for r in results if r.arm is not None]
        )
        first.settle()
        first.run_id += "+"
    learned = first.snapshot()["interfaces"]["node"]["router"]
    assert learned["choice"] == "small"
    first.close()
    small = TestModel("a")
    second = make(tmp_path / "r.db", run="second", strong=TestModel("a"), small=small)
    again = second.register(spec(target=0.9))
    known = second.snapshot()["interfaces"]["node"]["router"]
    assert known["choice"] == "small"
    assert known["arms"]["small"]["scores"] == learned["arms"]["small"]["scores"]
    ask(again, [f"t{n}" for n in range(20)])
    assert len(small.prompts) >= 10


def test_a_resumed_run_pays_nothing_twice(make: Make, tmp_path: Path) -> None:
    first = make(tmp_path / "r.db", strong=TestModel("one"), small=TestModel("bad"))
    options: dict[str, Any] = {"form": Form.switched, "answer": FreeText(lambda t: t != "bad"), "target": 0.1}
    before = ask(first.register(spec(**options)), ["a", "b"])
    assert [len(r.attempts) for r in before] == [2, 2]
    first.close()
    strong, small = TestModel("two"), TestModel("two")
    second = make(tmp_path / "r.db", strong=strong, small=small)
    assert second.resumed
    after = ask(second.register(spec(**options)), ["a", "b", "c"])
    assert [r.value for r in after] == ["one", "one", "two"]
    assert [r.reused for r in after] == [True, True, False]
    assert [r.cost_usd for r in after[:2]] == [0.0, 0.0]
    assert strong.prompts == []
    assert small.prompts == ["c"]


def test_closing_drains_what_is_in_flight(make: Make, tmp_path: Path) -> None:
    manager = make(tmp_path / "r.db", strong=TestModel(latency=0.1))
    interface = manager.register(spec())
    done: list[CallResult] = []
    interface.submit([interface.bind({"text": "x"})], lambda q, r: done.append(r))
    manager.close()
    assert [r.value for r in done] == ["ok"]


def test_stopping_without_drain_cancels_and_records_nothing_of_it(make: Make, tmp_path: Path) -> None:
    manager = make(tmp_path / "r.db", strong=TestModel(latency=5))
    interface = manager.register(spec())
    done: list[CallResult] = []
    interface.submit([interface.bind({"text": "x"})], lambda q, r: done.append(r))
    begun = time.monotonic()
    manager.close(status="stopped", drain=False)
    assert time.monotonic() - begun < 2
    assert [type(r.error).__name__ for r in done] == ["Cancelled"]


def test_validation_feedback_is_recorded_too(make: Make, tmp_path: Path) -> None:
    manager = make(tmp_path / "r.db", small=TestModel("bad"), strong=TestModel("good"))
    ask(manager.register(spec(form=Form.switched, answer=Choice(["good", "fair"]))), ["a"])
    manager.settle()
    assert manager.recording.flush(5)
    kinds = [(known.arm, known.kind, known.score) for known in manager.recording.fold("flow")]
    assert kinds == [("small", FeedbackKind.validation, 0.0)]


def test_a_lambda_check_that_raises_is_an_invalid_answer(make: Make) -> None:
    def check(text: str) -> None:
        raise ValueError("too rude")

    (result,) = ask(make(strong=TestModel()).register(spec(answer=FreeText(check))), ["x"])
    assert "too rude" in str(result.error)
