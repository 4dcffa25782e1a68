"""What the steps of a compiled flow do. Each takes all that Bytewax hands over at once."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from bytewax.inputs import FixedPartitionedSource, Source, StatefulSourcePartition
from bytewax.operators import StatefulBatchLogic
from bytewax.outputs import DynamicSink, StatelessSinkPartition
from typing_extensions import override

from chainwax.connectors.record import BadRecord, Outgoing, Record
from chainwax.connectors.sinks import to_json
from chainwax.operators.item import Batch, FailedItem, Item
from chainwax.operators.pressure import Pressure
from chainwax.router.credit import failure
from chainwax.router.errors import BackendError
from chainwax.router.manager import LLMManager
from chainwax.router.recording.rows import DeadLetter

__all__ = [
    "Letters",
    "LogSink",
    "Reader",
    "StatefulMap",
    "Work",
    "branch_each",
    "by_key",
    "dead_letter",
    "failures_of",
    "filter_each",
    "flat_map_each",
    "held_back",
    "is_ok",
    "key_each",
    "keyed_values",
    "late_letters",
    "map_each",
    "of_stream",
    "outgoing",
    "pick",
    "plain_values",
    "tagged",
    "unpacked",
    "without_key",
]

_log = logging.getLogger(__name__)

_BLAMELESS = frozenset(
    {
        "Late",
        "BudgetSpent",
        "Cancelled",
        "NoModelAllowed",
        *(c.__name__ for c in BackendError.__subclasses__()),
    }
)
"""Errors that have nothing to do with the answers before."""

Some = Item | Batch
Work = Callable[[list[Some]], list[Any]]
"""From what Bytewax hands over to what goes on, with a FailedItem in place of what failed."""


def is_ok(value: Item | Batch | FailedItem) -> bool:
    """Whether a step did not fail on it."""
    return type(value) is not FailedItem


def _failures(some: Some, node_id: str, error: Exception) -> list[FailedItem]:
    # Of a batch each item fails, so that none is lost.
    if not isinstance(some, Batch):
        return [FailedItem.of(some, node_id, error)]
    items = [replace(item, window_id=some.window_id) for item in some.items]
    return [FailedItem.of(item, node_id, error) for item in items]


def _became(some: Some, value: Any) -> Item:
    return some.joined(value) if isinstance(some, Batch) else some.with_value(value)


def held_back(source: Source[Any], pressure: Pressure) -> Source[Any]:
    """The same source, which reads nothing while an LLM step cannot submit what it has."""
    if isinstance(source, FixedPartitionedSource):
        return _HeldBack(source, pressure)
    return source  # one without a state: the LLM steps' own bound holds it


class _HeldBack(FixedPartitionedSource[Any, Any]):
    def __init__(self, source: FixedPartitionedSource[Any, Any], pressure: Pressure) -> None:
        self._source = source
        self._pressure = pressure

    @override
    def list_parts(self) -> list[str]:
        return self._source.list_parts()

    @override
    def build_part(self, step_id: str, for_part: str, resume_state: Any) -> _HeldBackPart:
        return _HeldBackPart(self._source.build_part(step_id, for_part, resume_state), self._pressure)


class _HeldBackPart(StatefulSourcePartition[Any, Any]):
    def __init__(self, part: StatefulSourcePartition[Any, Any], pressure: Pressure) -> None:
        self._part = part
        self._pressure = pressure
        self._held = False

    @override
    def next_batch(self) -> Iterable[Any]:
        self._held = self._pressure.high()
        return () if self._held else self._part.next_batch()

    @override
    def next_awake(self) -> datetime | None:
        # An empty batch makes Bytewax wait a millisecond by itself.
        return None if self._held else self._part.next_awake()

    @override
    def snapshot(self) -> Any:
        return self._part.snapshot()

    @override
    def close(self) -> None:
        self._part.close()


class Reader:
    """Makes items of what a source emits, and records them where there is a recording."""

    def __init__(self, node_id: str, manager: LLMManager | None) -> None:
        self._id = node_id
        self._manager = manager

    def __call__(self, values: list[Any]) -> list[Item | FailedItem]:
        """Items, and failures in place of what the source could not read."""
        out = [self._item(value) for value in values]
        if self._manager is not None and self._manager.settings.run.record_items:
            self._manager.recording.items(
                self._id, [(x.position, x.key, x.time, x.value) for x in out if type(x) is Item]
            )
        return out

    def _item(self, value: Any) -> Item | FailedItem:
        if type(value) is Record:
            return Item(value.value, value.key, value.position, value.time)
        if type(value) is BadRecord:
            return FailedItem(Item(value.raw, "", value.position), self._id, "BadRecord", value.error)
        if type(value) is Item:
            return value
        return Item(value, "", f"{self._id}:{_content_hash(value)}")


def _content_hash(value: Any) -> str:
    """A name for a value from a source that gives it no place: the same in each run."""
    try:
        text = json.dumps(value, sort_keys=True, default=repr).encode()
    except Exception:  # a value's own code runs in here and may raise anything
        text = _shown(value).encode("utf-8", "replace")
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def map_each(node_id: str, fn: Callable[[Any], Any]) -> Work:
    """One value for each."""

    def work(batch: list[Some]) -> list[Any]:
        out: list[Any] = []
        for some in batch:
            try:
                out.append(_became(some, fn(some.value)))
            except Exception as error:
                out += _failures(some, node_id, error)
        return out

    return work


def filter_each(node_id: str, fn: Callable[[Any], object]) -> Work:
    """What the function says yes to."""

    def work(batch: list[Some]) -> list[Any]:
        out: list[Any] = []
        for some in batch:
            try:
                if fn(some.value):
                    out.append(some)
            except Exception as error:
                out += _failures(some, node_id, error)
        return out

    return work


def flat_map_each(node_id: str, fn: Callable[[Any], Iterable[Any]]) -> Work:
    """Several values for each; a batch's are parts of its joined item."""

    def work(batch: list[Some]) -> list[Any]:
        out: list[Any] = []
        for some in batch:
            try:
                values = fn(some.value)
                if isinstance(values, str | bytes | Mapping):  # these can be iterated, and nobody means it
                    raise TypeError(
                        f"flat_map needs several values, not one {type(values).__name__}: put it in a list"
                    )
                # All before any: where the function fails half-way, the item fails as a whole.
                values = list(values)
            except Exception as error:
                out += _failures(some, node_id, error)
                continue
            whole = _became(some, None)
            out += [whole.part(value, number) for number, value in enumerate(values)]
        return out

    return work


