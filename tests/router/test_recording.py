"""Calls and attempts: what is recorded comes back as it was, and nothing stops the writer."""

import json
import threading
import time
import tracemalloc

import pytest
from pydantic import BaseModel

from chainwax.router.answers import FreeText, Structured
from chainwax.router.errors import AnswerInvalid, BackendDown, CallError, RecordingError
from chainwax.router.prompt import Prompt
from chainwax.router.recording import RecordingReader, SqliteRecording
from chainwax.router.types import (
    Arm,
    Attempt,
    CallRef,
    CallResult,
    NodeSpec,
    Query,
    Usage,
)

from .conftest import DRAFT, TEAM, answered, attempt, put, query, rows


def test_a_call_is_found_as_it_was(rec):
    arm = Arm("big", effort="high", max_tokens=5, prompt_version="ab", precision="q4")
    tries = [
        attempt("c1", 1, error="BackendDown: gone", text=None, first_token_s=None),
        Attempt(
            "c1", 2, arm, "strongest", 20.0, 0.5, 1.5, 0.25, "Billing.", Usage(1, 2, 3, 4), 0.01, 0.3,
            simulated=True, reused=True, shadow=True, invalid=True,
        ),
    ]  # fmt: skip
    result = answered("c1", attempts=tries, text="Billing.", waited_s=2.5)
    rec.result(query("c1"), result)
    assert rec.flush(5)

    found = rec.find(["c1", "unknown"])

    assert list(found) == ["c1"]
    call = found["c1"]
    assert call.attempts == tries
    assert (call.status, call.node, call.value, call.text, call.arm) == (
        "ok", "team", "billing", "Billing.", arm,
    )  # fmt: skip
    assert call.cost_usd == pytest.approx(0.011)
    again = call.as_result(TEAM.answer)
    assert again == CallResult("c1", "team", "billing", "Billing.", arm=arm, attempts=tries, reused=True)


def test_the_row_of_a_call_says_all_about_it(rec, path, clock):
    clock.now = 77.0
    asked = Query(
        DRAFT, "c1", [{"role": "user", "content": "hällo"}], "key", "f:1",
        (CallRef("team", "c0", "small"),), "w1",
    )  # fmt: skip
    rec.result(asked, answered("c1", DRAFT, "hi", " hi ", [attempt("c1", simulated=True)]))
    rec.flush(5)
    (row,) = rows(path, "calls")
    assert json.loads(row.pop("messages")) == [{"role": "user", "content": "hällo"}]
    assert json.loads(row.pop("params")) == {"temperature": 0.0, "max_tokens": 9}
    assert json.loads(row.pop("parents")) == [
        {"node": "team", "call_id": "c0", "arm": "small", "context": ""}
    ]
    assert row == {
        "run": "r1", "call_id": "c1", "node": "draft", "item_key": "key", "position": "f:1",
        "window_id": "w1", "status": "ok", "error": None, "message": None, "value": '"hi"',
        "value_is_repr": 0, "text": " hi ", "arm": "small", "cost_usd": 0.001, "waited_s": 0.0,
        "time": 77.0, "reused": 0, "simulated": 1, "context": None,
    }  # fmt: skip


def test_a_failed_call_comes_back_with_its_error(rec):
    rec.result(query("c1"), CallResult("c1", "team", error=BackendDown("no route")))
    rec.result(query("c2"), CallResult("c2", "team", error=KeyError("x")))
    rec.flush(5)
    found = rec.find(["c1", "c2"])
    error = found["c1"].as_result(TEAM.answer).error
    assert type(error) is BackendDown
    assert str(error) == "no route"
    strange = found["c2"].as_result(TEAM.answer).error
    assert type(strange) is CallError
    assert "KeyError" in str(strange)


def test_attempts_of_an_unfinished_call_are_found(rec):
    first, second = attempt("c1", 1, started=1.0), attempt("c1", 2, "big", started=2.0)
    rec.attempt(query("c1"), second)
    rec.attempt(query("c1"), first)
    rec.flush(5)
    call = rec.find(["c1"])["c1"]
    assert (call.status, call.node, call.attempts) == ("unfinished", "team", [first, second])
    with pytest.raises(ValueError, match="no end"):
        call.as_result(TEAM.answer)


def test_an_attempt_is_recorded_once_however_often_it_is_handed_over(rec, path):
    first, second = attempt("c1", 1), attempt("c1", 2, "big")
    rec.attempt(query("c1"), first)
    rec.result(query("c1"), answered("c1", attempts=[first, second]))
    rec.result(query("c1"), answered("c1", attempts=[first, second]))
    rec.flush(5)
    assert [row["number"] for row in rows(path, "attempts")] == [1, 2]
    assert len(rows(path, "calls")) == 1


def test_attempts_made_at_once_or_again_are_all_kept_though_each_counts_from_one(rec, path):
    for one in (
        attempt("c1", 1, "small", started=1.0),
        attempt("c1", 1, "big", started=1.0),  # in parallel
        attempt("c1", 1, "small", started=2.0),  # on a resumed run
    ):
        rec.attempt(query("c1"), one)
    rec.flush(5)
    assert len(rows(path, "attempts")) == 3


def test_an_answer_stands_and_an_error_may_be_answered_later(rec):
    rec.result(query("c1"), CallResult("c1", "team", error=BackendDown("no route")))
    put(rec, "c1", value="technical", text="technical")
    rec.result(query("c1"), CallResult("c1", "team", error=BackendDown("no route")))
    put(rec, "c1", value="billing")
    rec.flush(5)
    call = rec.find(["c1"])["c1"]
    assert (call.status, call.value, call.error) == ("ok", "technical", None)


