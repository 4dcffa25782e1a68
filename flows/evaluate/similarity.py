"""How alike two values are, and two streams: exactly, by field, or aligned.

The aligned similarity is after the one that ChainStream's own evaluation uses (its
``report_evaluator/utils.py``, Apache-2.0): items of two streams are paired in order so that the sum of
their likeness is greatest, by dynamic programming as for the longest common subsequence. What is otherwise
here, and why, docs/evaluating.md says.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple

from pydantic import BaseModel
from rapidfuzz.distance import Indel

from chainwax.connectors import to_json

__all__ = ["Measure", "Pair", "aligned", "alike", "plain", "stream_similarity"]

_CELLS = 400_000
"""The most pairs of items that are compared between two that are paired for certain."""
_FEW = 2500
"""Pairs of items that are simply all compared."""
_LEAST_BAND = 8
_DEEPEST = 32
"""Levels of a value; what lies deeper is compared as a whole."""
_LONGEST = 20_000
"""Characters of a text from which on only equality counts."""
_EDGES = " \t\r\n\"'`*.:;!,?"


class Measure(StrEnum):
    """What counts as alike."""

    exact = "exact"
    """All or nothing. Of texts, case, spaces and the punctuation around them do not count."""
    fields = "fields"
    """The share of equal fields; what is no object is one field."""
    aligned = "aligned"
    """The mean likeness of the fields: of texts by edit distance, of lists aligned, else by equality."""


class Pair(NamedTuple):
    """An item of the reference, one of the outputs, or both, and how alike they are."""

    reference: int | None
    output: int | None
    score: float

    @property
    def weight(self) -> int:
        """How many items it stands for."""
        return 2 if self.reference is not None and self.output is not None else 1


def plain(value: Any) -> Any:
    """A value as JSON holds it; what JSON cannot hold as its text."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    try:
        return json.loads(to_json(value))
    except (TypeError, ValueError, RecursionError):
        pass
    try:
        return str(value)
    except Exception:  # a value's own code
        return f"<{type(value).__name__}>"


def alike(one: Any, other: Any, measure: Measure = Measure.aligned) -> float:
    """How alike two plain values are, from 0 to 1; equal ones are 1.

    >>> alike({"team": "Billing", "order": 7}, {"team": "billing.", "order": 8}, Measure.fields)
    0.5
    """
    return _alike(one, other, measure, 0)


def _alike(one: Any, other: Any, measure: Measure, depth: int) -> float:
    if isinstance(one, str) and isinstance(other, str):
        return _texts(one, other, measure is Measure.aligned)
    if measure is Measure.exact or depth >= _DEEPEST:
        return float(_equal(one, other, depth))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        names = {**one, **other}
        if not names:
            return 1.0
        inner = measure if measure is Measure.aligned else Measure.exact
        return sum(
            _alike(one[name], other[name], inner, depth + 1)
            for name in names
            if name in one and name in other
        ) / len(names)
    if measure is Measure.aligned and isinstance(one, list) and isinstance(other, list):
        return _score(_pairs(one, other, measure, depth + 1))
    return float(_equal(one, other, depth))


