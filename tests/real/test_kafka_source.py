"""Reading topics of a real broker: places, ranges, resumes, poison, deletion, the broker's death."""

import json
import logging
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from bytewax.recovery import RecoveryConfig, init_db_dir
from bytewax.testing import cluster_main, run_main
from kafka import KafkaProducer, TopicPartition

from chainwax.connectors import BadRecord, ListSink, Record, SourceError, StopSwitch
from chainwax.connectors.kafka import KafkaServers, KafkaSource, watch
from chainwax.flows import Flow
from chainwax.router import ConfigError


@pytest.fixture
def topic(broker):
    return broker.topic(f"t-{uuid.uuid4().hex[:8]}")


@pytest.fixture
def produce(broker):
    producer = KafkaProducer(bootstrap_servers=broker.servers, max_request_size=4_000_000)

    def send(topic, values, **more):
        for value in values:
            raw = value if value is None or isinstance(value, bytes) else json.dumps(value).encode()
            future = producer.send(topic, raw, **{"partition": 0} | more)
        future.get(30)

    yield send
    producer.close()


def read(source, limit=None, seconds=15.0):
    """All that a source gives until it ends, or the first ``limit``."""
    out = []
    end = time.monotonic() + seconds
    for part in source.list_parts():
        partition = source.build_part("read", part, None)
        try:
            while limit is None or len(out) < limit:
                assert time.monotonic() < end, f"only {len(out)} records"
                batch = partition.next_batch()
                out += batch
                if not batch:
                    time.sleep(0.002)
        except StopIteration:
            pass
        finally:
            partition.close()
    return out


