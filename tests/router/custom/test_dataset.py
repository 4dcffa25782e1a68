"""What a node's dataset takes from its recording, and what it leaves out."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainwax.router import Choice, FeedbackKind, FreeText, NodeSpec, Prompt, Rules
from chainwax.router.custom import (
    HERE,
    Dataset,
    DatasetUnfit,
    Place,
    dataset_of,
    may_train,
    redact,
)
from chainwax.router.recording.training import Answered

NODE = NodeSpec("kind", Prompt("{text}"), Choice(["bill", "bug"]))
LABEL = FeedbackKind.label


def call(n, text, answer="bill", *, right=None, score=None, time=None, **more):
    return Answered(
        f"c{n}",
        f"k{n}",
        float(n if time is None else time),
        [{"role": "user", "content": text}],
        answer,
        "small",
        False,
        scores=[] if score is None else [(LABEL, score)],
        corrections=[] if right is None else [right],
        **more,
    )


def test_corrections_come_first_then_good_scores():
    data = dataset_of(
        NODE,
        [
            call(1, "one", "bill", right="bug", score=0.0),
            call(2, "two", "bill", score=1.0),
            call(3, "three", "bug", score=0.2),
            call(4, "four"),
            call(5, "five", right="something else"),
        ],
        held_out=0.5,
    )
    assert [(e.text, e.answer, e.corrected) for e in (*data.train, *data.held_out)] == [
        ("one", "bug", True),
        ("two", "bill", False),
    ]
    notes = data.notes
    assert (notes.calls, notes.corrected, notes.poor, notes.unscored, notes.invalid) == (5, 1, 1, 1, 1)


def test_a_validation_says_nothing_of_being_right():
    one = call(1, "one")
    one.scores = [(FeedbackKind.validation, 1.0)]
    assert dataset_of(NODE, [one]).notes.unscored == 1


def test_the_same_question_counts_once_and_with_its_oldest_time():
    data = dataset_of(
        NODE, [call(n, "  Same  TEXT" if n % 2 else "same text", right="bug") for n in range(9)]
    )
    assert [e.time for e in (*data.train, *data.held_out)] == [0.0]
    assert data.notes.duplicates == 8


def test_contradictions_are_left_out_and_told():
    calls = [call(n, f"q{n // 2}", right=("bill", "bug")[n % 2]) for n in range(40)]
    data = dataset_of(NODE, calls)
    assert not data.train
    assert data.notes.contradictions == 20
    with pytest.raises(DatasetUnfit, match="20 questions have contradicting corrections"):
        data.require(10)


def test_a_correction_settles_what_scores_contradict():
    data = dataset_of(
        NODE, [call(1, "q", "bill", score=1.0), call(2, "q", "bug", score=1.0), call(3, "q", right="bug")]
    )
    assert [e.answer for e in data.held_out] == ["bug"]


def test_two_good_texts_do_not_contradict_each_other():
    node = dataclasses.replace(NODE, answer=FreeText())
    data = dataset_of(node, [call(1, "q", "one way", score=1.0), call(2, "q", "another", score=1.0)])
    assert data.notes.contradictions == 0
    assert len(data.held_out) == 1


def test_one_class_and_ten_rows_are_refused_with_the_reason():
    data = dataset_of(NODE, [call(n, f"q{n}", right="bug") for n in range(50)])
    with pytest.raises(DatasetUnfit, match="all 40 questions have the same right answer 'bug'"):
        data.require(20)
    data = dataset_of(NODE, [call(n, f"q{n}", right=("bug", "bill")[n % 2]) for n in range(10)])
    with pytest.raises(DatasetUnfit, match=r"node 'kind' of the flow 'flow': 10 questions .* 200 are wanted"):
        data.require(200)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=60), st.floats(0.05, 0.9))
def test_held_out_is_later_than_all_that_is_trained_on(rows, share):
    calls = [call(n, f"text {text}", right="bug", time=time + 1) for n, (time, text) in enumerate(rows)]
    data = dataset_of(NODE, calls, held_out=share)
    assert len({e.text for e in (*data.train, *data.held_out)}) == len(data.train) + len(data.held_out)
    if data.train and data.held_out:
        assert max(e.time for e in data.train) < min(e.time for e in data.held_out)


def test_secrets_are_taken_out_of_questions_answers_and_what_models_said():
    node = dataclasses.replace(NODE, answer=FreeText())
    secret = "sk-abcdefghijklmnopqrstuv"
    data = dataset_of(
        node,
        [call(1, f"my key {secret}, bob@example.org", right=f"key {secret}", said={"small": secret})],
    )
    stored = repr(data.held_out)
    assert secret not in stored
    assert "example.org" not in stored
    assert "[key]" in stored
    assert data.notes.redacted == 1


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("AKIAIOSFODNN7EXAMPLE", "[key]"),
        ("ghp_0123456789abcdefghijABCDEFGHIJ", "[key]"),
        ("Authorization: Bearer abcdef0123456789", "Authorization: Bearer [token]"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl", "[token]"),
        ("postgres://joe:hunter2@db/x", "postgres://joe:[secret]@db/x"),
        ("card 4111 1111 1111 1111.", "card [card]."),
        ("order 4111 1111 1111 1112.", "order 4111 1111 1111 1112."),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "[key]"),
        ("-----BEGIN PRIVATE KEY-----\nMIIE, cut off", "[key]"),
        ("the token of gold fell by 3 %", "the token of gold fell by 3 %"),
        ("write to Ann.B+c@mail.example.co.uk!", "write to [email]!"),
    ],
)
def test_the_redactor_knows(text, left):
    assert redact(text) == left


@given(st.text(max_size=300))
def test_the_redactor_takes_any_text_and_is_done_at_once(text):
    once = redact(text)
    assert isinstance(redact(once), str)


def test_long_hostile_texts_do_not_hang_the_redactor():
    for text in ("a@" * 50_000, "1" * 100_000, "-----BEGIN PRIVATE KEY-----" * 2_000, "a." * 50_000 + "@"):
        redact(text)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    data = dataset_of(NODE, [call(n, f"q{n} ü\u2028\ud800", right=("bug", "bill")[n % 2]) for n in range(30)])
    data.save(tmp_path)
    again = Dataset.load(tmp_path)
    assert again == data
    assert again.hash == data.hash


@pytest.mark.parametrize(
    ("allow", "deny", "place", "may"),
    [
        ((), (), HERE, True),
        ((), (), Place("openai"), True),
        ((), ("provider:openai",), Place("openai"), False),
        ((), ("provider:openai",), HERE, True),
        ((), ("region:us",), Place("openai", "us"), False),
        ((), ("custom",), HERE, False),
        (("local",), (), Place("openai"), False),
        (("local", "custom"), (), HERE, True),
        (("provider:mistral",), (), Place("openai"), False),
    ],
)
def test_allow_and_deny_hold_for_training(allow, deny, place, may):
    assert may_train(Rules(allow, deny), "kind-1", place) is may
