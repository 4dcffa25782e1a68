"""What of Kafka needs no broker: decoding, places, addresses and passwords, URIs, what stands in headers."""

import json
import logging
import math
import time
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka.consumer.fetcher import ConsumerRecord
from kafka.errors import MessageSizeTooLargeError, TopicAlreadyExistsError
from kafka.protocol.api_header import ResponseClassRegistry

from chainwax.connectors import SINKS, SOURCES, BadRecord, Outgoing, Record, SinkError, open_sink, open_source
from chainwax.connectors.kafka import CODECS, KafkaServers, KafkaSink, KafkaSource
from chainwax.connectors.kafka.codecs import Decoder, codec_of
from chainwax.connectors.kafka.outbox import headers_of, id_of, stamp_of
from chainwax.connectors.kafka.ranges import Place, parse_place
from chainwax.connectors.kafka.servers import SERVER_OPTIONS, reason_of
from chainwax.connectors.kafka.sink import _shortened
from chainwax.connectors.kafka.transactions import Marker
from chainwax.router.errors import ConfigError
from chainwax.router.types import CallRef


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch):
    for option in SERVER_OPTIONS:
        monkeypatch.delenv(f"CHAINWAX_KAFKA_{option.upper()}", raising=False)


def message(value, key=None, timestamp=1000, headers=()):
    return ConsumerRecord("t", 2, 0, 7, timestamp, 0, key, value, list(headers), None, 0, 0, 0)


def decode(value, *more, codec="json", key=None, time=None, headers=None, **message_more):
    return Decoder("t", CODECS[codec], key, time, headers)(message(value, *more, **message_more))


def test_a_record():
    assert decode(b'{"id": "a", "n": 1}', b"k") == Record({"id": "a", "n": 1}, "k", "t:2:7", 1.0)
    assert decode(b'{"id": "a"}').key == "a"
    assert decode(b"[1]", timestamp=-1) == Record([1], "", "t:2:7", None)
    assert decode(None, b"gone") == Record(None, "gone", "t:2:7", 1.0)
    named = decode(b'{"id": "a", "who": 7, "at": "1970-01-01T00:01Z"}', b"k", key="who", time="at")
    assert (named.key, named.time) == ("7", 60.0)


@pytest.mark.parametrize(
    ("raw", "error", "options"),
    [
        (b"", "empty", {}),
        (b" \n", "empty", {}),
        (b"{", "malformed JSON", {}),
        (b"\xff", "not UTF-8: byte 0xff at 1", {}),
        (b"[" * 200_000, "nested deeper|malformed", {}),
        (b"\xff", "not UTF-8", {"codec": "text"}),
        (b"{}", "no field 'who' for the key", {"key": "who"}),
        (b'{"at": "soon"}', "field 'at' is not a time", {"time": "at"}),
        (b"[]", "headers=h: a list is not an object", {"headers": "h"}),
        (None, "no field 'who'", {"key": "who"}),
    ],
)
def test_poison(raw, error, options):
    bad = decode(raw, **options)
    assert isinstance(bad, BadRecord)
    assert bad.position == "t:2:7"
    assert len(bad.raw) <= 1000
    with pytest.raises(AssertionError, match=error):
        raise AssertionError(bad.error)


@given(st.none() | st.binary(max_size=50), st.none() | st.binary(max_size=10), st.sampled_from([*CODECS]))
def test_any_bytes_are_a_record_or_say_why_not(raw, key, codec):
    made = decode(raw, key, codec=codec)
    assert isinstance(made, Record | BadRecord)
    if isinstance(made, Record) and raw is not None and codec != "json":
        assert CODECS[codec].encode(made.value, "t") == raw


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("latest", Place("latest")),
        ("12", Place(offset=12)),
        (12, Place(offset=12)),
        ("1970-01-02", Place(time=86400.0)),
        ("1970-01-01T01:00:00 01:00", Place(time=0.0)),
        ("1970-01-01 00:01", Place(time=60.0)),
        (datetime(1970, 1, 2, tzinfo=UTC), Place(time=86400.0)),
    ],
)
def test_places(text, place):
    assert parse_place("from", text, ("latest",)) == place


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("latst", "from 'latst' is neither .* did you mean 'latest'"),
        ("-1", "is neither an offset"),
        ("²", "is neither an offset"),
        ("1.5", "is neither an offset"),
        ("2026-13-01", "is not an ISO time"),
        ("2999-01-01", "is still to come"),
        ("0000-01-01", "is not an ISO time"),
    ],
)
def test_no_places(text, error):
    with pytest.raises(ConfigError, match=error):
        parse_place("from", text, ("latest", "earliest"))


