"""Kafka topics as a source."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition
from kafka import KafkaConsumer, TopicPartition
from kafka.consumer.fetcher import ConsumerRecord
from kafka.errors import KafkaError, OffsetOutOfRangeError
from typing_extensions import override

from chainwax.connectors.kafka.codecs import Codec, Decoder, NotYet, codec_of, make_ready
from chainwax.connectors.kafka.ranges import Span, parse_place, spans
from chainwax.connectors.kafka.servers import KafkaServers, partitions_of, reason_of, shut
from chainwax.connectors.kafka.watch import Watch
from chainwax.connectors.record import AnyRecord, SourceError, StopSwitch
from chainwax.router.errors import ConfigError, UnknownName

__all__ = ["KafkaSource"]

log = logging.getLogger(__name__)

IDLE_SECONDS = 0.005
"""After so long an idle topic is asked again; each asking takes about 0.1 ms of CPU."""
PATIENCE_SECONDS = 120.0
"""How long records may wait for what their codec needs, a schema's registry for one."""
TELL_SECONDS = 2.0
"""A wait that takes longer is told."""
HELD_RECORDS = 4000
"""No more is polled while so many records of one worker wait to be taken."""

Place = tuple[int, int | None, int, str]
"""What the recovery store holds of a partition: the next offset, the offset to end at, how many were
emitted, the topic's id."""


class _Feed:
    """One consumer for all the partitions that one worker reads."""

    def __init__(self, servers: KafkaServers, on_lost: str, poll_records: int) -> None:
        self._consumer = servers.connected(
            KafkaConsumer,
            metrics_enabled=False,
            enable_auto_commit=False,
            auto_offset_reset="none",
            allow_auto_create_topics=False,
            # What a transaction took back was never said.
            isolation_level="read_committed",
        )
        self._on_lost = on_lost
        self._poll_records = poll_records
        self._taken: dict[TopicPartition, list[ConsumerRecord]] = {}
        self._due = 0.0

    @property
    def empty(self) -> bool:
        """Whether no partition is left."""
        return not self._taken

    def add(self, part: TopicPartition, offset: int) -> None:
        """Read a partition too, from an offset."""
        self._taken[part] = []
        self._consumer.assign(list(self._taken))
        self._consumer.seek(part, offset)

    def remove(self, part: TopicPartition) -> None:
        """Read a partition no more; the consumer ends with the last."""
        if self._taken.pop(part, None) is None:
            return
        if self._taken:
            self._consumer.assign(list(self._taken))
        else:
            shut(self._consumer)

    def take(self, part: TopicPartition, count: int) -> list[ConsumerRecord]:
        """At most ``count`` records of a partition that are there. Raises SourceError."""
        if not self._taken[part]:
            self._poll()
        taken = self._taken[part]
        self._taken[part] = taken[count:]
        return taken[:count]

    def put_back(self, part: TopicPartition, records: list[ConsumerRecord]) -> None:
        """Give back what was taken last and could not be used yet."""
        self._taken[part] = records + self._taken[part]

    def reached(self, part: TopicPartition, offset: int) -> bool:
        """Whether all before ``offset`` was taken; what transactions leave at the end counts as taken."""
        if self._taken[part]:
            return False
        at = self._consumer.position(part, timeout_ms=0)
        return at is not None and at >= offset

    def _poll(self) -> None:
        now = time.monotonic()
        if now < self._due or sum(map(len, self._taken.values())) >= HELD_RECORDS:
            return
        try:
            polled = self._consumer.poll(0, max_records=self._poll_records)
        except OffsetOutOfRangeError as error:
            self._lost(error.args[0])
            return
        except KafkaError as error:
            if not error.retriable:
                topics = ", ".join(sorted({part.topic for part in self._taken}))
                raise SourceError(f"topic '{topics}' cannot be read: {reason_of(error)}") from error
            log.warning("Kafka does not answer now: %s", reason_of(error))
            polled = {}
        for part, records in polled.items():
            self._taken[part] += records
        if not polled:
            self._due = now + IDLE_SECONDS

    def _lost(self, offsets: dict[TopicPartition, int]) -> None:
        first = self._consumer.beginning_offsets(list(offsets))
        for part, offset in offsets.items():
            _tell_lost(part, offset, first[part], self._on_lost)
            self._consumer.seek(part, first[part])


