"""Where a flow's results go: files of JSON lines, the console, a list.

Every sink of this room takes ``(key, value)`` pairs. A value is anything that `to_json` takes, or
text that `to_json` made already.
"""

from __future__ import annotations

import base64
import dataclasses
import errno
import json
import logging
import os
import stat
import sys
from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any
from uuid import UUID

from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition
from pydantic import BaseModel
from typing_extensions import override

from chainwax.router.errors import ChainwaxError, ConfigError

__all__ = ["ConsoleSink", "JsonLinesSink", "JsonText", "ListSink", "SinkError", "to_json"]

log = logging.getLogger(__name__)


class SinkError(ChainwaxError):
    """A sink cannot take what it is given: the disk is full, the file is gone."""


class JsonText(str):
    """Text that is one line of JSON already; sinks write it as it is."""

    __slots__ = ()


def _plain(value: Any) -> Any:
    """What JSON has in place of a value that it does not know."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        # Sets have no order of their own; without one, two runs would write different files.
        return sorted(value, key=lambda member: (type(member).__name__, repr(member)))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (Decimal, UUID, Path)):
        return str(value)
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} has no form in JSON")


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_plain).encode


def to_json(value: Any) -> JsonText:
    """One line of JSON for a value.

    Besides what JSON has: pydantic models and dataclasses become objects, times ISO-8601 text,
    durations seconds, sets sorted lists, bytes base64 text, decimals text, numpy's arrays lists.
    Raises TypeError where a value cannot be written: an unknown class, NaN, a cycle.

    >>> to_json({"at": timedelta(minutes=1), "tags": {"b", "a"}})
    '{"at": 60.0, "tags": ["a", "b"]}'
    """
    if type(value) is JsonText:
        return value
    try:
        text = _encode(value)
    except Exception as error:  # a value's own code runs in here and may raise anything
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise TypeError(f"cannot be written as JSON: {reason}") from error
    if not text.isascii():
        # A half surrogate pair cannot be encoded; spelled out, it is JSON for the same string.
        text = text.encode("utf-8", "backslashreplace").decode()
    return JsonText(text)


class _Encoder:
    """Makes a sink's lines, and counts what it could not write."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.unserialisable = 0

    def line(self, value: Any) -> str:
        try:
            return to_json(value)
        except TypeError as error:
            self.unserialisable += 1
            log.warning("%s: a value %s", self._name, error)
            try:
                shown = repr(value)[:1000]
            except Exception:
                shown = f"<{type(value).__name__}>"
            return to_json({"error": "unserialisable", "message": str(error), "repr": shown})

    def lines(self, values: list[Any]) -> bytes:
        return "".join(f"{self.line(value)}\n" for value in values).encode()


class _OnePart(FixedPartitionedSink[Any, int]):
    """A sink with one partition, whatever the key."""

    def __init__(self, name: str) -> None:
        self._part = name
        self._encoder = _Encoder(name)

    @property
    def unserialisable(self) -> int:
        """How many values could not be written; an object that says so stands in their place."""
        return self._encoder.unserialisable

    @override
    def list_parts(self) -> list[str]:
        return [self._part]

    @override
    def part_fn(self, item_key: str) -> int:
        return 0


class _FilePartition(StatefulSinkPartition[Any, int]):
    def __init__(self, path: Path, encoder: _Encoder, offset: int) -> None:
        self._path = path
        self._encoder = encoder
        self._offset = offset
        try:
            # Unbuffered: what was written is then in the file, and an error comes where it happens.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise SinkError(f"{path} cannot be written: {error.strerror}") from error
        try:
            self._cut()
        except BaseException:
            self._file.close()
            raise

    def _cut(self) -> None:
        """Drop what was written after the last snapshot: it will be written again."""
        info = os.fstat(self._file.fileno())
        if not stat.S_ISREG(info.st_mode):  # a device or a pipe keeps nothing
            return
        if info.st_size < self._offset:
            raise SinkError(
                f"{self._path} has {info.st_size} bytes, but {self._offset} were written to it before the "
                "stop: put the file back, or start a new run"
            )
        self._file.truncate(self._offset)

    @override
    def write_batch(self, values: list[Any]) -> None:
        data = memoryview(self._encoder.lines(values))
        size = len(data)
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise SinkError(f"{self._path} cannot be written: {error.strerror}") from error
        self._offset += size

    @override
    def snapshot(self) -> int:
        try:
            # The recovery store must never know of more than the disk has.
            os.fsync(self._file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a device has nothing to sync
                raise SinkError(f"{self._path} cannot be written: {error.strerror}") from error
        return self._offset

    @override
    def close(self) -> None:
        self._file.close()


class JsonLinesSink(_OnePart):
    """One JSON value a line, UTF-8; each value once, also through a crash and a resume.

    A new run begins the file anew; a resume cuts it to what the last snapshot covers. Missing
    folders are made. Raises SinkError where it cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        if self._path.is_dir():
            raise ConfigError(f"{path} is a folder: name a file in it, such as {self._path / 'out.jsonl'}")
        super().__init__(self._path.name)

    @override
    def build_part(self, step_id: str, for_part: str, resume_state: int | None) -> _FilePartition:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SinkError(f"{self._path.parent} cannot be made: {error.strerror}") from error
        return _FilePartition(self._path, self._encoder, resume_state or 0)


class _ConsolePartition(StatefulSinkPartition[Any, None]):
    def __init__(self, encoder: _Encoder) -> None:
        self._encoder = encoder

    @override
    def write_batch(self, values: list[Any]) -> None:
        data = self._encoder.lines(values)
        try:
            # Bytes where there are any: JSON is UTF-8, whatever the terminal's encoding.
            binary = getattr(sys.stdout, "buffer", None)
            sys.stdout.flush()
            if binary is None:
                sys.stdout.write(data.decode())
            else:
                binary.write(data)
            sys.stdout.flush()
        except OSError as error:
            raise SinkError(f"standard output cannot be written: {error.strerror}") from error

    @override
    def snapshot(self) -> None:
        return None


class ConsoleSink(_OnePart):
    """JSON lines to standard output; after a resume, what came since the last snapshot comes again."""

    def __init__(self) -> None:
        super().__init__("stdout")

    @override
    def build_part(self, step_id: str, for_part: str, resume_state: Any) -> Any:
        return _ConsolePartition(self._encoder)


class _ListPartition(StatefulSinkPartition[Any, int]):
    def __init__(self, values: list[Any]) -> None:
        self._values = values

    @override
    def write_batch(self, values: list[Any]) -> None:
        self._values += values

    @override
    def snapshot(self) -> int:
        return len(self._values)


class ListSink(_OnePart):
    """Appends to a list, values as they are; a resume cuts the list as it would a file."""

    def __init__(self, values: list[Any]) -> None:
        super().__init__("list")
        self._values = values

    @override
    def build_part(self, step_id: str, for_part: str, resume_state: int | None) -> _ListPartition:
        del self._values[resume_state or 0 :]
        return _ListPartition(self._values)
