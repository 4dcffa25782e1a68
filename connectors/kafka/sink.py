"""A Kafka topic as a sink."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition
from kafka import KafkaAdminClient, KafkaProducer
from kafka.admin import ConfigResource
from kafka.errors import KafkaError, MessageSizeTooLargeError
from kafka.partitioner.default import murmur2
from typing_extensions import override

from chainwax.connectors.kafka.codecs import Codec, codec_of, make_ready
from chainwax.connectors.kafka.outbox import DELIVERY_SECONDS, OVERHEAD, Outbox, headers_of
from chainwax.connectors.kafka.servers import KafkaServers, end, partitions_of, reason_of
from chainwax.connectors.kafka.transactions import Place, TransactionalPartition
from chainwax.connectors.record import Outgoing
from chainwax.connectors.sinks import SinkError, to_json
from chainwax.router.errors import ConfigError, UnknownName

__all__ = ["KafkaSink"]

log = logging.getLogger(__name__)

LINGER_MS = 5
"""Records that come within so long of each other go out together."""
BATCH_BYTES = 128 * 1024
SMALL_RECORD = 1_048_588
"""What a topic takes at most unless it says otherwise (``max.message.bytes``)."""
COMPRESSIONS = ("gzip", "snappy", "lz4", "zstd")


class _Partition(StatefulSinkPartition[Any, None]):
    def __init__(self, sink: KafkaSink, producer: KafkaProducer, number: int) -> None:
        self._sink = sink
        self._outbox = Outbox(producer, sink.topic, number, sink.refused)

    @override
    def write_batch(self, values: list[Any]) -> None:
        sink = self._sink
        for given in values:
            out = given if type(given) is Outgoing else Outgoing(given)
            raw = out.value if type(out.value) is bytes else sink.encoded(out.value)
            self._outbox.send(out, raw, headers_of(out, sink.max_record_bytes - OVERHEAD - len(raw)))
        self._outbox.settle(all_of_it=False)

    @override
    def snapshot(self) -> None:
        # The recovery store must never know of more than the broker has.
        self._outbox.settle(all_of_it=True)

    @override
    def close(self) -> None:
        # After the last snapshot nothing is under way. Where the flow has failed, an error here, while
        # Bytewax clears up, would end the process before anyone is told.
        self._sink.closed(self)


class KafkaSink(FixedPartitionedSink[Any, Any]):
    """Writes to a topic: every record acknowledged by all replicas before its epoch is over.

    >>> KafkaSink("answers", servers="127.0.0.1:9092", compression="gzip")  # doctest: +SKIP

    Each partition of the topic is one of Bytewax; a key's place is the one that Kafka's own clients give it.
    After a crash and a resume, what was written since the last snapshot is written again. Under a
    compiled flow a record carries the item's key and time, and in its headers the item's position
    (``chainwax.position``) and the calls it comes from (``chainwax.calls``). Values that cannot be encoded,
    or are larger than ``max_record_bytes``, go to the flow's dead letters. ``max_record_bytes`` None asks
    the topic.

    With a ``transactional_id`` each epoch is a transaction, and each output is written once, also through a
    crash and a resume: a consumer that reads what is committed sees each ``chainwax.id`` (a header) once.
    The ids of the transactions begin with it; it belongs to one run at a time. ``run`` is an id that
    a resume keeps and a new start does not; a flow that is compiled with a manager brings that of its run.

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
        transactional_id: str | None = None,
        run: str | None = None,
    ) -> None:
        if compression is not None and compression not in COMPRESSIONS:
            raise UnknownName("compression", compression, COMPRESSIONS)
        self.topic = topic
        self.transactional_id = transactional_id
        self.by_value = False
        """Whether an output's id says what it is too; see `chainwax.connectors.kafka.outbox.id_of`."""
        self._codec = codec_of(codec)
        self._compression = compression
        self._run: Callable[[], str] | None = None if run is None else lambda: run
        self.servers = servers if isinstance(servers, KafkaServers) else KafkaServers(servers)
        with self.servers.admin() as admin:
            self.partitions = partitions_of(admin, [topic], self.servers)[topic][1]
            self.max_record_bytes = max_record_bytes or _most_bytes(admin, topic)
        make_ready(self._codec, [topic], writing=True)
        self._producer: KafkaProducer | None = None
        self._parts: dict[_Partition | TransactionalPartition, tuple[int, str]] = {}
        self._lock = threading.Lock()

    def belongs_to(self, run: Callable[[], str], *, by_value: bool) -> None:
        """Told by a flow that is compiled: what gives its run's id, and what its outputs' ids are made of."""
        self._run = self._run or run
        self.by_value = by_value

    def run(self) -> str:
        """The id of the run. Raises ConfigError where nobody has said it."""
        if self._run is None:
            raise ConfigError(
                f"topic '{self.topic}': with a transactional_id the sink needs the run's id: "
                "KafkaSink(…, run=…), or a manager for the flow that is compiled"
            )
        return self._run()

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
        return [f"{self.topic}:{number:06}" for number in range(self.partitions)]

    @override
    def part_fn(self, item_key: str) -> int:
        return int(murmur2(item_key.encode("utf-8", "backslashreplace"))) & 0x7FFFFFFF

    @override
    def build_part(self, step_id: str, for_part: str, resume_state: Place | None) -> Any:
        number = int(for_part.rpartition(":")[2])
        part: _Partition | TransactionalPartition
        if self.transactional_id is not None:
            part = TransactionalPartition(self, step_id, number, resume_state)
        else:
            part = _Partition(self, self._shared(), number)
        with self._lock:
            self._parts[part] = (threading.get_ident(), step_id)
        return part

    def _shared(self) -> KafkaProducer:
        with self._lock:
            if self._producer is None:
                self._producer = self.connected()
            return self._producer

    def connected(self, **more: Any) -> KafkaProducer:
        """A producer. Raises ConfigError where nobody answers."""
        producer: KafkaProducer = self.servers.connected(
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
            **more,
        )
        return producer

    def commit_all(self, first: TransactionalPartition) -> None:
        """Begin to commit the partitions that one worker writes, where the ``first`` of them is to.

        Bytewax closes an epoch of one worker's partitions in one go, and waits for each: like this it waits
        for all at once.
        """
        with self._lock:
            beside = [part for part, place in self._parts.items() if place == self._parts[first]]
        for part in beside:
            if isinstance(part, TransactionalPartition):
                part.begin_commit()

    def closed(self, part: _Partition | TransactionalPartition) -> None:
        """A partition is written no more; the producer that they share ends with the last."""
        with self._lock:
            self._parts.pop(part, None)
            if self._parts or self._producer is None:
                return
            producer, self._producer = self._producer, None
        end(producer)

    def refused(self, error: Exception, size: int) -> SinkError:
        """What to say of a record that was not taken."""
        why = reason_of(error)
        if isinstance(error, MessageSizeTooLargeError):
            why = f"the record is too large (max.message.bytes): {why}"
        return SinkError(f"topic '{self.topic}' did not take a record of {size} bytes: {why}")


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
