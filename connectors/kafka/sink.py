"""A Kafka topic as a sink."""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition
from kafka import KafkaAdminClient, KafkaProducer
from kafka.admin import ConfigResource
from kafka.errors import KafkaError, MessageSizeTooLargeError
from kafka.partitioner.default import murmur2
from kafka.producer.future import FutureRecordMetadata
from typing_extensions import override

from chainwax.connectors.kafka.codecs import Codec, codec_of, make_ready
from chainwax.connectors.kafka.servers import KafkaServers, partitions_of, reason_of, shut
from chainwax.connectors.record import Outgoing
from chainwax.connectors.sinks import SinkError, to_json
from chainwax.router.errors import UnknownName

__all__ = ["CALLS_HEADER", "POSITION_HEADER", "KafkaSink"]

log = logging.getLogger(__name__)

CALLS_HEADER = "chainwax.calls"
"""The header that says what LLM calls a record owes its value to: JSON, ``[{"node", "call_id", "arm"}]``."""
POSITION_HEADER = "chainwax.position"
"""The header with the place in the source: the same in each run."""

LINGER_MS = 5
"""Records that come within so long of each other go out together."""
BATCH_BYTES = 128 * 1024
PENDING_RECORDS = 5000
PENDING_BYTES = 32 * 1024 * 1024
"""What one partition has under way before it waits; the library itself has no bound."""
DELIVERY_SECONDS = 120.0
"""How long a broker may be away before a record counts as undeliverable."""
SMALL_RECORD = 1_048_588
"""What a topic takes at most unless it says otherwise (``max.message.bytes``)."""
OVERHEAD = 512
"""Bytes that are kept free for the key and the position of a record."""
COMPRESSIONS = ("gzip", "snappy", "lz4", "zstd")


class _Partition(StatefulSinkPartition[Any, None]):
    def __init__(self, sink: KafkaSink, producer: KafkaProducer, number: int) -> None:
        self._sink = sink
        self._producer = producer
        self._number = number
        self._pending: deque[tuple[FutureRecordMetadata, int]] = deque()
        self._bytes = 0

    @override
    def write_batch(self, values: list[Any]) -> None:
        sink, number = self._sink, self._number
        for given in values:
            out = given if type(given) is Outgoing else Outgoing(given)
            raw = out.value if type(out.value) is bytes else sink.encoded(out.value)
            headers = _headers(out, sink.max_record_bytes - OVERHEAD - len(raw))
            key = out.key.encode("utf-8", "backslashreplace") if out.key else None
            try:
                future = self._producer.send(sink.topic, raw, key=key, headers=headers, partition=number)
            except (KafkaError, ValueError) as error:
                raise sink.refused(error, len(raw)) from error
            self._pending.append((future, len(raw)))
            self._bytes += len(raw)
        self._settle(all_of_it=False)

    def _settle(self, *, all_of_it: bool) -> None:
        """Look at what became of the oldest, and wait for them where too much is under way."""
        pending = self._pending
        while pending:
            future, size = pending[0]
            full = all_of_it or len(pending) > PENDING_RECORDS or self._bytes > PENDING_BYTES
            if not full and not future.is_done:
                return
            try:
                future.get(DELIVERY_SECONDS + 10)
            except KafkaError as error:
                raise self._sink.refused(error, size) from error
            pending.popleft()
            self._bytes -= size

    @override
    def snapshot(self) -> None:
        # The recovery store must never know of more than the broker has.
        self._settle(all_of_it=True)

    @override
    def close(self) -> None:
        # After the last snapshot nothing is under way. Where the flow has failed, an error here, while
        # Bytewax clears up, would end the process before anyone is told.
        self._sink.closed()


