"""``kafka://TOPIC?servers=HOST:PORT&…`` as a source or a sink."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chainwax.connectors.kafka.codecs import SCHEMA_CODECS, Codec, codec_of
from chainwax.connectors.kafka.registry import REGISTRY_OPTIONS, SchemaRegistry
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
    return KafkaSource(_topics(path), servers=servers, codec=_codec(options), stop=stop, **options)


def sink(path: str, **options: Any) -> KafkaSink:
    """The sink that a URI names."""
    topics = _topics(path)
    if len(topics) > 1:
        raise ConfigError(f"a sink writes to one topic, not to {len(topics)}")
    return KafkaSink(topics[0], servers=_servers(options), codec=_codec(options), **options)


def _topics(path: str) -> list[str]:
    name = path.removeprefix("//").removesuffix("/")
    if "/" in name or ":" in name or not name:
        raise ConfigError(f"'{name}' is no topic: write kafka://TOPIC?servers=HOST:PORT")
    return [topic.strip() for topic in name.split(",")]


def _servers(options: dict[str, Any]) -> KafkaServers:
    return KafkaServers(**{name: options.pop(name) for name in SERVER_OPTIONS if name in options})


REGISTRY_NAMES: Mapping[str, str] = {
    name: "registry" if name == "url" else f"registry_{name}" for name in REGISTRY_OPTIONS
}
"""How a URI calls the options of a registry."""
WRITER_OPTIONS = ("subject", "schema", "message")
"""What says by which schema a sink writes."""


def _codec(options: dict[str, Any]) -> Codec:
    name = options.pop("codec", "json")
    registry = {name: options.pop(said) for name, said in REGISTRY_NAMES.items() if said in options}
    more = {said: options.pop(said) for said in WRITER_OPTIONS if said in options}
    if name in SCHEMA_CODECS:
        if "message" in more and name != "protobuf":
            raise ConfigError(f"option 'message' is for codec=protobuf, not for codec={name}")
        return codec_of(name, registry=SchemaRegistry(**registry), **more)
    if registry or more:
        given = ", ".join([*(REGISTRY_NAMES[option] for option in registry), *more])
        raise ConfigError(f"{given}: only for codec={', '.join(SCHEMA_CODECS)}; this is codec={name}")
    return codec_of(name)
