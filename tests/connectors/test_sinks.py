"""Values become lines of JSON; what cannot is said, and never ends the flow."""

import dataclasses
import enum
import io
import json
import logging
import math
import os
import sys
from collections import OrderedDict
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from uuid import UUID

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from chainwax.connectors import ConsoleSink, JsonLinesSink, JsonText, ListSink, SinkError, to_json
from chainwax.router.errors import ConfigError


class Fault(BaseModel):
    product: str
    seen: datetime


@dataclasses.dataclass(slots=True)
class Point:
    x: int
    tags: set


class Colour(enum.Enum):
    red = "r"


class Hostile:
    def __repr__(self):
        raise RuntimeError("no repr")

    @property
    def tolist(self):
        raise KeyError("no list either")


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def cycle():
    value = {}
    value["self"] = value
    return value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            Fault(product="Quill", seen=datetime(2026, 3, 2, tzinfo=UTC)),
            {"product": "Quill", "seen": "2026-03-02T00:00:00Z"},
        ),
        (Point(1, {"b", "a"}), {"x": 1, "tags": ["a", "b"]}),
        ({"nested": [Point(1, frozenset())]}, {"nested": [{"x": 1, "tags": []}]}),
        (datetime(2026, 3, 2, 8, tzinfo=UTC), "2026-03-02T08:00:00+00:00"),
        (date(2026, 3, 2), "2026-03-02"),
        (timedelta(milliseconds=1500), 1.5),
        (Colour.red, "r"),
        (b"\xff\x00", "/wA="),
        (Decimal("1.50"), "1.50"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Path("a/b"), "a/b"),
        (MappingProxyType({"a": 1}), {"a": 1}),
        (OrderedDict(a=(1, 2)), {"a": [1, 2]}),
        (np.array([[1, 2]]), [[1, 2]]),
        (np.float32(0.5), 0.5),
        ({1, "a", None}, [None, 1, "a"]),
        ("line\nbreak", "line\nbreak"),
    ],
)
def test_what_json_lacks(value, expected):
    text = to_json(value)
    assert json.loads(text) == expected
    assert "\n" not in text


@pytest.mark.parametrize(
    "value",
    [object(), math.nan, [math.inf], {(1, 2): 3}, cycle(), deep(100_000), Hostile(), 10**5000, Fault, print],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_written(value):
    with pytest.raises(TypeError, match="cannot be written as JSON: "):
        to_json(value)


def test_text_that_is_json_already_is_left_alone():
    ready = to_json({"a": 1})
    assert isinstance(ready, JsonText)
    assert to_json(ready) is ready
    assert to_json("text") == '"text"'


@example("half \ud83d of a pair, \xe9")
@given(st.text(st.characters(exclude_categories=())))
def test_any_text_can_be_encoded_and_comes_back(text):
    line = to_json({"t": text})
    assert json.loads(line.encode("utf-8")) == {"t": text}


def write(sink, *batches, state=None):
    (part,) = sink.list_parts()
    partition = sink.build_part("out", part, state)
    for batch in batches:
        partition.write_batch(batch)
    state = partition.snapshot()
    partition.close()
    return state


def test_lines(tmp_path):
    out = tmp_path / "a" / "b" / "out.jsonl"
    sink = JsonLinesSink(out)
    state = write(sink, [{"a": "\xe9"}], [to_json("x"), 2], [])
    assert out.read_bytes() == '{"a": "\xe9"}\n"x"\n2\n'.encode()
    assert state == out.stat().st_size
    assert sink.part_fn("any key") == 0
    with out.open("ab") as file:
        file.write(b"after the snapsho")
    write(sink, [3], state=state)
    assert out.read_text("utf-8") == '{"a": "\xe9"}\n"x"\n2\n3\n'


def test_what_cannot_be_written_is_said_in_its_place(tmp_path, caplog):
    out = tmp_path / "out.jsonl"
    sink = JsonLinesSink(out)
    with caplog.at_level(logging.WARNING):
        write(sink, [1, math.nan, Hostile(), 2])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [lines[0], lines[3]] == [1, 2]
    assert lines[1]["error"] == "unserialisable"
    assert lines[1]["repr"] == "nan"
    assert lines[2]["repr"] == "<Hostile>"
    assert sink.unserialisable == 2
    assert "out.jsonl: a value cannot be written as JSON" in caplog.text


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder: name a file in it, such as .*out\.jsonl"):
        JsonLinesSink(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SinkError, match=r"file.* cannot be made: Not a directory"):
        write(JsonLinesSink(tmp_path / "file" / "inner" / "out.jsonl"))


def test_a_file_that_may_not_be_written(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    # Not by its mode: root may write anywhere.
    monkeypatch.setattr(Path, "open", refuse)
    out = tmp_path / "out.jsonl"
    with pytest.raises(SinkError, match=r"out\.jsonl cannot be written: Permission denied"):
        write(JsonLinesSink(out))


def test_devices_keep_nothing():
    assert write(JsonLinesSink("/dev/null"), [1], state=100) == 102


def test_console(capfdbinary):
    write(ConsoleSink(), [{"a": "\xe9"}], [1])
    assert capfdbinary.readouterr().out == '{"a": "\xe9"}\n1\n'.encode()


def test_console_is_utf8_whatever_the_terminal(monkeypatch):
    binary = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(binary, "ascii"))
    write(ConsoleSink(), ["\xe9"])
    assert binary.getvalue() == '"\xe9"\n'.encode()


def test_console_that_has_only_text(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(sys, "stdout", text)
    write(ConsoleSink(), ["\xe9"])
    assert text.getvalue() == '"\xe9"\n'


def test_console_that_nobody_reads(monkeypatch):
    read, written = os.pipe()
    os.close(read)
    broken = open(written, "w", buffering=1)  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", broken)
    with pytest.raises(SinkError, match="standard output cannot be written: Broken pipe"):
        write(ConsoleSink(), [1])
    monkeypatch.undo()
    with pytest.raises(BrokenPipeError):
        broken.close()


def test_list():
    values = ["old"]
    sink = ListSink(values)
    state = write(sink, [1, {2}])
    assert values == [1, {2}]
    values.append("after the snapshot")
    write(sink, [3], state=state)
    assert values == [1, {2}, 3]
