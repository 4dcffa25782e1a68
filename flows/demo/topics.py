"""``python -m chainwax.flows.demo.topics tickets:2 sorted`` makes topics, where they do not exist.

The number is that of the partitions. Kafka is where ``CHAINWAX_KAFKA_SERVERS`` says.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from chainwax.connectors.kafka import KafkaServers
from chainwax.router import ChainwaxError

__all__ = ["existing", "make_topics"]


def existing(servers: KafkaServers) -> set[str]:
    """The names of all topics. Raises :class:`ConfigError` where nobody answers."""
    with servers.admin() as admin:
        return set(admin.list_topics())


def make_topics(servers: KafkaServers, partitions: Mapping[str, int]) -> None:
    """Make the topics that do not exist yet. Raises :class:`ConfigError` where nobody answers."""
    wanted = {name: count for name, count in partitions.items() if name not in existing(servers)}
    options = {name: {"num_partitions": count, "replication_factor": 1} for name, count in wanted.items()}
    if options:
        with servers.admin() as admin:
            admin.create_topics(options, wait_for_metadata=True)


def main(arguments: list[str]) -> None:
    """Make what the arguments name."""
    named = (argument.partition(":") for argument in arguments)
    try:
        make_topics(KafkaServers(), {name: int(count or 1) for name, _, count in named})
    except (ChainwaxError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
