"""Topic to map to topic, records of 1 KB: chainwax's Kafka source and sink against Bytewax's own.

    .venv/bin/python benchmarks/kafka.py [--records 100000] [--rounds 3]

Both run as a plain Bytewax dataflow of one worker in a process of their own, in turns, from one topic of four
partitions to another, with keys, the bytes as they are, and all of it acknowledged by all replicas
(``acks=all``, an idempotent producer) before the flow ends. Both take batches of at most 1,000 records from
the source and let what comes within 5 ms go out together. Bytewax's own connector is
`bytewax.connectors.kafka` on confluent-kafka (C); chainwax's is on kafka-python (Python).

A round runs both, one after the other, from the start of the flow to its end; ``rate_ratio`` is the median of
the rounds' ratios. Reading alone goes to a sink that drops all; ``read_cpu_us`` is the CPU time of the
process while the flow runs, all threads, for each record. The broker is Apache Kafka (Java 17, Maven) on the
same machine, and takes its share of the cores.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import bytewax.operators as op
from _broker import broker
from _contract import report, say
from bytewax.connectors import kafka as theirs
from bytewax.dataflow import Dataflow
from bytewax.outputs import DynamicSink, StatelessSinkPartition
from bytewax.testing import run_main
from confluent_kafka import OFFSET_BEGINNING, Producer

from chainwax.connectors import BadRecord, Outgoing, Record
from chainwax.connectors.kafka import KafkaSink, KafkaSource

BYTES = 1000
PARTITIONS = 4
BATCH = 1000


class _Drop(StatelessSinkPartition[Any]):
    def write_batch(self, items: list[Any]) -> None:
        pass


class Drop(DynamicSink[Any]):
    """Where reading alone ends."""

    def build(self, step_id: str, worker_index: int, worker_count: int) -> _Drop:
        """One for each worker."""
        return _Drop()


def own_flow(servers: str, source: str, target: str | None) -> Dataflow:
    """Through chainwax's connectors."""

    def shout(record: Record | BadRecord) -> tuple[str, Outgoing]:
        assert isinstance(record, Record)  # bytes can always be read
        return record.key, Outgoing(record.value.upper(), record.key, record.position)

    flow = Dataflow("own")
    read = KafkaSource(
        source, servers=servers, codec="bytes", from_="earliest", to="latest", batch_size=BATCH
    )
    stream = op.input("in", flow, read)
    if target is None:
        op.output("out", stream, Drop())
    else:
        op.output("out", op.map("map", stream, shout), KafkaSink(target, servers=servers, codec="bytes"))
    return flow


def peer_flow(servers: str, source: str, target: str | None) -> Dataflow:
    """Through Bytewax's own."""

    def shout(message: Any) -> Any:
        return theirs.KafkaSinkMessage(message.key, message.value.upper())

    flow = Dataflow("peer")
    read = theirs.KafkaSource(
        [servers], [source], tail=False, starting_offset=OFFSET_BEGINNING, batch_size=BATCH
    )
    stream = op.input("in", flow, read)
    if target is None:
        op.output("out", stream, Drop())
    else:
        safe = {"acks": "all", "enable.idempotence": "true", "linger.ms": "5"}
        op.output("out", op.map("map", stream, shout), theirs.KafkaSink([servers], target, safe))
    return flow


FLOWS: dict[str, Callable[[str, str, str | None], Dataflow]] = {"own": own_flow, "peer": peer_flow}


def measured(name: str, servers: str, source: str, target: str | None) -> None:
    """Run one flow in this process and print its seconds of wall clock and CPU."""
    flow = FLOWS[name](servers, source, target)
    cpu, begun = _cpu(), time.perf_counter()
    run_main(flow)
    print(json.dumps([time.perf_counter() - begun, _cpu() - cpu]), flush=True)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def child(name: str, servers: str, source: str, target: str | None) -> tuple[float, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--child", name, servers, source, target or "-"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300, check=False)
    if done.returncode:
        sys.exit(f"kafka: the {name} flow failed")
    wall, cpu = json.loads(done.stdout.splitlines()[-1])
    return wall, cpu


def fill(servers: str, topic: str, count: int) -> None:
    """Records of 1 KB with keys, spread over the partitions."""
    producer = Producer({"bootstrap.servers": servers, "linger.ms": "20"})
    for number in range(count):
        text = f'{{"n": {number:09}, "text": "'.encode()
        producer.produce(topic, text + b"x" * (BYTES - len(text) - 2) + b'"}', key=f"key-{number % 5000}")
        producer.poll(0)
    producer.flush()


def held(servers: str, topic: str) -> int:
    """How many records a topic has."""
    spans = KafkaSource(topic, servers=servers, codec="bytes", from_="earliest", to="latest")
    return sum(span.end - span.first for _, span in spans._parts.values())


def main() -> None:
    """Measure, and print the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        name, servers, source, target = given.child
        measured(name, servers, source, None if target == "-" else target)
        return
    with broker() as made:
        servers = made.servers
        source = made.topic("in", PARTITIONS)
        say(f"{given.records} records of {BYTES} bytes into {PARTITIONS} partitions")
        fill(servers, source, given.records)
        copied: dict[str, list[tuple[float, float]]] = {name: [] for name in FLOWS}
        read: dict[str, list[tuple[float, float]]] = {name: [] for name in FLOWS}
        for number in range(given.rounds):
            for name in FLOWS:
                target = made.topic(f"out-{name}-{number}", PARTITIONS)
                copied[name].append(child(name, servers, source, target))
                if held(servers, target) != given.records:
                    sys.exit(f"kafka: {name} wrote {held(servers, target)} records of {given.records}")
                read[name].append(child(name, servers, source, None))
                say(f"{name}, seconds and CPU seconds: {copied[name][-1]} copied, {read[name][-1]} read")
    count = given.records

    def rate(runs: list[tuple[float, float]]) -> float:
        return float(count / statistics.median(wall for wall, _ in runs))

    def ratio(runs: dict[str, list[tuple[float, float]]]) -> float:
        walls = zip(runs["own"], runs["peer"], strict=True)
        return float(statistics.median(peer / own for (own, _), (peer, _) in walls))

    def cpu_us(runs: list[tuple[float, float]]) -> float:
        return float(statistics.median(cpu for _, cpu in runs) / count * 1e6)

    report(
        "kafka",
        simulated=[],
        records=count,
        record_bytes=BYTES,
        partitions=PARTITIONS,
        batch_size=BATCH,
        rounds=given.rounds,
        rate_ratio=ratio(copied),
        rate_per_s=rate(copied["own"]),
        peer_rate_per_s=rate(copied["peer"]),
        cpu_us=cpu_us(copied["own"]),
        peer_cpu_us=cpu_us(copied["peer"]),
        read_cpu_us=cpu_us(read["own"]),
        peer_read_cpu_us=cpu_us(read["peer"]),
        read_rate_ratio=ratio(read),
    )


if __name__ == "__main__":
    main()
