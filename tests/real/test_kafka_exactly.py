"""Exactly once into a topic of a real broker: transactions, who is fenced, what a crash leaves, a run."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter

import pytest
from bytewax.testing import run_main
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from chainwax.connectors import ItemsSource, ListSink, Outgoing, Record, SinkError, open_sink
from chainwax.connectors.kafka import KafkaSink, transactions
from chainwax.connectors.kafka.transactions import Marker
from chainwax.flows import Flow
from chainwax.router import ConfigError


@pytest.fixture
def topic(broker):
    return broker.topic(f"x-{uuid.uuid4().hex[:8]}")


@pytest.fixture
def seen(broker):
    """The values of a topic, as a consumer sees them that reads what is committed, or everything."""

    def read(topic, isolation="read_committed"):
        return [json.loads(record.value) for record in records(broker, topic, isolation)]

    return read


def records(broker, topic, isolation="read_committed"):
    consumer = KafkaConsumer(
        bootstrap_servers=broker.servers, enable_auto_commit=False, isolation_level=isolation
    )
    parts = [TopicPartition(topic, n) for n in sorted(consumer.partitions_for_topic(topic))]
    consumer.assign(parts)
    consumer.seek_to_beginning()
    ends, found = consumer.end_offsets(parts), []
    while any(consumer.position(part) < end for part, end in ends.items()):
        found += itertools.chain(*consumer.poll(200).values())
    consumer.close()
    return found


def begin(broker, topic, state=None, run="run-1", number=0, step="flow.out"):
    """A partition of a new process's sink."""
    made = KafkaSink(topic, servers=broker.servers, transactional_id=f"tx-{topic}", run=run)
    return made.build_part(step, made.list_parts()[number], state)


def items(*numbers):
    return [Outgoing(n, f"k{n % 3}", f"in:{n}") for n in numbers]


def test_an_epoch_is_seen_as_a_whole_or_not_at_all(broker, topic, seen):
    part = begin(broker, topic)
    part.write_batch(items(1, 2))
    part.write_batch(items(3))
    time.sleep(0.1)
    assert seen(topic) == []
    assert seen(topic, "read_uncommitted") == [1, 2, 3]
    part.snapshot()
    assert seen(topic) == [1, 2, 3]
    part.write_batch(items(4))
    part.close()  # the flow failed
    following = begin(broker, topic)
    following.write_batch(items(5))
    following.snapshot()
    following.close()
    assert seen(topic) == [1, 2, 3, 5]


def test_ids_are_in_the_headers_and_the_marker_is_in_the_transaction(broker, topic):
    part = begin(broker, topic)
    for epoch in (items(1, 2), items(3)):
        part.write_batch(epoch)
        state = part.snapshot()
    part.close()
    ids = [dict(record.headers)["chainwax.id"].decode() for record in records(broker, topic)]
    assert len({len(identity) for identity in ids}) == 1
    assert len(set(ids)) == 3
    with broker.admin() as admin:
        found = admin.list_group_offsets({f"tx-{topic}.flow.out": [TopicPartition(topic, 0)]})
    (offset,) = found[f"tx-{topic}.flow.out"].values()
    # Two records, the end of the transaction, one record.
    assert (offset.offset, state.next) == (4, 4)
    assert Marker.parse(offset.metadata) == Marker("run-1", epoch=2, first=0, written=3, partitions=1)


@pytest.mark.parametrize("says", ["produces", "commits"])
def test_who_comes_back_from_the_dead_is_fenced_and_fences_nobody(broker, topic, seen, says):
    zombie = begin(broker, topic)
    zombie.write_batch(items(1))
    time.sleep(0.1)
    heir = begin(broker, topic)
    heir.write_batch(items(1, 2))
    if says == "produces":
        zombie.write_batch(items(3))
    with pytest.raises(SinkError, match=r"another producer has begun with this transactional\.id"):
        zombie.snapshot()
    time.sleep(1)  # kafka-python would begin anew by itself
    zombie.close()
    heir.snapshot()
    heir.write_batch(items(4))
    heir.snapshot()
    heir.close()
    assert seen(topic) == [1, 2, 4]


def test_what_was_committed_and_not_known_comes_once_in_any_order_and_epoch(broker, topic, seen):
    part = begin(broker, topic)
    part.write_batch(items(1))
    known = part.snapshot()
    part.write_batch(items(2, 3, 4))
    part.snapshot()  # and here it dies, before Bytewax has the state
    part = begin(broker, topic, known)
    part.write_batch(items(4, 5))
    known = part.snapshot()
    part.write_batch(items(2))
    part.snapshot()  # and again
    part = begin(broker, topic, known)
    part.write_batch(items(6, 3, 2))
    known = part.snapshot()
    assert known.owed == {}
    part.close()
    assert sorted(seen(topic)) == [1, 2, 3, 4, 5, 6]


