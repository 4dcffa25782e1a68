"""Tell the router what became of its answers: the way back from downstream."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import bytewax.operators as op
from bytewax.dataflow import Stream, operator

from chainwax.operators.item import FailedItem, Item
from chainwax.router import Feedback, FeedbackKind, LLMManager, default_manager

__all__ = ["FeedbackOut", "Score", "feedback"]


@dataclass(frozen=True, slots=True)
class Score:
    """What a scoring function may return where a number does not say all."""

    value: float
    """In [0, 1]."""
    correction: Any = None
    """The right answer, where it is known."""


Scored = float | bool | Score | None
ScoreFunction = Callable[[Any], Scored | Mapping[str, Scored]]
"""From an item's value to one score for all nodes that it is about, or to a score for each by node id.

None says nothing about a node.
"""


@dataclass(frozen=True)
class FeedbackOut:
    """Streams of the feedback operator."""

    oks: Stream[Item]
    """The items, unchanged."""

    errs: Stream[FailedItem]
    """Items that could not be scored."""


@operator
def feedback(
    step_id: str,
    up: Stream[Item],
    score: ScoreFunction,
    *,
    about: Sequence[str],
    metric: str = "score",
    kind: FeedbackKind = FeedbackKind.downstream,
    manager: LLMManager | None = None,
) -> FeedbackOut:
    """Score each item and send the score to the calls of the nodes ``about`` that it came from.

    Scores go out a batch at a time. An item whose score is no number in [0, 1] goes to ``errs``; an item
    that some of the nodes never answered is scored for the others.
    """
    sender = _Sender(step_id, score, tuple(about), metric, kind, manager)
    scored = op.flat_map_batch("score", up, sender.send)
    return FeedbackOut(
        op.flat_map_batch("oks", scored, lambda batch: [x for x in batch if type(x) is Item]),
        op.flat_map_batch("errs", scored, lambda batch: [x for x in batch if type(x) is FailedItem]),
    )


class _Sender:
    def __init__(
        self,
        step_id: str,
        score: ScoreFunction,
        about: tuple[str, ...],
        metric: str,
        kind: FeedbackKind,
        manager: LLMManager | None,
    ) -> None:
        self._id = step_id.rpartition(".")[2]
        self._score = score
        self._about = about
        self._metric = metric
        self._kind = kind
        self._manager = manager
        self._lock = threading.Lock()

    def send(self, batch: list[Item]) -> list[Item | FailedItem]:
        out: list[Item | FailedItem] = []
        told: list[Feedback] = []
        now = time.time()
        for item in batch:
            try:
                told.extend(self._of(item, now))
                out.append(item)
            except Exception as error:
                out.append(FailedItem.of(item, self._id, error))
        if told:
            with self._lock:
                if self._manager is None:
                    self._manager = default_manager()
            self._manager.feedback(told)
        return out

    def _of(self, item: Item, now: float) -> list[Feedback]:
        scored = self._score(item.value)
        if scored is None:
            return []
        by_node = scored if isinstance(scored, Mapping) else dict.fromkeys(self._about, scored)
        told: list[Feedback] = []
        for ref in item.calls:
            if ref.node not in self._about:
                continue
            one = by_node.get(ref.node)
            if one is None:
                continue
            correction = one.correction if isinstance(one, Score) else None
            value = float(one.value if isinstance(one, Score) else one)
            if not (math.isfinite(value) and 0.0 <= value <= 1.0):
                raise ValueError(f"the score of node '{ref.node}' must be in [0, 1], not {one!r}")
            told.append(
                Feedback(
                    ref.node,
                    value,
                    ref.call_id,
                    item.key,
                    ref.arm,
                    self._metric,
                    self._id,
                    self._kind,
                    now,
                    correction,
                    ref.context,
                )
            )
        return told
