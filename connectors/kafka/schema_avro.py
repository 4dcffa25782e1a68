"""Avro in a Schema Registry's wire format, with fastavro."""

from __future__ import annotations

import io
import json
from typing import Any

from typing_extensions import override

from chainwax.connectors.kafka.codecs import JsonCodec
from chainwax.connectors.kafka.registry import Schema
from chainwax.connectors.kafka.schemas import HEAD, Reader, SchemaCodec, Writer
from chainwax.router.errors import ConfigError

try:
    import fastavro

    # fastavro's compiled reader goes as deep as a record says, and ends the process where the stack does.
    from fastavro._read_py import schemaless_reader as careful_reader
except ImportError as error:
    raise ConfigError("codec=avro needs fastavro: pip install 'chainwax[schemas]'") from error

__all__ = ["AvroCodec"]

_JSON = JsonCodec()


class AvroCodec(SchemaCodec):
    """Avro: records are dictionaries; times, dates, decimals and UUIDs are Python's own.

    >>> AvroCodec("http://127.0.0.1:8081", subject="tickets-value").kind
    'AVRO'

    Written values must have the schema's fields, and no others; those with a default may be missing.
    """

    name = "avro"
    kind = "AVRO"

    @override
    def reader(self, schema: Schema) -> Reader:
        """Reads with the schema that the record was written with."""
        parsed, recursive = _parsed(schema)
        read = careful_reader if recursive else fastavro.schemaless_reader

        def reader(raw: bytes) -> Any:
            stream = io.BytesIO(raw)
            stream.seek(HEAD)
            value = read(stream, parsed, None)
            if stream.tell() != len(raw):
                raise ValueError(f"{len(raw) - stream.tell()} bytes are left over")
            if recursive:
                _JSON.decode(_JSON.encode(value, ""), "")  # no deeper than any other value may be
            return value

        return reader

    @override
    def writer(self, schema: Schema) -> Writer:
        """Writes by the schema."""
        parsed, recursive = _parsed(schema)

        def writer(value: Any) -> bytes:
            if recursive:
                _JSON.decode(_JSON.encode(value, ""), "")  # one that holds itself would never end
            stream = io.BytesIO()
            try:
                fastavro.schemaless_writer(stream, parsed, value, strict_allow_default=True)
            except Exception:
                _say_which(value, parsed)
                raise
            return stream.getvalue()

        return writer


def _say_which(value: Any, parsed: Any) -> None:
    """Raise ValueError with the fields that do not fit; fastavro's writer often does not name them."""
    try:
        fastavro.validate(value, parsed)
    except fastavro.validation.ValidationError as error:
        raise ValueError("; ".join(str(one).lstrip()[:200] for one in error.errors[:5])) from None


def _parsed(schema: Schema) -> tuple[Any, bool]:
    """The schema as fastavro wants it, and whether something in it may hold itself."""
    named: dict[str, Any] = {}
    parts = [(name, json.loads(text)) for name, text in schema.references]
    for _, part in parts:
        fastavro.parse_schema(part, named_schemas=named)
    whole = json.loads(schema.text)
    parsed = fastavro.parse_schema(whole, named_schemas=named)
    return parsed, any(_holds_itself(name, named) for name in named)


def _holds_itself(name: str, named: dict[str, Any]) -> bool:
    found: set[str] = set()
    left = _names_in(named[name], named)
    while left:
        one = left.pop()
        if one not in found:
            found.add(one)
            left |= _names_in(named[one], named)
    return name in found


def _names_in(part: Any, named: dict[str, Any]) -> set[str]:
    """The named types that a parsed schema refers to by name."""
    if isinstance(part, str):
        return {part} if part in named else set()
    if isinstance(part, list):
        return set().union(*(_names_in(one, named) for one in part))
    if isinstance(part, dict):
        inner = [part.get("type"), part.get("items"), part.get("values"), *part.get("fields", ())]
        return set().union(*(_names_in(one, named) for one in inner if one is not None))
    return set()