def test_a_death_before_the_first_epoch_is_known_and_a_new_run(broker, topic, seen):
    part = begin(broker, topic)
    part.write_batch(items(1, 2))
    part.snapshot()
    again = begin(broker, topic)
    again.write_batch(items(2, 1, 3))
    again.snapshot()
    again.close()
    assert seen(topic) == [1, 2, 3]
    new = begin(broker, topic, run="run-2")
    new.write_batch(items(1, 2, 3))
    new.snapshot()
    new.close()
    assert seen(topic) == [1, 2, 3] * 2


def test_another_run_in_between_or_a_marker_that_is_gone(broker, topic, seen):
    part = begin(broker, topic)
    part.write_batch(items(1))
    known = part.snapshot()
    part.write_batch(items(2))
    part.snapshot()
    other = begin(broker, topic, run="run-2")
    other.write_batch(items(1, 2))
    other.snapshot()
    other.close()
    again = begin(broker, topic, known)
    again.write_batch(items(2, 3))
    again.snapshot()
    again.close()
    assert seen(topic) == [1, 2, 1, 2, 3]


def test_equal_outputs_are_counted(broker, topic, seen):
    part = begin(broker, topic)
    part.write_batch(items(1, 1))
    part.snapshot()
    again = begin(broker, topic)
    again.write_batch(items(1, 1, 1))
    again.snapshot()
    again.close()
    assert seen(topic) == [1, 1, 1]


def test_any_number_of_crashes_at_any_moment(broker, topic, seen):
    """A small model of a flow: its items wait for answers, and come in an order of their own each time."""
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    crashes = 0
    durable = (None, 0, frozenset())  # the sink's state, how many were read, which of them wait
    while True:
        state, read, waiting = durable
        waiting = set(waiting)
        part = begin(broker, topic, state)
        dead = False
        while not dead and (read < 150 or waiting):
            for _ in range(chance.randrange(3)):  # a part of an epoch
                count = min(chance.randrange(8), 150 - read)
                waiting |= set(range(read, read + count))
                read += count
                ready = chance.sample(sorted(waiting), chance.randint(0, len(waiting)))
                part.write_batch(items(*ready))
                waiting -= set(ready)
            dead = crashes < 25 and chance.random() < 0.15  # before the commit
            if not dead:
                state = part.snapshot()
                dead = crashes < 25 and chance.random() < 0.4  # after the commit, before it is known
            if not dead:
                durable = (state, read, frozenset(waiting))
        if not dead:
            part.close()
            break
        crashes += 1
    assert crashes > 5, seed
    assert Counter(seen(topic)) == Counter(range(150)), (seed, crashes)


def test_what_is_not_in_the_topic_any_more_is_told_and_written_again(broker, topic, seen, caplog):
    part = begin(broker, topic)
    part.write_batch(items(1))
    known = part.snapshot()
    part.write_batch(items(2, 3))
    part.snapshot()
    with broker.admin() as admin:
        admin.delete_records({TopicPartition(topic, 0): 3})
    again = begin(broker, topic, known)
    again.write_batch(items(2, 3, 4))
    again.snapshot()
    again.close()
    assert "1 of 2 records that were written just before the stop are not in the topic" in caplog.text
    assert seen(topic) == [3, 2, 3, 4]


def test_other_partitions_than_before(broker, topic, seen):
    part = begin(broker, topic)
    part.write_batch(items(1))
    known = part.snapshot()
    with broker.admin() as admin:
        admin.create_partitions({topic: 2})
    deadline = time.monotonic() + 10
    while len(KafkaSink(topic, servers=broker.servers).list_parts()) < 2:
        assert time.monotonic() < deadline
    # Nothing is in doubt: it goes on.
    again = begin(broker, topic, known)
    again.write_batch(items(2))
    known = again.snapshot()
    again.write_batch(items(3))
    again.snapshot()
    with broker.admin() as admin:
        admin.create_partitions({topic: 3})
    while len(KafkaSink(topic, servers=broker.servers).list_parts()) < 3:
        assert time.monotonic() < deadline
    with pytest.raises(SinkError, match="the topic had 2 partitions before the stop and has 3 now"):
        begin(broker, topic, known)
    assert seen(topic) == [1, 2, 3]


