"""``kafka://TOPIC?servers=HOST:PORT&…`` as a source or a sink."""

from __future__ import annotations

from typing import Any

from chainwax.connectors.kafka.servers import SERVER_OPTIONS, KafkaServers
from chainwax.connectors.kafka.sink import KafkaSink
from chainwax.connectors.kafka.source import KafkaSource
from chainwax.connectors.record import StopSwitch
from chainwax.router.errors import ConfigError

__all__ = ["sink", "source"]


def source(path: str, *, stop: StopSwitch | None = None, **options: Any) -> KafkaSource:
    """The source that a URI names; several topics have commas between."""
    servers = _servers(options)
    if "from" in options:
        options["from_"] = options.pop("from")
    return KafkaSource(_topics(path), servers=servers, stop=stop, **options)


def sink(path: str, **options: Any) -> KafkaSink:
    """The sink that a URI names."""
    topics = _topics(path)
    if len(topics) > 1:
        raise ConfigError(f"a sink writes to one topic, not to {len(topics)}")
    return KafkaSink(topics[0], servers=_servers(options), **options)


def _topics(path: str) -> list[str]:
    name = path.removeprefix("//").removesuffix("/")
    if "/" in name or ":" in name or not name:
        raise ConfigError(f"'{name}' is no topic: write kafka://TOPIC?servers=HOST:PORT")
    return [topic.strip() for topic in name.split(",")]


def _servers(options: dict[str, Any]) -> KafkaServers:
    return KafkaServers(**{name: options.pop(name) for name in SERVER_OPTIONS if name in options})
