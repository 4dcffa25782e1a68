"""A recording as JSON lines or Parquet, and back.

Both hold every row that the database holds. A JSON line is one row: ``{"version": 1, "kind": "call", …}``
with the columns of the row's table, JSON columns as JSON, and NULLs left out; ``kind`` is one of ``run``,
``item``, ``call``, ``attempt``, ``feedback``, ``decision``, ``dead_letter``. A Parquet file is one table
with the columns of all kinds, JSON columns as text: ``SELECT … WHERE kind = 'call'``.

Reading is strict: the first line that is not what it should be stops it, with the file and the line, and
nothing of the file is imported. A recording is evidence; half of one would be taken for a whole.
"""

from __future__ import annotations

import gzip
import json
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from chainwax.router.errors import RecordingError, nearest
from chainwax.router.recording.reader import RecordingReader
from chainwax.router.recording.rows import json_text, shown, storable
from chainwax.router.recording.schema import KINDS, TABLES, Column, explain, insert_sql, open_database

__all__ = ["EXPORT_VERSION", "export_jsonl", "export_parquet", "import_recording", "read_recording_lines"]

EXPORT_VERSION = 1

_LONGEST_LINE = 64 * 1024 * 1024  # bytes
_BATCH = 5_000  # rows

Record = dict[str, Any]
"""One row: ``kind`` and its columns, JSON columns parsed, without those that are NULL."""


def export_jsonl(recording: str | Path, run: str | None, out: str | Path) -> int:
    """Write a run (None: all runs) as JSON lines, compressed where the name ends in ``.gz``.

    Returns the number of lines. The file is there only once it is whole. Raises :class:`RecordingError`.
    """
    out = Path(out)
    lines = 0
    opener = gzip.open if out.suffix == ".gz" else open
    with _whole_file(out) as part, opener(part, "wb") as file:
        for kind, columns, rows in _tables(Path(recording), run):
            head = f'{{"version":{EXPORT_VERSION},"kind":"{kind}"'
            for row in rows:
                file.write(_line(head, columns, row))
                lines += 1
    return lines


def export_parquet(recording: str | Path, run: str | None, out: str | Path) -> int:
    """Write a run (None: all runs) as Parquet; returns the number of rows. Needs the extra ``parquet``.

    The file is there only once it is whole. Raises :class:`RecordingError`.
    """
    pa, parquet = _pyarrow()
    types = {
        "text": pa.string(),
        "json": pa.string(),
        "real": pa.float64(),
        "integer": pa.int64(),
        "bool": pa.bool_(),
    }
    fields = {column.name: types[column.type] for columns in TABLES.values() for column in columns}
    schema = pa.schema([("version", pa.int32()), ("kind", pa.string()), *fields.items()])
    count = 0
    with _whole_file(Path(out)) as part, parquet.ParquetWriter(part, schema, compression="zstd") as writer:
        for kind, columns, rows in _tables(Path(recording), run):
            while batch := rows.fetchmany(_BATCH):
                n = len(batch)
                of_kind = {c.name: [row[i] for row in batch] for i, c in enumerate(columns)}
                of_kind |= {c.name: list(map(bool, of_kind[c.name])) for c in columns if c.type == "bool"}
                of_kind |= {"version": [EXPORT_VERSION] * n, "kind": [kind] * n}
                writer.write_table(
                    pa.table(
                        {f.name: pa.array(of_kind.get(f.name, [None] * n), f.type) for f in schema}, schema
                    )
                )
                count += n
    return count


def read_recording_lines(path: str | Path) -> Iterator[Record]:
    """The rows of a file of JSON lines (``.gz``: compressed), each checked.

    Raises :class:`RecordingError`, which names the file and the line, at the first that is malformed, of an
    unknown version or kind, or has an unknown, missing or ill-typed key.
    """
    path = Path(path)
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(_LONGEST_LINE + 1):
                number += 1
                if len(line) > _LONGEST_LINE:
                    raise RecordingError(f"the line is longer than {_LONGEST_LINE} bytes")
                if line.strip():
                    yield _checked(_parsed(line))
    except (OSError, EOFError, zlib.error) as error:
        raise RecordingError(f"{path}: cannot be read after line {number}: {_reason(error)}") from None
    except RecordingError as error:
        raise RecordingError(f"{path}:{number}: {error}") from None


def import_recording(source: str | Path, recording: str | Path) -> int:
    """Put all rows of a file of JSON lines or Parquet into a recording, which is made where there is none.

    Rows that are there already stay (a dead letter without a position cannot be told apart, and is added
    once more). Returns the number of rows read. All or nothing is imported; raises
    :class:`RecordingError` with the file and the line (in Parquet: the row).
    """
    source, recording = Path(source), Path(recording)
    records = _read_parquet(source) if source.suffix == ".parquet" else read_recording_lines(source)
    statements = {kind: insert_sql(table, "DO NOTHING") for kind, table in KINDS.items()}
    count = 0
    first = list(islice(records, 1))  # a file that cannot be read at all leaves no empty recording behind
    with closing(open_database(recording, write=True)) as db:
        try:
            db.execute("BEGIN IMMEDIATE")
            for record in chain(first, records):
                db.execute(statements[record["kind"]], _row(record))
                count += 1
            db.execute("COMMIT")
        except sqlite3.Error as error:
            raise RecordingError(f"the recording '{recording}' cannot be written: {explain(error)}") from None
    return count