def key_each(node_id: str, fn: Callable[[Any], str | int]) -> Work:
    """The same with another key."""

    def work(batch: list[Some]) -> list[Any]:
        out: list[Any] = []
        for some in batch:
            try:
                key = fn(some.value)
                if type(key) is int:
                    key = str(key)
                if type(key) is not str:
                    raise TypeError(f"a key must be a text or a whole number, not {type(key).__name__}")
            except Exception as error:
                out += _failures(some, node_id, error)
                continue
            if isinstance(some, Batch):
                out.append(Batch(some.items, some.window_id, key, some.opened, some.closed))
            else:
                out.append(Item(some.value, key, some.position, some.time, some.calls, some.window_id))
        return out

    return work


def branch_each(node_id: str, fn: Callable[[Any], object]) -> Callable[[list[Some]], list[tuple[str, Any]]]:
    """Each with its side: ``yes``, ``no`` or ``failed``."""

    def work(batch: list[Some]) -> list[tuple[str, Any]]:
        out: list[tuple[str, Any]] = []
        for some in batch:
            try:
                out.append(("yes" if fn(some.value) else "no", some))
            except Exception as error:
                out += [("failed", failed) for failed in _failures(some, node_id, error)]
        return out

    return work


def pick(name: str) -> Callable[[list[tuple[str, Any]]], list[Any]]:
    """Those of one side."""
    return lambda pairs: [some for side, some in pairs if side == name]


def by_key(batch: list[Some]) -> list[tuple[str, Some]]:
    """Pairs for a keyed step; those without a key are together."""
    return [(some.key or "_", some) for some in batch]


def without_key(pairs: list[tuple[str, Any]]) -> list[Any]:
    """What a keyed step gives, without its keys."""
    return [value for _, value in pairs]


class StatefulMap(StatefulBatchLogic[Some, Any, Any]):
    """One key's state. It stays as it was where the function fails."""

    def __init__(self, node_id: str, fn: Callable[[Any, Any], tuple[Any, Any]], state: Any) -> None:
        self._id = node_id
        self._fn = fn
        self._state = state

    def on_batch(self, values: list[Some]) -> tuple[list[Any], bool]:
        """Call the function for each in turn."""
        out: list[Any] = []
        for some in values:
            try:
                answer = self._fn(self._state, some.value)
                if type(answer) is not tuple or len(answer) != 2:
                    raise TypeError(f"stateful_map needs (state, value), not {type(answer).__name__}")
            except Exception as error:
                out += _failures(some, self._id, error)
                continue
            self._state = answer[0]
            out.append(_became(some, answer[1]))
        return out, StatefulBatchLogic.RETAIN

    def snapshot(self) -> Any:
        """The state itself: functions replace it and do not change it."""
        return self._state


