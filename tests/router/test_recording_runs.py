"""Runs, feedback, items and processes: what a recording holds beyond single calls."""

import dataclasses
import json
import subprocess
import sys

import pytest

from chainwax.router.errors import RecordingError
from chainwax.router.recording import DeadLetter, NoRecording, RecordingReader, SqliteRecording
from chainwax.router.recording.totals import totals
from chainwax.router.types import (
    Arm,
    CallRef,
    Decision,
    Feedback,
    FeedbackKind,
    content_key,
)

from .conftest import TEAM, answered, attempt, put, query, rows


def test_runs_are_resumed_by_their_id_and_belong_to_one_flow(path, clock):
    rec = SqliteRecording(path, clock=clock)
    assert rec.open_run("r1", "support", {"a": 1}) is False
    put(rec, "c1")
    rec.close_run("r1", "stopped")
    rec.close()
    clock.now = 2000.0
    rec = SqliteRecording(path, clock=clock)
    (info,) = rec.runs()
    assert (info.status, info.started, info.ended, info.config) == ("stopped", 1000.0, 1000.0, {"a": 1})
    assert rec.open_run("r1", "support", {"a": 2}) is True
    (info,) = rec.runs()
    assert (info.status, info.started, info.ended, info.config) == ("running", 1000.0, None, {"a": 2})
    assert rec.find(["c1"])["c1"].value == "billing"
    with pytest.raises(RecordingError, match=r"of the flow 'support'.*'other'"):
        rec.open_run("r1", "other", {})
    assert rec.open_run("r2", "other", {}) is False
    with pytest.raises(RecordingError, match="no run 'r3': did you mean 'r"):
        rec.require_run("r3")
    rec.close()


def test_a_run_id_that_is_no_unicode_does_not_stop_the_writer(path):
    rec = SqliteRecording(path)
    rec.open_run("r\udcff", "f", {})
    put(rec, "c1")
    rec.close_run("r\udcff", "finished")
    rec.close()
    assert rows(path, "runs")[0]["status"] == "finished"
    assert rows(path, "calls")[0]["run"] == rows(path, "runs")[0]["run"]


def said(call_id, score=1.0, **fields):
    return Feedback("team", score, call_id, **{"source": "sent", "time": 5.0, **fields})


def test_the_same_metric_of_the_same_source_revises_a_score(rec, path):
    put(rec, "c1")
    rec.feedback([said("c1", 0.0, arm="small", time=5.0), said("c1", 0.25, arm="small", metric="other")])
    rec.feedback([said("c1", 1.0, time=6.0, correction="technical", kind=FeedbackKind.human)])
    rec.feedback([said("c1", 0.5, arm="small", time=4.0)])  # late: an older one does not undo it
    rec.flush(5)
    kept = {row["metric"]: row for row in rows(path, "feedback")}
    assert kept.keys() == {"score", "other"}
    assert (kept["score"]["score"], kept["score"]["time"]) == (1.0, 6.0)
    assert kept["score"]["feedback_kind"] == "human"
    assert json.loads(kept["score"]["correction"]) == "technical"


def test_scores_of_two_arms_of_one_call_stand_side_by_side(rec, path):
    put(rec, "c1")
    rec.feedback([said("c1", 1.0, arm="small"), said("c1", 0.0, arm="big")])
    rec.flush(5)
    assert len(rows(path, "feedback")) == 2


def test_a_score_counts_for_the_run_that_made_the_call(rec, path):
    put(rec, "c1")
    rec.feedback([said("c1", 1.0), said("elsewhere", 0.0), said("", 0.5, item_key="nobody")])
    rec.open_run("r2", "support", {})
    put(rec, "c2")
    rec.feedback([said("c2", 0.25), said("c1", 0.5, metric="late"), said("of another process", 0.0)])
    rec.flush(5)
    reader = RecordingReader(path)
    first, second = (totals(reader, run)["team"] for run in ("r1", "r2"))
    reader.close()
    assert (first.scores, first.score_sum) == (3, 2.0)
    assert (second.scores, second.score_sum) == (1, 0.25)