def _tables(recording: Path, run: str | None) -> Iterator[tuple[str, tuple[Column, ...], sqlite3.Cursor]]:
    """All tables, as they were at one moment."""
    if run is not None:
        with closing(RecordingReader(recording)) as reader:
            reader.require_run(run)
    with closing(open_database(recording, write=False)) as db:
        try:
            db.execute("BEGIN")
            for kind, table in KINDS.items():
                columns = TABLES[table]
                sql = f"SELECT {', '.join(c.name for c in columns)} FROM {table}"
                if run is None:
                    yield kind, columns, db.execute(f"{sql} ORDER BY rowid")
                else:
                    yield kind, columns, db.execute(f"{sql} WHERE run = ? ORDER BY rowid", (run,))
        except sqlite3.Error as error:
            raise RecordingError(f"the recording '{recording}' cannot be read: {explain(error)}") from None


@contextmanager
def _whole_file(out: Path) -> Iterator[Path]:
    """A name to write to, which becomes ``out`` once all is written."""
    part = out.with_name(out.name + ".part")
    try:
        yield part
        part.replace(out)
    except OSError as error:
        raise RecordingError(f"'{out}' cannot be written: {_reason(error)}") from None
    finally:
        part.unlink(missing_ok=True)


def _line(head: str, columns: tuple[Column, ...], row: tuple[Any, ...]) -> bytes:
    parts = [head]
    for column, value in zip(columns, row, strict=True):
        if value is None:
            continue
        if column.type == "bool":
            text = "true" if value else "false"
        else:
            text = value if column.type == "json" else json_text(value)
        parts.append(f'"{column.name}":{text}')
    return (",".join(parts) + "}\n").encode()


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RecordingError(f"the line is not UTF-8: {error.reason}") from None
    except (ValueError, RecursionError) as error:
        raise RecordingError(f"the line is no JSON: {_reason(error)}") from None


def _checked(record: Any) -> Record:
    if not isinstance(record, dict):
        raise RecordingError(f"the line is no JSON object, but {type(record).__name__}")
    version, kind = record.pop("version", None), record.get("kind")
    if version != EXPORT_VERSION or isinstance(version, bool):
        raise RecordingError(f"unknown version {shown(version)}: this chainwax knows {EXPORT_VERSION}")
    if not isinstance(kind, str) or kind not in KINDS:
        raise RecordingError(f"unknown kind {shown(kind)}: {nearest(shown(kind), KINDS)}")
    columns = {c.name: c for c in TABLES[KINDS[kind]]}
    for name, value in record.items():
        if name == "kind":
            continue
        column = columns.get(name)
        if column is None:
            raise RecordingError(f"unknown key {shown(name)} in a {kind}: {nearest(name[:80], columns)}")
        if value is not None and not _fits(column, value):
            raise RecordingError(f"'{name}' of a {kind} must be {_TYPES[column.type]}, not {shown(value)}")
    for column in columns.values():
        if column.required and record.get(column.name) is None:
            raise RecordingError(f"a {kind} lacks '{column.name}'")
    return record


_TYPES: Mapping[str, str] = {
    "text": "a text",
    "real": "a number",
    "integer": "a whole number of 64 bits",
    "bool": "true or false",
    "json": "JSON",
}


def _fits(column: Column, value: Any) -> bool:
    match column.type:
        case "text":
            return isinstance(value, str)
        case "real":
            return isinstance(value, float) or (type(value) is int and abs(value) < 2**1000)
        case "integer":
            return type(value) is int and -(2**63) <= value < 2**63
        case "bool":
            return isinstance(value, bool)
    return True


def _row(record: Record) -> tuple[Any, ...]:
    columns = TABLES[KINDS[record["kind"]]]
    row = []
    for column in columns:
        value = record.get(column.name)
        if value is not None:
            if column.type == "json":
                value = json_text(value)
            elif column.type == "real":
                value = float(value)
        row.append(value)
    return storable(tuple(row))


def _read_parquet(path: Path) -> Iterator[Record]:
    pa, parquet = _pyarrow()
    json_columns = {c.name for columns in TABLES.values() for c in columns if c.type == "json"}
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                for values in batch.to_pylist():
                    number += 1
                    record = {name: value for name, value in values.items() if value is not None}
                    for name in json_columns & record.keys():
                        record[name] = _parsed(str(record[name]).encode())
                    yield _checked(record)
    except (OSError, pa.ArrowException) as error:
        raise RecordingError(f"{path}: cannot be read after row {number}: {_reason(error)}") from None
    except RecordingError as error:
        raise RecordingError(f"{path}:{number}: {error}") from None


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RecordingError(
            "Parquet needs pyarrow, which is not installed: install the extra 'parquet' of chainwax"
        ) from None
    return pyarrow, pyarrow.parquet


def _reason(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
