"""The arithmetic of a choice and of a score in numpy: what :mod:`chainwax.router.learning.kernel` says."""

from __future__ import annotations

import binascii
import math
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

__all__ = ["best", "expect", "move", "note", "numbers", "read", "said", "spread", "worth"]

Floats = NDArray[np.float64]
Places = NDArray[np.intp]

_SPLIT = bytes(byte if chr(byte).isalnum() or byte == ord("_") else ord(" ") for byte in range(128))
_SPLIT += b" " * 128
"""What is no word becomes a space."""
_DIGITS = b"0123456789"
_SYMBOLS = b"=+*^/(){}$<>"
_FEW = bytes(set(range(256)) - set(_DIGITS + _SYMBOLS + b" \n"))
"""All but what is counted."""
_MACKAY = math.pi / 8.0


def read(
    raw: bytes, most: int, mask: int, words: list[bytes] | None = None
) -> tuple[bytes, int, int, int, int]:
    """As the kernel's; ``words`` are those of a text that is not ASCII, which bytes do not show."""
    found = list(dict.fromkeys(raw.translate(_SPLIT).split() if words is None else words))
    if len(found) > most:
        found = found[: most // 2] + found[len(found) - (most - most // 2) :]
    numbers = np.array(list(map(crc32, found)), dtype=np.uint32) & mask
    few = raw.translate(None, _FEW)
    digits, symbols = (len(few) - len(few.translate(None, which)) for which in (_DIGITS, _SYMBOLS))
    return numbers.astype("<u2").tobytes(), digits, few.count(b"\n"), symbols, few.count(b" ")


def numbers(context: str, most: int, mask: int) -> bytes:
    """As the kernel's."""
    raw = binascii.a2b_base64(context.encode("ascii"), strict_mode=True)
    if not raw or len(raw) % 2 or len(raw) > 2 * most:
        raise ValueError("numbers: no context")
    return (np.frombuffer(raw, dtype="<u2") & mask).astype(np.intp).tobytes()


def expect(
    out: Floats,
    words: Places,
    table: Floats,
    mean: Floats,
    own: Floats,
    keeps: Floats,
    level: float,
    mean_here: Floats,
    own_here: Floats,
    keeps_here: Floats,
    level_here: float,
) -> None:
    """As the kernel's."""
    odds, doubt = mean + mean_here, own + own_here
    var = level * np.square(keeps) + level_here * np.square(keeps_here) + doubt
    if len(words):
        weights, variances = np.add.reduce(table.take(words, axis=0), axis=0)
        odds += weights / math.sqrt(len(words))
        variances /= len(words)
        var += variances + variances[0]
        doubt += variances
    odds += odds.item(0)
    odds /= np.sqrt(1.0 + _MACKAY * var)
    out[0] = 1.0 / (1.0 + np.exp(-odds))
    out[1] = doubt


def spread(out: Floats, mean: Floats, doubt: Floats, cost: Floats, width: float) -> None:
    """As the kernel's."""
    np.multiply(width * mean * (1.0 - mean), np.sqrt(doubt), out=out)
    out[1:][cost[1:] >= cost[0]] = 0.0


def worth(
    drawn: Floats, mean: Floats, cost: Floats, rows: int, width: int, price: float
) -> tuple[float, float]:
    """As the kernel's."""
    chosen = np.argmax(drawn[:rows] - cost[:rows] / price, axis=1)
    at = np.arange(rows)
    return float(mean[at, chosen].mean()), float(cost[at, chosen].mean())


def note(
    kept_drawn: Floats,
    kept_mean: Floats,
    kept_cost: Floats,
    row: int,
    width: int,
    places: Places,
    drawn: Floats,
    mean: Floats,
    cost: Floats,
) -> None:
    """As the kernel's."""
    kept_drawn[row] = -np.inf
    kept_drawn[row, places] = drawn
    kept_mean[row, places] = mean
    kept_cost[row, places] = cost


def best(mean: Floats, spread: Floats, toll: Floats, normals: Floats) -> tuple[int, int]:
    """As the kernel's."""
    first = (mean + spread * normals - toll).argmax(axis=1)
    chosen = int(first[0])
    return chosen, int(np.count_nonzero(first == chosen))


def said(table: Floats, words: Places, width: int, place: int) -> tuple[float, float]:
    """As the kernel's."""
    flat, at = _both(table, words, width, place)
    return float(np.add.reduce(flat.take(at))), float(np.add.reduce(flat.take(at + width)))


def move(table: Floats, words: Places, width: int, place: int, by: float, shrink: float) -> None:
    """As the kernel's."""
    flat, at = _both(table, words, width, place)
    weights, variances = flat.take(at), flat.take(at + width)
    flat[at] = weights + variances * by
    flat[at + width] = variances * (1.0 - variances * shrink)


def _both(table: Floats, words: Places, width: int, place: int) -> tuple[Floats, Places]:
    """All numbers as one row, and where in it the weights of some words are, the common ones and an arm's."""
    first = words * (2 * width)
    return table.reshape(-1), np.concatenate((first, first + place))
