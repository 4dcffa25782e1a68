"""Topics in a Schema Registry's formats on a real broker, beside producers and consumers of Confluent's."""

import json
import threading
import time
import uuid

import pytest
from bytewax.errors import BytewaxRuntimeError
from bytewax.testing import run_main
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from rich.console import Console

from chainwax.connectors import ListSink, SourceError, StopSwitch, open_sink, open_source
from chainwax.connectors.kafka import schemas, source
from chainwax.flows import Flow
from chainwax.flows.preflight import print_check
from chainwax.router import load_settings

TICKET = json.dumps(
    {
        "type": "record",
        "name": "Ticket",
        "fields": [{"name": "id", "type": "string"}, {"name": "n", "type": "long"}],
    }
)
POINT = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "P", "type": "object"}


@pytest.fixture
def topics(broker):
    tag = uuid.uuid4().hex[:8]
    return broker.topic(f"in-{tag}"), broker.topic(f"out-{tag}")


@pytest.fixture
def client(registry):
    with SchemaRegistryClient({"url": registry.url}) as made:
        yield made


def produce(broker, topic, values, **config):
    producer = Producer({"bootstrap.servers": broker.servers, **config})
    for value in values:
        producer.produce(topic, value, partition=0)
    assert producer.flush(30) == 0


def consume(broker, topic):
    """All values of a topic's first partition."""
    consumer = Consumer({"bootstrap.servers": broker.servers, "group.id": uuid.uuid4().hex})
    end = consumer.get_watermark_offsets(TopicPartition(topic, 0))[1]
    consumer.assign([TopicPartition(topic, 0, 0)])
    found = [consumer.poll(20) for _ in range(end)]
    consumer.close()
    return [message.value() for message in found]


def copy(broker, registry, topics, codec, stop=None, more=""):
    """A flow from the one topic to the other; gives back what went to the dead letters."""
    options = f"servers={broker.servers}&codec={codec}&registry={registry.url}"
    flow = Flow("copy")
    flow.source("in").map("next", lambda value: value | {"n": value["n"] + 1}).sink("out")
    letters = []
    read = open_source(f"kafka://{topics[0]}?{options}&{more or 'to=latest'}", name="in", stop=stop)
    write = open_sink(f"kafka://{topics[1]}?{options}", name="out")
    run_main(flow.compile({"in": read}, {"out": write}, dead_letters=ListSink(letters)))
    return letters


def test_avro_there_and_back_and_poison_between(broker, registry, client, topics):
    there, back = (SerializationContext(topic, MessageField.VALUE) for topic in topics)
    write = AvroSerializer(client, TICKET)
    registry.register(f"{topics[1]}-value", TICKET)
    good = [write({"id": f"t{n}", "n": n}, there) for n in range(20)]
    poison = [b"\0\0\0\0\x63\x02a\x02", b'{"id": "a"}', b"\0\0\0", good[0][:-1], b""]
    produce(broker, topics[0], [*good[:10], *poison, *good[10:]])
    letters = copy(broker, registry, topics, "avro")
    read = AvroDeserializer(client)
    assert [read(raw, back) for raw in consume(broker, topics[1])] == [
        {"id": f"t{n}", "n": n + 1} for n in range(20)
    ]
    assert [letter["position"] for letter in letters] == [f"{topics[0]}:0:{n}" for n in range(10, 15)]
    said = [letter["message"] for letter in letters]
    assert "schema 99 cannot be had" in said[0]
    assert "404 Schema 99 not found" in said[0]
    assert "begins with byte 0x7b" in said[1]
    assert "cut off after 3 bytes" in said[2]
    assert "does not fit its schema 1" in said[3]
    assert "empty" in said[4]


def test_what_does_not_fit_the_schema_goes_to_the_dead_letters(broker, registry, client, topics):
    write = JSONSerializer(json.dumps(POINT), client)
    there = SerializationContext(topics[0], MessageField.VALUE)
    produce(broker, topics[0], [write({"n": n}, there) for n in (1, 2, 3)])
    strict = POINT | {"properties": {"n": {"type": "integer", "maximum": 3}}}
    registry.register(f"{topics[1]}-value", json.dumps(strict), "JSON")
    (letter,) = copy(broker, registry, topics, "jsonschema")
    assert "n: 4 is greater than the maximum of 3" in letter["message"]
    assert [json.loads(raw[5:])["n"] for raw in consume(broker, topics[1])] == [2, 3]


def test_a_new_version_of_a_schema_while_the_flow_runs(broker, registry, topics):
    newer = json.loads(TICKET)
    newer["fields"].append({"name": "lang", "type": "string", "default": "de"})
    first = registry.register(f"{topics[0]}-value", TICKET)
    registry.register(f"{topics[1]}-value", json.dumps(newer))
    produce(broker, topics[0], [b"\0" + first.to_bytes(4) + b"\x02a\x02"])
    stop = StopSwitch()
    letters, failed = [], []

    def run():
        try:
            letters.extend(copy(broker, registry, topics, "avro", stop, "from=earliest"))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_for(lambda: len(consume(broker, topics[1])) == 1)
        # Nobody knows the schema when its first record comes, nor is the registry there.
        second = registry.register(f"{topics[0]}-value", json.dumps(newer))
        registry.failing = (503, {"message": "moving house"})
        produce(broker, topics[0], [b"\0" + second.to_bytes(4) + b"\x02b\x04\x04fr"])
        wait_for(lambda: f"/schemas/ids/{second}" in [path for _, path in registry.asked])
        time.sleep(0.3)
        assert len(consume(broker, topics[1])) == 1
        registry.failing = None
        wait_for(lambda: len(consume(broker, topics[1])) == 2)
    finally:
        stop.set()
        thread.join(30)
    assert (letters, failed) == ([], [])
    assert consume(broker, topics[1])[1][5:] == b"\x02b\x06\x04fr"


