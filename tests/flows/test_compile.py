"""A compiled flow on a real Bytewax. LLM nodes are a stand-in here: what matters is what is around them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bytewax.operators as op
import pytest
from bytewax.recovery import RecoveryConfig, init_db_dir
from bytewax.testing import TestingSink, TestingSource, cluster_main, run_main

import chainwax.flows.compile as module
from chainwax.connectors.record import BadRecord, Record
from chainwax.connectors.sinks import JsonLinesSink, ListSink
from chainwax.flows import ConfigError, Flow, Stream, Tumbling
from chainwax.flows.nodes import Node, Port, SourceNode
from chainwax.flows.testing import TestModel, run_flow
from chainwax.operators.item import Batch, FailedItem, Item
from chainwax.operators.pressure import Pressure
from chainwax.router.config import load_settings
from chainwax.router.types import CallRef, NodeSpec


@dataclass
class Asked:
    """What the stand-in was given."""

    specs: dict[str, NodeSpec] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    items: list[Item] = field(default_factory=list)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """LLM nodes answer at once: the prompt in capitals, an error for an item that says 'refuse'."""
    told = Asked()

    def stand_in(step_id: str, up: Any, spec: NodeSpec, **options: Any) -> Any:
        told.specs[step_id] = spec
        told.options[step_id] = options

        def answer(batch: list[Item | Batch]) -> Iterable[Item | FailedItem]:
            for some in batch:
                for item in some.items if isinstance(some, Batch) else [some]:
                    told.items.append(item)
                    if item.value["x"] == "refuse":
                        yield FailedItem(item, step_id, "AnswerInvalid", "no answer", [])
                        continue
                    text = spec.prompt.render(item.value)[-1]["content"].upper()
                    window_id = some.window_id
                    calls = (*item.calls, CallRef(step_id, f"{step_id}-{item.position}", "arm"))
                    value = {**item.value, step_id: text}
                    yield Item(value, item.key, item.position, item.time, calls, window_id)

        parted = op.branch(f"{step_id}:x", op.flat_map_batch(step_id, up, answer), lambda x: type(x) is Item)
        return SimpleNamespace(oks=parted.trues, errs=parted.falses)

    monkeypatch.setattr(module, "llm_node", stand_in)
    return told


def records(*values: Any, **options: Any) -> list[Record]:
    return [Record(v, position=f"in:{n}", **options) for n, v in enumerate(values)]


def run(
    build: Callable[[Stream], Stream], items: Iterable[Any], *, keep: bool = False, **options: Any
) -> tuple[list[Any], list[dict[str, Any]]]:
    """What a flow of one source and one sink makes of items, and its dead letters."""
    flow = Flow("f")
    build(flow.source("in")).sink("out")
    out: list[Any] = []
    dead: list[dict[str, Any]] = []
    run_main(
        flow.compile(
            {"in": TestingSource(list(items), batch_size=3)},
            {"out": TestingSink(out)},
            dead_letters=TestingSink(dead),
            **options,
        )
    )
    return out, dead


def items_before(build: Callable[[Stream], Stream], items: Iterable[Any], asked: Asked) -> list[Item]:
    """The items that come to an LLM node after some others."""
    run(lambda s: build(s).query("probe", "{x}"), items)
    return asked.items


class TestFunctions:
    def test_map(self) -> None:
        assert run(lambda s: s.map("m", lambda v: v + 1), records(1, 2, 3, 4)) == ([2, 3, 4, 5], [])

    def test_filter(self) -> None:
        assert run(lambda s: s.filter("m", lambda v: v % 2), records(1, 2, 3, 4)) == ([1, 3], [])

    def test_flat_map(self) -> None:
        assert run(lambda s: s.flat_map("m", range), records(0, 2, 1)) == ([0, 1, 0], [])

    def test_flat_map_gives_each_part_a_place_of_its_own(self, asked: Asked) -> None:
        parts = items_before(lambda s: s.flat_map("m", lambda v: [{"x": 1}, {"x": 2}]), records({}), asked)
        assert [i.position for i in parts] == ["in:0/0", "in:0/1"]

    def test_branch(self) -> None:
        flow = Flow("f")
        even, odd = flow.source("in").branch("even", lambda v: v % 2 == 0)
        even.sink("evens")
        odd.map("neg", lambda v: -v).sink("odds")
        evens: list[int] = []
        odds: list[int] = []
        sinks = {"evens": TestingSink(evens), "odds": TestingSink(odds)}
        run_main(flow.compile({"in": TestingSource(records(*range(6)))}, sinks))
        assert (evens, odds) == ([0, 2, 4], [-1, -3, -5])

    def test_a_branch_asks_once_for_each_item(self) -> None:
        calls: list[int] = []
        run(lambda s: s.branch("b", lambda v: calls.append(v)).no, records(1, 2, 3))
        assert calls == [1, 2, 3]

    def test_merge(self) -> None:
        flow = Flow("f")
        a, b = flow.source("a"), flow.source("b")
        a.merge("both", b.map("m", lambda v: v * 10)).sink("out")
        out: list[int] = []
        sources = {"a": TestingSource(records(1, 2)), "b": TestingSource(records(1, 2))}
        run_main(flow.compile(sources, {"out": TestingSink(out)}))
        assert sorted(out) == [1, 2, 10, 20]

    def test_a_stream_may_be_used_twice(self) -> None:
        flow = Flow("f")
        source = flow.source("in")
        source.merge("m", source.map("neg", lambda v: -v)).sink("out")
        out: list[int] = []
        run_main(flow.compile({"in": TestingSource(records(1, 2))}, {"out": TestingSink(out)}))
        assert sorted(out) == [-2, -1, 1, 2]

    def test_key_and_stateful_map(self) -> None:
        def count(state: int | None, value: Any) -> tuple[int, Any]:
            now = (state or 0) + 1
            return now, f"{value}{now}"

        def build(stream: Stream) -> Stream:
            return stream.key("k", lambda v: v).stateful_map("n", count)

        out, dead = run(build, records("a", "b", "a", "a", "b"))
        assert sorted(out) == ["a1", "a2", "a3", "b1", "b2"]
        assert dead == []
        assert run(lambda s: s.stateful_map("n", count), records("a", "b")) == (["a1", "b2"], [])

    def test_whole_numbers_are_keys(self, asked: Asked) -> None:
        keyed = items_before(lambda s: s.key("k", lambda v: v["x"]), records({"x": 7}, {"x": "s"}), asked)
        assert [i.key for i in keyed] == ["7", "s"]

    def test_inputs_are_not_changed(self) -> None:
        source = records({"a": 1})
        run(lambda s: s.map("m", lambda v: {**v, "b": 2}), source)
        assert source[0].value == {"a": 1}


class TestBatches:
    def test_functions_get_the_list(self) -> None:
        values = records(*range(5))
        batch = {"size": 2, "seconds": 10.0}
        assert run(lambda s: s.batch("b", **batch).map("m", sum), values) == ([1, 5, 4], [])
        assert run(lambda s: s.batch("b", **batch).filter("m", lambda v: len(v) > 1), values) == (
            [[0, 1], [2, 3]],
            [],
        )
        assert run(lambda s: s.batch("b", **batch).flat_map("m", lambda v: v[::-1]), values) == (
            [1, 0, 3, 2, 4],
            [],
        )
        assert run(lambda s: s.batch("b", **batch).branch("m", lambda v: 4 in v).yes, values) == ([[4]], [])

    def test_key_on_a_batch_keys_what_it_becomes(self, asked: Asked) -> None:
        def build(stream: Stream) -> Stream:
            batches = stream.batch("b", size=2, seconds=10).key("k", lambda values: f"of-{len(values)}")
            return batches.map("m", lambda values: {"x": values})

        assert [i.key for i in items_before(build, records(1, 2, 3), asked)] == ["of-2", "of-1"]

    def test_llm_nodes_get_the_batch(self, asked: Asked) -> None:
        values = records({"x": "a"}, {"x": "b"}, {"x": "c"})
        out, _ = run(lambda s: s.batch("b", size=2, seconds=10).query("q", "{x}"), values)
        assert [v["q"] for v in out] == ["A", "B", "C"]

    def test_map_joins_what_the_items_owe(self, asked: Asked) -> None:
        def build(stream: Stream) -> Stream:
            answered = stream.query("q", "{x}").batch("b", size=2, seconds=10)
            return answered.map("m", lambda values: {"x": len(values)})

        joined = items_before(build, records({"x": "a"}, {"x": "b"}), asked)[-1]
        assert [ref.call_id for ref in joined.calls] == ["q-in:0", "q-in:1"]
        assert joined.value == {"x": 2}
        assert joined.position.startswith("window:")

    def test_windows(self) -> None:
        flow = Flow("f")
        window = flow.source("in").window("w", Tumbling(10), by="event")
        window.map("m", sum).sink("out")
        window.late.sink("late")
        out: list[Any] = []
        late: list[Any] = []
        source = [Record(n, position=str(n), time=t) for n, t in enumerate([1.0, 2.0, 15.0, 3.0])]
        sinks = {"out": TestingSink(out), "late": TestingSink(late)}
        run_main(flow.compile({"in": TestingSource(source)}, sinks, live=False))
        assert (out, late) == ([1, 2], [3])

    def test_late_items_that_nobody_takes_are_dead_letters(self) -> None:
        source = [Record(n, position=str(n), time=t) for n, t in enumerate([1.0, 15.0, 3.0, None])]
        out, dead = run(lambda s: s.window("w", Tumbling(10), by="event"), source, live=False)
        assert out == [[0], [1]]
        assert sorted((d["node"], d["error"], d["item"]) for d in dead) == [
            ("w", "Late", 2),
            ("w", "NoEventTime", 3),
        ]

    def test_feedback_takes_batches_apart(self, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
        scored: list[Any] = []

        def build(stream: Stream) -> Stream:
            return stream.query("q", "{x}").batch("b", size=2, seconds=10).feedback("fb", scored.append)

        out, dead = run(build, records({"x": "a"}, {"x": "b"}, {"x": "c"}))
        assert [v["x"] for v in scored] == ["a", "b", "c"]
        assert out == scored
        assert dead == []


class TestFailures:
    def test_a_failing_function_never_ends_the_flow(self) -> None:
        out, dead = run(lambda s: s.map("inverse", lambda v: 1 / v), records(1, 0, 2))
        assert out == [1, 0.5]
        assert dead == [
            {
                "node": "inverse",
                "error": "ZeroDivisionError",
                "message": "division by zero",
                "attempts": 0,
                "key": "",
                "position": "in:1",
                "time": None,
                "item": 0,
            }
        ]

    @pytest.mark.parametrize(
        "build",
        [
            lambda s, fn: s.map("n", fn),
            lambda s, fn: s.filter("n", fn),
            lambda s, fn: s.flat_map("n", fn),
            lambda s, fn: s.branch("n", fn).yes,
            lambda s, fn: s.key("n", fn),
            lambda s, fn: s.stateful_map("n", lambda state, value: fn(value)),
        ],
        ids=["map", "filter", "flat_map", "branch", "key", "stateful_map"],
    )
    @pytest.mark.parametrize(
        "error", [KeyError("x"), RecursionError(), MemoryError(), AssertionError()], ids=repr
    )
    def test_every_kind_of_function(self, build: Any, error: Exception) -> None:
        def fail(value: Any) -> Any:
            raise error

        out, dead = run(lambda s: build(s, fail), records(1, 2))
        assert out == []
        assert [(d["node"], d["error"], d["item"]) for d in dead] == [
            ("n", type(error).__name__, 1),
            ("n", type(error).__name__, 2),
        ]

    def test_an_error_that_cannot_be_shown(self) -> None:
        class Mute(Exception):
            def __str__(self) -> str:
                raise ValueError("no")

            __repr__ = __str__

        def fail(value: Any) -> Any:
            raise Mute

        _, dead = run(lambda s: s.map("n", fail), records(1))
        assert dead[0]["error"] == "Mute"

    def test_a_truth_value_that_fails(self) -> None:
        class Undecided:
            def __bool__(self) -> bool:
                raise ValueError("neither yes nor no")

        _, dead = run(lambda s: s.filter("n", lambda v: Undecided()), records(1))
        assert dead[0]["message"] == "neither yes nor no"

    def test_flat_map_that_fails_half_way_gives_nothing(self) -> None:
        def half(value: int) -> Any:
            yield value
            if value == 2:
                raise ValueError("half")

        out, dead = run(lambda s: s.flat_map("n", half), records(1, 2, 3))
        assert out == [1, 3]
        assert [d["item"] for d in dead] == [2]

    @pytest.mark.parametrize("value", ["text", b"bytes", {"a": 1}, 7, None], ids=repr)
    def test_flat_map_that_gives_no_list(self, value: Any) -> None:
        out, dead = run(lambda s: s.flat_map("n", lambda v: value), records(1))
        assert out == []
        assert dead[0]["error"] == "TypeError"

    @pytest.mark.parametrize("key", [None, 1.5, True, ["a"], b"k"], ids=repr)
    def test_a_key_that_is_none(self, key: Any) -> None:
        _, dead = run(lambda s: s.key("n", lambda v: key), records(1))
        assert dead[0]["message"].startswith("a key must be a text or a whole number")

    def test_a_state_survives_a_failure_and_a_wrong_answer(self) -> None:
        def count(state: int | None, value: int) -> Any:
            if value == 0:
                raise ValueError("zero")
            if value < 0:
                return value
            return (state or 0) + 1, (state or 0) + 1

        out, dead = run(lambda s: s.stateful_map("n", count), records(1, 0, -1, 1))
        assert out == [1, 2]
        assert [d["message"] for d in dead] == ["zero", "stateful_map needs (state, value), not int"]

    def test_of_a_batch_each_item_fails(self) -> None:
        def build(stream: Stream) -> Stream:
            return stream.batch("b", size=2, seconds=10).map("n", lambda v: 1 / 0)

        out, dead = run(build, records(1, 2, 3))
        assert out == []
        assert [(d["item"], d["position"]) for d in dead] == [(1, "in:0"), (2, "in:1"), (3, "in:2")]

    def test_llm_failures_are_dead_letters(self, asked: Asked) -> None:
        out, dead = run(lambda s: s.query("q", "{x}"), records({"x": "refuse"}, {"x": "a"}))
        assert [v["q"] for v in out] == ["A"]
        assert [(d["node"], d["error"], d["item"]) for d in dead] == [("q", "AnswerInvalid", {"x": "refuse"})]

    def test_what_a_source_cannot_read_is_a_dead_letter(self) -> None:
        bad = BadRecord("in.jsonl:2", '{"broken', "no JSON: it ends too early")
        out, dead = run(lambda s: s, [*records(1), bad, *records(2)])
        assert out == [1, 2]
        assert [(d["node"], d["error"], d["position"], d["item"]) for d in dead] == [
            ("in", "BadRecord", "in.jsonl:2", '{"broken')
        ]

    def test_without_dead_letters_failures_are_logged_without_content(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        flow = Flow("f")
        flow.source("in").map("n", lambda v: int(v)).sink("out")
        with caplog.at_level(logging.WARNING):
            run_main(flow.compile({"in": TestingSource(records("a secret"))}, {"out": TestingSink([])}))
        (line,) = [r.getMessage() for r in caplog.records]
        assert line == "node 'n' failed at in:0: ValueError"

    @pytest.mark.parametrize("depth", [5, 100_000])
    def test_dead_letters_can_be_written_whatever_the_item(self, depth: int, tmp_path: Path) -> None:
        deep: list[Any] = []
        for _ in range(depth):
            deep = [deep]

        class Mute:
            def __repr__(self) -> str:
                raise ValueError("no")

        hostile = [deep, object(), Mute(), float("nan"), {1: {2}}, "\ud800", "x" * 100_000, b"\xff"]
        flow = Flow("f")
        flow.source("in").map("n", lambda v: 1 / 0).sink("out")
        path = tmp_path / "dead.jsonl"
        source = TestingSource(records(*hostile))
        run_main(flow.compile({"in": source}, {"out": TestingSink([])}, dead_letters=JsonLinesSink(path)))
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert [line["position"] for line in lines] == [f"in:{n}" for n in range(len(hostile))]
        assert {line["node"] for line in lines} == {"n"}


class TestSourcesAndSinks:
    def test_records_become_items(self, asked: Asked) -> None:
        run(lambda s: s.query("q", "{x}"), [Record({"x": 1}, "k", "p:1", 5.0)])
        assert asked.items == [Item({"x": 1}, "k", "p:1", 5.0)]

    def test_plain_values_get_a_position_that_is_the_same_in_each_run(self, asked: Asked) -> None:
        class Odd(dict[Any, Any]):
            def __repr__(self) -> str:
                raise ValueError("no")

        values = [{"x": 1}, {"x": 2}, {"x": 1, 2: 3}, Odd({"x": {1}, (2,): object})]
        for _ in range(2):
            run(lambda s: s.query("q", "{x}"), values)
        first, second = asked.items[:4], asked.items[4:]
        assert [i.position for i in first] == [i.position for i in second]
        assert len({i.position for i in first}) == 4
        assert first[0].position.startswith("in:")

    def test_partitioned_sinks_get_keys(self) -> None:
        flow = Flow("f")
        flow.source("in").sink("out")
        out: list[Any] = []
        run_main(flow.compile({"in": TestingSource(records(1, 2))}, {"out": ListSink(out)}))
        assert out == [1, 2]

    def test_what_json_cannot_hold_is_a_dead_letter(self, tmp_path: Path) -> None:
        flow = Flow("f")
        flow.source("in").sink("out")
        dead: list[Any] = []
        path = tmp_path / "out.jsonl"
        source = TestingSource(records({"a": 1}, object(), {"nan": float("nan")}, {"b": "ü"}))
        run_main(flow.compile({"in": source}, {"out": JsonLinesSink(path)}, dead_letters=TestingSink(dead)))
        assert path.read_text(encoding="utf-8") == '{"a": 1}\n{"b": "ü"}\n'
        assert [(d["node"], d["error"], d["position"]) for d in dead] == [
            ("out", "TypeError", "in:1"),
            ("out", "TypeError", "in:2"),
        ]

    @pytest.mark.parametrize(
        ("sources", "sinks", "message"),
        [
            ({}, {"out": 1}, r"node 'in': nothing is given for this source: sources=\{'in': …\}"),
            (
                {"in": TestingSource([])},
                {},
                r"node 'out': nothing is given for this sink: sinks=\{'out': …\}",
            ),
            ({"inn": 1}, {"out": 1}, "unknown source of the flow: 'inn': did you mean 'in'?"),
            (
                {"in": TestingSource([])},
                {"out": 1, "outt": 1},
                "unknown sink of the flow: 'outt': did you mean 'out'?",
            ),
            ({"in": 1}, {"out": 1}, "node 'in': .* is no Bytewax source"),
            ({"in": TestingSource([])}, {"out": []}, "node 'out': .* is no Bytewax sink"),
        ],
    )
    def test_unbound(self, sources: Any, sinks: Any, message: str) -> None:
        flow = Flow("f")
        flow.source("in").sink("out")
        with pytest.raises(ConfigError, match=message):
            flow.compile(sources, sinks)

    def test_a_node_of_an_unknown_class(self) -> None:
        class OddNode(Node):
            pass

        flow = Flow.from_nodes("f", [SourceNode("in"), OddNode("odd", (Port("in"),))])
        with pytest.raises(ConfigError, match="node 'odd': nothing is known of nodes of the class OddNode"):
            flow.compile({"in": TestingSource([])}, {})

    def test_a_flow_without_a_sink_runs(self) -> None:
        flow = Flow("f")
        seen: list[int] = []
        flow.source("in").map("m", seen.append)
        run_main(flow.compile({"in": TestingSource(records(1, 2))}, {}))
        assert seen == [1, 2]


class TestNodes:
    def test_llm_nodes_are_told_all(self, asked: Asked) -> None:
        flow = Flow("f")
        source = flow.source("in")
        source.query("q", "{x}", ordered=False, max_in_flight=3, stream=True, priority=4).sink("out")
        manager: Any = SimpleNamespace(recording=None)
        flow.compile({"in": TestingSource([])}, {"out": TestingSink([])}, manager=manager)
        assert asked.specs["q"] is flow.specs()["q"]
        assert isinstance(asked.options["q"].pop("pressure"), Pressure)
        assert asked.options["q"].pop("shards") >= 1
        assert asked.options["q"] == {
            "manager": manager,
            "ordered": False,
            "max_in_flight": 3,
            "stream": True,
        }

    def test_feedback_is_about_the_end_result_by_default(
        self, asked: Asked, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: list[dict[str, Any]] = []

        def stand_in(step_id: str, up: Any, score: Any, **options: Any) -> Any:
            told.append({"id": step_id, **options})
            return SimpleNamespace(oks=up, errs=op.filter(f"{step_id}:none", up, lambda x: False))

        monkeypatch.setattr(module, "feedback", stand_in)
        flow = Flow("f")
        stream = flow.source("in").query("a", "{x}").query("b", "{x}")
        stream.feedback("all", bool, metric="good", kind="human")
        stream.feedback("one", bool, about=["a"]).sink("out")
        flow.compile({"in": TestingSource([])}, {"out": TestingSink([])})
        assert [(t["id"], t["about"], t["metric"], t["kind"]) for t in told] == [
            ("all", (), "good", "human"),
            ("one", ("a",), "score", "downstream"),
        ]

    def test_a_recording_gets_items_and_dead_letters(self, asked: Asked) -> None:
        kept: dict[str, list[Any]] = {"items": [], "dead": [], "told": []}
        recording = SimpleNamespace(
            items=lambda source, rows: kept["items"].extend((source, *row) for row in rows),
            dead_letters=kept["dead"].extend,
        )
        source = [Record({"x": 1}, "k", "p:1", 5.0), BadRecord("p:2", "{", "no JSON"), Record({}, "", "p:3")]
        manager = SimpleNamespace(recording=recording, settings=load_settings(), feedback=kept["told"].extend)
        run(lambda s: s.map("m", lambda v: v["x"]), source, manager=manager)
        assert kept["items"] == [("in", "p:1", "k", 5.0, {"x": 1}), ("in", "p:3", "", None, {})]
        assert sorted((d.node, d.position, d.error) for d in kept["dead"]) == [
            ("in", "p:2", "BadRecord"),
            ("m", "p:3", "KeyError"),
        ]


def test_ids_may_be_anything_that_an_id_may_be(asked: Asked) -> None:
    """Bytewax's step ids hang together over the whole flow: none of ours may meet a helping step's."""
    flow = Flow("chainwax")
    stream = flow.source("in")
    for name in ("ok", "in-ok", "failed", "chainwax", "dead-letters", "_", "values", "x" * 200):
        stream = stream.map(name, lambda v: v)
    yes, no = stream.branch("yes", bool)
    yes.merge("no", no).sink("out")
    out: list[int] = []
    run_main(flow.compile({"in": TestingSource(records(0, 1))}, {"out": TestingSink(out)}))
    assert sorted(out) == [0, 1]


def test_a_state_goes_on_after_a_restart(tmp_path: Path) -> None:
    def count(state: int | None, value: int) -> tuple[int, tuple[int, int]]:
        return (state or 0) + 1, (value, (state or 0) + 1)

    flow = Flow("f")
    flow.source("in").key("k", lambda v: v % 2).stateful_map("n", count).sink("out")
    out: list[Any] = []
    source = TestingSource([*records(0, 1, 2), TestingSource.ABORT(), *records(3, 4)])
    dataflow = flow.compile({"in": source}, {"out": ListSink(out)})
    init_db_dir(tmp_path, 1)
    for _ in range(2):
        run_main(dataflow, epoch_interval=timedelta(0), recovery_config=RecoveryConfig(tmp_path))
    assert sorted(out) == [(0, 1), (1, 1), (2, 2), (3, 2), (4, 3)]


def test_several_workers(asked: Asked) -> None:
    flow = Flow("f")
    stream = flow.source("in").key("k", lambda v: v["x"] % 5).query("q", "{x}")
    stream.stateful_map("n", lambda state, v: ((state or 0) + 1, (v["x"] % 5, (state or 0) + 1))).sink("out")
    out: list[Any] = []
    source = TestingSource(records(*({"x": n} for n in range(50))))
    cluster_main(flow.compile({"in": source}, {"out": ListSink(out)}), [], 0, worker_count_per_proc=3)
    assert sorted(out) == sorted((key, n) for key in range(5) for n in range(1, 11))


def test_with_the_real_operators() -> None:
    flow = Flow("f")
    team = flow.source("in").choose("team", "Which? {text}", ["left", "right"])
    left, right = team.branch("is_left", lambda item: item["team"] == "left")
    answered = left.batch("b", size=2, seconds=10).query("draft", "Answer {text}")
    answered.feedback("sent", lambda item: 1.0).sink("drafts")
    right.map("fails", lambda item: item["nothing"]).sink("none")

    def answers(prompt: str) -> str:
        return ("left" if "l" in prompt else "right") if prompt.startswith("Which") else prompt.upper()

    items = [{"text": "l1"}, {"text": "x2"}, {"txt": "l3"}, {"text": "l4"}]
    outputs = run_flow(flow, items, model=TestModel(answers))
    assert outputs["drafts"] == [
        {"text": "l1", "team": "left", "draft": "ANSWER L1"},
        {"text": "l4", "team": "left", "draft": "ANSWER L4"},
    ]
    assert outputs["none"] == []
    assert sorted((d["node"], d["error"]) for d in outputs.dead_letters) == [
        ("fails", "KeyError"),
        ("team", "PromptFieldMissing"),
    ]


def test_which_outputs_have_ids_that_say_what_they_are(asked: Asked) -> None:
    flow = Flow("many")
    items = flow.source("in")
    items.query("asked", "{text}").sink("plain")
    items.query("streamed", "{text}", stream=True).map("after", str).sink("pieces")
    few = items.batch("few", size=2, seconds=1).map("count", len)
    few.sink("batches")
    items.map("one", str).merge("both", items.map("two", str)).sink("merged")
    items.merge("around", few).sink("past")
    told: dict[str, tuple[str, bool]] = {}

    class Told(ListSink):
        def __init__(self, name: str) -> None:
            super().__init__([])
            self.name = name

        def belongs_to(self, run: Callable[[], str], *, by_value: bool) -> None:
            told[self.name] = (run(), by_value)

    sinks = {name: Told(name) for name in flow.sinks}
    manager: Any = SimpleNamespace(run_id="mine")
    flow.compile({"in": TestingSource([])}, sinks, dead_letters=Told("letters"), manager=manager)
    assert {name for name, (_, by_value) in told.items() if by_value} == {"pieces", "past", "letters"}
    assert len(told) == 6
    assert {run for run, _ in told.values()} == {"mine"}


def test_a_batch_that_became_one_item_says_which_items_these_were() -> None:
    def position(*places: str) -> str:
        return Batch([Item(place, "k", place) for place in places], "few/7").joined(0).position

    assert position("in:1", "in:2").startswith("window:few/7#")
    assert position("in:1", "in:2") == position("in:2", "in:1")
    assert len({position("in:1", "in:2"), position("in:1", "in:3"), position("in:1")}) == 3