def keep_reading(partition, seconds=15.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        partition.next_batch()
        time.sleep(0.005)


def offsets(records):
    return [int(record.position.rpartition(":")[2]) for record in records]


def test_records_with_key_time_position_and_headers(broker, topic, produce):
    headers = [("lang", b"de"), ("raw", b"\xff\x00"), ("none", None)]
    before = time.time()
    produce(topic, [{"id": "own", "text": "ä"}], key="kü".encode())
    produce(topic, [{"id": "own"}], key=b"\xff\xfe", timestamp_ms=1_700_000_000_123)
    produce(topic, [{"id": "own"}])
    # The library refuses None as a header; any other client may send it.
    produce(topic, [{"n": 1}], key=b"k", headers=headers[:2])
    one, two, three, four = read(KafkaSource(topic, servers=broker.servers, to="latest"))
    assert (one.value, one.key, one.position) == ({"id": "own", "text": "ä"}, "kü", f"{topic}:0:0")
    assert before - 1 <= one.time <= time.time() + 1
    assert (two.key, two.time) == ("fffe", 1_700_000_000.123)
    assert three.key == "own"
    assert four == Record({"n": 1}, "k", f"{topic}:0:3", four.time)
    named = KafkaSource(topic, servers=broker.servers, to="latest", headers="meta", from_=3, key="n")
    (four,) = read(named)
    assert (four.key, four.value) == ("1", {"n": 1, "meta": {"lang": "de", "raw": "ff00"}})


def test_poison_goes_to_the_dead_letters_and_the_flow_goes_on(broker, topic, produce):
    poison = [b"{", b"", b"\xff\xfe", b"[" * 200 + b"]" * 200, b"NaN", b'"\\ud800"', b"[" * 100_000]
    produce(topic, [{"n": 0}, *poison, None, {"n": 1}], key=b"k")
    values, letters = [], []
    flow = Flow("poison")
    flow.source("in").filter("objects", lambda value: value is not None).sink("out")
    source = KafkaSource(topic, servers=broker.servers, to="latest")
    run_main(flow.compile({"in": source}, {"out": ListSink(values)}, dead_letters=ListSink(letters)))
    assert values == [{"n": 0}, {"n": 1}]
    assert [letter["position"] for letter in letters] == [f"{topic}:0:{n}" for n in range(1, 8)]
    assert {letter["error"] for letter in letters} == {"BadRecord"}
    said = [letter["message"] for letter in letters]
    assert "malformed JSON" in said[0]
    assert "empty" in said[1]
    assert said[2] == "not UTF-8: byte 0xff at 1"
    assert said[3] == "nested deeper than 100"
    assert "half of a surrogate pair" in said[5]


def test_other_codecs(broker, topic, produce):
    produce(topic, [b"plain", b"\xff"])
    assert [r.value for r in read(KafkaSource(topic, servers=broker.servers, to=2, codec="bytes"))] == [
        b"plain",
        b"\xff",
    ]
    good, bad = read(KafkaSource(topic, servers=broker.servers, to=2, codec="text"))
    assert good.value == "plain"
    assert isinstance(bad, BadRecord)

    class Length:
        def decode(self, raw, topic):
            return len(raw) if raw != b"\xff" else 1 / 0

    good, bad = read(KafkaSource(topic, servers=broker.servers, to=2, codec=Length()))
    assert good.value == 5
    assert bad.error == "ZeroDivisionError: division by zero"


def test_two_megabytes_are_read(broker, produce):
    topic = broker.topic(f"big-{uuid.uuid4().hex[:8]}", max_message_bytes="3000000")
    produce(topic, [{"text": "x" * 2_000_000}, {"n": 1}])
    big, small = read(KafkaSource(topic, servers=broker.servers, to="latest"))
    assert len(big.value["text"]) == 2_000_000
    assert small.value == {"n": 1}


@pytest.mark.parametrize(
    ("from_", "to", "expected"),
    [
        ("earliest", "latest", range(10)),
        (3, 7, range(3, 7)),
        ("8", None, range(8, 10)),
        (4, 4, ()),
        (7, 3, ()),
        (50, "latest", ()),
        ("2023-11-14T22:13:23Z", "2023-11-14T22:13:26Z", range(3, 6)),
        # A plus sign in a URI is a space.
        ("2023-11-14T23:13:23 01:00", "2023-11-14T22:13:22.500Z", ()),
        (datetime(2023, 11, 14, 22, 13, 25, tzinfo=UTC), None, range(5, 10)),
        ("2023-11-14T22:13:29.5Z", "latest", ()),
    ],
)
def test_ranges_end_by_themselves(broker, topic, produce, from_, to, expected):
    for n in range(10):
        produce(topic, [{"n": n}], timestamp_ms=1_700_000_000_000 + 1000 * n)
    source = KafkaSource(topic, servers=broker.servers, from_=from_, to=to, group="ranges")
    produce(topic, [{"n": "late"}])
    limit = None if to is not None else len(expected)
    assert offsets(read(source, limit))[: limit or None] == list(expected)


def test_a_range_ends_behind_what_a_transaction_leaves(broker, topic, produce):
    """The last offset may be a transaction's mark, which no record has."""
    producer = KafkaProducer(bootstrap_servers=broker.servers, transactional_id=uuid.uuid4().hex)
    producer.init_transactions()
    for commit in (True, False):
        producer.begin_transaction()
        producer.send(topic, b'{"committed": %s}' % str(commit).lower().encode()).get(10)
        producer.commit_transaction() if commit else producer.abort_transaction()
    producer.close()
    source = KafkaSource(topic, servers=broker.servers, to="latest")
    assert [record.value for record in read(source)] == [{"committed": True}]


def test_a_limit_and_small_batches(broker, topic, produce):
    produce(topic, [{"n": n} for n in range(50)])
    source = KafkaSource(topic, servers=broker.servers, limit=7, batch_size=3)
    assert offsets(read(source)) == list(range(7))


def test_the_switch_ends_a_live_topic(broker, topic, produce):
    produce(topic, [{"n": 1}])
    stop = StopSwitch()
    values = []
    flow = Flow("live")
    flow.source("in").map("seen", lambda value: stop.set() or value).sink("out")
    source = KafkaSource(topic, servers=broker.servers, stop=stop)
    begun = time.monotonic()
    run_main(flow.compile({"in": source}, {"out": ListSink(values)}))
    assert values == [{"n": 1}]
    assert time.monotonic() - begun < 10


def test_two_workers_read_two_partitions(broker, produce):
    topic = broker.topic(f"two-{uuid.uuid4().hex[:8]}", partitions=2)
    for part in (0, 1):
        produce(topic, [{"n": n, "part": part} for n in range(300)], partition=part)
    threads, values = set(), []
    flow = Flow("two")
    stream = flow.source("in")
    stream.map("where", lambda value: threads.add(threading.get_ident()) or value).sink("out")
    source = KafkaSource(topic, servers=broker.servers, to="latest")
    cluster_main(flow.compile({"in": source}, {"out": ListSink(values)}), [], 0, worker_count_per_proc=2)
    assert len(threads) == 2
    for part in (0, 1):
        assert [v["n"] for v in values if v["part"] == part] == list(range(300))


class Stumble(Exception):
    """What a test kills a flow with."""


def test_a_resume_after_an_abort_loses_nothing(broker, topic, produce, tmp_path):
    produce(topic, [{"n": n} for n in range(200)])
    seen, fragile = [], [True]

    def work(value):
        seen.append(value["n"])
        return value

    class Sink(ListSink):
        def build_part(self, *given):
            inner = super().build_part(*given)
            write = inner.write_batch

            def writing(values):
                if fragile[0] and len(seen) >= 100:
                    raise Stumble
                write(values)

            inner.write_batch = writing
            return inner

    def run(**more):
        flow = Flow("resume")
        flow.source("in").map("work", work).sink("out")
        source = KafkaSource(topic, servers=broker.servers, batch_size=10, to="latest", **more)
        run_main(
            flow.compile({"in": source}, {"out": Sink(out)}),
            epoch_interval=timedelta(0),
            recovery_config=RecoveryConfig(str(tmp_path)),
        )

    out = []
    init_db_dir(tmp_path, 1)
    with pytest.raises(Stumble):
        run()
    first = len(seen)
    assert first < 200
    fragile[0] = False
    produce(topic, [{"n": "after the range"}])
    # A resume goes by its own offsets, whatever is said of the beginning.
    run(from_="latest")
    assert sorted({value["n"] for value in out}) == list(range(200))
    # Only what the last epoch did not cover is read again.
    assert seen[first] > 50
    seen.clear()
    run()
    assert seen == []


def test_a_group_is_for_monitors_and_where_a_new_run_begins(broker, topic, produce, monkeypatch):
    monkeypatch.setattr(watch, "COMMIT_SECONDS", 0.1)
    group = f"g-{uuid.uuid4().hex[:8]}"
    produce(topic, [{"n": n} for n in range(20)])
    source = KafkaSource(topic, servers=broker.servers, group=group)
    partition = source.build_part("in", f"{topic}:0", None)
    while partition.snapshot()[0] < 20:
        partition.next_batch()
    partition.snapshot()
    deadline = time.monotonic() + 20
    part = TopicPartition(topic, 0)
    with broker.admin() as admin:
        while time.monotonic() < deadline:
            partition.next_batch()
            found = admin.list_group_offsets({group: [part]})[group]
            if found[part].offset == 20:
                break
            time.sleep(0.1)
        assert found[part].offset == 20
    partition.close()
    produce(topic, [{"n": 20}])
    again = KafkaSource(topic, servers=broker.servers, group=group, limit=1)
    assert [record.value for record in read(again)] == [{"n": 20}]


def test_a_range_commits_nothing(broker, topic, produce):
    group = f"g-{uuid.uuid4().hex[:8]}"
    produce(topic, [{"n": 1}])
    source = KafkaSource(topic, servers=broker.servers, group=group, to="latest")
    partition = source.build_part("in", f"{topic}:0", None)
    while not partition.next_batch():
        time.sleep(0.002)
    partition.snapshot()
    partition.snapshot()
    assert source.watch is None
    partition.close()
    part = TopicPartition(topic, 0)
    with broker.admin() as admin:
        assert admin.list_group_offsets({group: [part]})[group][part].offset == -1


def test_deleted_offsets_are_an_error_or_a_warning(broker, topic, produce, caplog):
    produce(topic, [{"n": n} for n in range(10)])
    made = KafkaSource(topic, servers=broker.servers)
    place = made.build_part("in", f"{topic}:0", None)
    state = place.snapshot()
    with broker.admin() as admin:
        admin.delete_records({TopicPartition(topic, 0): 6})
    # While it runs.
    with pytest.raises(SourceError, match=r"offset 0 is not there any more, the oldest is 6: 6 records"):
        keep_reading(place)
    place.close()
    # On a resume.
    again = KafkaSource(topic, servers=broker.servers, limit=1)
    with pytest.raises(SourceError, match="with on_lost=earliest it would go on with the oldest"):
        again.build_part("in", f"{topic}:0", state)
    lenient = KafkaSource(topic, servers=broker.servers, on_lost="earliest", from_=2, to=8)
    with caplog.at_level(logging.WARNING):
        assert offsets(read(lenient)) == [6, 7]
    assert "going on with the oldest" in caplog.text


def test_new_partitions_and_deleted_topics_are_told(broker, topic, produce, monkeypatch, caplog):
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.1)
    produce(topic, [{"n": 1}])
    partition = KafkaSource(topic, servers=broker.servers).build_part("in", f"{topic}:0", None)
    with broker.admin() as admin:
        admin.create_partitions({topic: 3})
        end = time.monotonic() + 15
        while "has 3 partitions now and 1 of them are read" not in caplog.text:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert caplog.text.count("stop the flow and start it again") == 1
        state = partition.snapshot()
        admin.delete_topics([topic])
        with pytest.raises(SourceError, match=f"topic '{topic}' was deleted"):
            keep_reading(partition)
    partition.close()
    broker.topic(topic)
    with pytest.raises(SourceError, match="created anew since the stop: start a new run"):
        KafkaSource(topic, servers=broker.servers).build_part("in", f"{topic}:0", state)


