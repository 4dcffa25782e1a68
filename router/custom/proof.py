"""What a model must show before it serves, and what takes it back."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

from chainwax.router.answers import AnswerForm
from chainwax.router.backends.base import Weighing
from chainwax.router.custom.dataset import Example
from chainwax.router.errors import Abstains, AnswerInvalid, BackendError
from chainwax.router.instance import LLMInstance
from chainwax.router.types import Attempt, NodeSpec, Query

__all__ = ["Tally", "Watch", "judged", "measure"]

_AT_ONCE = 8
_WINDOW = 100
"""The last scores of a serving model that are looked at."""
_ALARM = 0.9995
"""Confidence at which they take it back: they are looked at again and again."""


@dataclass(slots=True)
class Tally:
    """Right answers among those that could be judged."""

    right: float = 0.0
    n: int = 0

    def add(self, score: float) -> None:
        """One more, with its score in [0, 1]."""
        self.right += score
        self.n += 1

    def bounds(self, confidence: float) -> tuple[float, float]:
        """Lower and upper bound, each one-sided at ``confidence`` (Wilson 1927)."""
        if not self.n:
            return 0.0, 1.0
        z = NormalDist().inv_cdf(confidence)
        p, n = self.right / self.n, self.n
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        wide = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return middle - wide, middle + wide

    def with_(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(self.right + other.right, self.n + other.n)

    def as_json(self, confidence: float) -> dict[str, Any]:
        """For cards and decisions."""
        low, high = self.bounds(confidence)
        return {"accuracy": self.right / self.n if self.n else None, "low": low, "high": high, "n": self.n}


@dataclass(slots=True)
class Watch:
    """The last scores of a model that serves."""

    scores: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    def add(self, score: float, others: float = 1.0) -> None:
        """One more; of a path's score, ``others`` is what its other calls were expected to get."""
        self.scores.append((score, others))

    def fell(self, bar: float) -> bool:
        """Whether it is plain that it lies below the bar by now."""
        n = len(self.scores)
        if n < _WINDOW // 4:
            return False
        lately = Tally(sum(score for score, _ in self.scores), n)
        return lately.bounds(_ALARM)[1] < bar * sum(others for _, others in self.scores) / n


def judged(form: AnswerForm, value: Any, right: Any) -> float:
    """1 where an answer is the right one, else 0: choices and structures by value, texts but for spaces."""
    if isinstance(value, str) and isinstance(right, str):
        return float(value.split() == right.split())
    return float(bool(form.jsonable(value) == form.jsonable(right)))


async def measure(instance: LLMInstance, node: NodeSpec, examples: Sequence[Example]) -> Tally:
    """How many of some examples a model gets right; where it abstains, with what was said there."""
    gate = asyncio.Semaphore(_AT_ONCE)
    tally = Tally()

    async def one(number: int, example: Example) -> None:
        async with gate:
            query = Query(node, f"held-out:{instance.name}:{number}", list(example.messages))
            _, value, _ = await answer_of(instance, query, example.said)
        try:
            right = node.answer.parse(example.answer)
        except AnswerInvalid:
            return  # what was right is no answer any more
        tally.add(0.0 if value is None else judged(node.answer, value, right))

    await asyncio.gather(*(one(number, example) for number, example in enumerate(examples)))
    return tally


async def answer_of(instance: LLMInstance, query: Query, said: dict[str, str]) -> tuple[Attempt, Any, bool]:
    """What a model answers, weighed with what others said where it abstains, and whether it did.

    None for no valid answer.
    """
    attempt, error = await instance.ask(query, instance.arms[0], number=1, shadow=True)
    text = attempt.text
    backend = instance.backend
    unsure = isinstance(error, Abstains)
    if unsure and isinstance(backend, Weighing):
        text = backend.weigh(query, said)
    elif isinstance(error, BackendError):
        return attempt, None, unsure
    try:
        return attempt, None if text is None else query.node.answer.parse(text), unsure
    except AnswerInvalid:
        return attempt, None, unsure
