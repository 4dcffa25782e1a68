"""Formats of the Schema Registry, against a loopback registry and Confluent's own client."""

import base64
import importlib
import json
import sys
import threading
import time
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from confluent_kafka.schema_registry import Schema as TheirSchema
from confluent_kafka.schema_registry import SchemaReference, SchemaRegistryClient, avro, json_schema, protobuf
from confluent_kafka.serialization import MessageField, SerializationContext
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kafka.consumer.fetcher import ConsumerRecord

from chainwax.connectors import BadRecord, Record, SourceError, open_sink, open_source
from chainwax.connectors.kafka import NotYet, SchemaRegistry, schemas
from chainwax.connectors.kafka.codecs import SCHEMA_CODECS, Decoder, codec_of, make_ready
from chainwax.connectors.kafka.schema_avro import AvroCodec
from chainwax.connectors.kafka.schema_json import JsonSchemaCodec
from chainwax.connectors.kafka.schema_protobuf import ProtobufCodec
from chainwax.router.errors import ConfigError

TICKET = json.dumps(
    {
        "type": "record",
        "name": "Ticket",
        "namespace": "shop",
        "fields": [
            {"name": "id", "type": "string"},
            {"name": "n", "type": ["null", "long"], "default": None},
            {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        ],
    }
)
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
LIST = json.dumps({"type": "record", "name": "L", "fields": [{"name": "next", "type": ["null", "L"]}]})
POINT = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "title": "Point",
    "type": "object",
    "properties": {"n": {"type": "integer"}, "at": {"type": "string"}},
    "required": ["n"],
}


@pytest.fixture(autouse=True)
def alone_and_patient(monkeypatch):
    monkeypatch.setattr(schemas, "WAIT_SECONDS", 10.0)  # what is not about waiting is told at once
    for name in ("URL", "USERNAME", "PASSWORD", "CAFILE"):
        monkeypatch.delenv(f"CHAINWAX_REGISTRY_{name}", raising=False)


@pytest.fixture
def client(registry):
    """Confluent's own."""
    with SchemaRegistryClient({"url": registry.url}) as made:
        yield made


def context(topic="t"):
    return SerializationContext(topic, MessageField.VALUE)


def ready(codec, topic="t", *, writing=False):
    make_ready(codec, [topic], writing=writing)
    return codec


def eventually(codec, raw, topic="t"):
    """What a record is, once the registry has answered."""
    end = time.monotonic() + 20
    while True:
        try:
            return codec.decode(raw, topic)
        except NotYet:
            assert time.monotonic() < end
            time.sleep(0.01)


def framed(number, body):
    return b"\0" + number.to_bytes(4) + body


def protos():
    """Two files, the second of which refers to the first; each name is new to this process."""
    tag = f"x{time.monotonic_ns()}"
    money = FileDescriptorProto(name=f"{tag}_money.proto", package=tag, syntax="proto3")
    kind = money.message_type.add(name="Money")
    kind.field.add(name="cents", number=1, type=FieldDescriptorProto.TYPE_INT64, label=1)
    order = FileDescriptorProto(
        name=f"{tag}_order.proto",
        package=tag,
        syntax="proto3",
        dependency=[money.name, "google/protobuf/timestamp.proto"],
    )
    order.message_type.add(name="Unused")
    kind = order.message_type.add(name="Order")
    message, text = FieldDescriptorProto.TYPE_MESSAGE, FieldDescriptorProto.TYPE_STRING
    kind.field.add(name="id", number=1, type=text, label=1)
    kind.field.add(name="to_pay", number=2, type=message, label=1, type_name=f".{tag}.Money")
    kind.field.add(name="at", number=3, type=message, label=1, type_name=".google.protobuf.Timestamp")
    line = kind.nested_type.add(name="Line")
    line.field.add(name="text", number=1, type=text, label=1)
    importlib.import_module("google.protobuf.timestamp_pb2")
    for file in (money, order):
        descriptor_pool.Default().Add(file)
    found = descriptor_pool.Default().FindMessageTypeByName
    kinds = {
        name: message_factory.GetMessageClass(found(f"{tag}.{name}")) for name in ("Order", "Order.Line")
    }
    return kinds, money, order


def test_avro_that_confluents_client_wrote_and_reads(registry, client):
    write = avro.AvroSerializer(client, TICKET)
    raw = write({"id": "a", "n": 5, "at": NOON}, context())
    assert ready(AvroCodec(registry.url)).decode(raw, "t") == {"id": "a", "n": 5, "at": NOON}
    own = ready(AvroCodec(registry.url), writing=True)
    back = avro.AvroDeserializer(client)(own.encode({"id": "b", "at": NOON}, "t"), context())
    assert back == {"id": "b", "n": None, "at": NOON}


