"""The compiled arithmetic against the same in numpy."""

from __future__ import annotations

import binascii
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainwax.router.learning import kernel, plain
from chainwax.router.learning.context import MOST, decode, read

pytestmark = pytest.mark.skipif(not kernel.COMPILED, reason="the kernel was not compiled: no C compiler")

ROWS = 32
seeds = st.integers(0, 2**32 - 1)
arms = st.integers(1, 70)


def both(name: str, *args: Any) -> tuple[Any, Any]:
    """What each makes of its own copy of the arguments, which may be changed: the results, and the copies."""
    out = []
    for room in (kernel, plain):
        own = [arg.copy() if isinstance(arg, np.ndarray) else arg for arg in args]
        out.append((getattr(room, name)(*own), [arg for arg in own if isinstance(arg, np.ndarray)]))
    (first, changed), (second, too) = out
    for one, other in zip(changed, too, strict=True):
        assert one == pytest.approx(other, rel=1e-12, abs=1e-300)
    return first, second


@given(st.text(st.characters(max_codepoint=127), max_size=4001))
def test_prompts_are_read_alike(text: str) -> None:
    raw = text.lower().encode()
    compiled, numpy = both("read", raw, 64, 4095)
    assert compiled == numpy


@pytest.mark.parametrize("words", [0, 1, 63, 64, 65, 200, 2000])
def test_of_many_words_the_first_half_and_the_last_are_read(words: int) -> None:
    raw = b" ".join(b"%x" % n for n in range(words))[:4001]
    compiled, numpy = both("read", raw, 64, 4095)
    assert compiled == numpy
    assert len(compiled[0]) == 2 * min(words, 64)


def test_a_longer_text_is_refused_and_never_comes_there() -> None:
    with pytest.raises(ValueError, match="too much"):
        kernel.read(b"a " * 5000, 64, 4095)
    assert len(decode(read("a b c " * 5000))) == 8
    assert len(decode(read("ä b c " * 5000))) == 8


@given(st.text(max_size=300) | st.text("ABCDabcd0189+/=", max_size=240))
def test_contexts_are_read_alike(context: str) -> None:
    out: list[bytes | None] = []
    for room in (kernel, plain):
        try:
            out.append(room.numbers(context, MOST, 4095))
        except ValueError:
            out.append(None)
    assert out[0] == out[1]


@given(st.text(st.characters(exclude_categories=[]), max_size=300))
def test_a_prompt_gives_a_context_that_is_read(text: str) -> None:
    context = read(text)
    assert 5 <= len(decode(context)) <= MOST
    assert plain.numbers(context, MOST, 4095) == decode(context).tobytes()


def test_a_context_of_more_numbers_is_none() -> None:
    for count, read_ in ((MOST, MOST), (MOST + 1, 0), (80, 0), (100, 0)):
        context = binascii.b2a_base64(b"\1\0" * count, newline=False).decode()
        assert len(decode(context)) == read_


def sized(seed: int, arms: int, words: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    width = arms + 1
    table = rng.random((ROWS, 2, width))
    return {
        "rng": rng,
        "width": width,
        "table": table,
        "words": rng.integers(0, ROWS, words),  # some of them twice
    }


@given(seeds, arms, st.integers(0, MOST))
def test_expectations_are_alike(seed: int, arms: int, words: int) -> None:
    known = sized(seed, arms, words)
    rng, width = known["rng"], known["width"]
    beliefs = [
        *(rng.normal(size=width), rng.random(width), rng.random(width), rng.random()),
        *(rng.normal(size=width), rng.random(width), rng.random(width), rng.random()),
    ]
    both("expect", np.empty((2, width)), known["words"], known["table"], *beliefs)


@given(seeds, arms, st.integers(1, MOST), st.data())
def test_words_are_moved_alike(seed: int, arms: int, words: int, data: st.DataObject) -> None:
    known = sized(seed, arms, words)
    place = data.draw(st.integers(1, arms))
    table, numbers, width = known["table"], known["words"], known["width"]
    compiled, numpy = both("said", table, numbers, width, place)
    assert compiled == pytest.approx(numpy)
    both(
        "move", table, numbers, width, place, data.draw(st.floats(-1.0, 1.0)), data.draw(st.floats(0.0, 0.1))
    )


@given(seeds, arms, st.integers(1, 40))
def test_the_same_arm_is_chosen(seed: int, arms: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    mean, doubt, cost = rng.random((3, arms))
    spread = np.empty(arms)
    both("spread", spread, mean, doubt, cost, 0.2)
    plain.spread(spread, mean, doubt, cost, 0.2)
    assert len(set(both("best", mean, spread, cost / 3.0, rng.normal(size=(rows, arms))))) == 1
    drawn, means, costs = rng.random((3, rows, arms))
    drawn[rng.random((rows, arms)) < 0.2] = -np.inf
    kept = rng.random((3, 5, arms + 2))
    both("note", *kept, 3, arms + 2, rng.permutation(arms) + 1, mean, doubt, cost)
    compiled, numpy = both("worth", drawn, means, costs, rows, arms, 0.5)
    assert compiled == pytest.approx(numpy)


def test_without_it_numpy_chooses_the_same() -> None:
    code = """
import sys
if "plain" in sys.argv:
    sys.modules["chainwax.router.learning._kernel"] = None
from chainwax.router.learning import kernel
from chainwax.router.learning.context import decode, read
from chainwax.router.learning.knowledge import Knowledge
from chainwax.router.types import Tier
assert kernel.COMPILED is not ("plain" in sys.argv)
known = Knowledge()
for key, tier in zip("abc", Tier):
    known.add(key, tier)
for n in range(60):
    known.learn("node", 1 + n % 3, decode(read(f"Ticket {n}: is it {n % 7} or {n % 5}?")), float(n % 4 > 0))
print(known.scores("node", decode(read("Ticket 61: is it 3 or 4?")))[0].round(9).tolist())
"""
    said = [
        subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout
        for how in ("compiled", "plain")
    ]
    assert said[0] == said[1]
    assert said[0].count(".") == 4


def test_sizes_that_do_not_fit_are_refused() -> None:
    some, more = np.ones(3), np.ones(4)
    table, words = np.ones((ROWS, 2, 3)), np.array([1, ROWS])
    beyond = {"said": (table, words, 3, 1), "move": (table, words, 3, 1, 0.1, 0.1)}
    for name, args in {
        **beyond,
        "best": (some, more, some, np.ones((2, 3))),
        "spread": (some, some, more, some, 0.1),
        "note": (*np.ones((3, 4, 3)), 4, 3, np.array([0]), *np.ones((3, 1))),
        "worth": (np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 3)), 3, 3, 1.0),
        "expect": (np.ones((2, 3)), words, table, *(some, some, some, 1.0) * 2),
    }.items():
        with pytest.raises(ValueError, match="sizes do not fit"):
            getattr(kernel, name)(*args)
    for place in (-1, 0, 3):
        with pytest.raises(ValueError, match="sizes do not fit"):
            kernel.move(table, np.array([0]), 3, place, 0.1, 0.1)