def _tell_lost(part: TopicPartition, offset: int, first: int, on_lost: str) -> None:
    what = f"topic '{part.topic}', partition {part.partition}: offset {offset} is not there any more"
    if offset < first:
        what += f", the oldest is {first}: {first - offset} records were deleted before they were read"
    if on_lost == "fail":
        raise SourceError(f"{what}; with on_lost=earliest it would go on with the oldest")
    log.warning("%s; going on with the oldest", what)


class _Partition(StatefulSourcePartition[AnyRecord, Place]):
    def __init__(self, source: KafkaSource, feed: _Feed, part: TopicPartition, place: Place) -> None:
        self._source = source
        self._feed = feed
        self._part = part
        self._next, self._end, self._emitted, self._topic_id = place
        self._decode = source.decoder(part.topic)
        self._limit = math.inf if source.limit is None else source.limit
        self._over = self._end is not None and self._next >= self._end
        self._idle = False
        self._covered: int | None = None
        self._waiting: float | None = None
        self._told = False

    @override
    def next_batch(self) -> list[AnyRecord]:
        room = int(min(self._source.batch_size, self._limit - self._emitted))
        if self._over or room <= 0 or self._source.stop.is_set():
            raise StopIteration
        watch = self._source.watch
        if watch is not None and watch.gone:
            raise SourceError(watch.gone)
        records = self._feed.take(self._part, room)
        self._idle = not records
        if not records:
            if self._end is not None and self._feed.reached(self._part, self._end):
                raise StopIteration
            return []
        last = self._end is not None and records[-1].offset >= self._end - 1
        if self._end is not None and last:
            records = [record for record in records if record.offset < self._end]
        made = self._decoded(records)
        if made:
            self._next = records[len(made) - 1].offset + 1
        self._emitted += len(made)
        self._over = last and len(made) == len(records)
        return made

    def _decoded(self, records: list[ConsumerRecord]) -> list[AnyRecord]:
        """What the records are, up to the first that has to wait; that and the rest are given back."""
        decode = self._decode
        made: list[AnyRecord] = []
        try:
            for record in records:
                made.append(decode(record))  # noqa: PERF401 - what came before an error must be kept
        except NotYet as error:
            self._feed.put_back(self._part, records[len(made) :])
            self._wait(error)
        else:
            self._waiting = None
        return made

    def _wait(self, error: NotYet) -> None:
        now = time.monotonic()
        self._idle = True
        if self._waiting is None:
            self._waiting = now
            self._told = False
        waited = now - self._waiting
        if waited > PATIENCE_SECONDS:
            raise SourceError(f"topic '{self._part.topic}' waited {waited:.0f} s in vain: {error}") from error
        if waited > TELL_SECONDS and not self._told:
            self._told = True
            log.warning("topic '%s' waits: %s", self._part.topic, error)

    @override
    def next_awake(self) -> datetime | None:
        return datetime.now(UTC) + timedelta(seconds=IDLE_SECONDS) if self._idle else None

    @override
    def snapshot(self) -> Place:
        # Only what an epoch before this one covered is surely done with.
        if self._covered is not None:
            self._source.done(self._part, self._covered)
        self._covered = self._next
        return (self._next, self._end, self._emitted, self._topic_id)

    @override
    def close(self) -> None:
        if self._covered is not None:
            self._source.done(self._part, self._covered)
        self._source.closed(self._feed, self._part)


