r"""Bytewax operators that ask LLMs, usable alone on any Bytewax stream.

>>> import chainwax.operators as lop

Each takes a step id and a stream, and returns a dataclass of streams: ``oks`` and ``errs``. What flows
between them are :class:`Item`\ s; a stream of anything else is taken too, and :func:`unwrap` gives plain
values back.
"""

from __future__ import annotations

import bytewax.operators as _op
from bytewax.dataflow import Stream as _Stream

from chainwax.operators.batch import BatchOut, batch
from chainwax.operators.feedback import FeedbackOut, Score, feedback
from chainwax.operators.item import Batch, FailedItem, Item
from chainwax.operators.llm import LLMOut, choose, extract, llm_node, query

__all__ = [
    "Batch",
    "BatchOut",
    "FailedItem",
    "FeedbackOut",
    "Item",
    "LLMOut",
    "Score",
    "batch",
    "choose",
    "extract",
    "feedback",
    "llm_node",
    "query",
    "unwrap",
]


def unwrap(step_id: str, up: _Stream[Item]) -> _Stream[object]:
    """The items' values alone."""
    return _op.flat_map_batch(step_id, up, lambda batch: [item.value for item in batch])