def test_feedback_that_names_only_node_and_key_finds_the_latest_call(rec):
    put(rec, "c1", item_key="ada", attempts=[attempt("c1", model="big")])
    put(rec, "c2", item_key="ada", attempts=[attempt("c2", model="small")])
    put(rec, "c3", item_key="bob", attempts=[attempt("c3", model="big")])
    rec.feedback([said("", 0.5, item_key="ada"), said("", 0.5, item_key="nobody")])
    rec.flush(5)
    assert rec.latest_call("team", "ada") == "c2"
    assert rec.latest_call("team", "nobody") is None
    assert rec.latest_call("draft", "ada") is None
    assert rec.ref_of("c2") == CallRef("team", "c2", "small")
    assert rec.ref_of("nothing") is None
    assert [(f.call_id, f.arm) for f in rec.fold("support")] == [("c2", "small")]


def test_the_fold_is_in_order_of_time_over_all_runs_of_the_flow(rec):
    put(rec, "c1", item_key="a", attempts=[attempt("c1", 1, "small"), attempt("c1", 2, "big", cost_usd=0.5)])
    rec.feedback([said("c1", 0.25, time=30.0)])
    rec.open_run("r2", "support", {})
    put(rec, "c2")
    rec.feedback([said("c2", 0.75, time=10.0), said("c2", float("nan"), metric="broken")])
    rec.open_run("r3", "another", {})
    put(rec, "c3")
    # Said during another run, yet about a call of this flow.
    rec.feedback([said("c3", 1.0, time=1.0), said("c1", 1.0, time=20.0, metric="late")])
    rec.flush(5)
    folded = list(rec.fold("support"))
    assert [(f.score, f.time, f.run, f.arm) for f in folded] == [
        (0.75, 10.0, "r2", "small"),
        (1.0, 20.0, "r1", "big"),
        (0.25, 30.0, "r1", "big"),
    ]
    assert folded[2].cost_usd == 0.5  # of the arm that it is about, not of the whole call
    assert folded[2].item_key == "a"
    assert folded[0].kind is FeedbackKind.downstream
    assert [f.run for f in rec.fold("another")] == ["r3"]
    assert list(rec.fold("support", "nobody")) == []


def test_answers_are_found_by_content_only_where_that_was_asked_for(tmp_path):
    messages, arm = [{"role": "user", "content": "hello"}], Arm("small")
    key = content_key(messages, arm, TEAM.params, TEAM.answer.key)
    for wanted in (False, True):
        rec = SqliteRecording(tmp_path / f"{wanted}.db", content_keys=wanted)
        rec.open_run("r1", "f", {})
        rec.attempt(query("c0"), attempt("c0", text="rubbish", error="AnswerInvalid: x", invalid=True))
        assert rec.flush(5)
        assert [a.text for a in rec.find_content([key]).values()] == (["rubbish"] if wanted else [])
        put(rec, "c1")
        rec.attempt(query("c2"), attempt("c2", text="worse", error="AnswerInvalid: y", invalid=True))
        rec.attempt(query("c3"), attempt("c3", text=None, error="BackendDown: z"))
        assert rec.flush(5)
        found = rec.find_content([key, "unknown"])
        assert [a.text for a in found.values()] == (["billing"] if wanted else [])
        rec.close()