def test_what_cannot_be_read_is_an_error_and_does_not_hang(broker, topic, monkeypatch):
    monkeypatch.setattr(transactions, "READ_SECONDS", 0.5)
    part = begin(broker, topic)
    part.write_batch(items(1))
    part.snapshot()
    known = part.snapshot()._replace(written=0, next=0)
    # Somebody else's transaction stands open before what is to be read.
    other = KafkaProducer(bootstrap_servers=broker.servers, transactional_id=f"other-{topic}")
    other.init_transactions()
    other.begin_transaction()
    other.send(topic, b"0").get(10)
    part.write_batch(items(2))
    part.snapshot()
    with pytest.raises(SinkError, match="nothing comes after offset 2, though records go to 4"):
        begin(broker, topic, known)
    other.abort_transaction()
    other.close()


def test_mistakes_are_told(broker, topic, monkeypatch):
    made = open_sink(f"kafka://{topic}?servers={broker.servers}&transactional_id=a", name="out")
    with pytest.raises(ConfigError, match="with a transactional_id the sink needs the run's id"):
        made.build_part("flow.out", made.list_parts()[0], None)
    monkeypatch.setattr(transactions, "TRANSACTION_SECONDS", 100_000.0)
    with pytest.raises(SinkError, match=rf"transactional\.id 'tx-{topic}.*TransactionTimeout"):
        begin(broker, topic)


# -- a flow ---------------------------------------------------------------------------------------


def test_dead_letters_keep_their_key_and_come_once(broker, topic):
    flow = Flow("fails")
    flow.source("in").map("fails", lambda value: 1 / 0).sink("out")
    for _ in range(2):  # the same run, begun again without a state
        letters = KafkaSink(topic, servers=broker.servers, transactional_id=f"tx-{topic}", run="r")
        source = ItemsSource([Record({"n": n}, f"key-{n}", f"in:{n}") for n in range(3)])
        run_main(flow.compile({"in": source}, {"out": ListSink([])}, dead_letters=letters))
    assert sorted(record.key for record in records(broker, topic)) == [b"key-0", b"key-1", b"key-2"]


FLOW = """
import time
from chainwax.flows import Flow
flow = Flow("double")

def double(value):
    time.sleep(0.002)
    if value["n"] % 50 == 7:
        raise ValueError("poison")
    return {"n": value["n"], "at": time.time()}

flow.source("in").map("double", double).sink("out")
"""


def test_a_run_that_is_killed_and_rescaled_writes_each_once(tmp_path, broker):
    name = uuid.uuid4().hex[:8]
    (tmp_path / "double.py").write_text(FLOW)
    source = broker.topic(f"in-{name}", partitions=3)
    for kind in ("out", "dead"):
        broker.topic(f"{kind}-{name}", partitions=3)
    producer = KafkaProducer(bootstrap_servers=broker.servers)
    for n in range(1500):
        producer.send(source, json.dumps({"n": n}).encode(), key=str(n).encode())
    producer.flush(60)
    producer.close()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CHAINWAX_")}
    environment |= {"CHAINWAX_KAFKA_SERVERS": broker.servers, "CHAINWAX_RUN__EPOCH_SECONDS": "0.2"}
    command = [sys.executable, "-m", "chainwax.flows.cli", "run", "double.py", "--state", "state"]
    command += ["--source", f"in=kafka://{source}?from=earliest&to=latest&batch_size=50"]
    command += ["--sink", f"out=kafka://out-{name}?transactional_id=first"]
    command += ["--dead-letters", f"kafka://dead-{name}?transactional_id=second"]

    def start(*more):
        return subprocess.Popen([*command, *more], cwd=tmp_path, env=environment, stderr=subprocess.PIPE)

    def wait_for(count, process):
        deadline = time.monotonic() + 60
        while (found := len(records(broker, f"out-{name}"))) < count:
            assert process.poll() is None
            assert time.monotonic() < deadline, f"{found} of {count}"

    for count, more in ((100, ("--workers", "2")), (500, ("--processes", "2"))):
        process = start(*more)
        wait_for(count, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = start("--processes", "3")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()
    wanted = Counter(n for n in range(1500) if n % 50 != 7)
    assert Counter(json.loads(r.value)["n"] for r in records(broker, f"out-{name}")) == wanted
    letters = Counter(r.key for r in records(broker, f"dead-{name}"))
    assert letters == Counter(str(n).encode() for n in range(7, 1500, 50))