class KafkaSource(FixedPartitionedSource[AnyRecord, Place]):
    """Records of one or more topics; each partition of a topic is one of Bytewax.

    >>> KafkaSource("tickets", servers="127.0.0.1:9092", from_="earliest")  # doctest: +SKIP

    A resume goes on with the offsets in the flow's recovery store. A new run begins where ``from_``
    says: ``stored`` where the ``group`` last committed, else with the earliest; ``earliest``; ``latest``;
    an offset; an ISO time (or a datetime), which is compared with the records' own time stamps. ``to``
    ends each partition before an offset, a time, or at ``latest``; at the latest where the topic ends
    when this is made. Such a range commits no offsets.

    ``group`` is only for monitors of lag: its offsets are committed every few seconds. ``codec`` is
    ``json``, ``text``, ``bytes`` or a :class:`Codec`. ``key`` and ``time`` name fields to use in place
    of the record's own key and time stamp; ``headers`` is the field that the headers are put under.
    ``limit`` is the first so many of each partition. ``on_lost`` says what to do where offsets to be read
    were deleted: ``fail``, or go on with the ``earliest``.

    Positions are ``topic:partition:offset``. What is no such value is a `BadRecord`.

    Raises ConfigError where the cluster does not answer, or lacks a topic; SourceError where it
    cannot go on.
    """

    def __init__(
        self,
        topics: str | Sequence[str],
        *,
        servers: str | KafkaServers | None = None,
        group: str | None = None,
        from_: str | int | datetime = "stored",
        to: str | int | datetime | None = None,
        codec: str | Codec = "json",
        key: str | None = None,
        time: str | None = None,
        headers: str | None = None,
        limit: int | None = None,
        batch_size: int = 500,
        on_lost: str = "fail",
        stop: StopSwitch | None = None,
    ) -> None:
        for name, value, least in (("limit", limit, 0), ("batch_size", batch_size, 1)):
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}: it must be at least {least}")
        if on_lost not in ("fail", "earliest"):
            raise UnknownName("on_lost", on_lost, ("fail", "earliest"))
        self.limit = limit
        self.batch_size = batch_size
        self.stop = stop or StopSwitch()
        self.watch: Watch | None = None
        self._codec = codec_of(codec)
        self._fields = (key, time, headers)
        self._on_lost = on_lost
        self._servers = servers if isinstance(servers, KafkaServers) else KafkaServers(servers)
        self._group = group
        start = parse_place("from", from_, ("stored", "earliest", "latest"))
        end = None if to is None else parse_place("to", to, ("latest",))
        self.ends = end is not None
        names = [topics] if isinstance(topics, str) else list(topics)
        if not names:
            raise ConfigError("there is no topic to read")
        with self._servers.admin() as admin:
            self._topics = partitions_of(admin, names, self._servers)
            parts = [TopicPartition(name, n) for name in names for n in range(self._topics[name][1])]
            found = spans(admin, parts, start, end, group)
        make_ready(self._codec, names, writing=False)
        self._parts = {f"{part.topic}:{part.partition}": (part, found[part]) for part in parts}
        self._lock = threading.Lock()
        self._feeds: dict[int, _Feed] = {}

    @override
    def list_parts(self) -> list[str]:
        return list(self._parts)

    @override
    def build_part(self, step_id: str, for_part: str, resume_state: Place | None) -> Any:
        part, span = self._parts[for_part]
        place = self._place(part, span, resume_state)
        with self._lock:
            # A worker is a thread, and all that it reads comes through one consumer.
            worker = threading.get_ident()
            feed = self._feeds.get(worker)
            if feed is None or feed.empty:
                feed = self._feeds[worker] = _Feed(self._servers, self._on_lost, self.batch_size)
            feed.add(part, place[0])
            if not self.ends and self.watch is None:
                self.watch = Watch(self._servers, self._topics, self._group)
        return _Partition(self, feed, part, place)

    def _place(self, part: TopicPartition, span: Span, resumed: Place | None) -> Place:
        topic_id = self._topics[part.topic][0]
        offset, end, emitted, before = resumed or (span.start, span.stop, 0, topic_id)
        if before != topic_id:
            raise SourceError(
                f"topic '{part.topic}' was deleted and created anew since the stop: start a new run"
            )
        if not span.first <= offset <= span.end and (end is None or offset < end):
            _tell_lost(part, offset, span.first, self._on_lost)
            offset = span.first
        return (offset, end, emitted, topic_id)

    def decoder(self, topic: str) -> Decoder:
        """What makes records of a topic's messages."""
        return Decoder(topic, self._codec, *self._fields)

    def done(self, part: TopicPartition, offset: int) -> None:
        """All before ``offset`` is done with."""
        if self.watch is not None:
            self.watch.commit(part, offset)

    def closed(self, feed: _Feed, part: TopicPartition) -> None:
        """A partition is read no more."""
        with self._lock:
            feed.remove(part)
            self._feeds = {worker: feed for worker, feed in self._feeds.items() if not feed.empty}
            watch = self.watch
            if watch is None or self._feeds:
                return
            self.watch = None
        watch.close()