def test_json_schema_that_confluents_client_wrote_and_reads(registry, client):
    raw = json_schema.JSONSerializer(json.dumps(POINT), client)({"n": 1}, context())
    codec = ready(JsonSchemaCodec(registry.url), writing=True)
    assert codec.decode(raw, "t") == {"n": 1}
    # What JSON makes of a time is what counts.
    back = json_schema.JSONDeserializer(None, schema_registry_client=client)
    assert back(codec.encode({"n": 2, "at": NOON}, "t"), context())["at"].startswith("2026-01-01T12")
    with pytest.raises(ValueError, match=r"does not fit schema 1 of subject 't-value': n: .*not of type"):
        codec.encode({"n": "x"}, "t")
    with pytest.raises(ValueError, match='does not fit its schema 1: "n" is a required property'):
        codec.decode(framed(1, b"{}"), "t")
    with pytest.raises(ValueError, match="malformed JSON"):
        codec.decode(framed(1, b"{"), "t")


def test_protobuf_that_confluents_client_wrote_and_reads(registry, client):
    kinds, _, order = protos()
    conf = {"use.deprecated.format": False}
    write = protobuf.ProtobufSerializer(kinds["Order"], client, conf)
    made = kinds["Order"](id="o", to_pay={"cents": 2**60}, at={"seconds": 1})
    codec = ready(ProtobufCodec(registry.url))
    assert eventually(codec, write(made, context())) == {
        "id": "o",
        "to_pay": {"cents": str(2**60)},
        "at": "1970-01-01T00:00:01Z",
    }
    inner = protobuf.ProtobufSerializer(kinds["Order.Line"], client, conf)
    assert codec.decode(inner(kinds["Order.Line"](text="x"), context()), "t") == {"text": "x"}
    for name, value in (("Order", {"id": "p", "to_pay": {"cents": 7}}), ("Order.Line", {"text": "y"})):
        for wanted in (name, f"{order.package}.{name}"):
            own = ready(ProtobufCodec(registry.url, message=wanted), writing=True)
            read = protobuf.ProtobufDeserializer(kinds[name], conf, client)
            assert read(own.encode(value, "t"), context()) == kinds[name](**value)
    with pytest.raises(ConfigError, match=r"no message 'Ordr': did you mean 'Order'"):
        ready(ProtobufCodec(registry.url, message="Ordr"), writing=True)
    # Without a name it is the first one.
    first = ready(ProtobufCodec(registry.url), writing=True)
    assert first.encode({}, "t")[5:] == b"\0"
    assert first.decode(first.encode({}, "t"), "t") == {}
    with pytest.raises(ValueError, match='no field named "id"'):
        first.encode({"id": "x"}, "t")


def test_references(registry, client):
    money = {"type": "fixed", "name": "shop.Money", "size": 2}
    client.register_schema("money", TheirSchema(json.dumps(money), "AVRO"))
    price = {"type": "record", "name": "shop.Price", "fields": [{"name": "m", "type": "shop.Money"}]}
    refers = [SchemaReference("shop.Money", "money", 1)]
    client.register_schema("price", TheirSchema(json.dumps(price), "AVRO", refers))
    order = {"type": "record", "name": "shop.Order", "fields": [{"name": "p", "type": "shop.Price"}]}
    number = client.register_schema(
        "t-value", TheirSchema(json.dumps(order), "AVRO", [SchemaReference("shop.Price", "price", 1)])
    )
    codec = ready(AvroCodec(registry.url), writing=True)
    raw = codec.encode({"p": {"m": b"ab"}}, "t")
    assert raw == framed(number, b"ab")
    assert codec.decode(raw, "t") == {"p": {"m": b"ab"}}

    client.register_schema("point.json", TheirSchema(json.dumps(POINT), "JSON"))
    line = {"type": "array", "items": {"$ref": "point.json"}}
    number = client.register_schema(
        "l-value", TheirSchema(json.dumps(line), "JSON", [SchemaReference("point.json", "point.json", 1)])
    )
    codec = ready(JsonSchemaCodec(registry.url))
    assert codec.decode(framed(number, b'[{"n": 1}]'), "l") == [{"n": 1}]
    with pytest.raises(ValueError, match="0/n"):
        codec.decode(framed(number, b'[{"n": "x"}]'), "l")
    # A schema may not make us ask anyone else for something.
    elsewhere = registry.register("e", json.dumps({"$ref": f"{registry.url}/stolen"}), "JSON")
    with pytest.raises(ValueError, match=r"/stolen, which is not among the references"):
        codec.decode(framed(elsewhere, b"1"), "e")
    assert not [path for _, path in registry.asked if "stolen" in path]


