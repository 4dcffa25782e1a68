"""What can be read off an answer, as numbers: for a guess whether it is wrong, before it is used.

Nothing here knows the language or the task. What an answer is like says little by itself (a short one may be
the best there is); what it means at one node, for one model, is learned from the scores that come back.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chainwax.router.learning.arithmetic import sums
from chainwax.router.learning.packed import pack, unpack
from chainwax.router.types import Message

__all__ = ["ANSWER", "PROMPT", "Standard", "answer_features", "prompt_features", "prompt_text"]

_READ = 8000
"""Characters of a text that are read; of a longer one the first half and the last."""
_WORDS = 400
_HEDGES = re.compile(
    r"\b(?:i (?:think|believe|guess)|i(?:'m| am) not (?:sure|certain)|maybe|perhaps|possibly|probably|"
    r"might|it(?: is|'s) (?:hard|difficult|possible)|not clear|unclear|it depends|approximately|roughly|"
    r"seems?)\b"
)
_REFUSALS = re.compile(
    r"\b(?:as an ai|i(?:'m| am) sorry|i apologi[sz]e|i (?:cannot|can't|can not|don't have)|"
    r"unable to|unfortunately|not able to)\b"
)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_WORD = re.compile(r"\w+")
_ITEM = re.compile(r"^[ \t]{0,8}(?:[-*•]|\d{1,3}[.)])\s", re.MULTILINE)
_KINDS = 6
"""Places for what a short answer says: which choice it is, for instance."""

PROMPT = ("characters", "lines", "numbers", "questions", "code", "other", "capitals", "word")
"""What a prompt is told by; ``other`` is what is not ASCII, ``word`` the mean length of a word."""
ANSWER = (
    "characters", "lines", "items", "numbers", "own numbers", "code", "other", "hedges", "refusals", "right",
    "wrong", "question", "cut", "overlap", "variety", "word", "logprob", "before", "same", "shared",
    *(f"kind{n}" for n in range(_KINDS)),
)  # fmt: skip
"""What an answer is told by, beside its prompt: ``own numbers`` are not in the prompt, ``right`` and
``wrong`` are sums, ``overlap`` is the share of its words that the prompt has; ``before`` says that a cheaper
model answered too, ``same`` that it said the same, ``shared`` how many words the two have in common."""


def prompt_text(messages: Sequence[Message]) -> str:
    """All texts of a query's messages, one below the other; at most what is read of them."""
    parts: list[str] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            parts.append(content)
        elif isinstance(content, list):
            texts = (part.get("text") for part in content if isinstance(part, dict))
            parts.extend(text for text in texts if isinstance(text, str))
    return _read("\n".join(parts))


def prompt_features(text: str) -> NDArray[np.float64]:
    """Shape (len(PROMPT),), raw."""
    words = _WORD.findall(text)[:_WORDS]
    size = len(text) or 1
    return np.array(
        [
            math.log1p(len(text)),
            math.log1p(text.count("\n")),
            math.log1p(len(_NUMBER.findall(text))),
            math.log1p(text.count("?")),
            math.log1p(sum(map(text.count, "{};<>"))),
            _other(text) / size,
            sum(map(str.isupper, text)) / size,
            _mean_length(words),
        ]
    )


def answer_features(
    prompt: str, answer: str, *, logprob: float | None = None, before: str | None = None, cut: bool = False
) -> NDArray[np.float64]:
    """Shape (len(ANSWER),), raw.

    ``prompt`` is :func:`prompt_text`'s. ``logprob`` is the mean of the answer's tokens, ``before`` what the
    model that was asked before said, ``cut`` says that the answer was as long as it may be.
    """
    whole = len(answer)
    answer = _read(answer)
    low = answer.lower()
    words = _WORD.findall(low)[:_WORDS]
    own = set(words)
    asked = set(_WORD.findall(prompt.lower())[:_WORDS])
    numbers = _NUMBER.findall(answer)
    right, wrong = sums(answer)
    shared = 0.0
    if before is not None:
        others = set(_WORD.findall(before[:_READ].lower())[:_WORDS])
        shared = len(own & others) / max(len(own | others), 1)
    last = answer.rstrip()[-1:]
    kinds = [0.0] * _KINDS
    if len(words) <= 3:
        # Long texts are all of one kind.
        kinds[zlib.crc32(" ".join(words).encode()) % _KINDS] = 1.0
    return np.array(
        [
            math.log1p(whole),
            math.log1p(answer.count("\n")),
            math.log1p(len(_ITEM.findall(answer))),
            math.log1p(len(numbers)),
            len(set(numbers) - set(_NUMBER.findall(prompt))) / max(len(numbers), 1),
            float("```" in answer),
            _other(answer) / max(len(answer), 1),
            math.log1p(len(_HEDGES.findall(low))),
            math.log1p(len(_REFUSALS.findall(low))),
            math.log1p(right),
            math.log1p(wrong),
            float(last == "?"),
            float(cut or (whole > 200 and last.isalnum())),
            len(own & asked) / max(len(own), 1),
            len(own) / max(len(words), 1),
            _mean_length(words),
            max(logprob, -20.0) if logprob is not None and math.isfinite(logprob) else 0.0,
            float(before is not None),
            float(before is not None and before.split() == answer.split()),
            shared,
            *kinds,
        ]
    )


class Standard:
    """Features made comparable: less their running mean, over their running deviation, within ±3."""

    def __init__(self, size: int) -> None:
        self.n = 0.0
        self.mean: NDArray[np.float64] = np.zeros(size)
        self.spread: NDArray[np.float64] = np.zeros(size)  # sum of squared deviations (Welford 1962)

    def take(self, raw: NDArray[np.float64]) -> NDArray[np.float64]:
        """Count the features in, and give them standardised: shape (size,)."""
        self.n += 1.0
        step = raw - self.mean
        self.mean += step / self.n
        self.spread += step * (raw - self.mean)
        # Until there is something to compare with, a deviation of 1 is taken to be half known.
        deviation = np.sqrt((self.spread + 2.0) / (self.n + 1.0))
        deviation[self.spread == 0.0] = np.inf  # what never changes tells nothing
        return np.clip((raw - self.mean) / deviation, -3.0, 3.0)

    def state(self) -> list[Any]:
        """What was counted in, JSON-ready."""
        return [self.n, pack(self.mean), pack(self.spread)]

    def restore(self, state: list[Any]) -> None:
        """Know what :meth:`state` gave."""
        self.n, self.mean, self.spread = state[0], unpack(state[1]), unpack(state[2])


def _read(text: str) -> str:
    if len(text) <= _READ:
        return text
    return text[: _READ // 2] + "\n" + text[-_READ // 2 :]


def _other(text: str) -> int:
    return 0 if text.isascii() else sum(c > "\x7f" for c in text)


def _mean_length(words: list[str]) -> float:
    return sum(map(len, words)) / len(words) if words else 0.0
