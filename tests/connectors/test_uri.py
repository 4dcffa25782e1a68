"""Sources and sinks by URI, and what is said of those that are wrong."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainwax.connectors import (
    SINKS,
    SOURCES,
    ConsoleSink,
    JsonLinesSink,
    Kind,
    RecordedSource,
    RecordingSource,
    StopSwitch,
    Uri,
    open_sink,
    open_source,
    parse_uri,
)
from chainwax.router.errors import ConfigError
from chainwax.router.recording import SqliteRecording


@pytest.fixture
def stream(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"who": f"w{n}", "created": n}) + "\n" for n in range(5)))
    return path


def first_batch(source):
    part = source.list_parts()[0]
    partition = source.build_part("in", part, None)
    batch = partition.next_batch()
    partition.close()
    return batch


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("in.jsonl", Uri("file", "in.jsonl")),
        ("file:in.jsonl", Uri("file", "in.jsonl")),
        ("./a:b.jsonl", Uri("file", "./a:b.jsonl")),
        ("C:in.jsonl", Uri("file", "C:in.jsonl")),
        ("in.jsonl?key=a%26b&speed=10x", Uri("file", "in.jsonl", {"key": "a&b", "speed": "10x"})),
        (
            "recording:run.db?run=latest&source=tickets",
            Uri("recording", "run.db", {"run": "latest", "source": "tickets"}),
        ),
        ("-", Uri("stdout", "")),
        ("stdout:", Uri("stdout", "")),
        ("KAFKA://host:1/topic", Uri("kafka", "//host:1/topic")),
        ("in.jsonl?", Uri("file", "in.jsonl")),
        ("", Uri("file", "")),
    ],
)
def test_parts(uri, parts):
    assert parse_uri(uri) == parts


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("in.jsonl?key", r"options are written \?name=value&name=value, not '\?key'"),
        ("in.jsonl?key=", "option 'key' has no value"),
        ("in.jsonl?key=a&key=b", "option 'key' is given twice"),
    ],
)
def test_malformed(uri, error):
    with pytest.raises(ConfigError, match=error):
        parse_uri(uri)


@given(st.text(max_size=40))
def test_any_text_opens_or_is_refused(text):
    try:
        open_source(text, name="tickets")
    except ConfigError as error:
        assert str(error).startswith(f"source 'tickets' ({text}): ")  # noqa: PT017


def test_options_reach_the_source(stream):
    source = open_source(f"{stream}?key=who&time=created&limit=3&batch_size=2", name="tickets")
    assert isinstance(source, RecordedSource)
    assert [(r.key, r.time) for r in first_batch(source)] == [("w0", 0), ("w1", 1)]


def test_the_uris_own_speed_goes_before_the_commands(stream):
    # At max the batch holds all five, at 1x only what is due.
    assert len(first_batch(open_source(f"{stream}?time=created", name="in", speed="1x"))) == 1
    assert len(first_batch(open_source(f"{stream}?time=created&speed=max", name="in", speed="1x"))) == 5
    assert len(first_batch(open_source(str(stream), name="in"))) == 5


def test_the_switch_reaches_the_source(stream):
    stop = StopSwitch()
    stop.set()
    partition = open_source(str(stream), name="in", stop=stop).build_part("in", "in.jsonl", None)
    with pytest.raises(StopIteration):
        partition.next_batch()
    partition.close()


def test_recordings(tmp_path):
    recording = SqliteRecording(tmp_path / "run.db")
    recording.open_run("r1", "flow", {})
    recording.items("tickets", [("p", "k", None, 1)])
    recording.close()
    source = open_source(f"recording:{tmp_path}/run.db?run=latest&source=tickets", name="tickets")
    assert isinstance(source, RecordingSource)
    assert first_batch(source)[0].value == 1
    with pytest.raises(ConfigError, match=r"source 't' \(recording:.*no run 'r2'"):
        open_source(f"recording:{tmp_path}/run.db?run=r2", name="t")


def test_sinks(tmp_path):
    assert isinstance(open_sink("-", name="out"), ConsoleSink)
    assert isinstance(open_sink("stdout:", name="out"), ConsoleSink)
    assert isinstance(open_sink(f"{tmp_path}/out.jsonl", name="out"), JsonLinesSink)
    assert isinstance(open_sink(f"{tmp_path}/out.NDJSON", name="out"), JsonLinesSink)


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("recordng:run.db", "unknown source scheme 'recordng': did you mean 'recording'?"),
        ("stdout:", "unknown source scheme 'stdout': known: "),
        ("{stream}?sped=1x", "unknown option 'sped': did you mean 'speed'?"),
        ("{stream}?limit=ten", "option 'limit' is 'ten', which is not a number"),
        ("{stream}?limit=-1", "limit is -1: it must be at least 0"),
        ("{stream}?speed=fast", "speed 'fast' is not a pace"),
        ("{stream}x", "does not exist: did you mean 'in.jsonl'?"),
        ("recording:{stream}", "in.jsonl"),
    ],
)
def test_wrong_sources(stream, uri, error):
    uri = uri.format(stream=stream)
    with pytest.raises(ConfigError) as caught:
        open_source(uri, name="tickets")
    assert str(caught.value).startswith(f"source 'tickets' ({uri}): ")
    assert error in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("stdot:", "unknown sink scheme 'stdot': did you mean 'stdout'?"),
        ("out.jsnl", "ending '.jsnl' is not one that is written: did you mean '.jsonl'?"),
        ("out.parquet", "ending '.parquet' is not one that is written"),
        ("out", "ending '' is not one that is written: known: .jsonl, .ndjson"),
        ("out.jsonl?speed=1x", "unknown option 'speed': there are none"),
        ("stdout:file", "stdout takes no path, but 'file' is given"),
    ],
)
def test_wrong_sinks(uri, error):
    with pytest.raises(ConfigError) as caught:
        open_sink(uri, name="drafts")
    assert str(caught.value).startswith(f"sink 'drafts' ({uri}): ")
    assert error in str(caught.value)


def test_a_new_connector_is_one_entry(monkeypatch):
    monkeypatch.setitem(
        SOURCES, "mine", Kind(lambda path, *, stop, depth=0: (path, stop, depth), {"depth": int})
    )
    monkeypatch.setitem(SINKS, "mine", Kind(lambda path: path))
    stop = StopSwitch()
    assert open_source("mine:there?depth=3", name="in", stop=stop, speed="1x") == ("there", stop, 3)
    assert open_sink("mine:here", name="out") == "here"
