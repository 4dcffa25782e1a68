"""Where streams come from and go to: recorded files, recordings, lists, the console, the feedback bus."""

from __future__ import annotations

from chainwax.connectors.bus import InProcessBus, open_bus
from chainwax.connectors.record import AnyRecord, BadRecord, Outgoing, Record, SourceError, StopSwitch
from chainwax.connectors.recorded import ItemsSource, RecordedSource, parse_speed
from chainwax.connectors.recording import RecordingSource
from chainwax.connectors.shared import open_redis
from chainwax.connectors.sinks import ConsoleSink, JsonLinesSink, JsonText, ListSink, SinkError, to_json
from chainwax.connectors.uri import SINKS, SOURCES, Kind, Uri, open_sink, open_source, parse_uri

__all__ = [
    "SINKS",
    "SOURCES",
    "AnyRecord",
    "BadRecord",
    "ConsoleSink",
    "InProcessBus",
    "ItemsSource",
    "JsonLinesSink",
    "JsonText",
    "Kind",
    "ListSink",
    "Outgoing",
    "Record",
    "RecordedSource",
    "RecordingSource",
    "SinkError",
    "SourceError",
    "StopSwitch",
    "Uri",
    "open_bus",
    "open_redis",
    "open_sink",
    "open_source",
    "parse_speed",
    "parse_uri",
    "to_json",
]