class KafkaSink(FixedPartitionedSink[Any, None]):
    """Writes to a topic: every record acknowledged by all replicas before its epoch is over.

    >>> KafkaSink("answers", servers="127.0.0.1:9092", compression="gzip")  # doctest: +SKIP

    Each partition of the topic is one of Bytewax; a key's place is the one that Kafka's own clients give it.
    After a crash and a resume, what was written since the last snapshot is written again. Under a
    compiled flow a record carries the item's key, and in its headers the item's position
    (``chainwax.position``) and the calls it comes from (``chainwax.calls``). Values that cannot be encoded,
    or are larger than ``max_record_bytes``, go to the flow's dead letters. ``max_record_bytes`` None asks
    the topic.

    Raises ConfigError where the cluster does not answer or lacks the topic, SinkError with the topic and the
    reason where a record is not taken.
    """

    takes_items = True

    def __init__(
        self,
        topic: str,
        *,
        servers: str | KafkaServers | None = None,
        codec: str | Codec = "json",
        compression: str | None = None,
        max_record_bytes: int | None = None,
    ) -> None:
        if compression is not None and compression not in COMPRESSIONS:
            raise UnknownName("compression", compression, COMPRESSIONS)
        self.topic = topic
        self._codec = codec_of(codec)
        self._compression = compression
        self._servers = servers if isinstance(servers, KafkaServers) else KafkaServers(servers)
        with self._servers.admin() as admin:
            self._count = partitions_of(admin, [topic], self._servers)[topic][1]
            self.max_record_bytes = max_record_bytes or _most_bytes(admin, topic)
        make_ready(self._codec, [topic], writing=True)
        self._producer: KafkaProducer | None = None
        self._open = 0
        self._lock = threading.Lock()

    def encode(self, value: Any) -> bytes:
        """A value's bytes. Raises TypeError, ValueError or SinkError where it cannot be written."""
        raw = self._codec.encode(value, self.topic)
        if len(raw) > self.max_record_bytes - OVERHEAD:
            raise SinkError(
                f"the record is too large: {len(raw)} bytes; topic '{self.topic}' takes at most "
                f"{self.max_record_bytes} (max.message.bytes)"
            )
        return raw

    def encoded(self, value: Any) -> bytes:
        """A value's bytes, or those of what stands in its place: for what has no dead letters behind it."""
        try:
            return self.encode(value)
        except (TypeError, ValueError, SinkError) as error:
            log.warning("topic '%s': a value cannot be written: %s", self.topic, error)
            return to_json(_shortened(value) | {"unwritable": str(error)}).encode()

    @override
    def list_parts(self) -> list[str]:
        # Bytewax sorts them: with zeros in front, the n-th is partition n.
        return [f"{self.topic}:{number:06}" for number in range(self._count)]

    @override
    def part_fn(self, item_key: str) -> int:
        return int(murmur2(item_key.encode("utf-8", "backslashreplace"))) & 0x7FFFFFFF

    @override
    def build_part(self, step_id: str, for_part: str, resume_state: None) -> _Partition:
        with self._lock:
            if self._producer is None:
                self._producer = self._connected()
            self._open += 1
            return _Partition(self, self._producer, int(for_part.rpartition(":")[2]))

    def _connected(self) -> KafkaProducer:
        producer: KafkaProducer = self._servers.connected(
            KafkaProducer,
            metrics_enabled=False,
            acks="all",
            enable_idempotence=True,
            compression_type=self._compression,
            linger_ms=LINGER_MS,
            batch_size=min(BATCH_BYTES, self.max_record_bytes),
            max_request_size=self.max_record_bytes,
            delivery_timeout_ms=int(DELIVERY_SECONDS * 1000),
            allow_auto_create_topics=False,
        )
        return producer

    def closed(self) -> None:
        """A partition is written no more; the producer ends with the last."""
        with self._lock:
            self._open -= 1
            if self._open == 0 and self._producer is not None:
                shut(self._producer, timeout=5)
                self._producer = None

    def refused(self, error: Exception, size: int) -> SinkError:
        """What to say of a record that was not taken."""
        why = reason_of(error)
        if isinstance(error, MessageSizeTooLargeError):
            why = f"the record is too large (max.message.bytes): {why}"
        return SinkError(f"topic '{self.topic}' did not take a record of {size} bytes: {why}")


def _headers(out: Outgoing, room: int) -> list[tuple[str, bytes]]:
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


def _shortened(value: Any) -> dict[str, Any]:
    """What of a value is small, and the beginning of what is not."""
    if not isinstance(value, Mapping):
        return {"value": repr(value)[:1000]}
    short: dict[str, Any] = {}
    for name, field in list(value.items())[:50]:
        try:
            small = len(to_json(field)) <= 1000
        except TypeError:
            small = False
        short[str(name)[:100]] = field if small else repr(field)[:1000]
    return short


def _most_bytes(admin: KafkaAdminClient, topic: str) -> int:
    """The topic's ``max.message.bytes``; the usual one where one may not ask."""
    name = "max.message.bytes"
    try:
        found = admin.describe_configs([ConfigResource("TOPIC", topic, [name])], config_filter="all")
        return int(found["topic"][topic][name]["value"])
    except (KafkaError, KeyError, TypeError, ValueError) as error:
        log.debug("topic '%s' does not tell its %s: %s", topic, name, error)
        return SMALL_RECORD
