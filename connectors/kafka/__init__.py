"""Kafka topics as sources and sinks.

The codecs with schemas stand in modules of their own, which need the extra ``schemas``:
`chainwax.connectors.kafka.schema_avro`, ``schema_json`` and ``schema_protobuf``.
"""

from __future__ import annotations

from chainwax.connectors.kafka.codecs import CODECS, BytesCodec, Codec, JsonCodec, NotYet, TextCodec
from chainwax.connectors.kafka.registry import SchemaRegistry
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
    "NotYet",
    "SchemaRegistry",
    "TextCodec",
]