def test_a_schema_that_refers_to_itself_ends(registry):
    refers = [{"name": "a", "subject": "a", "version": 1}]
    number = registry.register("a", '"string"', references=refers)
    with pytest.raises(ValueError, match="or to itself"):
        eventually(AvroCodec(registry.url), framed(number, b"\x02x"))
    for n in range(300):
        refers = [{"name": f"r{n - 1}", "subject": f"r{n - 1}", "version": 1}] if n else []
        number = registry.register(f"r{n}", '"string"', references=refers)
    with pytest.raises(ValueError, match="more than 200 others"):
        eventually(AvroCodec(registry.url), framed(number, b"\x02x"))


def test_each_schema_is_asked_for_once(registry):
    one = registry.register("t-value", '"string"')
    two = registry.register("t-value", '"long"')
    codec = ready(AvroCodec(registry.url))
    for _ in range(50):
        assert eventually(codec, framed(one, b"\x02a")) == "a"
        assert eventually(codec, framed(two, b"\x06")) == 3
        with pytest.raises(ValueError, match=r"schema 77 cannot be had.*404 Schema 77 not found"):
            eventually(codec, framed(77, b""))
    assert [path for _, path in registry.asked if path.startswith("/schemas/ids/")] == [
        "/schemas/ids/1",
        "/schemas/ids/2",
        "/schemas/ids/77",
    ]


def test_an_unknown_schema_is_asked_for_again_later(registry, monkeypatch):
    monkeypatch.setattr(schemas, "MISSING_SECONDS", 0.0)
    codec = ready(AvroCodec(registry.url))
    with pytest.raises(ValueError, match="404"):
        eventually(codec, framed(1, b"\x02a"))
    registry.register("t-value", '"string"')
    assert eventually(codec, framed(1, b"\x02a")) == "a"


def test_a_flood_of_unknown_ids_is_held_in_bounds(registry, monkeypatch):
    monkeypatch.setattr(schemas, "MAX_ASKED", 10)
    codec = ready(AvroCodec(registry.url))
    for number in range(60):
        with pytest.raises(ValueError, match="404"):
            eventually(codec, framed(1000 + number, b""))
    assert len(codec._asked) <= 10


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", "it is empty"),
        (b"\0", "cut off after 1 bytes"),
        (b"\0\0\0\0", "cut off after 4 bytes"),
        (b'{"id": 1}', "begins with byte 0x7b, not with 0"),
        (b"\1" + b"x" * 16, "ids of schemas in headers are not read"),
        (framed(1, b""), "does not fit its schema 1: EOFError"),
        (framed(1, b"\x02"), "does not fit its schema 1"),
        (framed(1, b"\x02a\x00"), "does not fit its schema 1"),
        (framed(1, b"\x02a\x00\x00more"), "4 bytes are left over"),
        (framed(1, b"\xff" * 9 + b"\x01"), "does not fit its schema 1"),
        (framed(1, b"\x02a\x00" + b"\xfe" * 9 + b"\x01"), "does not fit its schema 1"),
        (framed(2, b""), "schema 2 cannot be used: schema 2 is JSON, not AVRO"),
        (framed(3, b""), "schema 3 cannot be used"),
        (framed(4, b""), "schema 4 cannot be used: UnknownType: nothing"),
        (framed(2**32 - 1, b""), "404 Schema 4294967295 not found"),
    ],
)
def test_poison(registry, raw, error):
    for text, kind in ((TICKET, "AVRO"), ("{}", "JSON"), ("{", "AVRO"), ('"nothing"', "AVRO")):
        registry.register("t-value", text, kind)
    codec = ready(AvroCodec(registry.url))
    with pytest.raises(ValueError, match=error):
        eventually(codec, raw)


