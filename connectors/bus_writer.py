"""Writes to the bus's topics without ever holding up who has something to say."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, NamedTuple

from kafka import KafkaProducer
from kafka.errors import AuthorizationError, KafkaError, MessageSizeTooLargeError

from chainwax.connectors.bus_topics import Topics
from chainwax.connectors.kafka.servers import KafkaServers, reason_of, shut
from chainwax.router.errors import ConfigError

__all__ = ["Message", "TopicWriter", "end_producer"]

log = logging.getLogger(__name__)

_DAY_MS = 24 * 3600 * 1000
_HOLDS = 200_000
"""Things that wait at most for a broker that is away: some 100 MB."""
_PAUSE_S = 0.5
_STALL_S = 2.0
"""After so long without a word from the brokers, the topics are looked at: they may be gone."""
_TAKE = 2000
"""Things that are made into messages at once."""


class Message(NamedTuple):
    """One message on its way."""

    topic: str
    key: bytes | None
    value: bytes
    stands_for: int
    """How many of the things that were handed over it carries."""


Make = Callable[[list[Any]], list[Message]]
"""From what was handed over to messages; called on the writer's thread."""


class TopicWriter:
    """A thread with a producer. What is handed over waits in memory until the brokers have it.

    The producer is idempotent and tries again for a day, so that a broker's restart neither loses nor doubles
    anything nor changes its order. More than ``holds`` things do not wait: what comes then is lost, counted
    and logged. The thread starts with the first of them.
    """

    def __init__(self, servers: KafkaServers, topics: Topics, make: Make, *, holds: int = _HOLDS) -> None:
        self.counts: Counter[str] = Counter()
        """``written``, ``lost``, ``tried_again`` and ``outages``."""
        self.reached: dict[tuple[str, int], int] = {}
        """The highest offset written, by topic and partition."""
        self._servers = servers
        self._topics = topics
        self._make = make
        self._holds = holds
        self._queue: deque[Any] = deque()
        self._unsent: deque[Message] = deque()
        self._again: deque[Message] = deque()
        self._accepted = 0
        self._settled = 0
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._renew = False
        self._told_loss = False
        self._producer: Any = None
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """How many things the brokers do not have yet."""
        return self._accepted - self._settled

    def put(self, things: list[Any]) -> None:
        """Hand things over; returns at once. From any thread."""
        with self._lock:
            room = 0 if self._closing else max(self._holds - self.waiting, 0)
            taken = things if len(things) <= room else things[:room]
            self._queue.extend(taken)
            self._accepted += len(taken)
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name="chainwax-bus-out", daemon=True)
                self._thread.start()
        self._wake.set()
        if len(taken) < len(things):
            closed = "the feedback bus is closed"
            why = closed if self._closing else f"{self._holds} messages wait for Kafka already"
            self._lose(len(things) - len(taken), why)

    def flush(self, until: float) -> bool:
        """Wait until the brokers have all of it; False where they have not by ``until`` (monotonic)."""
        while self.waiting:
            if time.monotonic() >= until:
                return False
            time.sleep(0.002)
        return True

    def close(self, until: float) -> None:
        """Write what is left, until then at the latest, and stop."""
        self.flush(until)
        with self._lock:
            self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(1.0)
        if self._producer is not None:
            end_producer(self._producer, 0.2)
        if self.waiting:
            self._lose(self.waiting, "Kafka had not taken them at the end")

    def _lose(self, count: int, why: str) -> None:
        if not self._told_loss:
            self._told_loss = True
            log.error("feedback bus: %d messages are lost: %s", count, why)
        self.counts["lost"] += count

    def _settle(self, count: int) -> None:
        with self._lock:
            self._settled += count

    # The writer's thread.

    def _run(self) -> None:
        while not self._closing:
            if not self._queue and not self._unsent:
                before = self._settled
                pause = _PAUSE_S if self._again else _STALL_S if self.waiting else None
                woken = self._wake.wait(pause)
                if not woken and not self._again and self.waiting and self._settled == before:
                    self._guarded(self._look)
                self._unsent.extend(self._again.popleft() for _ in range(len(self._again)))
            self._wake.clear()
            self._guarded(self._send)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            if not isinstance(error, KafkaError | ConfigError | OSError):
                log.exception("feedback bus: the writer failed, and goes on")
            elif not self.counts["outages"]:
                log.warning("feedback bus: Kafka takes nothing now, it is tried again: %s", reason_of(error))
            self.counts["outages"] += 1
            end = time.monotonic() + _PAUSE_S
            while not self._closing and time.monotonic() < end:
                time.sleep(0.02)

    def _look(self) -> None:
        with self._servers.admin() as admin:
            names = (self._topics.feedback, self._topics.calls, self._topics.decisions)
            self._topics.ensure(admin, (*names, self._topics.dead_letters))

    def _send(self) -> None:
        if self._renew:
            self._renew = False
            old, self._producer = self._producer, None
            end_producer(old, 5)
        if self._producer is None:
            self._look()
            self._producer = self._servers.connected(
                KafkaProducer,
                metrics_enabled=False,
                acks="all",
                enable_idempotence=True,
                linger_ms=0,  # what comes while a request is under way goes out together with the next
                batch_size=64 * 1024,
                delivery_timeout_ms=_DAY_MS,
                request_timeout_ms=10_000,
                max_block_ms=int(_STALL_S * 1000),
                allow_auto_create_topics=False,
            )
        while (self._unsent or self._queue) and not self._closing:
            if not self._unsent:
                things = [self._queue.popleft() for _ in range(min(len(self._queue), _TAKE))]
                self._unsent.extend(self._make(things))
                self._settle(len(things) - sum(one.stands_for for one in self._unsent))
                continue
            self._hand_over(self._unsent[0])
            self._unsent.popleft()

    def _hand_over(self, message: Message) -> None:
        try:
            future = self._producer.send(message.topic, message.value, key=message.key)
        except (MessageSizeTooLargeError, ValueError) as error:
            self._refused(message, error)
            return
        except KafkaError:
            self._look()  # the topic may be gone
            raise
        future.add_callback(self._written, message)
        future.add_errback(self._failed, message)

    def _refused(self, message: Message, error: BaseException) -> None:
        self._settle(message.stands_for)
        self._lose(message.stands_for, f"topic '{message.topic}' does not take it: {reason_of(error)}")

    # On the producer's own thread.

    def _written(self, message: Message, at: Any) -> None:
        place = (at.topic, at.partition)
        self.reached[place] = max(at.offset, self.reached.get(place, -1))
        self.counts["written"] += 1
        self._settle(message.stands_for)

    def _failed(self, message: Message, error: BaseException) -> None:
        if self._closing:
            return
        if isinstance(error, MessageSizeTooLargeError):
            self._refused(message, error)
            return
        if not self.counts["tried_again"]:
            log.warning("feedback bus: topic '%s' refused a message: %s", message.topic, reason_of(error))
        self.counts["tried_again"] += 1
        # A producer that has given up on a message may be beyond use.
        self._renew = not isinstance(error, AuthorizationError)
        self._again.append(message)


def end_producer(producer: Any, timeout: float) -> None:
    """Close a producer, whether or not it could write all that it has."""
    try:
        shut(producer, timeout=timeout)
    except KafkaError:
        # It goes on trying then, and has no public way to be told to stop.
        producer._sender.force_close()
        producer._sender.join(5)
        shut(producer, timeout=1)