def test_a_registry_that_stays_away_ends_the_flow_and_loses_nothing(broker, registry, topics, monkeypatch):
    monkeypatch.setattr(source, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(source, "TELL_SECONDS", 0.2)
    monkeypatch.setattr(schemas, "AGAIN_SECONDS", 0.1)
    number = registry.register(f"{topics[1]}-value", TICKET)
    produce(broker, topics[0], [b"\0" + number.to_bytes(4) + b"\x02a\x02"])
    flow = Flow("copy")
    flow.source("in").sink("out")
    options = f"servers={broker.servers}&codec=avro&registry={registry.url}"
    values, letters = [], []

    def run(failing):
        registry.failing = None
        read = open_source(f"kafka://{topics[0]}?{options}&to=latest", name="in")
        registry.failing = failing
        run_main(
            flow.compile({"in": read}, {"out": ListSink(values)}, dead_letters=ListSink(letters)),
        )

    for failing, said in (
        ((500, {"message": "no store"}), "waited 1 s in vain: .*500 no store"),
        ((401, {"message": "who are you"}), "refuses the credentials: 401 who are you"),
    ):
        with pytest.raises(BytewaxRuntimeError) as ended:
            run(failing)
        with pytest.raises(SourceError, match=said):
            raise ended.value.__cause__
    assert (values, letters) == ([], [])
    run(None)
    assert values == [{"id": "a", "n": 1}]


def wait_for(true, seconds=40):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


# -- what else is between two topics -------------------------------------------------------------------


def test_two_megabytes_where_the_next_topic_does_not_take_them(broker, topics):
    tag = uuid.uuid4().hex[:8]
    wide = broker.topic(f"wide-{tag}", max_message_bytes="3000000")
    produce(
        broker, wide, [json.dumps({"text": "x" * 2_000_000}), b'{"n": 1}'], **{"message.max.bytes": 3_000_000}
    )
    flow = Flow("narrow")
    flow.source("in").sink("out")
    servers = f"servers={broker.servers}"
    letters = broker.topic(f"letters-{tag}")
    run_main(
        flow.compile(
            {"in": open_source(f"kafka://{wide}?{servers}&to=latest", name="in")},
            {"out": open_sink(f"kafka://{topics[1]}?{servers}", name="out")},
            dead_letters=open_sink(f"kafka://{letters}?{servers}", name="dead"),
        )
    )
    assert consume(broker, topics[1]) == [b'{"n": 1}']
    (letter,) = map(json.loads, consume(broker, letters))
    assert letter["position"] == f"{wide}:0:0"
    assert f"the record is too large: 2000012 bytes; topic '{topics[1]}' takes at most" in letter["message"]


def test_two_flows_on_one_topic_and_group_do_not_disturb_each_other(broker, topics):
    produce(broker, topics[0], [b'{"n": %d}' % n for n in range(500)])
    found = {"one": [], "two": []}
    stops = {name: StopSwitch() for name in found}

    def run(name):
        uri = f"kafka://{topics[0]}?servers={broker.servers}&group=same&from=earliest&batch_size=10"
        flow = Flow(name)
        flow.source("in").sink("out")
        read = open_source(uri, name="in", stop=stops[name])
        run_main(flow.compile({"in": read}, {"out": ListSink(found[name])}))

    threads = [threading.Thread(target=run, args=(name,)) for name in found]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: all(len(values) >= 500 for values in found.values()))
    finally:
        for name, thread in zip(found, threads, strict=True):
            stops[name].set()
            thread.join(30)
    assert all([value["n"] for value in values] == list(range(500)) for values in found.values())


def test_check_looks_at_the_first_items_of_a_topic(broker, topics, monkeypatch, capsys):
    monkeypatch.setattr("chainwax.flows.preflight._WAIT_SECONDS", 3.0)
    produce(broker, topics[0], [b'{"n": 1}', b"{", b'{"n": 2}'])
    flow = Flow("looks")
    flow.source("in").sink("out")
    flow.source("none").sink("nowhere")
    servers = f"servers={broker.servers}&from=earliest"
    count = print_check(
        flow,
        load_settings(run={"recording": None}, models={}),
        {"in": f"kafka://{topics[0]}?{servers}", "none": f"kafka://{topics[1]}?{servers}"},
        {},
        Console(width=200),
        file=None,
    )
    said = capsys.readouterr().out
    assert "source 'in': looked at 3 items" in said
    assert f"source 'in': {topics[0]}:0:1: malformed JSON" in said
    assert "source 'none': looked at 0 items: none came within 3 s" in said
    assert count == 0, said
