"""Kafka topics as sources and sinks."""

from __future__ import annotations

from chainwax.connectors.kafka.codecs import CODECS, BytesCodec, Codec, JsonCodec, TextCodec
from chainwax.connectors.kafka.servers import KafkaServers
from chainwax.connectors.kafka.sink import KafkaSink
from chainwax.connectors.kafka.source import KafkaSource

__all__ = [
    "CODECS",
    "BytesCodec",
    "Codec",
    "JsonCodec",
    "KafkaServers",
    "KafkaSink",
    "KafkaSource",
    "TextCodec",
]
