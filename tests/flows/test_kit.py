"""The test kit itself: the model in memory, cassettes, the virtual clock, run_flow."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, Literal

import pytest

from chainwax.flows import Flow
from chainwax.flows.testing import Cassette, TestModel, VirtualClock, run_flow
from chainwax.router import BackendDown, ChainwaxError, ModelConfig, RecordingError, load_settings
from chainwax.router.backends.openai import OpenAIBackend

from .test_bad_servers import broken, server


def ask_flow() -> Flow:
    flow = Flow("kit")
    flow.source("in").query("ask", "{text}").sink("out")
    return flow


SIMULATED: dict[str, Any] = {
    "tier": "local",
    "backend": "simulated",
    "input_cost_per_token": 0.0,
    "output_cost_per_token": 0.0,
}
TEXTS: list[dict[str, Any]] = [{"text": f"t{n}"} for n in range(4)]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("same", ["same"] * 4),
        (["a", "b"], ["a", "b", "a", "b"]),
        ({"t": "any"}, ["any"] * 4),
        (lambda text: text.upper(), ["T0", "T1", "T2", "T3"]),
    ],
)
def test_a_model_answers_as_told(answers: Any, expected: list[str]) -> None:
    model = TestModel(answers)
    out = run_flow(ask_flow(), TEXTS, model=model)
    assert [v["ask"] for v in out["out"]] == expected
    assert model.prompts == ["t0", "t1", "t2", "t3"]
    assert out.dead_letters == []
    assert out.snapshot["interfaces"]["ask"]["uptime"]["queries"] == 4


def test_what_a_model_cannot_answer_is_a_dead_letter() -> None:
    out = run_flow(ask_flow(), TEXTS, model=TestModel({"t1": "one"}))
    assert len(out["out"]) == 1
    assert len(out.dead_letters) == 3
    assert "no answer for 't0'" in out.dead_letters[0]["message"]


def test_models_stand_in_for_configured_ones() -> None:
    settings = load_settings(
        run={"recording": None},
        defaults={"form": "direct", "model": "b"},
        models={name: {**SIMULATED, "input_cost_per_token": 1.0} for name in ("a", "b")},
    )
    a, b = TestModel("a"), TestModel("b")
    out = run_flow(ask_flow(), TEXTS, models={"a": a, "b": b}, settings=settings)
    assert [v["ask"] for v in out["out"]] == ["b"] * 4
    assert out.snapshot["interfaces"]["ask"]["router"]["spent_usd"] == 4.0
    assert a.prompts == []


def test_items_by_source() -> None:
    flow = Flow("two")
    flow.merge("both", flow.source("a"), flow.source("b")).query("ask", "{text}").sink("out")
    with pytest.raises(ChainwaxError, match=r"sources \['a', 'b'\]"):
        run_flow(flow, TEXTS)
    out = run_flow(flow, {"a": TEXTS[:1], "b": TEXTS[1:]})
    assert sorted(v["text"] for v in out["out"]) == ["t0", "t1", "t2", "t3"]


def test_a_cassette_records_a_real_server_once_and_plays_it_back(tmp_path: Path) -> None:
    path = tmp_path / "cassettes" / "ask.jsonl"
    with server(broken) as url:
        config = ModelConfig(tier="local", url=url, model="m")
        first = run_flow(ask_flow(), TEXTS, model=Cassette(path, OpenAIBackend("m", config)))
    assert [v["ask"] for v in first["out"]] == [f"fine: t{n}" for n in range(4)]
    # The server is gone; what it said is not.
    modes: tuple[Literal["once", "play"], ...] = ("once", "play")
    for mode in modes:
        again = run_flow(ask_flow(), TEXTS, model=Cassette(path, OpenAIBackend("m", config), mode=mode))
        assert again["out"] == first["out"]
    new = run_flow(
        ask_flow(), [{"text": "new"}], model=Cassette(path, OpenAIBackend("m", config), mode="play")
    )
    assert "no answer is recorded" in new.dead_letters[0]["message"]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 4
    assert {line["reply"]["text"] for line in lines} == {f"fine: t{n}" for n in range(4)}


def test_a_cassette_tells_prompts_and_parameters_apart(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    hot = Flow("kit")
    hot.source("in").query("ask", "{text}", temperature=1.0).sink("out")
    run_flow(ask_flow(), TEXTS, model=Cassette(path, TestModel("cold")))
    out = run_flow(hot, TEXTS, model=Cassette(path, TestModel("hot")))
    assert {v["ask"] for v in out["out"]} == {"hot"}


def test_a_cassette_records_no_errors_and_can_begin_anew(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    run_flow(ask_flow(), TEXTS, model=Cassette(path, TestModel([BackendDown("no")] * 2 + ["a"] * 100)))
    assert "no" not in {json.loads(line)["reply"]["text"] for line in path.read_text().splitlines()}
    again = run_flow(ask_flow(), TEXTS, model=Cassette(path, TestModel("b"), mode="record"))
    assert {v["ask"] for v in again["out"]} == {"b"}


@pytest.mark.parametrize("line", ["{", "[]", '{"key": "k"}', '{"key": "k", "reply": {"tex": "x"}}'])
def test_a_damaged_cassette_names_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(RecordingError, match=r"c\.jsonl:1"):
        Cassette(path, TestModel())


def test_the_virtual_clock_moves_when_told_and_when_slept_on() -> None:
    clock = VirtualClock(100.0)
    clock.advance(5)
    asyncio.run(clock.sleep(10))
    assert clock.time() == clock.monotonic() == 115.0
    with pytest.raises(ValueError, match="does not go back"):
        clock.advance(-1)


def test_a_flow_on_a_virtual_clock_does_not_wait_for_retries() -> None:
    clock = VirtualClock()
    model = TestModel([BackendDown("later", retry_after=3600.0), "fine"])
    settings = load_settings(
        run={"recording": None},
        models={"test": SIMULATED},
    )
    out = run_flow(ask_flow(), TEXTS[:1], models={"test": model}, settings=settings, clock=clock)
    assert out["out"][0]["ask"] == "fine"
    assert clock.time() >= 1_700_000_000.0 + 3600.0
