"""What is read off a prompt to learn by: its words, hashed, and a few signs of its size and make.

A context is a short text (at most :data:`MOST` numbers of twelve bits, base64), so that it can travel with a
call, its lineage and its scores: whoever learns of a score learns the same, also a process that never saw
the prompt. The words cannot be read back from it.
"""

from __future__ import annotations

import binascii
import math
import re
import struct
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from chainwax.router.learning import kernel, plain

__all__ = ["MOST", "NOTHING", "PLACES", "decode", "read"]

PLACES = 4096
"""Places that words are hashed to."""
_WORDS = 64
"""Words of a prompt that count: of more the first half and the last."""
_SIGNS = 5
MOST = _WORDS + _SIGNS
"""Numbers in a context."""
_READ = 4000
"""Characters of a prompt that are read: of a longer one the first half and the last."""
_WORD_ANY = re.compile(r"\w+")
_NUMBERS = struct.Struct(f"<{_SIGNS}H")
_signs: dict[tuple[bytes, int], int] = {}
"""Hashes of signs; they are few."""

NOTHING: NDArray[np.intp] = np.zeros(0, dtype=np.intp)
"""A context of which nothing is known."""


def read(text: str) -> str:
    """The context of a prompt.

    >>> len(decode(read("Which team should answer?")))
    9
    """
    size = len(text)
    if size > _READ:
        text = text[: _READ // 2] + "\n" + text[-_READ // 2 :]
    low = text.lower()
    raw = low.encode("utf-8", "surrogatepass")
    if low.isascii():
        words, digits, lines, symbols, spaces = kernel.read(raw, _WORDS, PLACES - 1)
    else:
        # Words are hashed as bytes; only what is not ASCII has to be split as text.
        found = [word.encode("utf-8", "surrogatepass") for word in _WORD_ANY.findall(low)]
        words, digits, lines, symbols, spaces = plain.read(raw, _WORDS, PLACES - 1, found)
    signs = _NUMBERS.pack(
        _sign(b"size", int(2.0 * math.log2(size + 1))),
        _sign(b"digits", digits.bit_length()),
        _sign(b"lines", min(lines, 9)),
        _sign(b"symbols", symbols.bit_length()),
        _sign(b"word", 2 * len(raw) // (1 + spaces)),
    )
    return binascii.b2a_base64(words + signs, newline=False).decode("ascii")


def decode(context: str) -> NDArray[np.intp]:
    """The numbers in a context, shape (at most MOST,), in [0, PLACES).

    None where it is no context, for it may come from anywhere.
    """
    if not context:
        return NOTHING
    try:
        return np.frombuffer(kernel.numbers(context, MOST, PLACES - 1), dtype=np.intp)
    except ValueError:
        return NOTHING


def _sign(name: bytes, value: int) -> int:
    known = _signs.get((name, value))
    if known is None:
        known = crc32(b"#%s %d" % (name, value)) & (PLACES - 1)
        if len(_signs) < PLACES:
            _signs[name, value] = known
    return known
