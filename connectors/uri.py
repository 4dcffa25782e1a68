"""Sources and sinks by name: ``tickets.jsonl?speed=10x``, ``recording:run.db?run=latest``, ``-``.

A new connector is one entry in `SOURCES` or `SINKS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any
from urllib.parse import parse_qsl

from bytewax.inputs import Source
from bytewax.outputs import Sink

from chainwax.connectors.record import AnyRecord, StopSwitch
from chainwax.connectors.recorded import RecordedSource
from chainwax.connectors.recording import RecordingSource
from chainwax.connectors.sinks import ConsoleSink, JsonLinesSink
from chainwax.router.errors import ConfigError, RecordingError, UnknownName, nearest

__all__ = ["SINKS", "SOURCES", "Kind", "Uri", "open_sink", "open_source", "parse_uri"]


@dataclass(frozen=True, slots=True)
class Uri:
    """A URI in its parts."""

    scheme: str
    """``file`` where none is written."""
    path: str
    """All between the scheme and the options."""
    options: Mapping[str, str] = field(default_factory=dict)
    """What stands behind the question mark."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of source or sink."""

    open: Callable[..., Any]
    """Called as ``open(path, **options)``; sources also get ``stop``."""
    options: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)
    """The options that it takes, each with what reads its text and raises ValueError."""
    endings: tuple[str, ...] = ()
    """The endings that a path must have one of; empty where any will do."""


def _kafka_source(path: str, **options: Any) -> Source[AnyRecord]:
    from chainwax.connectors.kafka import uris  # most flows need no Kafka, and its client takes a while

    return uris.source(path, **options)


def _kafka_sink(path: str, **options: Any) -> Sink[Any]:
    from chainwax.connectors.kafka import uris

    return uris.sink(path, **options)


_SERVERS: Mapping[str, Callable[[str], Any]] = dict.fromkeys(
    (
        "servers",
        "security_protocol",
        "sasl_mechanism",
        "sasl_username",
        "sasl_password_env",
        "ssl_cafile",
        "ssl_certfile",
        "ssl_keyfile",
        "ssl_password_env",
    ),
    str,
)
_REGISTRY: Mapping[str, Callable[[str], Any]] = dict.fromkeys(
    ("registry", "registry_username", "registry_password_env", "registry_cafile"), str
)
_KAFKA: Mapping[str, Callable[[str], Any]] = {
    **dict.fromkeys(("from", "to", "group", "codec", "key", "time", "headers", "on_lost"), str),
    **dict.fromkeys(("limit", "batch_size"), int),
    **_REGISTRY,
    **_SERVERS,
}
_KAFKA_OUT: Mapping[str, Callable[[str], Any]] = {
    **dict.fromkeys(("codec", "compression", "transactional_id", "subject", "schema", "message"), str),
    "max_record_bytes": int,
    **_REGISTRY,
    **_SERVERS,
}

_PACED: Mapping[str, Callable[[str], Any]] = {"speed": str, "limit": int, "batch_size": int}

SOURCES: dict[str, Kind] = {
    "file": Kind(RecordedSource, {"key": str, "time": str, **_PACED}),
    "recording": Kind(RecordingSource, {"run": str, "source": str, **_PACED}),
    "kafka": Kind(_kafka_source, _KAFKA),
}
"""Sources by scheme."""


def _console(path: str) -> ConsoleSink:
    if path:
        raise ConfigError(f"stdout takes no path, but '{path}' is given")
    return ConsoleSink()


SINKS: dict[str, Kind] = {
    "file": Kind(JsonLinesSink, endings=(".jsonl", ".ndjson")),
    "stdout": Kind(_console),
    "kafka": Kind(_kafka_sink, _KAFKA_OUT),
}
"""Sinks by scheme."""


def parse_uri(uri: str) -> Uri:
    """The parts of a URI, whatever its scheme.

    >>> parse_uri("in/tickets.jsonl?key=id&speed=10x")
    Uri(scheme='file', path='in/tickets.jsonl', options={'key': 'id', 'speed': '10x'})
    >>> parse_uri("recording:run.db").scheme, parse_uri("-").scheme
    ('recording', 'stdout')

    Raises ConfigError where an option has no value or comes twice.
    """
    if uri == "-":
        return Uri("stdout", "")
    place, mark, query = uri.partition("?")
    # Two letters at least: one is a drive.
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", place)
    scheme = found[1].lower() if found else "file"
    path = place[found.end() :] if found else place
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        raise ConfigError(
            f"'{uri}': options are written ?name=value&name=value, not '{mark}{query}'"
        ) from None
    options: dict[str, str] = {}
    for name, value in pairs:
        if not value:
            raise ConfigError(f"'{uri}': option '{name}' has no value")
        if name in options:
            raise ConfigError(f"'{uri}': option '{name}' is given twice")
        options[name] = value
    return Uri(scheme, path, options)


def open_source(
    uri: str, *, name: str, stop: StopSwitch | None = None, speed: str | float | None = None
) -> Source[AnyRecord]:
    """The source that a URI names, for the node ``name``.

    ``speed`` is for sources whose URI states none. Raises ConfigError, which names the node and the
    URI: an unknown scheme, option, file or ending, with the nearest there is.
    """
    defaults = {} if speed is None else {"speed": speed}
    source: Source[AnyRecord] = _open(SOURCES, "source", uri, name, defaults, {"stop": stop})
    return source


def open_sink(uri: str, *, name: str) -> Sink[tuple[str, Any]]:
    """The sink that a URI names, for the node ``name``. Raises ConfigError as `open_source` does."""
    sink: Sink[tuple[str, Any]] = _open(SINKS, "sink", uri, name, {}, {})
    return sink


def _open(
    kinds: Mapping[str, Kind],
    what: str,
    uri: str,
    name: str,
    defaults: Mapping[str, Any],
    always: Mapping[str, Any],
) -> Any:
    try:
        parts = parse_uri(uri)
        kind = kinds.get(parts.scheme)
        if kind is None:
            raise UnknownName(f"{what} scheme", parts.scheme, kinds)
        if kind.endings and not parts.path.lower().endswith(kind.endings):
            ending = PurePath(parts.path).suffix
            raise ConfigError(
                f"ending '{ending}' is not one that is written: {nearest(ending, kind.endings)}"
            )
        options = {option: value for option, value in defaults.items() if option in kind.options}
        for option, text in parts.options.items():
            if option not in kind.options:
                raise UnknownName("option", option, kind.options)
            try:
                options[option] = kind.options[option](text)
            except ValueError:
                raise ConfigError(f"option '{option}' is '{text}', which is not a number") from None
        return kind.open(parts.path, **options, **always)
    except (ConfigError, RecordingError) as error:
        raise ConfigError(f"{what} '{name}' ({uri}): {error}") from error
