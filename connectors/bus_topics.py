"""The bus's topics: their names, what they are like, and how they come to be."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from kafka import KafkaAdminClient
from kafka.errors import (
    AuthorizationError,
    InvalidReplicationFactorError,
    PolicyViolationError,
    TopicAlreadyExistsError,
)

from chainwax.connectors.kafka.servers import reason_of

__all__ = ["Topics"]

log = logging.getLogger(__name__)

_UNKNOWN_TOPIC = 3
_DAY_MS = 24 * 3600 * 1000
_told: set[str] = set()
"""Topics that could not be made."""


@dataclass(frozen=True, slots=True)
class Topics:
    """The names of the five topics."""

    feedback: str = "chainwax.feedback"
    calls: str = "chainwax.calls"
    decisions: str = "chainwax.decisions"
    dead_letters: str = "chainwax.dead-letters"
    control: str = "chainwax.control"

    def ensure(self, admin: KafkaAdminClient, names: Iterable[str]) -> dict[str, tuple[str, int]]:
        """Make those of the topics that are not there.

        Gives back the id and the number of partitions of each that is there now; one that may not be made,
        or that nobody leads yet, is left out. Raises KafkaError where the cluster does not answer.
        """
        wanted = list(names)
        found = _described(admin, wanted)
        absent = [name for name in wanted if name not in found]
        if absent:
            made = [name for name in absent if self._make(admin, name)]
            if made:
                admin.wait_for_topics(made)
            found = _described(admin, wanted)
        return found

    def _make(self, admin: KafkaAdminClient, name: str) -> bool:
        """Whether it is there then."""
        configs = {
            # The broker's clock, so that what is read later is read in the order in which it came.
            "message.timestamp.type": "LogAppendTime",
            # What routers know is all that was ever said to them; the calls are only for looking up.
            "retention.ms": "-1" if name == self.feedback else str(30 * _DAY_MS),
        }
        if name == self.control:
            # Of each thing that can be changed, what was said last stays.
            configs["cleanup.policy"] = "compact"
        # One partition has one order, and with it every router adds up the same numbers the same way.
        topic = {"num_partitions": 1, "replication_factor": -1, "configs": configs}
        try:
            admin.create_topics({name: topic})
            log.info("topic '%s' has been made", name)
        except TopicAlreadyExistsError:
            return True
        except (AuthorizationError, InvalidReplicationFactorError, PolicyViolationError) as error:
            level = logging.DEBUG if name in _told else logging.WARNING  # it is tried again and again
            _told.add(name)
            log.log(level, "topic '%s' does not exist and cannot be made here: %s", name, reason_of(error))
            return False
        return True


def _described(admin: KafkaAdminClient, names: list[str]) -> dict[str, tuple[str, int]]:
    found: dict[str, tuple[str, int]] = {}
    for topic in admin.describe_topics(names):
        code = topic["error_code"]
        led = all(part["leader_id"] >= 0 for part in topic["partitions"])
        if code == 0 and topic["partitions"] and led:
            found[topic["name"]] = (str(topic["topic_id"]), len(topic["partitions"]))
        elif code not in (0, _UNKNOWN_TOPIC):
            log.debug("topic '%s' cannot be used now: error %s", topic["name"], code)
    return found
