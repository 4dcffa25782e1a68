"""The LLM operators on a real Bytewax run: what comes out, in which order, after which crash."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import bytewax.operators as op
import pytest
from bytewax.dataflow import Dataflow
from bytewax.recovery import RecoveryConfig, init_db_dir
from bytewax.testing import TestingSink, TestingSource, cluster_main, run_main
from pydantic import BaseModel

import chainwax.operators as lop
from chainwax.flows.testing import TestModel
from chainwax.router import BackendDown, BackendRefused, Form, LLMManager, load_settings

from .conftest import Make, items


class Fault(BaseModel):
    product: str
    severity: int


def run(
    manager: LLMManager, source: list[Any], *, node: str = "query", batch: int = 10, **options: Any
) -> tuple[list[lop.Item], list[lop.FailedItem]]:
    oks: list[lop.Item] = []
    errs: list[lop.FailedItem] = []
    flow = Dataflow("flow")
    up = op.input("in", flow, TestingSource(source, batch_size=batch))
    arguments = {"query": ("{text}",), "choose": ("{text}", ["yes", "no"]), "extract": ("{text}", Fault)}[
        node
    ]
    out = getattr(lop, node)("ask", up, *arguments, manager=manager, **options)
    op.output("oks", out.oks, TestingSink(oks))
    op.output("errs", out.errs, TestingSink(errs))
    run_main(flow)
    return oks, errs


def test_each_item_gains_its_answer(make_manager: Make) -> None:
    model = TestModel(lambda text: f"about {text}")
    oks, errs = run(make_manager(model), items(25))
    assert errs == []
    assert [i.value for i in oks] == [{"text": f"t{n}", "n": n, "ask": f"about t{n}"} for n in range(25)]
    assert [i.position for i in oks] == [f"test:{n}" for n in range(25)]
    assert {ref.node for i in oks for ref in i.calls} == {"ask"}
    assert len({ref.call_id for i in oks for ref in i.calls}) == 25


def test_calls_run_at_once_and_never_block_the_worker(make_manager: Make) -> None:
    model = TestModel(latency=0.05)
    begun = time.monotonic()
    oks, _ = run(make_manager(model), items(80), max_in_flight=16, ordered=False)
    took = time.monotonic() - begun
    assert len(oks) == 80
    assert model.most_at_once == 16  # bounded, and the bound is used
    assert took < 1.5  # 80 × 50 ms one by one are 4 s


def test_order_is_kept_for_each_key(make_manager: Make) -> None:
    class Shuffled(TestModel):
        async def generate(self, request: Any) -> Any:
            import asyncio

            await asyncio.sleep(
                0.02 if request.query.messages[-1]["content"].endswith(("0", "3", "7")) else 0.0
            )
            return await super().generate(request)

    source = items(60, key=lambda n: f"k{n % 3}")
    oks, _ = run(make_manager(Shuffled()), source)
    for key in ("k0", "k1", "k2"):
        numbers = [i.value["n"] for i in oks if i.key == key]
        assert numbers == sorted(numbers)
        assert len(numbers) == 20
    unordered, _ = run(make_manager(Shuffled(), run_id="other"), source, ordered=False)
    assert sorted(i.value["n"] for i in unordered) == list(range(60))
    assert [i.value["n"] for i in unordered if i.key == "k0"] != list(range(0, 60, 3))


def test_choose_gives_one_of_the_choices_and_garbage_is_a_dead_letter(make_manager: Make) -> None:
    answers = {"t0": "Yes.", "t1": "The answer is NO", "t2": "maybe", "t3": "yes or no", "t4": ""}
    oks, errs = run(make_manager(TestModel(answers)), items(5), node="choose")
    assert [i.value["ask"] for i in oks] == ["yes", "no"]
    assert [(e.item.value["n"], e.error) for e in errs] == [(n, "AnswerInvalid") for n in (2, 3, 4)]
    assert "'maybe'" in errs[0].message
    assert "['yes', 'no']" in errs[0].message
    assert errs[0].attempts[0].text == "maybe"
    assert errs[0].attempts[0].invalid


def test_extract_gives_the_model_and_repairs_what_is_plain(make_manager: Make) -> None:
    answers = {
        "t0": '{"product": "lamp", "severity": 3}',
        "t1": 'Sure! ```json\n{"product": "radio", "severity": 2,}\n```',
        "t2": "I cannot do that",
        "t3": '{"product": "lamp"}',
        "t4": "{" * 100_000,
    }
    oks, errs = run(make_manager(TestModel(answers)), items(5), node="extract")
    assert [i.value["ask"] for i in oks] == [
        Fault(product="lamp", severity=3),
        Fault(product="radio", severity=2),
    ]
    assert [e.error for e in errs] == ["AnswerInvalid"] * 3
    assert "severity" in errs[1].message


def test_an_item_without_the_prompts_field_is_a_dead_letter_and_nothing_is_asked(make_manager: Make) -> None:
    model = TestModel()
    source = [
        lop.Item({"txt": "a"}, position="1"),
        lop.Item({"text": "b"}, position="2"),
        lop.Item(7, position="3"),
    ]
    oks, errs = run(make_manager(model), source)
    assert [i.value["text"] for i in oks] == ["b"]
    assert [e.error for e in errs] == ["PromptFieldMissing"] * 2
    assert "node 'ask'" in errs[0].message
    assert "did you mean 'txt'" in errs[0].message
    assert model.prompts == ["b"]


def test_a_foreign_stream_is_taken_as_it_is(make_manager: Make) -> None:
    flow = Dataflow("flow")
    up = op.input("in", flow, TestingSource([("k", "one"), ("k", "two")]))
    out = lop.query("ask", up, "Say {value}", manager=make_manager(TestModel(str.upper)))
    values: list[Any] = []
    op.output("out", lop.unwrap("plain", out.oks), TestingSink(values))
    op.output("errs", out.errs, TestingSink([]))
    run_main(flow)
    assert values == [{"value": "one", "ask": "SAY ONE"}, {"value": "two", "ask": "SAY TWO"}]


def test_one_failing_backend_does_not_lose_the_rest(make_manager: Make) -> None:
    model = TestModel(["ok", BackendRefused("too long"), "ok", RuntimeError("a fault in a backend")])
    oks, errs = run(make_manager(model), items(20))
    assert len(oks) == 10
    assert len(errs) == 10
    assert {e.error for e in errs} == {"BackendRefused"}
    assert all(e.attempts for e in errs)


def test_the_next_model_answers_where_one_is_down(make_manager: Make) -> None:
    manager = make_manager(TestModel([BackendDown("gone")]), TestModel("from the second"))
    oks, errs = run(manager, items(12), form=Form.adaptive)
    assert errs == []
    assert {i.value["ask"] for i in oks} == {"from the second"}
    assert {i.calls[0].arm for i in oks} == {"model1"}


def test_a_streamed_answer_comes_in_pieces_in_order_for_each_key(make_manager: Make) -> None:
    model = TestModel(lambda text: f"{text}: a longer answer in several pieces", latency=0.01)
    oks, errs = run(make_manager(model), items(6, key=lambda n: f"k{n % 2}"), stream=True)
    assert errs == []
    for key in ("k0", "k1"):
        pieces = [(i.value["n"], i.value["ask"]) for i in oks if i.key == key]
        assert [n for n, _ in pieces] == sorted(n for n, _ in pieces)  # one answer after the other
        for n in {n for n, _ in pieces}:
            mine = [piece for m, piece in pieces if m == n]
            assert [p["index"] for p in mine] == list(range(len(mine)))
            assert [p["is_end"] for p in mine] == [False] * (len(mine) - 1) + [True]
            assert "".join(p["delta"] for p in mine) == f"t{n}: a longer answer in several pieces"
            assert len(mine) > 3


def test_nothing_is_lost_at_the_end_of_the_input(make_manager: Make) -> None:
    # The last calls are in flight when the source ends: on_eof has to wait for them.
    for count in (1, 7, 64, 65):
        oks, _ = run(make_manager(TestModel(latency=0.03), run_id=f"r{count}"), items(count), batch=100)
        assert len(oks) == count


def test_after_a_crash_nothing_is_lost_and_nothing_recorded_is_paid_again(
    make_manager: Make, tmp_path: Path
) -> None:
    recovery = tmp_path / "recovery"
    recovery.mkdir()
    init_db_dir(recovery, 1)
    source: list[Any] = items(40)
    source.insert(25, TestingSource.ABORT())
    asked: list[str] = []
    out: list[lop.Item] = []

    def once(model: TestModel) -> LLMManager:
        manager = make_manager(model, recording=tmp_path / "run.db", run_id="the-run")
        flow = Dataflow("flow")
        up = op.input("in", flow, TestingSource(source, batch_size=5))
        answered = lop.query("ask", up, "{text}", manager=manager, max_in_flight=8)
        op.output("oks", answered.oks, TestingSink(out))
        op.output("errs", answered.errs, TestingSink([]))
        from datetime import timedelta

        run_main(flow, epoch_interval=timedelta(0), recovery_config=RecoveryConfig(str(recovery)))
        manager.settle()
        asked.extend(model.prompts)
        manager.close()
        return manager

    first = once(TestModel(latency=0.01))
    assert not first.resumed
    crashed_after = len(out)
    assert crashed_after < 40
    second = once(TestModel(latency=0.01))
    assert second.resumed
    assert {i.value["n"] for i in out} == set(range(40))
    assert sorted(asked) == sorted(f"t{n}" for n in range(40))  # each once, over both processes


def test_four_workers_give_the_same_items(make_manager: Make) -> None:
    oks: list[lop.Item] = []
    manager = make_manager(TestModel(latency=0.005))
    flow = Dataflow("flow")
    up = op.input("in", flow, TestingSource(items(50, key=lambda n: f"k{n % 7}")))
    out = lop.query("ask", up, "{text}", manager=manager)
    op.output("oks", out.oks, TestingSink(oks))
    op.output("errs", out.errs, TestingSink([]))
    cluster_main(flow, [], 0, worker_count_per_proc=4)
    assert sorted(i.value["n"] for i in oks) == list(range(50))
    for key in {i.key for i in oks}:
        numbers = [i.value["n"] for i in oks if i.key == key]
        assert numbers == sorted(numbers)


@pytest.mark.parametrize("ordered", [True, False])
def test_a_batch_is_taken_apart_and_traced(make_manager: Make, ordered: bool) -> None:
    flow = Dataflow("flow")
    oks: list[lop.Item] = []
    up = op.input("in", flow, TestingSource(items(10)))
    batches = lop.batch("window", up, size=4, seconds=5)
    out = lop.query("ask", batches.oks, "{text}", manager=make_manager(TestModel()), ordered=ordered)
    op.output("oks", out.oks, TestingSink(oks))
    op.output("errs", out.errs, TestingSink([]))
    run_main(flow)
    assert sorted(i.value["n"] for i in oks) == list(range(10))
    by_window = {w: sorted(i.value["n"] for i in oks if i.window_id == w) for w in {i.window_id for i in oks}}
    assert by_window == {
        "flow.window/0": [0, 1, 2, 3],
        "flow.window/1": [4, 5, 6, 7],
        "flow.window/2": [8, 9],
    }


def test_the_same_item_over_two_branches_is_two_calls(make_manager: Make) -> None:
    model = TestModel(latency=0.02)
    flow = Dataflow("flow")
    oks: list[lop.Item] = []
    up = op.input("in", flow, TestingSource(items(3)))
    out = lop.query("ask", op.merge("both", up, up), "{text}", manager=make_manager(model))
    op.output("oks", out.oks, TestingSink(oks))
    op.output("errs", out.errs, TestingSink([]))
    run_main(flow)
    assert len(oks) == 6
    assert len({i.calls[0].call_id for i in oks}) == 6


def test_a_dataflow_that_nobody_prepared_is_recorded_and_goes_on(tmp_path: Path) -> None:
    prompts: list[list[str]] = []
    for _ in range(2):
        model = TestModel("fine")
        settings = load_settings(
            run={"recording": tmp_path / "run.db", "id": "friday"},
            models={
                "m": {
                    "tier": "local",
                    "backend": "simulated",
                    "input_cost_per_token": 0.0,
                    "output_cost_per_token": 0.0,
                }
            },
        )
        with LLMManager(settings, backends={"m": model}) as manager:
            oks, _ = run(manager, items(5))
        assert [i.value["ask"] for i in oks] == ["fine"] * 5
        prompts.append(model.prompts)
    assert prompts == [[f"t{n}" for n in range(5)], []]  # the second start found all answers
