"""Reads the bus's topics: first what was said before, in the order in which it came, then what comes."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from chainwax.connectors.bus_topics import Topics
from chainwax.connectors.kafka.servers import KafkaServers, reason_of, shut
from chainwax.router.errors import ConfigError

__all__ = ["Handle", "TopicReader", "records_of"]

log = logging.getLogger(__name__)

_LOOK_S = 2.0
"""How often it is looked whether the topics are still the same."""
_POLL_MS = 100
_QUEUED = 20_000
"""Records of one partition that wait at most for those of another."""
_PAUSE_S = 0.5

Handle = Callable[[Sequence[Any], bool], None]
"""Takes kafka-python's records, and whether they are live; none of them, from time to time, while live."""


class TopicReader:
    """A thread that reads all partitions of three topics, as no group: every process reads everything.

    What was there at the start is handed over in the order of its time stamps, over all partitions, the calls
    before the feedback of the same millisecond. A topic that is made anew is read from its beginning.
    """

    def __init__(self, servers: KafkaServers, topics: Topics, handle: Handle) -> None:
        self.outages = 0
        self._servers = servers
        self._topics = topics
        self._names = (topics.calls, topics.feedback, topics.control)
        self._handle = handle
        self._next: dict[tuple[str, str, int], int] = {}
        """Where to read on, by topic, its id, and partition."""
        self._ids: dict[str, str] = {}
        self._caught_up = threading.Event()
        self._moved = 0.0
        self._failure = ""
        self._answered = False
        """Whether there was ever a broker."""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def catch_up(self, patience: float) -> None:
        """Begin to read, and wait until all is handed over that was there at the beginning.

        Raises ConfigError where that stands still for ``patience`` seconds.
        """
        if self._thread is None:
            self._moved = time.monotonic()
            self._thread = threading.Thread(target=self._run, name="chainwax-bus-in", daemon=True)
            self._thread.start()
        while not self._caught_up.wait(0.05):
            if self._failure and not self._answered:
                break
            if time.monotonic() - self._moved > patience:
                break
        else:
            return
        why = self._failure or f"nothing came for {patience:g} s"
        raise ConfigError(f"the feedback bus cannot catch up with '{self._topics.feedback}': {why}")

    def passed(self, topic: str, partition: int, offset: int) -> bool:
        """Whether a record of a topic that is read has been handed over."""
        return self._next.get((topic, self._ids.get(topic, ""), partition), 0) > offset

    @property
    def started(self) -> bool:
        """Whether anything is read."""
        return self._thread is not None

    def close(self) -> None:
        """Stop reading."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(5)

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._read()
            except (KafkaError, ConfigError, OSError) as error:
                self._failure = reason_of(error)
                if not self.outages:
                    log.warning("feedback bus: nothing can be read now, it is tried again: %s", self._failure)
                self.outages += 1
            except Exception as error:
                self._failure = repr(error)
                self.outages += 1
                log.exception("feedback bus: the reader failed, and goes on")
            else:
                continue
            self._ended.wait(_PAUSE_S)

    def _read(self) -> None:
        """Read until the topics change."""
        with self._servers.admin() as admin:
            self._answered = True
            there = self._topics.ensure(admin, self._names)
            if len(there) < len(self._names):
                absent = ", ".join(f"'{name}'" for name in self._names if name not in there)
                raise ConfigError(
                    f"waiting for the topic {absent}, which is not there, or not to be seen by this user"
                )
            consumer = self._connected(there)
            try:
                if not self._caught_up.is_set():
                    self._recall(consumer)
                    self._caught_up.set()
                look_at = time.monotonic() + _LOOK_S
                while not self._ended.is_set():
                    polled = consumer.poll(_POLL_MS)
                    for part in sorted(polled, key=lambda part: part.topic != self._topics.calls):
                        self._pass_on(polled[part], live=True)
                    self._handle((), True)
                    if time.monotonic() >= look_at:
                        if self._topics.ensure(admin, self._names) != there:
                            log.warning("feedback bus: its topics have changed: they are read anew")
                            return
                        look_at = time.monotonic() + _LOOK_S
            finally:
                shut(consumer)

    def _connected(self, there: dict[str, tuple[str, int]]) -> Any:
        consumer = self._servers.connected(
            KafkaConsumer,
            metrics_enabled=False,
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            # Each poll empties the buffer: while one topic has records left in it, the broker is only asked
            # for the other, and answers when something comes or its patience ends.
            max_poll_records=1_000_000,
            fetch_max_wait_ms=200,
            request_timeout_ms=10_000,
            allow_auto_create_topics=False,
        )
        self._ids = {name: topic_id for name, (topic_id, _) in there.items()}
        parts = [TopicPartition(name, n) for name, (_, count) in there.items() for n in range(count)]
        consumer.assign(parts)
        for part in parts:
            known = self._next.get((part.topic, self._ids[part.topic], part.partition))
            if known is None:
                consumer.seek_to_beginning(part)
            else:
                consumer.seek(part, known)
        return consumer

    def _pass_on(self, records: Sequence[Any], *, live: bool) -> None:
        self._handle(records, live)
        for record in records:
            self._next[record.topic, self._ids[record.topic], record.partition] = record.offset + 1

    def _recall(self, consumer: Any) -> None:
        """Hand over what is there, as one stream in the order of time."""
        ends = consumer.end_offsets(list(consumer.assignment()))
        queues: dict[Any, deque[Any]] = {part: deque() for part in ends}
        unread = {part for part, end in ends.items() if consumer.position(part) < end}
        while unread and not self._ended.is_set():
            polled = consumer.poll(_POLL_MS)
            for part, records in polled.items():
                queues[part].extend(records)
                if len(queues[part]) > _QUEUED:
                    consumer.pause(part)
            unread = {part for part in unread if consumer.position(part) < ends[part]}
            if polled:
                self._moved = time.monotonic()
            self._pass_on(self._in_order(queues, unread), live=False)
            for part in consumer.paused():
                if len(queues[part]) < _QUEUED // 2:
                    consumer.resume(part)
        for part in consumer.paused():
            consumer.resume(part)

    def _in_order(self, queues: dict[Any, deque[Any]], unread: set[Any]) -> list[Any]:
        """What can be told apart by now: the oldest of all, as long as every partition has shown its next."""
        out: list[Any] = []
        calls = self._topics.calls
        while not any(not queues[part] for part in unread):
            heads = [queue for queue in queues.values() if queue]
            if not heads:
                break
            first = min(heads, key=lambda q: (q[0].timestamp, q[0].topic != calls, q[0].partition))
            out.append(first.popleft())
        return out


def records_of(servers: KafkaServers, topic: str) -> Iterator[Any]:
    """All that a topic holds now; nothing where it does not exist. Raises KafkaError."""
    consumer = servers.connected(
        KafkaConsumer,
        metrics_enabled=False,
        group_id=None,
        enable_auto_commit=False,
        max_poll_records=100_000,
    )
    try:
        parts = [TopicPartition(topic, n) for n in consumer.partitions_for_topic(topic) or ()]
        consumer.assign(parts)
        consumer.seek_to_beginning(*parts)
        ends = consumer.end_offsets(parts)
        while any(consumer.position(part) < end for part, end in ends.items()):
            for records in consumer.poll(_POLL_MS).values():
                yield from records
    finally:
        shut(consumer)
