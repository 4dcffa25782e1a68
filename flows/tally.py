"""Counting what a run reads and what fails, while it runs and at next to no cost."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from bytewax.inputs import FixedPartitionedSource, Source, StatefulSourcePartition
from bytewax.outputs import (
    DynamicSink,
    FixedPartitionedSink,
    Sink,
    StatefulSinkPartition,
    StatelessSinkPartition,
)
from typing_extensions import override

from chainwax.connectors import Outgoing

__all__ = ["Tally", "counted_letters", "counted_source"]


@dataclass(slots=True)
class Tally:
    """What was counted. With several workers a number may be off by what two count at the same instant."""

    items: int = 0
    """Records that the sources emitted, unreadable ones included."""
    letters: int = 0
    """Dead letters."""
    first: dict[str, Any] | None = None
    """The first of them."""

    def failed(self, letters: list[Any]) -> None:
        """Count dead letters."""
        if letters and self.first is None:
            self.first = letters[0]
        self.letters += len(letters)


class _SourcePartition(StatefulSourcePartition[Any, Any]):
    def __init__(self, inner: StatefulSourcePartition[Any, Any], tally: Tally) -> None:
        self._inner = inner
        self._tally = tally

    @override
    def next_batch(self) -> Any:
        batch = self._inner.next_batch()
        if not isinstance(batch, list):
            batch = list(batch)
        self._tally.items += len(batch)
        return batch

    @override
    def next_awake(self) -> datetime | None:
        return self._inner.next_awake()

    @override
    def snapshot(self) -> Any:
        return self._inner.snapshot()

    @override
    def close(self) -> None:
        self._inner.close()


class _Source(FixedPartitionedSource[Any, Any]):
    def __init__(self, inner: FixedPartitionedSource[Any, Any], tally: Tally) -> None:
        self._inner = inner
        self._tally = tally

    @override
    def list_parts(self) -> list[str]:
        return self._inner.list_parts()

    @override
    def build_part(self, step_id: str, for_part: str, resume_state: Any) -> _SourcePartition:
        return _SourcePartition(self._inner.build_part(step_id, for_part, resume_state), self._tally)


class _Letters(StatelessSinkPartition[Any]):
    def __init__(self, tally: Tally, inner: StatelessSinkPartition[Any] | None) -> None:
        self._tally = tally
        self._inner = inner

    @override
    def write_batch(self, items: list[Any]) -> None:
        self._tally.failed(items)
        if self._inner is not None:
            self._inner.write_batch(items)

    @override
    def close(self) -> None:
        if self._inner is not None:
            self._inner.close()


class _LettersSink(DynamicSink[Any]):
    def __init__(self, tally: Tally, inner: DynamicSink[Any] | None) -> None:
        self._tally = tally
        self._inner = inner

    @override
    def build(self, step_id: str, worker_index: int, worker_count: int) -> _Letters:
        inner = self._inner.build(step_id, worker_index, worker_count) if self._inner else None
        return _Letters(self._tally, inner)


class _KeyedLetters(StatefulSinkPartition[Any, Any]):
    def __init__(self, tally: Tally, inner: StatefulSinkPartition[Any, Any]) -> None:
        self._tally = tally
        self._inner = inner

    @override
    def write_batch(self, values: list[Any]) -> None:
        self._tally.failed([value.value if type(value) is Outgoing else value for value in values])
        self._inner.write_batch(values)

    @override
    def snapshot(self) -> Any:
        return self._inner.snapshot()

    @override
    def close(self) -> None:
        self._inner.close()


class _KeyedLettersSink(FixedPartitionedSink[Any, Any]):
    def __init__(self, tally: Tally, inner: FixedPartitionedSink[Any, Any]) -> None:
        self._tally = tally
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        # What a compiled flow asks of a sink, such as whether it takes whole items.
        return getattr(self._inner, name)

    @override
    def list_parts(self) -> list[str]:
        return self._inner.list_parts()

    @override
    def part_fn(self, item_key: str) -> int:
        return self._inner.part_fn(item_key)

    @override
    def build_part(self, step_id: str, for_part: str, resume_state: Any) -> _KeyedLetters:
        return _KeyedLetters(self._tally, self._inner.build_part(step_id, for_part, resume_state))


def counted_source(source: Source[Any], tally: Tally) -> Source[Any]:
    """The source, counted; one that has no partitions is left as it is."""
    return _Source(source, tally) if isinstance(source, FixedPartitionedSource) else source


def counted_letters(sink: Sink[Any] | None, tally: Tally) -> Sink[Any]:
    """The sink of the dead letters, counted; with None they are counted only."""
    if isinstance(sink, FixedPartitionedSink):
        return _KeyedLettersSink(tally, sink)
    if sink is None or isinstance(sink, DynamicSink):
        return _LettersSink(tally, sink)
    return sink
