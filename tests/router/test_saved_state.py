"""A router that was saved and loaded chooses as the one that went on."""

from __future__ import annotations

import json
import random
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from chainwax.connectors import InProcessBus
from chainwax.flows.testing import TestModel
from chainwax.router import (
    CallResult,
    Choice,
    Feedback,
    Form,
    LLMInterface,
    LLMManager,
    NodeSpec,
    Prompt,
    Query,
    load_settings,
)
from chainwax.router.policies import POLICIES, Remembering
from chainwax.router.share import ALL, Share

Make = Callable[..., LLMManager]
PRICES = {"strong": 1e-4, "middle": 1e-5, "small": 1e-6}
TIERS = {"strong": "strongest", "middle": "standard", "small": "local"}
RIGHT = {"strong": 0.95, "middle": 0.85, "small": 0.6}
DELAY = 30


def right(text: str) -> str:
    return "yes" if zlib.crc32(text.encode()) % 2 else "no"


def answers(model: str) -> Callable[[str], str]:
    def answer(text: str) -> str:
        lucky = random.Random(f"{model} {text}").random() < RIGHT[model]
        return right(text) if lucky else {"yes": "no", "no": "yes"}[right(text)]

    return answer


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as stack:

        def manager(
            *,
            run: str = "run",
            recording: Path | None = None,
            share: Share = ALL,
            begin: bool = True,
            **node: Any,
        ) -> LLMManager:
            settings = load_settings(
                run={"id": run, "recording": recording, "seed": 7},
                models={
                    name: {
                        "tier": TIERS[name],
                        "backend": "simulated",
                        "input_cost_per_token": price,
                        "output_cost_per_token": price,
                    }
                    for name, price in PRICES.items()
                },
                nodes={"node": node},
            )
            backends = {name: TestModel(answers(name)) for name in PRICES}
            made = LLMManager(settings, backends=backends, bus=InProcessBus(), share=share)
            stack.callback(made.close)
            if begin:
                made.begin_run("flow", run, nodes=[SPEC])
            else:
                made.register(SPEC)
            return made

        yield manager


SPEC = NodeSpec("node", Prompt("{text}"), Choice(["yes", "no"]), flow="flow")


def interface_of(manager: LLMManager) -> LLMInterface:
    return manager.register(SPEC)


def ask(manager: LLMManager, n: int) -> CallResult:
    interface = interface_of(manager)
    done = threading.Event()
    results: list[CallResult] = []

    def take(query: Query, result: CallResult) -> None:
        results.append(result)
        done.set()

    text = f"Is {n} it, or is it {n * n}? {'Think! ' * (n % 7)}"
    interface.submit([interface.bind({"text": text}, item_key=f"k{n}", position=f"p{n}")], take)
    assert done.wait(10)
    return results[0]


class Stream:
    """Items in order, each scored some items later; what was asked of each is kept."""

    def __init__(self, manager: LLMManager, waiting: list[tuple[str, str, float]] | None = None) -> None:
        self.manager = manager
        self.waiting = list(waiting or [])

    def go(self, start: int, end: int) -> list[Any]:
        seen = []
        for n in range(start, end):
            result = ask(self.manager, n)
            tried = [(a.arm.key, a.propensity, a.shadow, a.invalid, a.cost_usd) for a in result.attempts]
            seen.append((tried, result.arm and result.arm.key, result.value, type(result.error).__name__))
            if result.arm is not None:
                text = f"Is {n} it, or is it {n * n}? {'Think! ' * (n % 7)}"
                self.waiting.append((result.call_id, result.arm.key, float(result.value == right(text))))
            if len(self.waiting) > DELAY:
                call, arm, score = self.waiting.pop(0)
                self.manager.feedback([Feedback("node", score, call, arm=arm, source="s", time=1.0)])
            self.manager.settle()  # shadows too
        return seen


FORMS = [
    {"form": "direct"},
    {"form": "direct", "model": "middle", "certify": 0.3, "target": 0.8},
    {"form": "parallel", "target": 0.9},
    {"form": "switched", "target": 0.95},
    {"form": "switched", "target": 0.9, "certify": 0.2},
    {"form": "adaptive", "target": 0.9},
    {"form": "adaptive", "target": 0.9, "certify": 0.2},
    {"form": "adaptive", "target": 1.0, "budget": 0.6},
    {"form": "switched", "mode": "observe", "observe_share": 0.3, "model": "strong"},
    {"form": "adaptive", "mode": "observe", "observe_share": 0.3, "model": "middle"},
]


