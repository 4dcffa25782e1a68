"""How bytes become records: one reader for each format, each able to go on from where it stopped."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

from chainwax.connectors.record import AnyRecord, BadRecord, Record
from chainwax.router.errors import ConfigError, nearest

__all__ = [
    "FORMATS",
    "Fields",
    "ItemsReader",
    "LinesReader",
    "ParquetReader",
    "Reader",
    "State",
    "parse_json",
    "parse_time",
]

MAX_LINE = 16 * 1024 * 1024
"""Bytes of the longest line that is read."""
MAX_DEPTH = 100
"""Lists and objects inside one another; deeper ones break pickling and JSON further down."""
READ_BYTES = 4 * 1024 * 1024
"""One call of `Reader.read` stops after about so much, so that long lines do not pile up."""

YEAR_ONE = datetime(1, 1, 1, tzinfo=UTC).timestamp()

State = tuple[Any, ...]
"""Where a reader stands, in its own terms; pickled into the recovery store."""


class Reader(Protocol):
    """Reads one partition from front to back."""

    state: State
    """The place after the last record read; a reader built with it goes on there."""

    def read(self, count: int) -> list[AnyRecord]:
        """The next records, at most ``count``; none at the end."""
        ...

    def close(self) -> None:
        """Let go of files."""
        ...


def parse_time(value: Any) -> float:
    """Seconds since 1970 from ISO-8601 text, a datetime, or a number of s, ms, µs or ns.

    A time without a zone is UTC. Raises ValueError where it is none of these.

    >>> parse_time("1970-01-01T00:01:00Z"), parse_time("1970-01-01 00:01:00"), parse_time(60)
    (60.0, 60.0, 60.0)
    >>> parse_time(1_772_438_420_000) == parse_time(1_772_438_420)
    True
    """
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.strip())
        except ValueError:
            value = float(value)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC).timestamp()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"a {type(value).__name__} is not a time")
    seconds = float(value)
    if not math.isfinite(seconds):
        raise ValueError(f"{seconds} is not a time")
    # 1e11 seconds are the year 5138 and 1e11 milliseconds 1973: nothing real lies between.
    while abs(seconds) > 1e11:
        seconds /= 1000
    if seconds < YEAR_ONE:
        raise ValueError(f"{value} is before the year 1")
    return seconds


class Fields:
    """Which fields of a value hold its key and its time.

    Without a name the usual ones are tried, and a value may lack them; a field that was named must
    be there, or a typing error would go unseen.
    """

    KEYS = ("id", "key")
    TIMES = ("time", "timestamp", "ts")

    def __init__(self, key: str | None = None, time: str | None = None) -> None:
        self._key = key
        self._time = time
        self._keys = (key,) if key else self.KEYS
        self._times = (time,) if time else self.TIMES

    def record(self, value: Any, position: str) -> AnyRecord:
        """The record that a value is, or why it is none."""
        try:
            if type(value) is dict:
                return Record(value, self._key_of(value), position, self._time_of(value))
            if self._key or self._time:
                kind = type(value).__name__
                raise ValueError(f"no field '{self._key or self._time}': a {kind} is not an object")
        except ValueError as error:
            return BadRecord.of(position, repr(value), str(error))
        return Record(value, "", position, None)

    def _key_of(self, value: Mapping[str, Any]) -> str:
        for name in self._keys:
            key = value.get(name)
            if key is not None:
                if type(key) is str:
                    return key
                return json.dumps(key, sort_keys=True, ensure_ascii=False, default=str)
        if self._key:
            raise ValueError(_absent(self._key, "key", value))
        return ""

    def _time_of(self, value: Mapping[str, Any]) -> float | None:
        for name in self._times:
            when = value.get(name)
            if when is not None:
                try:
                    return parse_time(when)
                except (ValueError, OverflowError):
                    if self._time:
                        raise ValueError(f"field '{name}' is not a time: {str(when)[:100]!r}") from None
        if self._time:
            raise ValueError(_absent(self._time, "time", value))
        return None


def _absent(name: str, what: str, value: Mapping[str, Any]) -> str:
    if name in value:
        return f"field '{name}' for the {what} is null"
    return f"no field '{name}' for the {what}: {nearest(name, value)}"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_decode = json.JSONDecoder(parse_constant=_refuse_constant).decode


def parse_json(raw: bytes, position: str, fields: Fields) -> AnyRecord | None:
    """The record that a piece of JSON is, whatever the bytes are; None where they are blank.

    Any JSON value is a record. Beyond what JSON forbids, refused are values nested deeper than
    100 and half surrogate pairs: no store and no model further down could take them.
    """
    try:
        text = str(raw, "utf-8")
        if not text or text.isspace():
            return None
        value = _decode(text)
        if text.count("[") + text.count("{") > MAX_DEPTH:
            _refuse_depth(value)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return BadRecord.of(position, raw, f"not UTF-8: byte 0x{raw[error.start]:02x} at {error.start + 1}")
    except UnicodeEncodeError:
        return BadRecord.of(position, raw, "not Unicode: half of a surrogate pair (\\ud800 to \\udfff)")
    except json.JSONDecodeError as error:
        return BadRecord.of(
            position, raw, f"malformed JSON: {error.msg.removesuffix(' at')} at column {error.pos + 1}"
        )
    except RecursionError:
        return BadRecord.of(position, raw, f"nested deeper than {MAX_DEPTH}")
    except ValueError as error:
        return BadRecord.of(position, raw, str(error))
    return fields.record(value, position)


def _refuse_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            if isinstance(parent, (dict, list))
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH}")


class LinesReader:
    """JSON lines, gzipped or not (the first bytes tell, not the name).

    Its state is (lines read, bytes read of the unpacked text, 1 once a broken archive has ended).
    """

    def __init__(self, path: Path, label: str, fields: Fields, state: State | None) -> None:
        self.state: State = state or (0, 0, 0)
        self._path = path
        self._label = label
        self._fields = fields
        try:
            with path.open("rb") as probe:
                zipped = probe.read(2) == b"\x1f\x8b"
            self._file: IO[bytes] | gzip.GzipFile
            self._file = gzip.open(path) if zipped else path.open("rb")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
        offset, ended = self.state[1:]
        if offset and not ended:
            self._skip(offset, zipped)

    def _skip(self, offset: int, zipped: bool) -> None:
        try:
            # Only reading shows how long an archive is; a plain file would seek beyond its end.
            reached = self._file.seek(offset)
            size = reached if zipped else self._path.stat().st_size
        except (EOFError, zlib.error, gzip.BadGzipFile):
            size = -1
        if size < offset:
            self.close()
            raise ConfigError(
                f"{self._path} is shorter than when it was read up to byte {offset}: it is another file, "
                "start a new run"
            )

    def read(self, count: int) -> list[AnyRecord]:
        """The next records, at most ``count``; none at the end. Raises OSError where the disk fails."""
        out: list[AnyRecord] = []
        line, offset, ended = self.state
        stop = offset + READ_BYTES
        readline, fields, label = self._file.readline, self._fields, self._label
        while not ended and len(out) < count and (offset < stop or not out):
            try:
                raw = readline(MAX_LINE + 1)
                length = len(raw)
                if length > MAX_LINE:
                    length += self._skip_line(raw)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                ended = 1
                what = "is cut off" if isinstance(error, EOFError) else "is damaged"
                out.append(
                    BadRecord(f"{label}:{line + 1}", "", f"the archive {what} after line {line}: {error}")
                )
                break
            if not raw:
                break
            line += 1
            offset += length
            position = f"{label}:{line}"
            if length > MAX_LINE:
                out.append(
                    BadRecord.of(position, raw, f"a line of {length} bytes; at most {MAX_LINE} are read")
                )
                continue
            parsed = parse_json(raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw, position, fields)
            if parsed is not None:
                out.append(parsed)
        self.state = (line, offset, ended)
        return out

    def _skip_line(self, raw: bytes) -> int:
        """Bytes from here to the next line."""
        skipped = 0
        while raw and not raw.endswith(b"\n"):
            raw = self._file.readline(READ_BYTES)
            skipped += len(raw)
        return skipped

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ParquetReader:
    """Rows of a Parquet file as objects. Its state is (rows read, 1 once a damaged file has ended)."""

    def __init__(self, path: Path, label: str, fields: Fields, state: State | None) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ConfigError(f"{path} needs pyarrow: pip install 'chainwax[parquet]'") from error
        self.state: State = state or (0, 0)
        self._label = label
        self._fields = fields
        self._rows: list[dict[str, Any]] = []
        self._arrow = pyarrow
        # Nanoseconds do not fit into a datetime; what is below a microsecond is cut.
        self._errors = (pyarrow.ArrowException, OSError, ValueError)
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except self._errors as error:
            raise ConfigError(f"{path} cannot be read as Parquet: {error}") from error
        skip, group = self.state[0], 0
        meta = self._file.metadata
        while group < meta.num_row_groups and skip >= meta.row_group(group).num_rows:
            skip -= meta.row_group(group).num_rows
            group += 1
        self._skip = skip
        self._batches = self._file.iter_batches(1000, row_groups=range(group, meta.num_row_groups))

    def read(self, count: int) -> list[AnyRecord]:
        """The next records, at most ``count``; none at the end."""
        row, ended = self.state
        try:
            while not self._rows and not ended:
                self._rows = self._plain(next(self._batches)).to_pylist()[self._skip :]
                self._skip = 0
        except StopIteration:
            return []
        except self._errors as error:
            self.state = (row, 1)
            return [
                BadRecord(f"{self._label}:{row + 1}", "", f"the file is damaged after row {row}: {error}")
            ]
        rows, self._rows = self._rows[:count], self._rows[count:]
        self.state = (row + len(rows), ended)
        record, label = self._fields.record, self._label
        return [record(value, f"{label}:{number}") for number, value in enumerate(rows, row + 1)]

    def _plain(self, batch: Any) -> Any:
        arrow = self._arrow
        for index, field in enumerate(batch.schema):
            if arrow.types.is_timestamp(field.type) and field.type.unit == "ns":
                micro = batch.column(index).cast(arrow.timestamp("us", field.type.tz), safe=False)
                batch = batch.set_column(index, field.name, micro)
        return batch

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ItemsReader:
    """A list in memory. Its state is (items read,)."""

    def __init__(self, items: Sequence[Any], label: str, fields: Fields, state: State | None) -> None:
        self.state: State = state or (0,)
        self._items = items
        self._label = label
        self._fields = fields

    def read(self, count: int) -> list[AnyRecord]:
        """The next records, at most ``count``; none at the end. Ready-made records pass as they are."""
        (start,) = self.state
        items = self._items[start : start + count]
        self.state = (start + len(items),)
        return [
            item
            if isinstance(item, (Record, BadRecord))
            else self._fields.record(item, f"{self._label}:{number}")
            for number, item in enumerate(items, start)
        ]

    def close(self) -> None:
        """Nothing to let go of."""


FORMATS: Mapping[str, Callable[[Path, str, Fields, State | None], Reader]] = {
    ".jsonl": LinesReader,
    ".jsonl.gz": LinesReader,
    ".ndjson": LinesReader,
    ".ndjson.gz": LinesReader,
    ".parquet": ParquetReader,
}
"""The reader for each ending of a file's name: a new format is added here."""
