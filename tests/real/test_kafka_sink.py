"""Writing to topics of a real broker: keys, lineage, sizes, refusals, compression."""

import json
import re
import time
import uuid

import pytest
from bytewax.errors import BytewaxRuntimeError
from bytewax.testing import cluster_main, run_main
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from chainwax.connectors import ItemsSource, ListSink, Outgoing, Record, SinkError, open_sink
from chainwax.connectors.kafka import KafkaServers, KafkaSink, sink
from chainwax.flows import Flow
from chainwax.flows.testing import TestModel
from chainwax.router import ConfigError, LLMManager, ModelConfig, load_settings
from chainwax.router.types import CallRef


@pytest.fixture
def topic(broker):
    return broker.topic(f"s-{uuid.uuid4().hex[:8]}")


@pytest.fixture
def messages(broker):
    """All that a topic holds, by partition."""

    def read(topic):
        consumer = KafkaConsumer(
            bootstrap_servers=broker.servers, enable_auto_commit=False, isolation_level="read_committed"
        )
        parts = [TopicPartition(topic, n) for n in sorted(consumer.partitions_for_topic(topic))]
        consumer.assign(parts)
        consumer.seek_to_beginning()
        ends, found = consumer.end_offsets(parts), []
        while any(consumer.position(part) < end for part, end in ends.items()):
            for batch in consumer.poll(200).values():
                found += batch
        consumer.close()
        return found

    return read


def write(broker, topic, items, letters=None, **options):
    flow = Flow("write")
    flow.source("in").sink("out")
    made = KafkaSink(topic, servers=broker.servers, **options)
    dataflow = flow.compile(
        {"in": ItemsSource(items)}, {"out": made}, dead_letters=ListSink([] if letters is None else letters)
    )
    run_main(dataflow)


def test_keys_positions_and_kafkas_own_places(broker, messages):
    topic = broker.topic(f"p-{uuid.uuid4().hex[:8]}", partitions=12)
    items = [Record({"n": n}, f"kunde-ü{n}", f"in:{n}") for n in range(60)]
    items += [Record({"n": n}, "", f"in:{n}") for n in range(60, 120)]
    flow = Flow("write")
    flow.source("in").sink("out")
    made = KafkaSink(topic, servers=broker.servers)
    cluster_main(flow.compile({"in": ItemsSource(items)}, {"out": made}), [], 0, worker_count_per_proc=2)
    found = messages(topic)
    assert sorted(json.loads(message.value)["n"] for message in found) == list(range(120))
    producer = KafkaProducer(bootstrap_servers=broker.servers)
    producer.partitions_for(topic)
    for message in found:
        n = json.loads(message.value)["n"]
        assert dict(message.headers) == {"chainwax.position": f"in:{n}".encode()}
        assert message.key == (f"kunde-ü{n}".encode() if n < 60 else None)
        if n < 60:
            # Where any other client puts the key.
            assert producer._partition(topic, None, None, None, message.key, None) == message.partition
    producer.close()
    # Those without a key are spread too.
    assert len({message.partition for message in found if message.key is None}) > 4


def test_the_lineage_is_in_the_headers(broker, topic, messages):
    flow = Flow("asked")
    asked = flow.source("in").query("team", "Which? {text}").map("again", lambda item: {"text": item})
    asked.query("draft", "Answer {text}").sink("out")
    settings = load_settings(
        run={"recording": None},
        models={
            "test": ModelConfig(
                tier="standard", backend="simulated", input_cost_per_token=0.0, output_cost_per_token=0.0
            )
        },
    )
    with LLMManager(settings, backends={"test": TestModel()}) as manager:
        manager.begin_run("asked")
        made = KafkaSink(topic, servers=broker.servers)
        run_main(flow.compile({"in": ItemsSource([{"text": "x"}])}, {"out": made}, manager=manager))
    (message,) = messages(topic)
    calls = json.loads(dict(message.headers)["chainwax.calls"])
    assert [call["node"] for call in calls] == ["team", "draft"]
    assert all(call["call_id"] and call["arm"] for call in calls)


def test_what_cannot_be_written_goes_to_the_dead_letters(broker, topic, messages):
    letters = []
    write(broker, topic, [{"n": 0}, {"bad": float("nan")}, {"big": "x" * 2_000_000}, {"n": 1}], letters)
    assert [json.loads(message.value) for message in messages(topic)] == [{"n": 0}, {"n": 1}]
    assert [letter["position"] for letter in letters] == ["items:1", "items:2"]
    assert "cannot be written as JSON" in letters[0]["message"]
    assert letters[1]["error"] == "SinkError"
    assert f"topic '{topic}' takes at most 1048588 (max.message.bytes)" in letters[1]["message"]


def test_two_megabytes_where_the_topic_takes_them(broker, messages):
    topic = broker.topic(f"big-{uuid.uuid4().hex[:8]}", max_message_bytes="3000000")
    write(broker, topic, [{"big": "x" * 2_000_000}, {"n": 1}])
    assert sorted(len(message.value) for message in messages(topic)) == [8, 2_000_011]


