"""The feedback bus of one process, and the choice between it and one over Kafka."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from chainwax.router.config import BusConfig
from chainwax.router.errors import UnknownName
from chainwax.router.feedback import FeedbackBus, Learn
from chainwax.router.types import Decision, Feedback

if TYPE_CHECKING:
    from chainwax.connectors.bus_topics import Topics
    from chainwax.connectors.kafka.servers import KafkaServers

__all__ = ["InProcessBus", "kafka_of", "open_bus"]

log = logging.getLogger(__name__)


class InProcessBus:
    """Hands feedback and decisions to all who listen, in order, on the publisher's own thread.

    A listener has to take what it is given and return at once, as the manager does, which only queues it
    for its own loop. One that raises is logged, and the others still get what it did not take. After
    `close` nothing is carried any more; what comes then is logged.
    """

    def __init__(self, *, keep_decisions: int = 1000) -> None:
        self._learners: tuple[Callable[[Any], None], ...] = ()
        self._listeners: tuple[Callable[[Any], None], ...] = ()
        self._decisions: deque[Decision] = deque(maxlen=keep_decisions)
        self._lock = threading.RLock()
        self._closed = False

    def publish(self, feedback: Sequence[Feedback]) -> None:
        """Send feedback on. Called from any thread."""
        self._tell(self._learners, tuple(feedback))

    def announce(self, decision: Decision) -> None:
        """Keep a decision and tell those who listen. Called from any thread."""
        with self._lock:
            self._decisions.append(decision)
            self._tell(self._listeners, decision)

    def subscribe(self, learn: Learn) -> None:
        """Have ``learn`` called with all feedback that is published from now on."""
        with self._lock:
            self._learners += (learn,)

    def listen(self, listener: Callable[[Decision], None]) -> None:
        """Have ``listener`` called with every decision that is announced from now on."""
        with self._lock:
            self._listeners += (listener,)

    @property
    def decisions(self) -> list[Decision]:
        """The decisions announced last, oldest first; at most ``keep_decisions``."""
        with self._lock:
            return list(self._decisions)

    def close(self) -> None:
        """Carry nothing from now on; all that was published has been delivered."""
        with self._lock:
            self._closed = True

    def _tell(self, listeners: tuple[Callable[[Any], None], ...], what: Any) -> None:
        with self._lock:  # one order for all listeners, whoever publishes
            if self._closed:
                log.warning("the feedback bus is closed: %r came too late", what)
                return
            for listener in listeners:
                try:
                    listener(what)
                except Exception:
                    log.exception("a listener of the feedback bus failed")


def open_bus(config: BusConfig, flow: str) -> FeedbackBus:
    """The bus that the configuration's ``[bus]`` asks for, for a process that runs the flow ``flow``.

    Raises ConfigError where it cannot work; whether Kafka is there is seen when a run begins.
    """
    if config.kind == "memory":
        return InProcessBus()
    # Who needs no Kafka does not wait for its library to load.
    from chainwax.connectors.kafka_bus import KafkaBus

    servers, topics = kafka_of(config)
    return KafkaBus(servers, flow=flow, topics=topics, patience=config.catch_up_seconds)


def kafka_of(config: BusConfig) -> tuple[KafkaServers, Topics]:
    """Where Kafka is, and the topics' names, as ``[bus]`` says. Raises ConfigError."""
    from chainwax.connectors.bus_topics import Topics
    from chainwax.connectors.kafka.servers import SERVER_OPTIONS, KafkaServers

    known = [name for name in SERVER_OPTIONS if name != "servers"]
    for name in config.options:
        if name not in known:
            raise UnknownName("key in [bus.options]", name, known)
    options: dict[str, Any] = dict(config.options)
    servers = KafkaServers(config.servers, **options)
    return servers, Topics(
        feedback=config.topic("feedback"),
        calls=config.topic("calls"),
        decisions=config.topic("decisions"),
        dead_letters=config.topic("dead-letters"),
        control=config.topic("control"),
    )
