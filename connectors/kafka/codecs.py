"""From the bytes of a topic to values and back. A new format is one entry in `CODECS`.

Those whose schemas come from a registry stand in modules of their own: they need libraries of an extra.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from kafka.consumer.fetcher import ConsumerRecord

from chainwax.connectors.readers import Fields, parse_json
from chainwax.connectors.record import AnyRecord, BadRecord, Record, SourceError
from chainwax.connectors.sinks import to_json
from chainwax.router.errors import UnknownName

__all__ = [
    "CODECS",
    "SCHEMA_CODECS",
    "BytesCodec",
    "Codec",
    "Decoder",
    "JsonCodec",
    "NotYet",
    "TextCodec",
    "codec_of",
    "make_ready",
]


class NotYet(Exception):
    """A codec cannot decode a record now, and can later: the source keeps it and tries again."""


class Codec(Protocol):
    """One format of values. ``topic`` is for formats whose schema hangs on the topic's name.

    Where it also has ``ready(topics, *, writing)``, that is called once before the flow starts; it raises
    ConfigError where the codec cannot work.
    """

    def decode(self, raw: bytes, topic: str) -> Any:
        """The value that the bytes are. Raises ValueError where they are none."""
        ...

    def encode(self, value: Any, topic: str) -> bytes:
        """The bytes of a value. Raises TypeError or ValueError where it has none."""
        ...


class _Bare(Fields):
    """No key and no time: the decoder looks for those."""

    def record(self, value: Any, position: str) -> AnyRecord:
        return Record(value)


_BARE = _Bare()


class JsonCodec:
    """Any JSON value; refused are what JSON forbids, nesting deeper than 100, and half surrogate pairs.

    >>> JsonCodec().decode(b'{"n": 1}', "t"), JsonCodec().encode({"n": 1}, "t")
    ({'n': 1}, b'{"n": 1}')
    """

    def decode(self, raw: bytes, topic: str) -> Any:
        """The value; ValueError says what is wrong and where."""
        parsed = parse_json(raw, "", _BARE)
        if parsed is None:
            raise ValueError("malformed JSON: the value is empty")
        if isinstance(parsed, BadRecord):
            raise ValueError(parsed.error)
        return parsed.value

    def encode(self, value: Any, topic: str) -> bytes:
        """What `to_json` makes of it."""
        return to_json(value).encode()


class TextCodec:
    """UTF-8 text."""

    def decode(self, raw: bytes, topic: str) -> str:
        """The text."""
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: byte 0x{raw[error.start]:02x} at {error.start + 1}") from None

    def encode(self, value: Any, topic: str) -> bytes:
        """The bytes of a text."""
        if not isinstance(value, str):
            raise TypeError(f"codec=text writes texts, not a {type(value).__name__}")
        return value.encode()


class BytesCodec:
    """The bytes as they are."""

    def decode(self, raw: bytes, topic: str) -> bytes:
        """The same bytes."""
        return raw

    def encode(self, value: Any, topic: str) -> bytes:
        """The same bytes."""
        if not isinstance(value, (bytes, bytearray, memoryview)):
            raise TypeError(f"codec=bytes writes bytes, not a {type(value).__name__}")
        return bytes(value)


CODECS: dict[str, Codec] = {"json": JsonCodec(), "text": TextCodec(), "bytes": BytesCodec()}
"""Codecs by the name that a URI gives them."""


SCHEMA_CODECS: Mapping[str, tuple[str, str]] = {
    "avro": ("chainwax.connectors.kafka.schema_avro", "AvroCodec"),
    "jsonschema": ("chainwax.connectors.kafka.schema_json", "JsonSchemaCodec"),
    "protobuf": ("chainwax.connectors.kafka.schema_protobuf", "ProtobufCodec"),
}
"""Module and class of the codecs whose schemas come from a registry."""


def codec_of(codec: str | Codec, **options: Any) -> Codec:
    """The codec of that name, or the codec itself; ``options`` are for those with schemas.

    Raises UnknownName, and ConfigError where a library for it is not installed.
    """
    if not isinstance(codec, str):
        return codec
    if codec in SCHEMA_CODECS:
        module, name = SCHEMA_CODECS[codec]
        made: Codec = getattr(importlib.import_module(module), name)(**options)
        return made
    if codec not in CODECS:
        raise UnknownName("codec", codec, CODECS.keys() | SCHEMA_CODECS.keys())
    return CODECS[codec]


def make_ready(codec: Codec, topics: Sequence[str], *, writing: bool) -> None:
    """Let a codec look at what it needs before the flow starts. Raises ConfigError."""
    ready = getattr(codec, "ready", None)
    if ready is not None:
        ready(topics, writing=writing)


class Decoder:
    """Makes records of what one topic holds.

    The key is the field ``key``, else the record's own key (hex where it is no UTF-8), else the usual
    fields of an object; the time is the field ``time``, else the record's own time stamp. With
    ``headers``, objects get the record's headers as ``{name: text}`` under that name.
    """

    def __init__(
        self, topic: str, codec: Codec, key: str | None, time: str | None, headers: str | None
    ) -> None:
        self._topic = topic
        self._codec = codec
        self._fields = Fields(key, time)
        self._own_key = key is None
        self._own_time = time is None
        self._headers = headers

    def __call__(self, message: ConsumerRecord) -> AnyRecord:
        """A record at ``topic:partition:offset``, or what is wrong with it.

        Raises NotYet where the codec has to wait, SourceError where it cannot work any longer.
        """
        raw = message.value
        position = f"{self._topic}:{message.partition}:{message.offset}"
        try:
            value = None if raw is None else self._codec.decode(raw, self._topic)
            if self._headers:
                value = _with_headers(value, self._headers, message.headers)
        except (NotYet, SourceError):
            raise
        except Exception as error:  # a codec may be anyone's, and one message must not end the flow
            why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            return BadRecord.of(position, raw or b"", why)
        record = self._fields.record(value, position)
        if type(record) is Record:
            if self._own_key and message.key is not None:
                record.key = _text(message.key)
            if self._own_time:
                record.time = message.timestamp / 1000 if message.timestamp >= 0 else None
        return record


def _with_headers(value: Any, name: str, headers: list[tuple[str, bytes | None]]) -> Mapping[str, Any]:
    if type(value) is not dict:
        raise ValueError(f"headers={name}: a {type(value).__name__} is not an object that could take them")
    value[name] = {header: None if raw is None else _text(raw) for header, raw in headers}
    return value


def _text(raw: bytes) -> str:
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError:
        return raw.hex()
