"""From where to where a topic is read: what ``from`` and ``to`` mean in offsets."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from kafka import KafkaAdminClient, TopicPartition
from kafka.errors import KafkaError, RetriableError
from kafka.protocol.consumer import IsolationLevel, OffsetSpec

from chainwax.connectors.kafka.servers import reason_of
from chainwax.connectors.readers import parse_time
from chainwax.router.clock import SYSTEM_CLOCK
from chainwax.router.errors import ConfigError, nearest

__all__ = ["Place", "Span", "parse_place", "spans"]

log = logging.getLogger(__name__)

COORDINATOR_SECONDS = 15.0
"""How long the place where groups are kept may take to be there; a cluster's first use of it makes it."""


@dataclass(frozen=True, slots=True)
class Place:
    """A place in every partition: a word, an offset, or a time."""

    word: str = ""
    offset: int = 0
    time: float | None = None
    """Seconds since 1970, UTC."""


@dataclass(frozen=True, slots=True)
class Span:
    """One partition's offsets as they were at the start: the last of each pair is not read."""

    first: int
    """The oldest there is."""
    end: int
    """Where the next record will come."""
    start: int
    stop: int | None
    """None where it is read on and on."""


def parse_place(option: str, given: str | int | datetime, words: Iterable[str]) -> Place:
    """What ``from`` or ``to`` says: one of ``words``, an offset, an ISO time.

    Raises ConfigError where it is none of them, or a time to come.
    """
    if isinstance(given, int):
        given = str(given)
    if isinstance(given, datetime):
        return Place(time=parse_time(given))
    if given in words:
        return Place(given)
    if given.isdecimal():
        return Place(offset=int(given))
    if not re.match(r"\d{4}-", given):
        raise ConfigError(
            f"{option} '{given}' is neither an offset nor an ISO time such as 2026-03-01T12:00Z, nor a word: "
            f"{nearest(given, words)}"
        )
    try:
        # In a URI a plus sign means a space.
        when = parse_time(re.sub(r"(:[\d.]+) (\d\d:?\d\d)$", r"\1+\2", given))
    except (ValueError, OverflowError):
        raise ConfigError(f"{option} '{given}' is not an ISO time such as 2026-03-01T12:00Z") from None
    if when > SYSTEM_CLOCK.time():
        raise ConfigError(f"{option} '{given}' is still to come: a range ends with what the topic holds now")
    return Place(time=when)


def spans(
    admin: KafkaAdminClient,
    parts: list[TopicPartition],
    start: Place,
    stop: Place | None,
    group: str | None,
) -> dict[TopicPartition, Span]:
    """Where each partition is to be read. Raises ConfigError where the cluster cannot say."""
    try:
        first = _offsets(admin, dict.fromkeys(parts, int(OffsetSpec.EARLIEST)))
        end = _offsets(admin, dict.fromkeys(parts, int(OffsetSpec.LATEST)))
        stored = _stored(admin, parts, group) if start.word == "stored" and group else {}
        starts = _places(admin, start, first, end, stored)
        stops = _places(admin, stop, first, end, {}) if stop else {}
    except (KafkaError, OSError) as error:
        raise ConfigError(f"its offsets cannot be read: {reason_of(error)}") from error
    return {part: Span(first[part], end[part], starts[part], stops.get(part)) for part in parts}


def _offsets(admin: KafkaAdminClient, specs: Mapping[TopicPartition, int]) -> dict[TopicPartition, int]:
    found = admin.list_partition_offsets(dict(specs), isolation_level=IsolationLevel.READ_COMMITTED)
    return {part: at.offset for part, at in found.items()}


def _stored(admin: KafkaAdminClient, parts: list[TopicPartition], group: str) -> dict[TopicPartition, int]:
    until = time.monotonic() + COORDINATOR_SECONDS
    while True:
        try:
            found = admin.list_group_offsets({group: parts})[group]
            return {part: at.offset for part, at in found.items() if at.offset >= 0}
        except RetriableError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def _places(
    admin: KafkaAdminClient,
    place: Place,
    first: Mapping[TopicPartition, int],
    end: Mapping[TopicPartition, int],
    stored: Mapping[TopicPartition, int],
) -> dict[TopicPartition, int]:
    if place.word == "latest":
        return dict(end)
    if place.word:
        return {part: stored.get(part, offset) for part, offset in first.items()}
    if place.time is not None:
        found = _offsets(admin, dict.fromkeys(first, int(place.time * 1000)))
        # -1: nothing is as late as that.
        return {part: offset if offset >= 0 else end[part] for part, offset in found.items()}
    return {part: min(place.offset, offset) for part, offset in end.items()}
