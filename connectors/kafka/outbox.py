"""What goes into one partition of a topic: records with their headers, and what became of them."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable
from hashlib import blake2b

from kafka import KafkaProducer
from kafka.errors import KafkaError
from kafka.producer.future import FutureRecordMetadata

from chainwax.connectors.record import Outgoing

__all__ = [
    "CALLS_HEADER",
    "DELIVERY_SECONDS",
    "ID_HEADER",
    "OVERHEAD",
    "POSITION_HEADER",
    "Outbox",
    "headers_of",
    "id_of",
    "stamp_of",
]

log = logging.getLogger(__name__)

CALLS_HEADER = "chainwax.calls"
"""The header that says what LLM calls a record owes its value to: JSON, ``[{"node", "call_id", "arm"}]``."""
POSITION_HEADER = "chainwax.position"
"""The header with the place in the source: the same in each run."""
ID_HEADER = "chainwax.id"
"""The header with the id of an output, 32 hexadecimal digits; see `id_of`."""

PENDING_RECORDS = 5000
PENDING_BYTES = 32 * 1024 * 1024
"""What one partition has under way before it waits; the library itself has no bound."""
DELIVERY_SECONDS = 120.0
"""How long a broker may be away before a record counts as undeliverable."""
OVERHEAD = 512
"""Bytes that are kept free for the key and the position of a record."""
AHEAD_SECONDS = 60.0
"""Brokers refuse records from the future, an hour and more unless told otherwise: those get the time now."""
BEHIND_SECONDS = 86_400.0
"""A broker deletes records by their time stamps, after a week unless told otherwise: what a replay writes of
an older past would be gone before anybody reads it. Such records get the time now too."""


class Outbox:
    """Sends to one partition. ``refused`` makes what is raised of an error and a record's size in bytes."""

    def __init__(
        self,
        producer: KafkaProducer,
        topic: str,
        number: int,
        refused: Callable[[Exception, int], Exception],
    ) -> None:
        self._producer = producer
        self._topic = topic
        self._number = number
        self._refused = refused
        self._pending: deque[tuple[FutureRecordMetadata, int]] = deque()
        self._bytes = 0
        self.first: int | None = None
        """The offset of the first record that was seen to arrive …"""
        self.next = 0
        """… and the one behind the last."""

    def send(self, out: Outgoing, raw: bytes, headers: list[tuple[str, bytes]]) -> None:
        """Send a record; what became of it is seen later, by `settle`."""
        try:
            future = self._producer.send(
                self._topic,
                raw,
                key=out.key.encode("utf-8", "backslashreplace") if out.key else None,
                headers=headers,
                partition=self._number,
                timestamp_ms=stamp_of(out.time),
            )
        except (KafkaError, ValueError) as error:
            raise self._refused(error, len(raw)) from error
        self._pending.append((future, len(raw)))
        self._bytes += len(raw)

    def settle(self, *, all_of_it: bool) -> None:
        """Look at what became of the oldest, and wait for them where too much is under way.

        With ``all_of_it`` nothing is under way afterwards.
        """
        pending = self._pending
        while pending:
            future, size = pending[0]
            full = all_of_it or len(pending) > PENDING_RECORDS or self._bytes > PENDING_BYTES
            if not full and not future.is_done:
                return
            try:
                offset = future.get(DELIVERY_SECONDS + 10).offset
            except KafkaError as error:
                raise self._refused(error, size) from error
            pending.popleft()
            self._bytes -= size
            self.next = offset + 1
            if self.first is None:
                self.first = offset


def headers_of(out: Outgoing, room: int) -> list[tuple[str, bytes]]:
    """A record's headers. Where its calls need more than ``room`` bytes they are left out, which is told."""
    headers = []
    if out.position:
        headers.append((POSITION_HEADER, out.position[: OVERHEAD // 4].encode("utf-8", "backslashreplace")))
    if out.calls:
        calls = [{"node": ref.node, "call_id": ref.call_id, "arm": ref.arm} for ref in out.calls]
        raw = json.dumps(calls).encode()
        if len(raw) <= room:
            headers.append((CALLS_HEADER, raw))
        else:
            log.warning("%s: %d calls do not fit into the record's headers", out.position, len(calls))
    return headers


def id_of(out: Outgoing, raw: bytes, stamp: str, *, by_value: bool) -> str:
    """The id of an output: the same whenever a run makes it again.

    It says where the output comes from and not what it is: the run and the sink (``stamp``), the item's
    position and key, and the LLM nodes that it went through. So it stays the same where a value does not,
    because a function looked at the clock. Two outputs that have all this in common are made in the same
    epoch, and there counting them is enough, but for those that wait for different things: pieces of a
    streamed answer, an item that came both through a window and past it. For these, and where there is no
    position, it says what the value is too (``by_value``).
    """
    named = json.dumps([out.position, out.key, *(ref.node for ref in out.calls)]).encode()
    if by_value or not out.position:
        named += raw
    return stamp + blake2b(named, digest_size=12).hexdigest()


def stamp_of(seconds: float | None) -> int | None:
    """Event time in milliseconds, where a broker takes it; with None the producer takes the time now."""
    now = time.time()
    if seconds is None or not now - BEHIND_SECONDS <= seconds <= now + AHEAD_SECONDS:
        return None
    return int(seconds * 1000)
