"""What every source of this room emits, what sinks may get, and the switch that stops all sources."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from chainwax.router.errors import ChainwaxError
from chainwax.router.types import CallRef

__all__ = ["AnyRecord", "BadRecord", "Outgoing", "Record", "SourceError", "StopSwitch"]

RAW_CHARS = 1000
"""How much of something unreadable a `BadRecord` keeps."""


@dataclass(slots=True)
class Record:
    """One thing that was read.

    >>> Record({"text": "hello"}, key="a", position="tickets.jsonl:1").position
    'tickets.jsonl:1'
    """

    value: Any
    key: str = ""
    """What it is about; empty where the source has no key."""
    position: str = ""
    """The source's own name of the place: file and line, partition and offset."""
    time: float | None = None
    """Event time: seconds since 1970, UTC."""


@dataclass(slots=True)
class BadRecord:
    """A place in a source that could not be read: it goes to the dead letters, the stream goes on."""

    position: str
    raw: str
    """What stood there, at most its first 1000 characters."""
    error: str
    """What is wrong with it."""

    @classmethod
    def of(cls, position: str, raw: bytes | str, error: str) -> BadRecord:
        """Shorten ``raw``, and spell out the bytes in it that are not text."""
        # Cut before decoding: 4 bytes are the most that one character takes.
        text = raw[: 4 * RAW_CHARS]
        data = text.encode("utf-8", "backslashreplace") if isinstance(text, str) else text
        return cls(position, data.decode("utf-8", "backslashreplace")[:RAW_CHARS], error)


AnyRecord = Record | BadRecord
"""What a source emits."""


@dataclass(slots=True)
class Outgoing:
    """What a sink with ``takes_items = True`` gets of a compiled flow: a value with its key and lineage."""

    value: Any
    key: str = ""
    position: str = ""
    """The place in the source that it came from."""
    calls: tuple[CallRef, ...] = ()
    """The LLM calls that it owes its value to, oldest first."""
    time: float | None = None
    """Event time: seconds since 1970, UTC."""


class SourceError(ChainwaxError):
    """A source cannot go on: its stream is gone, or what comes next was deleted before it was read."""


class StopSwitch(threading.Event):
    """Set once, it makes every source that was given it end as if its stream were over.

    The flow then drains: what is under way is finished and the last snapshot is taken, so that a
    resume goes on after the last record that was emitted.
    """