def tagged(stream: str | None) -> Callable[[list[Item]], list[tuple[str, Item]]]:
    """Items with the name of their stream; with None their values are such pairs already."""
    if stream is None:
        return lambda batch: [(item.value[0], item.with_value(item.value[1])) for item in batch]
    return lambda batch: [(stream, item) for item in batch]


def of_stream(name: str, *, alone: bool) -> Callable[[list[Any]], list[Item]]:
    """The items of one stream, of pairs with failures between them; ``alone`` where it is the only one."""
    if alone:
        return lambda batch: [
            out[1] if type(out) is tuple else out for out in batch if type(out) is not FailedItem
        ]
    return lambda batch: [out[1] for out in batch if type(out) is tuple and out[0] == name]


def failures_of(batch: list[Any]) -> list[FailedItem]:
    """The failures between pairs."""
    return [out for out in batch if type(out) is FailedItem]


def unpacked(batches: list[Batch]) -> list[Item]:
    """The items of batches."""
    return [
        Item(item.value, item.key, item.position, item.time, item.calls, batch.window_id)
        for batch in batches
        for item in batch.items
    ]


def late_letters(node_id: str) -> Callable[[list[Item]], list[FailedItem]]:
    """Late items as failures, for a window whose late stream nobody takes."""
    return lambda items: [
        FailedItem(item, node_id, "Late", "the item came after its window was closed") for item in items
    ]


def plain_values(batch: list[Some]) -> list[Any]:
    """Values for a sink."""
    return [some.value for some in batch]


def keyed_values(batch: list[Some]) -> list[tuple[str, Any]]:
    """Keys and values for a partitioned sink."""
    return [(some.key, some.value) for some in batch]


def outgoing(batch: list[Some]) -> list[tuple[str, Outgoing]]:
    """Keys and whole items for a partitioned sink; those without a key are spread by their position."""
    return [
        (item.key or item.position, Outgoing(item.value, item.key, item.position, item.calls, item.time))
        for item in (some.joined(some.value) if isinstance(some, Batch) else some for some in batch)
    ]


def _jsonable(value: Any) -> Any:
    """The value itself where JSON can hold it, else the beginning of what it looks like."""
    try:
        to_json(value)
    except TypeError:
        return _shown(value)[:1000]
    return value


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except Exception:
        return f"<{type(value).__name__}>"


def dead_letter(failed: FailedItem) -> dict[str, Any]:
    """What the dead letters hold of an item: plain values, whatever the item was."""
    item = failed.item
    return {
        "node": failed.node,
        "error": failed.error,
        "message": failed.message,
        "attempts": len(failed.attempts),
        "key": item.key,
        "position": item.position,
        "time": item.time,
        "item": _jsonable(item.value),
    }


class Letters:
    """Makes dead letters of failures, and records them where there is a recording.

    The calls that a failed item owes its value to hear of it.
    """

    def __init__(self, manager: LLMManager | None) -> None:
        self._manager = manager

    def __call__(self, failures: list[FailedItem]) -> list[Item]:
        """Dead letters in place of the items' values."""
        if self._manager is not None and self._manager.recording is not None:
            self._manager.recording.dead_letters(
                [
                    DeadLetter(
                        f.node,
                        f.item.value,
                        f.error,
                        f.message,
                        f.item.key,
                        f.item.position,
                        f.attempts,
                        item_time=f.item.time,
                        window_id=f.item.window_id,
                        parents=f.item.calls,
                    )
                    for f in failures
                ]
            )
            self._manager.feedback(
                [
                    failure(f.item.calls, f.node, item_key=f.item.key, time=time.time())
                    for f in failures
                    if f.item.calls and f.error not in _BLAMELESS
                ]
            )
        return [failed.item.with_value(dead_letter(failed)) for failed in failures]


class _LogPartition(StatelessSinkPartition[dict[str, Any]]):
    def write_batch(self, items: list[dict[str, Any]]) -> None:
        for letter in items:
            _log.warning("node '%s' failed at %s: %s", letter["node"], letter["position"], letter["error"])


class LogSink(DynamicSink[dict[str, Any]]):
    """Where dead letters go when nobody takes them. Not their content, which may be private."""

    def build(self, step_id: str, worker_index: int, worker_count: int) -> _LogPartition:
        """One for each worker."""
        return _LogPartition()