def test_items_decisions_and_dead_letters_are_kept(rec, path, clock):
    rec.items("tickets", [("f:1", "ada", 1.5, {"text": "a"}), ("f:2", "", None, [1, None])])
    rec.items("tickets", [("f:1", "ada", 1.5, {"text": "changed"}), ("f:3", "x", 2.0, object())])
    rec.items("other", [("f:1", "", None, None)])
    rec.decision(Decision("promoted", "team", {"arm": "small", "odd": object()}))
    letter = DeadLetter("team", {"text": "a"}, "AnswerInvalid", "no", "ada", "f:1", [attempt("c1")])
    rec.dead_letters([letter, letter])  # a resumed run sends it again
    nameless = dataclasses.replace(letter, position="", value=object())
    rec.dead_letters([nameless, nameless])  # nothing tells them apart from two items
    assert rec.flush(5)

    items = list(rec.read_items("r1", "tickets"))
    assert [(i.position, i.key, i.time, i.value) for i in items[:2]] == [
        ("f:1", "ada", 1.5, {"text": "a"}),
        ("f:2", "", None, [1, None]),
    ]
    assert items[2].is_repr
    assert [i.position for i in rec.read_items("r1", "tickets", skip=2)] == ["f:3"]
    assert rec.sources("r1") == ["other", "tickets"]
    (decision,) = rows(path, "decisions")
    assert decision["time"] == clock.now
    assert json.loads(decision["detail"])["arm"] == "small"
    letters = rows(path, "dead_letters")
    assert [r["position"] for r in letters] == ["f:1", "", ""]
    assert json.loads(letters[0]["attempts"])[0]["arm"]["model"] == "small"
    assert letters[1]["value_is_repr"] == 1


def test_the_recorders_last_words_are_kept_for_each_run(rec):
    assert rec.snapshot_of("r1") is None
    rec.snapshot("r1", {"n": 1})
    rec.snapshot("r1", {"n": 2})
    rec.flush(5)
    assert rec.snapshot_of("r1") == {"n": 2}


def test_closing_twice_does_no_harm_and_recording_after_it_is_an_error(path):
    rec = SqliteRecording(path)
    rec.open_run("r1", "f", {})
    put(rec, "c1")
    rec.close()
    rec.close()
    with pytest.raises(RecordingError, match=r"run\.db' is closed"):
        put(rec, "c2")
    assert not path.with_name("run.db-wal").exists()
    reader = RecordingReader(path)
    assert "c1" in reader.find(["c1"])
    reader.close()


def test_no_recording_calls_back_at_once_and_finds_nothing():
    rec = NoRecording()
    called = []
    assert rec.open_run("r1", "f", {}) is False
    rec.result(query("c1"), answered("c1"), lambda: called.append(1))
    assert called == [1]
    assert rec.find(["c1"]) == {}
    assert list(rec.fold("f")) == []
    assert rec.flush(0)


WRITER = """
import os, sys
from chainwax.router.answers import FreeText
from chainwax.router.prompt import Prompt
from chainwax.router.recording import SqliteRecording
from chainwax.router.types import *
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
node = NodeSpec("n", Prompt("{text}"), FreeText())
rec = SqliteRecording(path, on_error=lambda message: print(message, file=sys.stderr))
rec.open_run("r", "f", {})
for i in range(count):
    call = f"{name}-{i}"
    attempt = Attempt(call, 1, Arm("m"), started=1.0, text="t")
    result = CallResult(call, "n", "t", "t", arm=Arm("m"), attempts=[attempt])
    query = Query(node, call, [{"role": "user", "content": "x" * 500}])
    rec.result(query, result, lambda call=call: os.write(1, (call + "\\n").encode()))
    if i % 50 == 0:
        rec.flush()
rec.close()
"""


def test_what_was_called_durable_survives_kill_9(path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), "k", "10000000"], stdout=subprocess.PIPE, text=True
    )
    durable = [process.stdout.readline().strip() for _ in range(700)]
    process.kill()
    durable += process.stdout.read().split("\n")[:-1]  # the last may be cut off
    process.stdout.close()
    process.wait()
    assert process.returncode == -9
    rec = SqliteRecording(path)
    assert rec.open_run("r", "f", {}) is True
    assert set(rec.find(durable)) == set(durable)
    assert all(call.attempts for call in rec.find(durable).values())
    rec.close()


def test_two_processes_make_and_write_one_file(path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), name, "400"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for name in "ab"
    ]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, b"")
    assert len(rows(path, "calls")) == len(rows(path, "attempts")) == 800
    assert len(rows(path, "runs")) == 1