@pytest.mark.parametrize("node", FORMS, ids=lambda node: " ".join(str(v) for v in node.values()))
def test_the_next_1000_choices_are_the_same(make: Make, node: dict[str, Any]) -> None:
    first = make(**node)
    stream = Stream(first)
    stream.go(0, 400)
    saved = json.dumps(first.save_state(), allow_nan=False)
    waiting = list(stream.waiting)
    throughout = stream.go(400, 1400)
    other = make(**node)
    assert other.load_state(json.loads(saved))
    assert json.dumps(other.save_state()["nodes"]["node"]["policies"]) == json.dumps(
        json.loads(saved)["nodes"]["node"]["policies"]
    )
    assert Stream(other, waiting).go(400, 1400) == throughout
    if node["form"] != "direct":
        assert len({str(tried) for tried, *_ in throughout}) > 1  # there was something to choose


def test_no_text_is_in_a_saved_state(make: Make) -> None:
    manager = make(form="switched", target=0.9)
    Stream(manager).go(0, 50)
    text = json.dumps(manager.save_state())
    assert "Think" not in text
    assert "Is 7 it" not in text


@pytest.mark.parametrize("form", ["switched", "adaptive"])
def test_what_was_recorded_before_it_was_saved_is_not_learned_twice(
    make: Make, tmp_path: Path, form: str
) -> None:
    first = make(recording=tmp_path / "r.db", form=form, target=0.9)
    stream = Stream(first)
    stream.go(0, 200)
    saved = json.loads(json.dumps(first.save_state()))
    throughout = stream.go(200, 300)
    first.close()
    again = make(recording=tmp_path / "r.db", form=form, target=0.9, begin=False)
    assert again.load_state(saved)
    known = interface_of(again).router.stats.arms
    before = [(s.scores, s.scored) for s in known]
    again.recording.close()
    again.begin_run("flow", "later")
    after = [(s.scores, s.scored) for s in known]
    assert before == after
    assert len(throughout) == 100


def test_another_run_begins_with_its_budget_and_an_account_of_its_own(make: Make) -> None:
    first = make(form="adaptive", budget=0.5)
    Stream(first).go(0, 100)
    router = interface_of(first).router
    assert router.purse is not None
    spent = router.stats.spent
    assert spent > 0
    saved = json.loads(json.dumps(first.save_state()))
    for run, left in (("run", 0.5 - spent), ("other", 0.5)):
        second = make(run=run, form="adaptive", budget=0.5)
        assert second.load_state(saved)
        again = interface_of(second).router
        assert again.purse is not None
        assert again.purse.left(0.0) == pytest.approx(left)
        of_strong = second.snapshot()["interfaces"]["node"]["router"]["arms"]["strong"]
        assert (of_strong["cost_usd"], of_strong["answers"], of_strong["used"]) == (0.0, 0, 0)
        assert again.stats.mean_cost(again.stats.arms[0]) == router.stats.mean_cost(router.stats.arms[0])


def test_another_process_knows_the_same_and_draws_on_its_own(make: Make) -> None:
    first = make(form="switched", target=0.9)
    Stream(first).go(0, 200)
    saved = json.loads(json.dumps(first.save_state()))
    second = make(form="switched", target=0.9, share=Share(1, 2))
    drawn = json.dumps(second.save_state()["nodes"]["node"]["policies"]["switched"]["random"])
    assert second.load_state(saved)
    known = second.save_state()["nodes"]["node"]["policies"]["switched"]
    assert json.dumps(known["random"]) == drawn
    assert known["links"] == saved["nodes"]["node"]["policies"]["switched"]["links"]


def test_arms_that_are_gone_are_passed_over(make: Make) -> None:
    for form in ("switched", "adaptive"):
        first = make(form=form, target=0.9)
        Stream(first).go(0, 100)
        saved = json.loads(json.dumps(first.save_state()))
        second = make(form=form, target=0.9, deny=["small"])
        assert second.load_state(saved)
        Stream(second).go(100, 200)
        third = make(form=form, target=0.9)
        assert third.load_state(json.loads(json.dumps(second.save_state())))
        Stream(third).go(200, 300)


def test_every_policy_that_learns_or_draws_can_be_saved(make: Make) -> None:
    for form in (Form.switched, Form.adaptive):
        router = interface_of(make(form=form)).router
        assert isinstance(POLICIES[form](router.node, router.stats, 1), Remembering)
