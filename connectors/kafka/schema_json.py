"""JSON Schema in a Schema Registry's wire format, with jsonschema-rs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn

from typing_extensions import override

from chainwax.connectors.kafka.codecs import JsonCodec
from chainwax.connectors.kafka.registry import Schema
from chainwax.connectors.kafka.schemas import HEAD, Reader, SchemaCodec, Writer
from chainwax.router.errors import ConfigError

try:
    import jsonschema_rs
except ImportError as error:
    raise ConfigError("codec=jsonschema needs jsonschema-rs: pip install 'chainwax[schemas]'") from error

__all__ = ["JsonSchemaCodec"]

_JSON = JsonCodec()


class JsonSchemaCodec(SchemaCodec):
    """JSON that is checked against its schema, when it is read and when it is written.

    >>> JsonSchemaCodec("http://127.0.0.1:8081").kind
    'JSON'
    """

    name = "jsonschema"
    kind = "JSON"

    @override
    def reader(self, schema: Schema) -> Reader:
        """Reads and checks."""
        check = _checker(schema)

        def reader(raw: bytes) -> Any:
            value = _JSON.decode(raw[HEAD:], "")
            check(value)
            return value

        return reader

    @override
    def writer(self, schema: Schema) -> Writer:
        """Checks what stands in the bytes: a time is text there."""
        check = _checker(schema)

        def writer(value: Any) -> bytes:
            raw = _JSON.encode(value, "")
            check(_JSON.decode(raw, ""))
            return raw

        return writer


def _checker(schema: Schema) -> Callable[[Any], None]:
    parts = [(name, json.loads(text)) for name, text in schema.references]
    registry = jsonschema_rs.Registry(parts, retriever=_fetch_nothing) if parts else None
    validator = jsonschema_rs.validator_for(
        json.loads(schema.text), registry=registry, retriever=_fetch_nothing
    )
    is_valid = validator.is_valid

    def check(value: Any) -> None:
        if not is_valid(value):
            error = next(validator.iter_errors(value))
            place = "/".join(map(str, error.instance_path))
            raise ValueError(f"{place}: {error.message[:300]}" if place else error.message[:300])

    return check


def _fetch_nothing(address: str) -> NoReturn:
    raise ValueError(f"it refers to {address}, which is not among the references that it was registered with")
