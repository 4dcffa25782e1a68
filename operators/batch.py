"""Collect items by count and time, so that a model's queue gets them together."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import bytewax.operators as op
from bytewax.dataflow import Stream, operator
from bytewax.operators import StatefulBatchLogic
from typing_extensions import override

from chainwax.operators._shards import split, to_shards
from chainwax.operators.item import Batch, FailedItem, Item
from chainwax.router import ConfigError

__all__ = ["BatchOut", "batch"]


@dataclass(frozen=True)
class BatchOut:
    """Streams of the batch operator."""

    oks: Stream[Batch]
    """Batches of at most ``size`` items; none is empty."""

    errs: Stream[FailedItem]
    """Nothing goes wrong here: always empty, there so that all operators look alike."""


@operator
def batch(step_id: str, up: Stream[Any], *, size: int, seconds: float) -> BatchOut:
    """Put ``size`` items together, or as many as came within ``seconds`` of the first.

    A batch has no keys: items are put together as they come, and what is left at the end of the input
    is a batch too. A batch's ``window_id`` is the same after a resume. Raises :class:`ConfigError` for a
    size below 1 or a time that is not above 0.
    """
    if size < 1:
        raise ConfigError(f"batch '{step_id}': size must be at least 1, not {size}")
    if not seconds > 0:
        raise ConfigError(f"batch '{step_id}': seconds must be above 0, not {seconds}")
    longest = timedelta(seconds=seconds)
    keyed = to_shards("shard", up, 1)
    collected = op.stateful_batch("collect", keyed, lambda state: _Collect(step_id, size, longest, state))
    return BatchOut(split("oks", collected, Batch), split("errs", collected, FailedItem))


@dataclass
class _State:
    items: list[Item]
    number: int


class _Collect(StatefulBatchLogic[Item, Batch, _State]):
    def __init__(self, step_id: str, size: int, longest: timedelta, state: _State | None) -> None:
        self._step_id = step_id
        self._size = size
        self._longest = longest
        self._items = state.items if state else []
        self._number = state.number if state else 0
        self._due: datetime | None = datetime.now(UTC) + longest if self._items else None

    @override
    def on_batch(self, values: list[Item]) -> tuple[list[Batch], bool]:
        out: list[Batch] = []
        for value in values:
            if not self._items:
                self._due = datetime.now(UTC) + self._longest
            self._items.append(value)
            if len(self._items) >= self._size:
                out.append(self._close())
        return out, StatefulBatchLogic.RETAIN

    @override
    def on_notify(self) -> tuple[list[Batch], bool]:
        # A notification of a batch that has gone full meanwhile may still come.
        due = self._due is not None and datetime.now(UTC) >= self._due
        return ([self._close()] if due else []), StatefulBatchLogic.RETAIN

    @override
    def on_eof(self) -> tuple[list[Batch], bool]:
        return ([self._close()] if self._items else []), StatefulBatchLogic.RETAIN

    @override
    def notify_at(self) -> datetime | None:
        return self._due

    @override
    def snapshot(self) -> _State:
        return _State(list(self._items), self._number)

    def _close(self) -> Batch:
        items, self._items, self._due = self._items, [], None
        number, self._number = self._number, self._number + 1
        return Batch(items, f"{self._step_id}/{number}")
