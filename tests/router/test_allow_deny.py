"""What a node keeps on its own machine stays there, whatever else happens to its calls."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from chainwax.connectors import InProcessBus
from chainwax.flows.testing import TestModel
from chainwax.router import (
    BackendDown,
    CallResult,
    Choice,
    Feedback,
    FeedbackKind,
    Form,
    FreeText,
    LLMInterface,
    LLMManager,
    Mode,
    ModelConfig,
    NodeSpec,
    Prompt,
    Rules,
    load_settings,
)
from chainwax.router.custom.dataset import collect

SECRET = "s3cr3t"
NEAR = {"near": "local", "closer": "local"}
FAR = {"strong": "strongest", "middle": "standard", "tuned": "custom"}
PRICE = {"strong": 1e-4, "middle": 1e-5, "tuned": 1e-7, "near": 1e-6, "closer": 1e-7}
LOCAL = [
    Rules(allow=("local",)),
    Rules(allow=("tier:local",)),
    Rules(allow=("near", "model:near")),
    Rules(allow=("provider:me",)),
    Rules(allow=("region:here",)),
    Rules(deny=("strongest", "tier:standard", "custom")),
    Rules(deny=("region:there",)),
    Rules(allow=("local", "strong"), deny=("provider:them",)),
]
"""As many ways to say that a node's text stays here."""
CHOICES = ["yes", "no"]
ANSWERS = {
    "right": "yes",
    "wrong": "no",
    "garbage": "neither of the two",
    "down": [BackendDown("away"), BackendDown("still away")],
    "now and then": ["yes", BackendDown("away"), "what?", "no"],
}


def config(name: str) -> dict[str, Any]:
    near = name in NEAR
    return {
        "tier": (NEAR | FAR)[name],
        "backend": "simulated",
        "input_cost_per_token": PRICE[name],
        "output_cost_per_token": PRICE[name],
        "provider": "me" if near else "them",
        "region": "here" if near else "there",
        "retries": 0,
    }


def ask(node: LLMInterface, texts: list[str]) -> list[CallResult]:
    results: list[CallResult] = []
    ready = threading.Event()

    def done(_: Any, result: CallResult) -> None:
        results.append(result)
        if len(results) == len(texts):
            ready.set()

    node.submit([node.bind({"text": t}, item_key=t, position=t) for t in texts], done)
    assert ready.wait(20), "a call hangs"
    return results


def told(manager: LLMManager, result: CallResult, draw: Callable[..., Any]) -> None:
    if result.arm is None or not draw(st.booleans()):
        return
    score, right = draw(st.sampled_from([(1.0, None), (0.0, None), (0.0, "yes"), (1.0, "yes"), (0.5, "no")]))
    kind = draw(st.sampled_from([FeedbackKind.label, FeedbackKind.downstream, FeedbackKind.validation]))
    manager.feedback(
        [Feedback(result.node, score, result.call_id, arm=result.arm.key, kind=kind, correction=right)]
    )


def leaks(models: dict[str, TestModel]) -> list[str]:
    return [n for n in FAR if any(SECRET in str(r.query.messages) for r in models[n].requests)]


@given(st.data())
@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_path_carries_a_local_nodes_text_elsewhere(data: st.DataObject) -> None:
    """A node that is only asked here beside one that is asked anywhere, through whatever may come."""
    draw = data.draw
    models = {name: TestModel(ANSWERS[draw(st.sampled_from(sorted(ANSWERS)))]) for name in PRICE}
    rules = draw(st.sampled_from(LOCAL))
    own = {
        "form": draw(st.sampled_from(list(Form))),
        "target": draw(st.sampled_from([0.5, 0.99, 1.0])),
        "certify": draw(st.sampled_from([0.0, 1.0])),
        "agreement": draw(st.sampled_from([0.0, 0.95])),
        "budget": draw(st.sampled_from([None, 1e-5, 1.0])),
        "latency": draw(st.sampled_from([None, 1e-6])),
    }
    answer = Choice(CHOICES) if draw(st.booleans()) else FreeText()
    first = [n for n in PRICE if n in ("near", "closer", "strong") or draw(st.booleans())]
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(
            run={"recording": str(Path(folder) / "run.db"), "seed": draw(st.integers(0, 99))},
            defaults={"custom": "auto"},
            models={name: config(name) for name in first},
            custom={"folder": str(Path(folder) / "models"), "least": 10_000},
        )
        backends = {name: models[name] for name in first}
        with LLMManager(settings, backends=backends, bus=InProcessBus()) as manager:
            manager.begin_run("flow")
            private = NodeSpec("private", Prompt("{text}"), answer, "flow", rules=rules, **own)
            public = replace(private, id="public", rules=Rules())
            if draw(st.booleans()):
                today = draw(st.sampled_from([None, "near"]))
                private = replace(private, mode=Mode.observe, observe_share=1.0, model=today)
            faces = {spec.id: manager.register(spec) for spec in (private, public)}
            for step in range(draw(st.integers(1, 5))):
                for word, face in ((SECRET, faces["private"]), ("open", faces["public"])):
                    for result in ask(face, [f"{word} {step} {n}" for n in range(6)]):
                        told(manager, result, draw)
                manager.settle()
                change = draw(st.sampled_from(["", "comes", "goes", "price", "rules"]))
                there = [n for n in PRICE if n in manager.instances]
                if change == "comes" and len(there) < len(PRICE):
                    new = next(n for n in PRICE if n not in there)
                    manager.add_model(new, ModelConfig(**config(new)), models[new])
                elif change == "goes" and "closer" in there:
                    manager.withdraw_model("closer")
                elif change == "price":
                    manager.set_price("near", input_cost_per_token=1.0)
                elif change == "rules":  # said another way
                    manager.run(
                        _change(faces["private"], replace(private, rules=draw(st.sampled_from(LOCAL))))
                    )
            manager.settle()
            manager.recording.flush(10)
            assert leaks(models) == []
            dataset = collect(Path(folder) / "run.db", public, held_out=0.2)
            assert SECRET not in str([*dataset.train, *dataset.held_out])


async def _change(face: LLMInterface, node: NodeSpec) -> None:
    face.change(node)


def test_the_check_would_see_a_leak() -> None:
    models = {name: TestModel("yes") for name in PRICE}
    settings = load_settings(
        run={"recording": ""}, models={name: config(name) for name in ("near", "strong")}
    )
    backends = {name: models[name] for name in ("near", "strong")}
    with LLMManager(settings, backends=backends, bus=InProcessBus()) as manager:
        manager.begin_run("flow")
        free = manager.register(NodeSpec("free", Prompt("{text}"), FreeText(), form=Form.parallel))
        ask(free, [f"{SECRET} {n}" for n in range(6)])
    assert leaks(models) == ["strong"]


@pytest.mark.parametrize("rules", LOCAL)
def test_a_local_node_is_asked_here_all_the_same(rules: Rules) -> None:
    near = TestModel("yes")
    settings = load_settings(
        run={"recording": ""}, models={name: config(name) for name in ("near", "strong")}
    )
    backends = {"near": near, "strong": TestModel("yes")}
    with LLMManager(settings, backends=backends, bus=InProcessBus()) as manager:
        manager.begin_run("flow")
        (result,) = ask(manager.register(NodeSpec("a", Prompt("{text}"), FreeText(), rules=rules)), ["x"])
    assert result.error is None
    assert len(near.prompts) == 1