def test_servers_from_the_environment_and_passwords_never_in_sight(monkeypatch):
    assert KafkaServers().client()["bootstrap_servers"] == ["127.0.0.1:9092"]
    monkeypatch.setenv("CHAINWAX_KAFKA_SERVERS", "a:1, b:2")
    monkeypatch.setenv("CHAINWAX_KAFKA_SECURITY_PROTOCOL", "SASL_SSL")
    monkeypatch.setenv("CHAINWAX_KAFKA_SSL_CAFILE", "ca.pem")
    with pytest.raises(ConfigError, match="CHAINWAX_KAFKA_SASL_PASSWORD, which holds a password, is not set"):
        KafkaServers().client()
    monkeypatch.setenv("MINE", "secret-word")
    servers = KafkaServers(sasl_mechanism="SCRAM-SHA-512", sasl_username="me", sasl_password_env="MINE")
    made = servers.client()
    assert made["bootstrap_servers"] == ["a:1", "b:2"]
    assert made["ssl_cafile"] == "ca.pem"
    assert (made["sasl_plain_username"], made["sasl_plain_password"]) == ("me", "secret-word")
    assert "secret-word" not in repr(servers)
    assert (
        KafkaServers("c:3", settings={"client_id": "x"}, sasl_password_env="MINE").client()["client_id"]
        == "x"
    )
    # A token provider has no password.
    assert "sasl_plain_password" not in KafkaServers("c:3", sasl_mechanism="OAUTHBEARER").client()
    with pytest.raises(ConfigError, match="security_protocol 'SASL_SLS' is unknown: did you mean 'SASL_SSL'"):
        KafkaServers(security_protocol="SASL_SLS").client()
    with pytest.raises(ConfigError, match="variable NOT_THERE"):
        KafkaServers("c:3", sasl_mechanism="OAUTHBEARER", ssl_password_env="NOT_THERE").client()


@pytest.mark.parametrize(
    "servers", ["host", "host:", ":9092", "host:0", "host:x", "host:70000", ",", "a:1,b"]
)
def test_wrong_addresses(servers):
    with pytest.raises(ConfigError, match="servers"):
        KafkaServers(servers).client()


def test_the_options_of_uris_are_those_of_the_classes():
    assert set(SERVER_OPTIONS) <= SOURCES["kafka"].options.keys()
    assert set(SERVER_OPTIONS) <= SINKS["kafka"].options.keys()


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("kafka://127.0.0.1:9092/t", r"'127\.0\.0\.1:9092/t' is no topic: write kafka://TOPIC\?servers="),
        ("kafka://", "is no topic"),
        ("kafka://t?sasl_password=x", "unknown option 'sasl_password': did you mean 'sasl_password_env'"),
        ("kafka://t?limit=many", "option 'limit' is 'many', which is not a number"),
        ("kafka://t?limit=-1", "limit is -1: it must be at least 0"),
        ("kafka://t?codec=jsn", "unknown codec 'jsn': did you mean 'json'"),
        ("kafka://t?on_lost=late", "unknown on_lost 'late'"),
        ("kafka://t?to=earliest", "to 'earliest' is neither"),
        ("kafka://t?servers=nohost", "'nohost' is not HOST:PORT"),
    ],
)
def test_wrong_sources(uri, error):
    with pytest.raises(ConfigError, match=error):
        open_source(uri, name="in")


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("kafka://a,b", "a sink writes to one topic, not to 2"),
        ("kafka://t?compression=zip", "unknown compression 'zip': did you mean 'gzip'"),
        ("kafka://t?from=latest", "unknown option 'from'"),
    ],
)
def test_wrong_sinks(uri, error):
    with pytest.raises(ConfigError, match=error):
        open_sink(uri, name="out")


def test_a_topic_must_be_named():
    with pytest.raises(ConfigError, match="no topic to read"):
        KafkaSource([], servers="127.0.0.1:1")