def test_dead_letters_that_are_too_large_are_shortened(broker, topic, messages):
    flow = Flow("fails")
    flow.source("in").map("fails", lambda value: 1 / 0).sink("out")
    letters = KafkaSink(topic, servers=broker.servers)
    source = ItemsSource([{"id": "k", "big": "x" * 2_000_000}])
    run_main(flow.compile({"in": source}, {"out": ListSink([])}, dead_letters=letters))
    (message,) = messages(topic)
    letter = json.loads(message.value)
    assert (message.key, letter["node"], letter["error"]) == (b"k", "fails", "ZeroDivisionError")
    assert "too large" in letter["unwritable"]
    assert len(letter["item"]) == 1000


def test_what_the_broker_refuses_is_an_error(broker, messages):
    topic = broker.topic(f"small-{uuid.uuid4().hex[:8]}", max_message_bytes="2000")
    with pytest.raises(BytewaxRuntimeError) as failed:
        write(broker, topic, [{"a": "x" * 5000}], max_record_bytes=100_000)
    assert isinstance(failed.value.__cause__, SinkError)
    assert str(failed.value.__cause__) == (
        f"topic '{topic}' did not take a record of 5009 bytes: the record is too large (max.message.bytes): "
        "MessageSizeTooLargeError"
    )
    assert messages(topic) == []


def test_a_topic_that_is_deleted_while_writing_is_an_error(broker, topic, monkeypatch):
    monkeypatch.setattr(sink, "DELIVERY_SECONDS", 2.0)
    made = KafkaSink(topic, servers=KafkaServers(broker.servers, settings={"request_timeout_ms": 1000}))
    part = made.build_part("out", made.list_parts()[0], None)
    part.write_batch([{"n": 1}])
    part.snapshot()
    with broker.admin() as admin:
        admin.delete_topics([topic])
    part.write_batch([{"n": 2}])
    with pytest.raises(SinkError, match=f"topic '{topic}' did not take a record of 8 bytes"):
        part.snapshot()
    part.close()


def test_many_calls_do_not_make_a_record_too_large(broker, topic, messages, caplog):
    made = KafkaSink(topic, servers=broker.servers)
    part = made.build_part("out", made.list_parts()[0], None)
    calls = tuple(CallRef("node", f"{n:032}", "model") for n in range(20_000))
    part.write_batch([Outgoing({"n": 1}, "k", "in:1", calls), Outgoing({"n": 2}, "k", "in:2", calls[:3])])
    part.close()
    one, two = messages(topic)
    assert [name for name, _ in one.headers] == ["chainwax.position"]
    assert len(json.loads(dict(two.headers)["chainwax.calls"])) == 3
    assert "20000 calls do not fit" in caplog.text


def test_compression(broker, topic, messages):
    write(broker, topic, [{"text": "x" * 100_000}] * 5, compression="gzip")
    assert len(messages(topic)) == 5
    with broker.admin() as admin:
        logs = json.dumps(admin.describe_log_dirs(), default=str)
    size = re.search(rf'"{topic}".*?"partition_size": (\d+)', logs)
    assert 0 < int(size[1]) < 10_000


def test_event_time_is_the_records_time(broker, topic, messages):
    hour_ago = float(int(time.time()) - 3600) + 0.25
    times = [hour_ago, 9e9, 1e9]
    write(broker, topic, [Record({"n": n}, "", f"in:{n}", when) for n, when in enumerate(times)])
    one, *others = messages(topic)
    assert one.timestamp == int(hour_ago * 1000)
    # A broker refuses what is to come, and soon deletes what is long past.
    assert all(abs(other.timestamp / 1000 - time.time()) < 60 for other in others)


def test_other_codecs(broker, topic, messages):
    of_bytes, of_text = [], []
    write(broker, topic, [b"\xff", "text"], of_bytes, codec="bytes")
    write(broker, topic, ["ä", {"n": 1}], of_text, codec="text")
    assert [message.value for message in messages(topic)] == [b"\xff", "ä".encode()]
    assert [letter["message"] for letter in of_bytes] == ["codec=bytes writes bytes, not a str"]
    assert [letter["message"] for letter in of_text] == ["codec=text writes texts, not a dict"]


def test_what_cannot_work_is_said_at_once(broker, topic, monkeypatch):
    with pytest.raises(ConfigError, match=rf"sink 'o' \(.*\): .*did you mean '{topic}'\?"):
        open_sink(f"kafka://{topic}x?servers={broker.servers}", name="o")
    with pytest.raises(ConfigError, match=r"unknown option 'compresion': did you mean 'compression'\?"):
        open_sink(f"kafka://{topic}?compresion=gzip", name="o")
    with pytest.raises(ConfigError, match="writes to one topic, not to 2"):
        open_sink(f"kafka://{topic},other", name="o")
    # The library for it is not among what chainwax needs.
    monkeypatch.setattr("kafka.producer.kafka.has_snappy", lambda: False)
    made = open_sink(f"kafka://{topic}?servers={broker.servers}&compression=snappy", name="o")
    with pytest.raises(ConfigError, match="snappy compression codec not found"):
        made.build_part("out", made.list_parts()[0], None)