def test_poison_of_protobuf(registry):
    registry.register("text", 'syntax = "proto3"; message A {}', "PROTOBUF")
    _, money, _ = protos()
    lonely = FileDescriptorProto(name="lonely.proto", dependency=["nobody/has.proto"])
    for file in (money, lonely):
        registry.register("t-value", base64.b64encode(file.SerializeToString()).decode(), "PROTOBUF")
    codec = ready(ProtobufCodec(registry.url))
    for raw, error in (
        (framed(1, b"\0"), "does not give Protobuf schemas compiled"),
        (framed(2, b""), "cut off within its message indexes"),
        (framed(2, b"\x02"), "cut off within its message indexes"),
        (framed(2, b"\x80"), "cut off within its message indexes"),
        (framed(2, b"\xff" * 9), "its message indexes are no numbers"),
        (framed(2, b"\x01"), "-1 message indexes"),
        (framed(2, b"\xfe\xff\x03" + b"\0" * 9), "message indexes"),
        (framed(2, b"\x02\x01"), "message index -1"),
        (framed(2, b"\x02\x0e"), r"no message at \[7\]"),
        (framed(2, b"\x04\x00\x00"), r"no message at \[0, 0\]"),
        (framed(2, b"\0\x08"), r"not a message .*Money"),
        (framed(3, b"\0"), r"imports nobody/has\.proto, which is neither among its references"),
    ):
        with pytest.raises(ValueError, match=error):
            eventually(codec, raw)


@pytest.fixture(scope="module")
def filled():
    """Readers of one schema of each format, without a registry."""
    _, money, order = protos()
    texts = [base64.b64encode(file.SerializeToString()).decode() for file in (money, order)]
    return {
        "avro": AvroCodec("http://a:1").reader(schemas.Schema(1, "AVRO", TICKET)),
        "nested": AvroCodec("http://a:1").reader(schemas.Schema(1, "AVRO", LIST)),
        "json": JsonSchemaCodec("http://a:1").reader(schemas.Schema(1, "JSON", json.dumps(POINT))),
        "protobuf": ProtobufCodec("http://a:1").reader(
            schemas.Schema(1, "PROTOBUF", texts[1], ((money.name, texts[0]),))
        ),
    }


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["avro", "nested", "json", "protobuf"]), st.binary(max_size=60))
def test_any_bytes_are_a_value_or_say_why_not(filled, name, body):
    codec = AvroCodec("http://a:1")
    codec._readers[1] = filled[name]
    message = ConsumerRecord("t", 0, 0, 7, 1, 0, None, framed(1, body), [], None, 0, 0, 0)
    made = Decoder("t", codec, None, None, None)(message)
    assert isinstance(made, Record) or made.error.startswith("does not fit its schema 1: ")


def test_nesting_without_end_does_not_end_the_process(registry):
    """fastavro's compiled code overruns the stack where a schema holds itself."""
    registry.register("t-value", LIST)
    codec = ready(AvroCodec(registry.url), writing=True)
    assert codec.decode(codec.encode({"next": {"next": None}}, "t"), "t") == {"next": {"next": None}}
    for depth in (200, 5_000, 1_000_000):
        with pytest.raises(ValueError, match=r"nested deeper|RecursionError"):
            codec.decode(framed(1, b"\x02" * depth + b"\x00"), "t")
    endless = {}
    endless["next"] = endless
    with pytest.raises(ValueError, match="Circular"):
        codec.encode(endless, "t")
    # One that holds itself by way of another is such a schema too; one that merely comes twice is not.
    inner = {"type": "record", "name": "B", "fields": [{"name": "a", "type": ["null", "A"]}]}
    outer = {
        "type": "record",
        "name": "A",
        "fields": [{"name": "b", "type": {"type": "array", "items": inner}}],
    }
    number = registry.register("x", json.dumps(outer))
    with pytest.raises(ValueError, match=r"nested deeper|RecursionError"):
        eventually(codec, framed(number, b"\x02\x02" * 100_000))


def test_logical_types_and_what_does_not_fit(registry):
    fields = [
        {"name": "price", "type": {"type": "bytes", "logicalType": "decimal", "precision": 6, "scale": 2}},
        {"name": "kind", "type": {"type": "enum", "name": "K", "symbols": ["A", "B"]}},
    ]
    registry.register("t-value", json.dumps({"type": "record", "name": "R", "fields": fields}))
    codec = ready(AvroCodec(registry.url), writing=True)
    value = {"price": Decimal("12.50"), "kind": "B"}
    assert codec.decode(codec.encode(value, "t"), "t") == value
    for wrong, error in (
        ({"price": Decimal(1)}, "R.kind"),
        ({"price": Decimal(1), "kind": "C"}, "R.kind"),
        (value | {"kindd": "A"}, "more fields than the schema specifies: kindd"),
        ([], "is <\\[\\]>"),
        (None, "None"),
    ):
        with pytest.raises(ValueError, match=error) as refused:
            codec.encode(wrong, "t")
        assert str(refused.value).startswith("does not fit schema 1 of subject 't-value': ")
        assert len(str(refused.value)) < 600


