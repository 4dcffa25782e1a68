"""The control topic as a program without a run sees it: what operators say, and what is in force."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from kafka import KafkaProducer
from kafka.errors import KafkaError

from chainwax.connectors.bus import kafka_of
from chainwax.connectors.bus_reader import records_of
from chainwax.connectors.bus_writer import end_producer
from chainwax.connectors.kafka.servers import reason_of
from chainwax.connectors.wire import ControlMessage, Unreadable, decode, encode_control
from chainwax.router.config import BusConfig
from chainwax.router.control import Change
from chainwax.router.errors import ConfigError

__all__ = ["read_topic", "write_topic"]

_PATIENCE_S = 10.0


def read_topic(config: BusConfig, flow: str) -> list[Change]:
    """What the topic holds of a flow, oldest first; what cannot be read is passed over.

    Raises ConfigError where Kafka does not answer.
    """
    servers, topics = kafka_of(config)
    found = []
    with _explained(topics.control):
        for record in sorted(records_of(servers, topics.control), key=lambda one: one.timestamp):
            try:
                change = decode(ControlMessage, record.value).change
            except Unreadable:
                continue  # every process that hears it says so
            if change.flow == flow:
                found.append(replace(change, time=record.timestamp / 1000))
    return found


def write_topic(config: BusConfig, changes: Sequence[Change]) -> None:
    """Say what is to be changed from now on; returns when Kafka has it.

    Raises ConfigError where Kafka does not take it within 10 seconds.
    """
    servers, topics = kafka_of(config)
    with _explained(topics.control):
        with servers.admin() as admin:
            if topics.control not in topics.ensure(admin, [topics.control]):
                raise ConfigError(f"the topic '{topics.control}' does not exist and cannot be made here")
        producer = servers.connected(
            KafkaProducer,
            metrics_enabled=False,
            acks="all",
            enable_idempotence=True,
            delivery_timeout_ms=int(_PATIENCE_S * 1000),
            request_timeout_ms=5000,
            max_block_ms=5000,
            allow_auto_create_topics=False,
        )
        try:
            until = time.monotonic() + _PATIENCE_S
            for key, value in map(encode_control, changes):
                producer.send(topics.control, value, key=key).get(max(until - time.monotonic(), 0.1))
        finally:
            end_producer(producer, 1.0)


@contextmanager
def _explained(topic: str) -> Iterator[None]:
    try:
        yield
    except (KafkaError, OSError) as error:
        raise ConfigError(f"the topic '{topic}' cannot be used: {reason_of(error)}") from error
