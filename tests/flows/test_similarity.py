"""How alike values and streams are: by hand-made cases, and by what must hold for any."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainwax.flows.evaluate.similarity import Measure, aligned, alike, plain, stream_similarity

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text("yn ", max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=8,
)
STREAM = st.lists(VALUES, max_size=7)
MEASURE = st.sampled_from(list(Measure))


@pytest.mark.parametrize(
    ("one", "other", "exact", "fields", "soft"),
    [
        ("Yes.", " yes", 1, 1, 1),
        ("y", "n", 0, 0, 0),
        ({"a": 1, "b": "x"}, {"a": 1, "b": "z"}, 0, 0.5, 0.5),
        ({"a": 1}, {"a": 1, "b": 2}, 0, 0.5, 0.5),
        ({"text": "a small lamp"}, {"text": "a tall lamp"}, 0, 0, 20 / 23),
        ([1, 2, 3], [1, 3], 0, 0, 0.8),
        (1, 1.0, 1, 1, 1),
        (1, True, 0, 0, 0),
        ("7", 7, 0, 0, 0),
        ({}, {}, 1, 1, 1),
        (None, None, 1, 1, 1),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, 0, 0, 0.5),
    ],
)
def test_values(one, other, exact, fields, soft):
    found = [alike(one, other, measure) for measure in Measure]
    assert found == pytest.approx([exact, fields, soft])


def test_what_is_too_many_counts_and_short_texts_and_numbers_do():
    right = {"out": [{"n": 1}, {"n": 2}]}
    assert stream_similarity(right, right) == 1.0
    assert stream_similarity(right, {"out": [{"n": 1}, {"n": 9}, {"n": 2}]}) == pytest.approx(0.8)
    assert stream_similarity(right, {"out": [{"n": 1}]}) == pytest.approx(2 / 3)
    assert stream_similarity(right, {**right, "more": ["x", "x"]}) == pytest.approx(4 / 6)
    assert stream_similarity({"out": ["y"]}, {"out": ["y"]}) == 1.0
    assert stream_similarity({}, {}) == 1.0
    assert stream_similarity({"out": []}, {"out": ["y"]}) == 0.0


@given(STREAM, STREAM, MEASURE)
def test_it_is_within_bounds_symmetric_and_one_for_the_same(one, other, measure):
    there = stream_similarity({"s": one}, {"s": other}, measure)
    assert 0.0 <= there <= 1.0 + 1e-12
    assert there == pytest.approx(stream_similarity({"s": other}, {"s": one}, measure))
    assert stream_similarity({"s": one}, {"s": one}, measure) == 1.0


@given(STREAM, STREAM, MEASURE)
def test_each_item_stands_once_and_in_order(one, other, measure):
    pairs = aligned([plain(x) for x in one], [plain(x) for x in other], measure)
    assert [p.reference for p in pairs if p.reference is not None] == list(range(len(one)))
    assert [p.output for p in pairs if p.output is not None] == list(range(len(other)))


@settings(max_examples=60)
@given(st.lists(VALUES, max_size=4), st.lists(VALUES, max_size=4), MEASURE)
def test_no_pairing_is_better(one, other, measure):
    one, other = [plain(x) for x in one], [plain(x) for x in other]

    def best(size):
        for left in itertools.combinations(range(len(one)), size):
            for right in itertools.combinations(range(len(other)), size):
                yield sum(alike(one[a], other[b], measure) for a, b in zip(left, right, strict=True))

    most = max(max(best(size)) for size in range(min(len(one), len(other)) + 1))
    assert sum(pair.score for pair in aligned(one, other, measure)) == pytest.approx(most)


@pytest.mark.parametrize("text", ["{n}", "y"])
def test_long_streams_take_seconds(text):
    right = [{"n": text.replace("{n}", str(n)), "odd": n % 2} for n in range(4000)]
    own = [item for n, item in enumerate(right) if n % 11]
    begun = time.monotonic()
    found = sum(pair.weight * pair.score for pair in aligned(right, own)) / (len(right) + len(own))
    assert time.monotonic() - begun < 30
    assert found > (0.95 if text == "{n}" else 0.8)


def test_what_json_cannot_hold_is_its_text():
    assert plain({1, 2}) == [1, 2]
    assert plain(object).startswith("<class")
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert isinstance(plain(deep), str)
    nested = {"a": 1}
    for _ in range(200):
        nested = {"a": nested}
    assert alike(nested, nested) == 1.0
    assert alike("x" * 50_000, "x" * 50_001) == 0.0