def test_a_schema_from_a_file_is_registered_where_that_is_allowed(registry, tmp_path):
    path = tmp_path / "ticket.avsc"
    path.write_text(TICKET)
    codec = ready(AvroCodec(registry.url, schema=path, subject="mine"), writing=True)
    assert registry.subjects == {"mine": [1]}
    registry.read_only = True
    # Known already, so reading is enough.
    again = ready(AvroCodec(registry.url, schema=path, subject="mine"), writing=True)
    assert again.encode({"id": "a", "at": NOON}, "t") == codec.encode({"id": "a", "at": NOON}, "t")
    with pytest.raises(ConfigError, match=r"does not allow this: 422 Subject t-value is in read-only mode"):
        ready(AvroCodec(registry.url, schema=path), writing=True)
    with pytest.raises(ConfigError, match=r"none\.avsc cannot be read"):
        ready(AvroCodec(registry.url, schema=tmp_path / "none.avsc"), writing=True)
    with pytest.raises(ConfigError, match=r"404 Subject 'new-value' not found.*schema=FILE would register"):
        ready(AvroCodec(registry.url), "new", writing=True)
    with pytest.raises(ConfigError, match="are for sinks"):
        ready(AvroCodec(registry.url, schema=path))


def test_a_proto_file_is_compiled_by_the_registry(registry, tmp_path):
    _, money, _ = protos()
    path = tmp_path / "money.proto"
    path.write_text(f'syntax = "proto3"; package {money.package}; message Money {{ int64 cents = 1; }}')
    registry.compiled[path.read_text()] = money.SerializeToString()
    codec = ready(ProtobufCodec(registry.url, schema=path), writing=True)
    assert codec.decode(codec.encode({"cents": 3}, "t"), "t") == {"cents": "3"}