def _equal(one: Any, other: Any, depth: int) -> bool:
    if isinstance(one, str) and isinstance(other, str):
        return _texts(one, other, False) == 1.0
    if isinstance(one, bool) or isinstance(other, bool) or depth >= _DEEPEST:
        return one is other or (type(one) is type(other) and bool(one == other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[n], other[n], depth + 1) for n in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(
            _equal(a, b, depth + 1) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
    return bool(one == other)


@lru_cache(maxsize=65536)
def _texts(one: str, other: str, soft: bool) -> float:
    if one == other:
        return 1.0
    one, other = (" ".join(text.casefold().split()).strip(_EDGES) for text in (one, other))
    if one == other:
        return 1.0
    if not soft or max(len(one), len(other)) > _LONGEST:
        return 0.0
    return float(Indel.normalized_similarity(one, other))


def aligned(
    reference: Sequence[Any], outputs: Sequence[Any], measure: Measure = Measure.aligned
) -> list[Pair]:
    """The pairs of plain values, in order, whose likeness is greatest in sum; others stand alone, with 0.

    Long streams are not compared item by item with all of each other: equal items of which there is one in
    each are paired first, as many as keep the order (a patience diff); between two such pairs the rest is
    tried, of what is very long only items at about the same place.
    """
    return _pairs(reference, outputs, measure, 0)


def stream_similarity(
    reference: Mapping[str, Sequence[Any]],
    outputs: Mapping[str, Sequence[Any]],
    measure: Measure = Measure.aligned,
) -> float:
    """How alike the streams of two runs are, from 0 to 1: twice the likeness of all pairs, by all items.

    A stream that only one of them has counts; two runs without any item are alike.

    >>> stream_similarity({"out": ["y", "n"]}, {"out": ["y", "n", "n"]})
    0.8
    """
    pairs: list[Pair] = []
    for name in {**reference, **outputs}:
        right, own = ([plain(item) for item in side.get(name, ())] for side in (reference, outputs))
        pairs += aligned(right, own, measure)
    return _score(pairs)


def _score(pairs: Sequence[Pair]) -> float:
    items = sum(pair.weight for pair in pairs)
    return sum(pair.weight * pair.score for pair in pairs) / items if items else 1.0


def _pairs(reference: Sequence[Any], outputs: Sequence[Any], measure: Measure, depth: int) -> list[Pair]:
    # Equal items at both ends belong together in some best pairing: only what lies between has to be tried.
    shorter = min(len(reference), len(outputs))
    head = 0
    while head < shorter and _equal(reference[head], outputs[head], depth):
        head += 1
    tail = 0
    while tail < shorter - head and _equal(reference[-1 - tail], outputs[-1 - tail], depth):
        tail += 1
    pairs = [Pair(n, n, 1.0) for n in range(head)]
    at = (head, head)
    ends = (len(reference) - tail, len(outputs) - tail)
    for anchor in [*_anchors(reference, outputs, head, ends), ends]:
        between = _between(reference[at[0] : anchor[0]], outputs[at[1] : anchor[1]], measure, depth)
        pairs += [
            Pair(
                None if pair.reference is None else pair.reference + at[0],
                None if pair.output is None else pair.output + at[1],
                pair.score,
            )
            for pair in between
        ]
        if anchor is not ends:
            pairs.append(Pair(*anchor, 1.0))
        at = (anchor[0] + 1, anchor[1] + 1)
    return pairs + [Pair(len(reference) - n, len(outputs) - n, 1.0) for n in range(tail, 0, -1)]


def _anchors(
    reference: Sequence[Any], outputs: Sequence[Any], start: int, ends: tuple[int, int]
) -> list[tuple[int, int]]:
    """Places of equal items that there is one of in each, as many as keep the order of both."""
    if (ends[0] - start) * (ends[1] - start) <= _FEW:
        return []
    known = _single(reference[start : ends[0]])
    places = _single(outputs[start : ends[1]])
    found = [(at + start, places[key] + start) for key, at in known.items() if key in places]
    # The longest rising sequence of places in the outputs: the least last place for each length.
    lasts: list[int] = []
    numbers: list[int] = []
    before: list[int | None] = []
    for number, (_, place) in enumerate(found):
        length = bisect_left(lasts, place)
        if length == len(lasts):
            lasts.append(place)
            numbers.append(number)
        else:
            lasts[length], numbers[length] = place, number
        before.append(numbers[length - 1] if length else None)
    chosen: list[tuple[int, int]] = []
    last = numbers[-1] if numbers else None
    while last is not None:
        chosen.append(found[last])
        last = before[last]
    return chosen[::-1]


def _single(items: Sequence[Any]) -> dict[str, int]:
    """Places of the items that there is one of, by their text."""
    places: dict[str, int] = {}
    several: set[str] = set()
    for place, item in enumerate(items):
        key = json.dumps(item, sort_keys=True, ensure_ascii=False)
        if key in places:
            several.add(key)
        places[key] = place
    return {key: place for key, place in places.items() if key not in several}


def _between(reference: Sequence[Any], outputs: Sequence[Any], measure: Measure, depth: int) -> list[Pair]:
    """The dynamic programming, in a band around the line from the first items to the last."""
    rows, columns = len(reference), len(outputs)
    if not rows or not columns:
        return [Pair(n, None, 0.0) for n in range(rows)] + [Pair(None, n, 0.0) for n in range(columns)]
    width = columns if rows * columns <= _CELLS else max(_LEAST_BAND, _CELLS // rows // 2)
    slope = columns / rows
    starts = [max(0, int(row * slope) - width) for row in range(rows)]
    ends = [min(columns, int((row + 1) * slope) + width + 1) for row in range(rows)]
    # best[c]: the greatest sum for the rows so far and the first c columns. Left of a row's band it is what
    # it was, for nothing there is paired any more; right of it, what stands at the band's end.
    best = [0.0] * (columns + 1)
    steps: list[bytearray] = []
    for row in range(rows):
        start, end = starts[row], ends[row]
        item = reference[row]
        taken = bytearray(end - start)
        diagonal = best[start]
        left = best[start]
        for column in range(start, end):
            above = best[column + 1]
            value, step = (above, 1) if above >= left else (left, 2)
            if diagonal + 1.0 > value:
                both = diagonal + _alike(item, outputs[column], measure, depth)
                if both > value:
                    value, step = both, 3
            taken[column - start] = step
            diagonal = above
            best[column + 1] = left = value
        for column in range(end, columns):
            best[column + 1] = max(best[column + 1], left)
        steps.append(taken)
    return _traced(reference, outputs, steps, starts, measure, depth)


def _traced(
    reference: Sequence[Any],
    outputs: Sequence[Any],
    steps: Sequence[bytearray],
    starts: Sequence[int],
    measure: Measure,
    depth: int,
) -> list[Pair]:
    found: list[Pair] = []
    row, column = len(reference), len(outputs)
    while row and column:
        at = column - 1 - starts[row - 1]
        taken = steps[row - 1]
        step = 2 if at >= len(taken) else 1 if at < 0 else taken[at]
        if step == 3:
            row, column = row - 1, column - 1
            found.append(Pair(row, column, _alike(reference[row], outputs[column], measure, depth)))
        elif step == 2:
            column -= 1
            found.append(Pair(None, column, 0.0))
        else:
            row -= 1
            found.append(Pair(row, None, 0.0))
    found += [Pair(n, None, 0.0) for n in range(row - 1, -1, -1)]
    found += [Pair(None, n, 0.0) for n in range(column - 1, -1, -1)]
    return found[::-1]
