"""The people who handle the tickets, as a process of its own: it reads the demo's outputs and scores them.

It knows the flow by its topics alone: each record's header ``chainwax.calls`` says which calls the record
owes its value to, and each score goes to ``chainwax.feedback`` by the id of its call. A line on standard
input says that nothing more will come; the end of standard input ends it at once.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from kafka import KafkaConsumer, TopicPartition

from chainwax.connectors.kafka import KafkaServers
from chainwax.connectors.kafka.outbox import CALLS_HEADER
from chainwax.connectors.kafka_bus import KafkaBus
from chainwax.flows.demo.support import Fields, can_be_sent, read_right, sorted_right
from chainwax.router import ChainwaxError, Feedback

__all__ = ["scores_of"]

_FLUSH_SECONDS = 30.0


def scores_of(ticket: Mapping[str, Any]) -> dict[str, float]:
    """What the people say of a ticket, by node: of a sorted one how it was sorted, else of its reply."""
    if "draft" not in ticket:
        return {node: float(right) for node, right in sorted_right(dict(ticket)).items()}
    read = {**ticket, "fields": Fields.model_validate(ticket["fields"])}
    return {"fields": read_right(read), "draft": float(can_be_sent(read))}


def _feedback(record: Any) -> Iterable[Feedback]:
    calls = {call["node"]: call for call in json.loads(dict(record.headers)[CALLS_HEADER])}
    for node, score in scores_of(json.loads(record.value)).items():
        if node in calls:
            yield Feedback(node, score, call_id=calls[node]["call_id"], source="desk")


def main(topics: list[str]) -> None:
    """Score the records of the topics."""
    all_said = threading.Event()

    def listen() -> None:
        if not sys.stdin.readline():
            os._exit(1)  # whoever started this is gone
        all_said.set()

    threading.Thread(target=listen, daemon=True).start()
    servers = KafkaServers()
    bus = KafkaBus(servers, flow="support")
    consumer = servers.connected(KafkaConsumer, auto_offset_reset="earliest", group_id=None)
    parts = [TopicPartition(topic, part) for topic in topics for part in consumer.partitions_for_topic(topic)]
    consumer.assign(parts)
    said = 0
    ends = None
    while ends is None or any(consumer.position(part) < end for part, end in ends.items()):
        if ends is None and all_said.is_set():
            ends = consumer.end_offsets(parts)
        for records in consumer.poll(timeout_ms=50).values():
            feedback = [one for record in records for one in _feedback(record)]
            said += len(feedback)
            bus.publish(feedback)
    written = bus.flush(_FLUSH_SECONDS)
    bus.close()
    consumer.close()
    sys.stdout.write(json.dumps({"scores": said, "written": written}) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ChainwaxError as problem:
        sys.exit(f"error: {problem}")