def test_what_cannot_work_is_said_at_once(broker, topic, monkeypatch):
    with pytest.raises(ConfigError, match=rf"has no topic '{topic}x': did you mean '{topic}'\?"):
        KafkaSource(f"{topic}x", servers=broker.servers)
    with pytest.raises(ConfigError, match="has no topic 'no/topic name'") as unknown:
        KafkaSource("no/topic name", servers=broker.servers)
    assert "__consumer_offsets" not in str(unknown.value)
    monkeypatch.setattr("chainwax.connectors.kafka.servers.CONNECT_SECONDS", 1.0)
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=r"Kafka at 127\.0\.0\.1:1 cannot be reached: .*ECONNREFUSED"):
        KafkaSource(topic, servers="127.0.0.1:1")
    monkeypatch.setenv("CHAINWAX_KAFKA_SASL_PASSWORD", "secret-word")
    wrong = KafkaServers(
        broker.servers, security_protocol="SASL_PLAINTEXT", sasl_mechanism="PLAIN", sasl_username="me"
    )
    with pytest.raises(ConfigError, match="it wants no credentials at this address") as refused:
        KafkaSource(topic, servers=wrong)
    assert "secret-word" not in f"{refused.value} {wrong}"
    with pytest.raises(ConfigError, match="cannot be reached"):
        KafkaSource(topic, servers=KafkaServers(broker.servers, security_protocol="SSL"))
    assert time.monotonic() - begun < 10
