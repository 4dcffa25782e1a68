"""Exactly once: the epochs of a flow as transactions of one partition of a topic.

When Bytewax closes an epoch it asks each partition of a sink for its state. There, and before Bytewax knows
of it, the epoch's transaction is committed. A crash in between is what all this is about: the records are
in the topic, and the resumed flow makes the same outputs again. So

- every record has an id that says what output it is (`chainwax.connectors.kafka.outbox.id_of`);
- the transaction also commits a *marker*: an offset of the consumer group ``PREFIX.STEP`` for this very
  partition, which is the offset behind the last record, with a few numbers as its metadata. Kafka keeps the
  last one of each, commits it together with the records, and gives it back in one request: a topic of
  markers would have to be made, compacted and read;
- the state in Bytewax's recovery store holds the offset behind the last record that it knows of.

On a resume the records between the two offsets are those that will be made again: their ids are read from
the topic and the outputs that have them are dropped, each as often as it was written. Dropping the first
so-and-so many would be wrong: the calls of an LLM node end in another order the second time. Nor is it over
with the epoch: an output that was in the first epoch before the crash may come in a later one after it, so
the ids that did not come yet are part of the state. Nothing is assumed of how many epochs the recovery
store may lag behind.

Where the source stands is not in the marker: the recovery store says from where a resume reads again, and
what comes of that is told by its id.

One `transactional.id` for each partition: who begins with it fences whoever had it before, whose open
transaction is aborted, in whatever process it was.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

from bytewax.outputs import StatefulSinkPartition
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import InvalidProducerEpochError, KafkaError, ProducerFencedError
from kafka.structs import OffsetAndMetadata
from typing_extensions import override

from chainwax.connectors.kafka.outbox import ID_HEADER, OVERHEAD, Outbox, headers_of, id_of
from chainwax.connectors.kafka.servers import KafkaServers, end, reason_of, shut
from chainwax.connectors.record import Outgoing
from chainwax.connectors.sinks import SinkError

if TYPE_CHECKING:
    from chainwax.connectors.kafka.sink import KafkaSink

__all__ = ["TRANSACTION_SECONDS", "Marker", "Place", "TransactionalPartition", "fenced_for_good"]

log = logging.getLogger(__name__)

TRANSACTION_SECONDS = 600.0
"""How long an epoch may be open before the broker aborts it; brokers allow 900 unless told otherwise."""
COMMIT_SECONDS = 130.0
"""How long a commit may take: a broker may be away meanwhile."""
ABORT_SECONDS = 5.0
READ_SECONDS = 60.0
"""How long the records of the last epoch may take to come while none comes."""


class Place(NamedTuple):
    """What the recovery store holds of a partition."""

    run: str
    next: int | None
    """The offset behind the last record of the run; None where there is none."""
    written: int
    """Records of the run in this partition."""
    partitions: int
    """Of the topic."""
    owed: dict[str, int]
    """Ids of outputs that were written and were not made again yet, each with how often."""


class Marker(NamedTuple):
    """What each transaction says of itself, beside the offset behind its last record."""

    run: str
    epoch: int
    """Transactions of the run in this partition."""
    first: int
    """The offset of the run's first record."""
    written: int
    """Records of the run in this partition."""
    partitions: int
    """Of the topic."""

    @classmethod
    def parse(cls, text: str) -> Marker | None:
        """From an offset's metadata; None where it is not ours."""
        try:
            made = cls(**json.loads(text))
        except (ValueError, TypeError):
            return None
        return made if type(made.run) is str and all(type(x) is int for x in made[1:]) else None

    def text(self) -> str:
        """As an offset's metadata."""
        return json.dumps(self._asdict())