def test_keys_go_where_all_clients_of_kafka_send_them():
    sink = KafkaSink.__new__(KafkaSink)
    # From the tests of Kafka's own client.
    known = {"21": -973932308, "foobar": -790332482, "a-little-bit-long-string": -985981536}
    assert {key: sink.part_fn(key) for key in known} == {
        key: value & 0x7FFFFFFF for key, value in known.items()
    }
    assert sink.part_fn("\ud800") >= 0


def test_encoding_and_its_limit(caplog):
    sink = KafkaSink.__new__(KafkaSink)
    sink.topic, sink.max_record_bytes, sink._codec = "t", 1000, codec_of("json")
    assert sink.encode({"ä": 1}) == '{"ä": 1}'.encode()
    with pytest.raises(SinkError, match=r"too large: 602 bytes; topic 't' takes at most 1000"):
        sink.encode("x" * 600)
    with caplog.at_level(logging.WARNING):
        stand_in = json.loads(sink.encoded({"item": "x" * 5000, "node": "n", "bad": float("nan")}))
    assert (stand_in["node"], len(stand_in["item"]), stand_in["bad"]) == ("n", 1000, "nan")
    assert "unwritable" in stand_in
    assert _shortened(object())["value"].startswith("<object")


def test_headers():
    calls = (CallRef("n", "c1", "m"),)
    out = Outgoing(1, "k", "in:1", calls)
    assert headers_of(out, 100) == [
        ("chainwax.position", b"in:1"),
        ("chainwax.calls", b'[{"node": "n", "call_id": "c1", "arm": "m"}]'),
    ]
    assert headers_of(Outgoing(1), 100) == []
    assert [name for name, _ in headers_of(out, 10)] == ["chainwax.position"]


def test_what_errors_say():
    assert reason_of(MessageSizeTooLargeError(None)) == "MessageSizeTooLargeError"
    long = TopicAlreadyExistsError("Request 'x' failed with response 'y'")
    assert reason_of(long) == "TopicAlreadyExistsError: Request 'x'"
    assert reason_of(ValueError()) == "ValueError"


def test_an_outputs_id_says_where_it_comes_from():
    def of(value, position="in:1", key="k", nodes=("a",), stamp="0" * 8, by_value=False):
        calls = tuple(CallRef(node, value, "model") for node in nodes)
        return id_of(Outgoing(value, key, position, calls), value.encode(), stamp, by_value=by_value)

    assert len(of("x")) == 32
    assert of("x") == of("y")
    assert of("x", position="") != of("y", position="")
    assert of("x", by_value=True) != of("y", by_value=True)
    others = [
        {"position": "in:2"},
        {"key": "l"},
        {"nodes": ("a", "b")},
        {"nodes": ("ab",)},
        {"stamp": "1" * 8},
    ]
    assert len({of("x"), *(of("x", **other) for other in others)}) == 6
    assert of("x", position="\udc80") != of("x")


@pytest.mark.parametrize("seconds", [0.0, 1e9, -1.0, None, math.nan, math.inf, 4e9])
def test_event_times_that_a_broker_would_not_take_or_soon_delete(seconds):
    assert stamp_of(seconds) is None


@pytest.mark.parametrize("ago", [0.0, 60.0, 80_000.0])
def test_event_times_that_a_broker_takes(ago):
    seconds = float(int(time.time() - ago)) + 0.25
    assert stamp_of(seconds) == int(seconds * 1000)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '"run"', "{}", '{"run": "r"}', "a note"])
def test_what_is_no_marker_is_none(text):
    assert Marker.parse(text) is None


def test_markers():
    marker = Marker("run", epoch=2, first=3, written=4, partitions=5)
    assert Marker.parse(marker.text()) == marker
    for wrong in ({"epoch": "2"}, {"run": 1}, {"first": True}, {"more": 1}):
        assert Marker.parse(json.dumps(marker._asdict() | wrong)) is None


def test_all_classes_of_responses_are_made_before_threads_could_make_them_twice():
    for response in ResponseClassRegistry._response_class_registry.values():
        whole = response[None]
        assert whole._VERSIONS.keys() >= set(range(whole.max_version + 1))