def test_the_value_is_parsed_anew_by_the_nodes_form(rec):
    class Fault(BaseModel):
        product: str
        since: float

    form = Structured(Fault)
    node = NodeSpec("fields", Prompt("{text}"), form)
    text = '{"product": "tap", "since": 3}'
    put(rec, "c1", node, value=form.parse(text), text=text)
    put(rec, "c2", node, value=form.parse(text), text="garbage")
    rec.flush(5)
    found = rec.find(["c1", "c2"])
    assert found["c1"].value == {"product": "tap", "since": 3.0}
    assert found["c1"].as_result(form).value == Fault(product="tap", since=3)
    with pytest.raises(AnswerInvalid):
        found["c2"].as_result(form)


class Nasty:
    def __repr__(self):
        raise RuntimeError("no")


class Refusing(FreeText):
    def jsonable(self, value):
        raise LookupError("cannot")


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (object(), FreeText()),
        (Nasty(), FreeText()),
        (b"\xff", FreeText()),
        (deep(100_000), FreeText()),
        ("text", Refusing()),
    ],
    ids=["object", "bad repr", "bytes", "deep", "form refuses"],
)
def test_an_answer_that_json_cannot_hold_is_kept_as_its_repr_and_delivered(rec, path, value, answer):
    node = NodeSpec("odd", Prompt("{text}"), answer)
    durable = threading.Event()
    rec.result(query("c1", node), answered("c1", node, value, "text"), durable.set)
    assert durable.wait(5)
    assert rec.flush(5)
    (row,) = rows(path, "calls")
    assert row["value_is_repr"] == 1
    assert isinstance(json.loads(row["value"]), str)
    assert rec.find(["c1"])["c1"].text == "text"


def test_texts_and_numbers_that_sqlite_cannot_hold_do_not_stop_the_others(rec, path):
    surrogate = "a\ud800b"
    put(rec, "before")
    bad = attempt("odd", text=surrogate, usage=Usage(10**30, 1), error="E\udfff")
    rec.result(
        Query(DRAFT, "odd", [{"role": "user", "content": surrogate}], surrogate, "p"),
        answered("odd", DRAFT, surrogate, surrogate, [bad]),
    )
    put(rec, "after")
    assert rec.flush(5)
    found = rec.find(["before", "odd", "after"])
    assert [found[c].status for c in ("before", "odd", "after")] == ["ok"] * 3
    assert found["odd"].value == surrogate
    assert found["odd"].text == "a\\ud800b"
    assert found["odd"].attempts[0].usage.input == 2**63 - 1
    assert json.loads(rows(path, "calls")[1]["messages"])[0]["content"] == surrogate


def test_a_huge_answer_and_nul_characters_are_kept(rec):
    text = "x\0" * 2_000_000
    put(rec, "c1", DRAFT, value=text, text=text)
    assert rec.flush(20)
    assert rec.find(["c1"])["c1"].text == text


def test_a_row_that_cannot_be_made_is_counted_and_told_and_its_callback_called(path):
    told = []
    rec = SqliteRecording(path, on_error=told.append)
    rec.open_run("r1", "f", {})
    called = threading.Event()
    rec.result(query("c1"), "no result", called.set)
    put(rec, "c2")
    assert called.wait(5)
    assert rec.flush(5)
    assert rec.lost == 1
    assert "cannot be made" in told[0]
    assert str(path) in told[0]
    assert "c2" in rec.find(["c2"])
    with pytest.raises(RecordingError, match="1 rows are missing"):
        rec.close()


def test_callbacks_come_in_order_once_what_they_are_about_can_be_read(rec):
    seen, ready = [], threading.Event()
    reader = RecordingReader(rec.path)

    def durable(number):
        seen.append((number, f"c{number}" in reader.find([f"c{number}"])))
        if number == 199:
            ready.set()

    for i in range(200):
        rec.result(query(f"c{i}"), answered(f"c{i}"), lambda i=i: durable(i))
    assert ready.wait(10)
    reader.close()
    assert seen == [(i, True) for i in range(200)]


def test_a_callback_that_raises_stops_neither_the_others_nor_the_writer(path):
    told = []
    rec = SqliteRecording(path, on_error=told.append)
    rec.open_run("r1", "f", {})
    after = threading.Event()

    def bad():
        raise ValueError("boom")

    rec.result(query("c1"), answered("c1"), bad)
    rec.result(query("c2"), answered("c2"), after.set)
    assert after.wait(5)
    rec.close()
    assert len(told) == 1
    assert "boom" in told[0]


def test_many_threads_record_at_once(rec, path):
    def work(name):
        for i in range(200):
            put(rec, f"{name}-{i}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rec.flush(10)
    assert len(rows(path, "calls")) == len(rows(path, "attempts")) == 800


def test_a_lone_call_is_written_at_once_without_a_timer(rec):
    begun = time.perf_counter()
    for i in range(20):
        done = threading.Event()
        rec.result(query(f"c{i}"), answered(f"c{i}"), done.set)
        assert done.wait(5)
    assert time.perf_counter() - begun < 1.0  # any timer of 50 ms would be seen


def test_memory_does_not_grow_with_history(rec):
    def record(start, count):
        for i in range(start, start + count):
            put(rec, f"c{i}", item_key=f"k{i}", position=f"f:{i}")
        assert rec.flush(20)

    record(0, 1000)
    tracemalloc.start()
    record(1000, 500)
    before, _ = tracemalloc.get_traced_memory()
    record(1500, 3000)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 3000 calls are over 3 MB of objects; what Python keeps of freed tuples is a twentieth of that.
    assert after - before < 500_000
