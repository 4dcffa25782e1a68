"""Where an item goes: operators that wait for models are keyed by shard, not by item.

Bytewax scans the timers of all keys of a stateful step at each activation, so its keys must be few. An
item's own key decides its shard, so that order is kept for each key.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import bytewax.operators as op
from bytewax.dataflow import Stream
from bytewax.operators import KeyedStream

from chainwax.operators.item import Batch, Item

__all__ = ["SHARDS", "shards_for", "to_shards"]

SHARDS = 4
"""Shards of a step. Changing it between a crash and a resume keeps all items, but not their order."""

# Bytewax gives a key to the worker that its hash says, and names in a row may all go to one. Of these the
# n-th goes to worker n of 24, and so each run of them is spread evenly over any number that divides it.
_NAMES = tuple(
    f"shard-{n}"
    for n in (
        *(126, 82, 221, 471, 37, 60, 107, 506, 8, 388, 216, 263),
        *(502, 42, 16, 296, 564, 829, 285, 160, 552, 539, 59, 504),
    )
)


def shards_for(workers: int) -> int:
    """How many shards keep so many workers equally busy: a worker looks at each of its own all the time.

    >>> shards_for(1), shards_for(3), shards_for(8)
    (4, 12, 24)
    """
    if workers == 1:
        return SHARDS
    return 12 if workers <= 4 else len(_NAMES)


def to_shards(step_id: str, up: Stream[Any], shards: int) -> KeyedStream[Any]:
    """Key a stream by shard; what is neither an item nor a batch becomes an item."""
    names = _NAMES[:shards]

    def key_all(batch: list[Any]) -> list[tuple[str, Any]]:
        return [
            (names[zlib.crc32(x.key.encode("utf-8", "surrogatepass")) % shards], x) for x in map(_item, batch)
        ]

    one = names[0]

    def key_one(batch: list[Any]) -> list[tuple[str, Any]]:
        return [(one, _item(x)) for x in batch]

    return op.flat_map_batch(step_id, up, key_one if shards == 1 else key_all)


def _item(value: Any) -> Item | Batch:
    if type(value) is Item or type(value) is Batch:
        return value
    # A foreign stream: (key, value) pairs keep their key. Positions are given by the step, in order.
    if type(value) is tuple and len(value) == 2 and type(value[0]) is str:
        return Item(value[1], value[0])
    return Item(value)


def split(step_id: str, up: KeyedStream[Any], kind: type | tuple[type, ...]) -> Stream[Any]:
    """The values of one kind, without their shard."""
    pick: Callable[[list[tuple[str, Any]]], list[Any]] = lambda batch: [  # noqa: E731
        value for _, value in batch if isinstance(value, kind)
    ]
    return op.flat_map_batch(step_id, up, pick)