class TransactionalPartition(StatefulSinkPartition[Any, Place]):
    """One partition of a topic in exactly once mode."""

    def __init__(self, sink: KafkaSink, step_id: str, number: int, resumed: Place | None) -> None:
        self._sink = sink
        self._group = f"{sink.transactional_id}.{step_id}"
        self._part = TopicPartition(sink.topic, number)
        self._name = f"{self._group}.{sink.topic}.{number}"
        self._run = resumed.run if resumed else sink.run()
        self._stamp = blake2b(f"{self._run}\0{step_id}".encode(), digest_size=4).hexdigest()
        self._open = False
        self._working: _Work | None = None
        self._producer = sink.connected(
            transactional_id=self._name,
            transaction_timeout_ms=int(TRANSACTION_SECONDS * 1000),
            retry_backoff_ms=10,  # a commit waits for several answers, one after the other
        )
        fenced_for_good(self._producer)
        try:
            self._begin(resumed)
        except BaseException:
            end(self._producer)
            raise
        self._outbox = Outbox(self._producer, sink.topic, number, self._refused)

    def _begin(self, resumed: Place | None) -> None:
        try:
            # Fences who had the id before. What it was about to commit is committed, else aborted, by then.
            self._producer.init_transactions()
            behind, marker = _marker(self._sink.servers, self._group, self._part)
        except KafkaError as error:
            raise self._refused(error) from error
        if marker is not None and marker.run != self._run:
            marker = None  # of a run before this one, or of one that came between
        place = resumed or Place(
            self._run, None, 0, marker.partitions if marker else self._sink.partitions, {}
        )
        if place.next is None and marker is not None:
            place = place._replace(next=marker.first)
        self._owed = Counter(place.owed)
        self._next = place.next
        self._written = place.written
        self._epoch = marker.epoch if marker else 0
        self._first = marker.first if marker else place.next
        if place.next is not None and (marker is None or marker.written > place.written):
            self._owe(place, behind if marker else None, marker)
        if self._owed and place.partitions != self._sink.partitions:
            raise SinkError(
                f"{self._told}: the topic had {place.partitions} partitions before the stop and has "
                f"{self._sink.partitions} now: keys are elsewhere, and what was written already cannot be "
                "told from what was not; begin a new run"
            )

    def _owe(self, place: Place, behind: int | None, marker: Marker | None) -> None:
        """Take note of what is in the topic and not in the recovery store."""
        assert place.next is not None
        try:
            ids, end = _ids(self._sink.servers, self._part, place.next, behind, self._stamp)
        except KafkaError as error:
            raise self._refused(error) from error
        self._next, self._written = end, place.written + len(ids)
        if marker is not None:
            missing, self._written = marker.written - self._written, marker.written
            if missing > 0:
                # Dropping the rest would put older values behind newer ones in a compacted topic.
                log.warning(
                    "%s: %d of %d records that were written just before the stop are not in the topic any "
                    "more (retention or compaction): all of these are written again",
                    *(self._told, missing, missing + len(ids)),
                )
                return
        self._owed.update(ids)

    @property
    def _told(self) -> str:
        return (
            f"topic '{self._part.topic}', partition {self._part.partition}, transactional.id '{self._name}'"
        )

    @override
    def write_batch(self, values: list[Any]) -> None:
        sink = self._sink
        for given in values:
            out = given if type(given) is Outgoing else Outgoing(given)
            raw = out.value if type(out.value) is bytes else sink.encoded(out.value)
            identity = id_of(out, raw, self._stamp, by_value=sink.by_value)
            if identity in self._owed:
                self._owed[identity] -= 1
                if not self._owed[identity]:
                    del self._owed[identity]
                continue
            if not self._open:
                self._start()
            headers = headers_of(out, sink.max_record_bytes - OVERHEAD - len(raw))
            self._outbox.send(out, raw, [*headers, (ID_HEADER, identity.encode())])
            self._written += 1
        self._outbox.settle(all_of_it=False)

    def _start(self) -> None:
        try:
            self._producer.begin_transaction()
        except KafkaError as error:
            raise self._refused(error) from error
        self._open = True

    @override
    def snapshot(self) -> Place:
        if self._open:
            self._sink.commit_all(self)
            assert self._working is not None
            self._working.wait(COMMIT_SECONDS, f"{self._told}: the broker did not commit")
            self._working = None
            self._open = False
        return Place(self._run, self._next, self._written, self._sink.partitions, dict(self._owed))

    def begin_commit(self) -> None:
        """Commit what is open, beside what others commit at this time; `snapshot` waits for it."""
        if self._open and self._working is None:
            self._working = _Work(self._commit)

    def _commit(self) -> None:
        # Each record is looked at: the library may begin anew after an error, and then a commit would
        # be one of a transaction that has lost its records.
        self._outbox.settle(all_of_it=True)
        self._next = self._outbox.next
        self._first = self._outbox.first if self._first is None else self._first
        assert self._first is not None
        self._epoch += 1
        marker = Marker(self._run, self._epoch, self._first, self._written, self._sink.partitions)
        try:
            self._producer.send_offsets_to_transaction(
                {self._part: OffsetAndMetadata(self._next, marker.text(), -1)}, self._group
            )
            self._producer.commit_transaction()
        except KafkaError as error:
            raise self._refused(error) from error

    @override
    def close(self) -> None:
        # Nothing may be raised here: see `end`. Who comes next aborts it otherwise, or the broker in time.
        if self._open and self._working is None:
            try:
                _Work(self._producer.abort_transaction).wait(ABORT_SECONDS, "the broker is away")
            except Exception as error:
                log.debug("%s: not aborted: %s", self._told, error)
        self._sink.closed(self)
        end(self._producer)

    def _refused(self, error: Exception, size: int | None = None) -> SinkError:
        if isinstance(error, ProducerFencedError | InvalidProducerEpochError) or "Fenced" in str(error):
            return SinkError(
                f"{self._told}: another producer has begun with this transactional.id: either the same flow "
                "runs elsewhere, or this epoch was open for too long"
            )
        if size is not None:
            return self._sink.refused(error, size)
        return SinkError(f"{self._told}: {reason_of(error)}")


