"""Keeps an eye on the topics that are read, beside the flow."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping

from kafka import KafkaAdminClient, TopicPartition
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata

from chainwax.connectors.kafka.servers import KafkaServers, reason_of, shut
from chainwax.router.errors import ConfigError

__all__ = ["Topic", "Watch"]

log = logging.getLogger(__name__)

LOOK_SECONDS = 30.0
"""How often it looks for new partitions and for topics that are gone."""
COMMIT_SECONDS = 5.0
"""How often a group's offsets are committed."""

Topic = tuple[str, int]
"""A topic's id, which a topic created anew under the name does not have, and its number of partitions."""


class Watch:
    """A thread that looks at the topics from time to time and commits a group's offsets.

    The offsets are for monitors of lag alone: a flow resumes from its own recovery store.
    """

    def __init__(self, servers: KafkaServers, topics: Mapping[str, Topic], group: str | None) -> None:
        self.gone: str | None = None
        """What became of a topic that cannot be read any further."""
        self._servers = servers
        self._topics = topics
        self._known = {name: count for name, (_, count) in topics.items()}
        self._missed: set[str] = set()
        self._group = group
        self._offsets: dict[TopicPartition, int] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chainwax-kafka-watch", daemon=True)
        self._thread.start()

    def commit(self, part: TopicPartition, offset: int) -> None:
        """Note that all before ``offset`` is done with."""
        if self._group:
            with self._lock:
                self._offsets[part] = offset

    def close(self) -> None:
        """End the thread, once what was noted is committed; waits a moment for it."""
        self._ended.set()
        self._thread.join(5)

    def _run(self) -> None:
        due = time.monotonic() + LOOK_SECONDS
        ended = False
        admin: KafkaAdminClient | None = None
        while not ended:
            ended = self._ended.wait(COMMIT_SECONDS if self._group else LOOK_SECONDS)
            looking = time.monotonic() >= due and not ended
            if not looking and not self._offsets:
                continue
            if looking:
                due = time.monotonic() + LOOK_SECONDS
            try:
                admin = admin or self._servers.connected(KafkaAdminClient)
                self._commit(admin)
                if looking:
                    self._look(admin)
            except (KafkaError, ConfigError, OSError) as error:
                log.debug("the topics cannot be looked at now: %s", reason_of(error))
        if admin is not None:
            shut(admin)

    def _commit(self, admin: KafkaAdminClient) -> None:
        with self._lock:
            offsets, self._offsets = self._offsets, {}
        if not offsets or not self._group:
            return
        at = {part: OffsetAndMetadata(offset, "", -1) for part, offset in offsets.items()}
        try:
            refused = {error for error in admin.alter_group_offsets(self._group, at).values() if error.errno}
        except KafkaError:
            with self._lock:
                self._offsets = offsets | self._offsets
            raise
        if refused:
            why = ", ".join(sorted(error.__name__ for error in refused))
            log.warning(
                "group '%s' did not take all offsets (does another read as it?): %s", self._group, why
            )

    def _look(self, admin: KafkaAdminClient) -> None:
        for topic in admin.describe_topics(list(self._topics)):
            name, code = topic["name"], topic["error_code"]
            if code == 0:
                self._seen(name, str(topic["topic_id"]), len(topic["partitions"]))
            # Once may be a broker that has only just started.
            elif code == 3 and name in self._missed:
                self.gone = f"topic '{name}' was deleted"
            elif code == 3:
                self._missed.add(name)

    def _seen(self, name: str, topic_id: str, count: int) -> None:
        self._missed.discard(name)
        if topic_id != self._topics[name][0]:
            self.gone = f"topic '{name}' was deleted and created anew"
        if count > self._known[name]:
            log.warning(
                "topic '%s' has %d partitions now and %d of them are read: stop the flow and start it again "
                "to read the others too",
                name,
                count,
                self._topics[name][1],
            )
            self._known[name] = count
