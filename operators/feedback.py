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
from chainwax.router import CallRef, Feedback, FeedbackKind, LLMManager, default_manager
from chainwax.router.credit import LONGEST

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
    about: Sequence[str] = (),
    metric: str = "score",
    kind: FeedbackKind = FeedbackKind.downstream,
    manager: LLMManager | None = None,
) -> FeedbackOut:
    """Score each item and send the score to the calls of the nodes ``about`` that it came from.

    With an empty ``about`` the score is one of the item's end result, and goes out with the path of all its
    calls: the router gives each its share. A mapping is always one score for each node that it names.

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
        if isinstance(scored, Mapping):
            by_node: Mapping[str, Scored] = scored
        elif self._about or len(item.calls) == 1:
            by_node = dict.fromkeys(self._about or (item.calls[0].node,), scored)
        else:
            return [self._said(item, item.calls[-1], scored, now, item.calls)] if item.calls else []
        return [
            self._said(item, ref, one, now)
            for ref in item.calls
            if (not self._about or ref.node in self._about) and (one := by_node.get(ref.node)) is not None
        ]

    def _said(
        self,
        item: Item,
        ref: CallRef,
        scored: float | bool | Score,
        now: float,
        path: tuple[CallRef, ...] = (),
    ) -> Feedback:
        value = float(scored.value if isinstance(scored, Score) else scored)
        if not (math.isfinite(value) and 0.0 <= value <= 1.0):
            whose = "of the item" if path else f"of node '{ref.node}'"
            raise ValueError(f"the score {whose} must be in [0, 1], not {scored!r}")
        return Feedback(
            ref.node,
            value,
            ref.call_id,
            item.key,
            ref.arm,
            self._metric,
            self._id,
            self._kind,
            now,
            scored.correction if isinstance(scored, Score) else None,
            ref.context,
            path=path[-LONGEST:],
        )