def test_a_registry_that_is_away_slow_or_strange_is_waited_for(registry, monkeypatch):
    monkeypatch.setattr(schemas, "AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(schemas, "WAIT_SECONDS", 0.05)
    number = registry.register("t-value", '"string"')
    codec, raw = AvroCodec(registry.url), framed(number, b"\x02a")
    for failing, said in (
        ((500, {"error_code": 50001, "message": "no store"}), "cannot answer now: 500 no store"),
        ((503, "<html>"), "cannot answer now: 503"),
        ((429, {}), "429 Too Many Requests"),
        ((200, "<html>hello"), "not JSON"),
        ((200, {"no": "schema"}), "without a schema"),
        ((200, {"schema": 5}), "without a schema"),
    ):
        registry.failing = failing
        seen, end = "", time.monotonic() + 20
        while said not in seen:
            assert time.monotonic() < end, seen
            with pytest.raises(NotYet) as wait:
                codec.decode(raw, "t")
            seen = str(wait.value)
            assert registry.url in seen
    registry.failing, registry.delay = None, 0.3
    begun = time.monotonic()
    with pytest.raises(NotYet, match="has not answered yet"):
        codec.decode(raw, "t")
    assert time.monotonic() - begun < 5
    assert eventually(codec, raw) == "a"
    # What a source makes of it: it keeps the record.
    registry.delay = 0
    registry.failing = (500, {})
    other = registry.register("t-value", '"long"')
    message = ConsumerRecord("t", 0, 0, 7, 1, 0, None, framed(other, b"\x02"), [], None, 0, 0, 0)
    decode = Decoder("t", codec, None, None, None)
    with pytest.raises(NotYet):
        decode(message)
    registry.failing = None
    end = time.monotonic() + 20
    while True:
        try:
            made = decode(message)
            break
        except NotYet:
            assert time.monotonic() < end
    assert made == Record(1, "", "t:0:7", 0.001)
    missing = ConsumerRecord("t", 0, 0, 8, 1, 0, None, framed(99, b"\x02"), [], None, 0, 0, 0)
    registry.failing = (500, {})
    with pytest.raises(NotYet):
        decode(missing)


def test_credentials(registry, monkeypatch):
    registry.user = ("me", "secret-word")
    number = registry.register("t-value", '"string"')
    with pytest.raises(ConfigError, match="refuses the credentials: 401 Unauthorized"):
        ready(AvroCodec(registry.url))
    with pytest.raises(SourceError, match="refuses the credentials: 401"):
        eventually(AvroCodec(registry.url), framed(number, b"\x02a"))
    with pytest.raises(ConfigError, match="CHAINWAX_REGISTRY_PASSWORD, which holds the registry's password"):
        ready(AvroCodec(SchemaRegistry(registry.url, username="me")))
    monkeypatch.setenv("MINE", "not-the-secret")
    wrong = SchemaRegistry(registry.url, username="me", password_env="MINE")
    with pytest.raises(ConfigError, match="401") as refused:
        ready(AvroCodec(wrong))
    assert "not-the-secret" not in f"{refused.value} {wrong} {refused.value.__cause__!r}"
    monkeypatch.setenv("CHAINWAX_REGISTRY_URL", registry.url)
    monkeypatch.setenv("CHAINWAX_REGISTRY_USERNAME", "me")
    monkeypatch.setenv("CHAINWAX_REGISTRY_PASSWORD", "secret-word")
    assert eventually(ready(codec_of("avro")), framed(number, b"\x02a")) == "a"
    # What one may not read is poison, and not the end of the flow.
    registry.failing = (403, {"error_code": 40301, "message": "Denied"})
    other = ConsumerRecord("t", 0, 0, 7, 1, 0, None, framed(5, b"\x02"), [], None, 0, 0, 0)
    codec = ready(codec_of("avro"))
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            made = Decoder("t", codec, None, None, None)(other)
            break
        except NotYet:
            pass
    assert isinstance(made, BadRecord)
    assert "schema 5 may not be read" in made.error
    assert "403 Denied" in made.error


@pytest.mark.parametrize(
    ("url", "error"),
    [
        (None, "no schema registry is named"),
        ("localhost:8081", "is not http://HOST:PORT"),
        ("ftp://a", "is not http://HOST:PORT"),
        ("http://", "is not http://HOST:PORT"),
        ("http://a:x", "is not http://HOST:PORT"),
        ("http://a:1?b=c", "is not http://HOST:PORT"),
        ("http://me:hidden-word@a:1", "no credentials in the address"),
        ("http://127.0.0.1:1", "cannot be reached"),
    ],
)
def test_wrong_addresses(url, error):
    with pytest.raises(ConfigError, match=error) as refused:
        ready(AvroCodec(url))
    assert "hidden-word" not in str(refused.value)


def test_a_certificate_file_that_is_none(tmp_path):
    (tmp_path / "ca.pem").write_text("hello")
    for name in ("ca.pem", "none.pem"):
        with pytest.raises(ConfigError, match="holds no certificates that can be read"):
            ready(AvroCodec(SchemaRegistry("https://a:1", cafile=str(tmp_path / name))))


@pytest.mark.parametrize(
    ("open_it", "uri", "error"),
    [
        (open_source, "kafka://t?codec=avro", "no schema registry is named"),
        (open_source, "kafka://t?codec=arvo", "did you mean 'avro'"),
        (
            open_source,
            "kafka://t?registry=http://a:1",
            r"registry: only for codec=avro, .* this is codec=json",
        ),
        (open_source, "kafka://t?codec=avro&registry_password=x", "did you mean 'registry_password_env'"),
        (open_source, "kafka://t?codec=avro&schema=x.avsc", "unknown option 'schema'"),
        (open_sink, "kafka://t?codec=avro&registry=http://a:1&message=M", "'message' is for codec=protobuf"),
        (open_sink, "kafka://t?subject=s", "subject: only for codec=avro"),
    ],
)
def test_wrong_uris(open_it, uri, error):
    with pytest.raises(ConfigError, match=error):
        open_it(f"{uri}&servers=127.0.0.1:1", name="n")


@pytest.mark.parametrize(
    ("codec", "library"),
    [("avro", "fastavro"), ("jsonschema", "jsonschema_rs"), ("protobuf", "google.protobuf")],
)
def test_a_library_that_is_not_installed(codec, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, SCHEMA_CODECS[codec][0], raising=False)
    with pytest.raises(ConfigError, match=rf"codec={codec} needs .*pip install 'chainwax\[schemas\]'"):
        open_source(f"kafka://t?codec={codec}&registry=http://a:1", name="in")


def test_many_threads_ask_once(registry):
    number = registry.register("t-value", '"string"')
    registry.delay = 0.1
    codec, found = AvroCodec(registry.url), []
    threads = [
        threading.Thread(target=lambda: found.append(eventually(codec, framed(number, b"\x02a"))))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["a"] * 8
    assert len(registry.asked) == 1