class _Work:
    """Something done in a thread, because kafka-python waits for ever for the end of a transaction."""

    def __init__(self, do: Callable[[], None]) -> None:
        self._error: Exception | None = None
        self._do = do
        self._thread = threading.Thread(target=self._run, name="chainwax-transaction", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._do()
        except Exception as error:
            self._error = error

    def wait(self, seconds: float, late: str) -> None:
        """Wait until it is done, and raise what it raised; SinkError where it takes too long."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            raise SinkError(f"{late} within {seconds:g} s")
        if self._error is not None:
            raise self._error


def fenced_for_good(producer: KafkaProducer) -> None:
    """Have a producer that was fenced stay so.

    kafka-python 3.0 takes the broker's INVALID_PRODUCER_EPOCH for a passing error: it asks for a new epoch,
    is refused, asks without naming the old one, and so fences who has rightly fenced it.
    """
    producer._transaction_manager._supports_epoch_bump = lambda: False


def _marker(servers: KafkaServers, group: str, part: TopicPartition) -> tuple[int, Marker | None]:
    until = time.monotonic() + READ_SECONDS
    with servers.admin() as admin:
        while True:
            try:
                found = admin.list_group_offsets({group: [part]})[group].get(part)
                break
            except KafkaError as error:
                # A broker that is new makes its topic of offsets when it is first asked.
                if not error.retriable or time.monotonic() > until:
                    raise
                time.sleep(0.1)
    return (-1, None) if found is None else (found.offset, Marker.parse(found.metadata or ""))


def _ids(
    servers: KafkaServers, part: TopicPartition, start: int, end: int | None, stamp: str
) -> tuple[list[str], int]:
    """The ids with that stamp of the committed records from ``start`` to ``end``, and where that is.

    Without an ``end`` it is the end of the partition. Raises KafkaError and SinkError.
    """
    consumer = servers.connected(
        KafkaConsumer,
        metrics_enabled=False,
        enable_auto_commit=False,
        auto_offset_reset="none",
        allow_auto_create_topics=False,
        isolation_level="read_committed",
    )
    try:
        consumer.assign([part])
        start = max(start, consumer.beginning_offsets([part])[part])
        if end is None:
            end = int(consumer.end_offsets([part])[part])
        consumer.seek(part, start)
        ids = [
            text
            for record in _read(consumer, part, end)
            for name, value in record.headers
            if name == ID_HEADER and (text := value.decode("ascii", "replace")).startswith(stamp)
        ]
        return ids, max(end, start)
    finally:
        shut(consumer)


def _read(consumer: KafkaConsumer, part: TopicPartition, end: int) -> Iterator[Any]:
    until = time.monotonic() + READ_SECONDS
    while (at := consumer.position(part)) < end:
        polled = consumer.poll(500)
        for records in polled.values():
            yield from (record for record in records if record.offset < end)
        if consumer.position(part) > at:
            until = time.monotonic() + READ_SECONDS
        elif time.monotonic() > until:
            raise SinkError(
                f"topic '{part.topic}', partition {part.partition}: nothing comes after offset {at}, though "
                f"records go to {end}: another transaction may be open there"
            )
