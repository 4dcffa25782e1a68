"""Arbitrary bytes become a record, a bad record or nothing; never an exception."""

import gzip
import json
from datetime import UTC, date, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainwax.connectors import BadRecord, Record, RecordedSource
from chainwax.connectors.readers import Fields, parse_json, parse_time

ANY = Fields()


def read_all(path, **options):
    source = RecordedSource(path, **options)
    out = []
    for part in source.list_parts():
        partition = source.build_part("in", part, None)
        try:
            while True:
                out += partition.next_batch()
        except StopIteration:
            partition.close()
    return out


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.binary(max_size=300))
def test_any_bytes_are_read_without_an_exception(raw):
    parsed = parse_json(raw, "f:1", ANY)
    if parsed is None:
        assert not raw.decode("utf-8").strip()
    else:
        assert parsed.position == "f:1"
        assert isinstance(parsed, Record) or (parsed.error and len(parsed.raw) <= 1000)


@given(json_values)
def test_json_comes_back_as_it_was(value):
    parsed = parse_json(json.dumps(value).encode(), "f:1", ANY)
    assert isinstance(parsed, Record)
    assert parsed.value == value


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), max_size=8), st.booleans())
def test_each_line_is_accounted_for(tmp_path_factory, lines, zipped):
    path = tmp_path_factory.mktemp("lines") / "in.jsonl"
    data = b"\n".join(lines)
    path.write_bytes(gzip.compress(data) if zipped or data[:2] == b"\x1f\x8b" else data)
    out = read_all(path)
    if lines and lines[0].startswith(b"\xef\xbb\xbf"):
        lines[0] = lines[0][3:]
    filled = [
        f"in.jsonl:{number}"
        for number, line in enumerate(lines, 1)
        if line.decode("utf-8", "replace").strip()
    ]
    assert [record.position for record in out] == filled


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 100))
def test_a_damaged_archive_never_raises(tmp_path_factory, garbage, cut):
    path = tmp_path_factory.mktemp("gz") / "in.jsonl.gz"
    whole = gzip.compress(b'{"id": 1}\n' * 20)
    path.write_bytes(whole[: cut or 2] + garbage)
    for record in read_all(path):
        assert isinstance(record, (Record, BadRecord))


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b'{"a": ', "malformed JSON: Expecting value at column 7"),
        (b'{"a": 1} {"b": 2}', "malformed JSON: Extra data at column 10"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b'{"a": "\xff"}', "not UTF-8: byte 0xff at 8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8: byte 0xff at 1"),
        (b"\x00" * 50, "malformed JSON: Expecting value at column 1"),
        (b"[" * 100_000, "nested deeper than 100"),
        (b"[" * 101 + b"]" * 101, "nested deeper than 100"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "nested deeper than 100"),
        (b'{"a": "\\ud83d"}', "not Unicode: half of a surrogate pair"),
        (b'{"\\uDE00": 1}', "not Unicode: half of a surrogate pair"),
        (b"9" * 5000, "integer string conversion"),
    ],
)
def test_what_is_no_json_is_a_bad_record(raw, error):
    parsed = parse_json(raw, "f:1", ANY)
    assert isinstance(parsed, BadRecord)
    assert error in parsed.error
    assert 0 < len(parsed.raw) <= 1000


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b'"text"', "text"),
        (b"12", 12),
        (b"null", None),
        (b"[1, 2]\r\n", [1, 2]),
        (b'{"a": "\\ud83d\\ude00"}', {"a": "\N{GRINNING FACE}"}),
        (b"[" * 100 + b"]" * 100, json.loads("[" * 100 + "]" * 100)),
        (b"[" + b"{}," * 500 + b"{}]", [{}] * 501),
    ],
)
def test_any_json_value_is_a_record(raw, value):
    assert parse_json(raw, "f:1", ANY) == Record(value, "", "f:1", None)


@pytest.mark.parametrize("blank", [b"", b"\n", b" \t\r\n"])
def test_blank_lines_are_nothing(blank):
    assert parse_json(blank, "f:1", ANY) is None


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("2026-03-02T08:00:20+00:00", 1_772_438_420),
        ("2026-03-02T08:00:20Z", 1_772_438_420),
        ("2026-03-02T09:00:20+01:00", 1_772_438_420),
        ("2026-03-02 08:00:20", 1_772_438_420),
        (1_772_438_420, 1_772_438_420),
        (1_772_438_420.5, 1_772_438_420.5),
        (1_772_438_420_500, 1_772_438_420.5),
        (1_772_438_420_500_000, 1_772_438_420.5),
        (1_772_438_420_500_000_000, 1_772_438_420.5),
        ("1772438420", 1_772_438_420),
        (datetime(2026, 3, 2, 9, 0, 20, tzinfo=timezone(timedelta(hours=1))), 1_772_438_420),
        (date(2026, 3, 2), 1_772_409_600),
        (0, 0),
    ],
)
def test_times(value, seconds):
    assert parse_time(value) == seconds


@pytest.mark.parametrize("value", ["soon", "", "nan", float("inf"), True, None, [], {}, -1e11])
def test_what_is_no_time(value):
    with pytest.raises(ValueError, match=r".+"):
        parse_time(value)


@given(st.one_of(st.text(max_size=30), st.integers(), st.floats(), st.booleans()))
def test_a_time_is_one_that_a_datetime_holds(value):
    try:
        seconds = parse_time(value)
    except (ValueError, OverflowError):
        return
    assert datetime.fromtimestamp(seconds, UTC).year <= 9999


@pytest.mark.parametrize(
    ("value", "key", "time"),
    [
        ({"id": "a", "key": "b", "time": 5, "ts": 6}, "a", 5),
        ({"key": "b", "ts": 6}, "b", 6),
        ({"id": None, "key": 7, "timestamp": "x", "ts": 1}, "7", 1),
        ({"id": True}, "true", None),
        ({"id": {"b": 1, "a": "\xe9"}}, '{"a": "\xe9", "b": 1}', None),
        ({"time": 10**400}, "", None),
        ({}, "", None),
    ],
)
def test_usual_fields(value, key, time):
    assert ANY.record(value, "p") == Record(value, key, "p", time)


def test_named_fields():
    fields = Fields("customer", "created")
    value = {"id": 1, "customer": "Ada", "created": "1970-01-01T00:00:09Z"}
    assert fields.record(value, "p") == Record(value, "Ada", "p", 9)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ({"custmer": "Ada", "created": 1}, "no field 'customer' for the key: did you mean 'custmer'?"),
        ({"customer": "Ada"}, "no field 'created' for the time: known: customer"),
        ({"customer": None, "created": 1}, "field 'customer' for the key is null"),
        ({"customer": "Ada", "created": "soon"}, "field 'created' is not a time: 'soon'"),
        (["Ada"], "no field 'customer': a list is not an object"),
    ],
)
def test_a_named_field_must_be_there(value, error):
    parsed = Fields("customer", "created").record(value, "p")
    assert isinstance(parsed, BadRecord)
    assert parsed.error == error
