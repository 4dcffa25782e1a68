"""Protobuf in a Schema Registry's wire format, with Google's protobuf and no generated classes."""

from __future__ import annotations

import base64
import binascii
import importlib
from typing import Any

from typing_extensions import override

from chainwax.connectors.kafka.registry import Schema
from chainwax.connectors.kafka.schemas import HEAD, Reader, SchemaCodec, Writer
from chainwax.router.errors import ConfigError, nearest

try:
    from google.protobuf import descriptor_pool, json_format, message_factory
    from google.protobuf.descriptor_pb2 import FileDescriptorProto
    from google.protobuf.message import DecodeError
except ImportError as error:
    raise ConfigError("codec=protobuf needs protobuf: pip install 'chainwax[schemas]'") from error

__all__ = ["ProtobufCodec"]

MAX_INDEXES = 64
"""How deep messages may be defined inside one another."""


class ProtobufCodec(SchemaCodec):
    """Protobuf: messages are dictionaries in Protobuf's own JSON mapping, with the fields' own names.

    >>> ProtobufCodec("http://127.0.0.1:8081", message="Ticket").kind
    'PROTOBUF'

    So 64-bit numbers are texts, bytes base64 text, times ISO text, enums their names; fields that are not set
    have their defaults (https://protobuf.dev/programming-guides/json/). ``message`` is the one to write,
    where it is not the schema's first.
    """

    name = "protobuf"
    kind = "PROTOBUF"
    form = "serialized"

    def __init__(self, *given: Any, message: str | None = None, **more: Any) -> None:
        super().__init__(*given, **more)
        self._message = message

    @override
    def ready(self, topics: Any, *, writing: bool) -> None:
        """As every codec with schemas does."""
        if self._message and not writing:
            raise ConfigError("'message' is for sinks: a record says itself which message it is")
        super().ready(topics, writing=writing)

    @override
    def reader(self, schema: Schema) -> Reader:
        """Reads whichever of the schema's messages a record is."""
        pool, file = _file(schema)
        kinds: dict[tuple[int, ...], Any] = {}

        def reader(raw: bytes) -> Any:
            indexes, start = _indexes(raw)
            kind = kinds.get(indexes)
            if kind is None:
                kind = kinds[indexes] = message_factory.GetMessageClass(_at(file, indexes))
            message = kind()
            try:
                message.ParseFromString(raw[start:])
            except DecodeError as error:
                raise ValueError(f"not a message {kind.DESCRIPTOR.full_name}: {error}") from None
            return json_format.MessageToDict(
                message,
                preserving_proto_field_name=True,
                always_print_fields_with_no_presence=True,
                descriptor_pool=pool,
            )

        return reader

    @override
    def writer(self, schema: Schema) -> Writer:
        """Writes one of the schema's messages."""
        pool, file = _file(schema)
        messages = _messages(file)
        if not messages:
            raise ValueError("it has no message")
        wanted = self._message or next(iter(messages))
        indexes = messages.get(wanted) or messages.get(f"{file.package}.{wanted}")
        if indexes is None:
            short = [name.removeprefix(f"{file.package}.") for name in messages]
            raise ValueError(f"it has no message '{wanted}': {nearest(wanted, short)}")
        kind = message_factory.GetMessageClass(_at(file, indexes))
        # The first message alone is so common that it has a shorter form.
        head = b"\0" if indexes == (0,) else b"".join(map(_zigzag, (len(indexes), *indexes)))

        def writer(value: Any) -> bytes:
            message = kind()
            json_format.ParseDict(value, message, descriptor_pool=pool)
            return head + bytes(message.SerializeToString())

        return writer


def _file(schema: Schema) -> tuple[Any, Any]:
    """The schema's file in a pool with all that it imports."""
    pool = descriptor_pool.DescriptorPool()
    proto = _proto(schema.text, f"schema-{schema.id}.proto")
    parts = [_proto(text, name) for name, text in schema.references]
    known = {part.name for part in parts}
    for one in (*parts, proto):
        for imported in one.dependency:
            _add_common(pool, imported, known)
    for part in parts:
        pool.Add(part)
    pool.Add(proto)
    return pool, pool.FindFileByName(proto.name)


def _proto(text: str, name: str) -> FileDescriptorProto:
    proto = FileDescriptorProto()
    try:
        proto.ParseFromString(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError, DecodeError):
        raise ValueError(
            "the registry does not give Protobuf schemas compiled (format=serialized): only those are read"
        ) from None
    proto.name = name
    return proto


def _add_common(pool: Any, name: str, known: set[str]) -> None:
    """Add a file that everyone has, such as google/protobuf/timestamp.proto, and what it imports."""
    if name in known:
        return
    known.add(name)
    if name.startswith("google/protobuf/"):
        module = name.removesuffix(".proto").replace("/", ".")
        importlib.import_module(f"{module}_pb2")
    proto = FileDescriptorProto()
    try:
        descriptor_pool.Default().FindFileByName(name).CopyToProto(proto)
    except KeyError:
        raise ValueError(
            f"it imports {name}, which is neither among its references nor loaded here"
        ) from None
    for imported in proto.dependency:
        _add_common(pool, imported, known)
    pool.Add(proto)


def _messages(file: Any) -> dict[str, tuple[int, ...]]:
    """All messages by full name, with their place: the indexes from the outermost inwards."""
    found: dict[str, tuple[int, ...]] = {}

    def add(kinds: Any, before: tuple[int, ...]) -> None:
        for number, kind in enumerate(kinds):
            found[kind.full_name] = (*before, number)
            add(kind.nested_types, (*before, number))

    add(_outermost(file), ())
    return found


def _outermost(file: Any) -> list[Any]:
    """The file's messages in the order in which they stand in it."""
    proto = FileDescriptorProto()
    file.CopyToProto(proto)
    return [file.message_types_by_name[one.name] for one in proto.message_type]


def _at(file: Any, indexes: tuple[int, ...]) -> Any:
    kinds = _outermost(file)
    kind = None
    for index in indexes:
        if index >= len(kinds):
            raise ValueError(f"its schema has no message at {list(indexes)}")
        kind = kinds[index]
        kinds = kind.nested_types
    return kind


def _indexes(raw: bytes) -> tuple[tuple[int, ...], int]:
    """Which message it is, and where it begins."""
    count, at = _unzigzag(raw, HEAD)
    if count == 0:
        return (0,), at
    if not 0 < count <= MAX_INDEXES:
        raise ValueError(f"{count} message indexes")
    found = []
    for _ in range(count):
        index, at = _unzigzag(raw, at)
        if index < 0:
            raise ValueError(f"message index {index}")
        found.append(index)
    return tuple(found), at


def _unzigzag(raw: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 35, 7):
        if at >= len(raw):
            raise ValueError("cut off within its message indexes")
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (value >> 1) ^ -(value & 1), at
    raise ValueError("its message indexes are no numbers")


def _zigzag(number: int) -> bytes:
    value = number << 1
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])
