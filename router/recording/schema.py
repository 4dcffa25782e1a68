"""The tables of a recording, and how a file of them is opened.

The columns stand here once: the statements, the export and the import are made from them.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chainwax.router.errors import RecordingError

__all__ = ["KINDS", "SCHEMA_VERSION", "TABLES", "Column", "create", "explain", "insert_sql", "open_database"]

SCHEMA_VERSION = 1

ColumnType = Literal["text", "real", "integer", "bool", "json"]
_AFFINITY = {"text": "TEXT", "real": "REAL", "integer": "INTEGER", "bool": "INTEGER", "json": "TEXT"}


@dataclass(frozen=True, slots=True)
class Column:
    """A column; ``required`` ones are never NULL."""

    name: str
    type: ColumnType = "text"
    required: bool = False


def _columns(spec: str) -> tuple[Column, ...]:
    # "name", "name:type", and a "!" behind those that are never NULL.
    out = []
    for word in spec.split():
        name, _, kind = word.rstrip("!").partition(":")
        assert kind in ("", *_AFFINITY)
        out.append(Column(name, kind or "text", word.endswith("!")))  # type: ignore[arg-type]
    return tuple(out)


# Numbers that were measured are not required: SQLite keeps NaN as NULL, and that must not refuse the row.
TABLES: Mapping[str, tuple[Column, ...]] = {
    "runs": _columns("run! flow! config:json! started:real ended:real status!"),
    "items": _columns("run! source! position! item_key! time:real value:json value_is_repr:bool!"),
    "calls": _columns(
        "run! call_id! node! item_key! position! window_id messages:json! params:json! parents:json! "
        "status! error message value:json value_is_repr:bool! text arm cost_usd:real waited_s:real "
        "time:real reused:bool! simulated:bool! context"
    ),
    "attempts": _columns(
        "run! call_id! number:integer! node! arm! arm_parts:json! tier! started:real queued_s:real "
        "latency_s:real first_token_s:real text input_tokens:integer! output_tokens:integer! "
        "cached_tokens:integer! reasoning_tokens:integer! cost_usd:real propensity:real error "
        "invalid:bool! simulated:bool! shadow:bool! reused:bool! content_key"
    ),
    "feedback": _columns(
        "run! call_id! node! item_key! arm! metric! source! feedback_kind! score:real time:real "
        "correction:json weight:real path:json"
    ),
    "decisions": _columns("run! decision_kind! node! detail:json! time:real"),
    "dead_letters": _columns(
        "run! node! item_key! position! value:json value_is_repr:bool! error! message! attempts:json! "
        "time:real item_time:real window_id parents:json settled:real"
    ),
}

KINDS: Mapping[str, str] = {
    "run": "runs",
    "item": "items",
    "call": "calls",
    "attempt": "attempts",
    "feedback": "feedback",
    "decision": "decisions",
    "dead_letter": "dead_letters",
}
"""The name of a row of each table, in the order in which they are exported."""

_INDEXES = (
    "CREATE UNIQUE INDEX runs_key ON runs(run)",
    "CREATE UNIQUE INDEX items_key ON items(run, source, position)",
    "CREATE UNIQUE INDEX calls_key ON calls(call_id)",
    # Models that are asked at once, in the shadow, or again on a resumed run may count from 1 each: only
    # with its arm and its start is an attempt what it was, and no paid one is taken for another.
    "CREATE UNIQUE INDEX attempts_key ON attempts(call_id, number, arm, started)",
    # Partial: costs nothing where no content keys are recorded.
    "CREATE INDEX attempts_content ON attempts(content_key) WHERE content_key IS NOT NULL",
    # Feedback that could not be tied to a call is told apart by the node and the item in its run.
    "CREATE UNIQUE INDEX feedback_key ON feedback(call_id, arm, metric, source, "
    "CASE call_id WHEN '' THEN run || char(31) || node || char(31) || item_key ELSE '' END)",
    "CREATE UNIQUE INDEX decisions_key ON decisions(run, decision_kind, node, detail, time)",
    # An item without a position is not told apart from others: each of its dead letters is kept.
    "CREATE UNIQUE INDEX dead_letters_key ON dead_letters(run, node, item_key, position) "
    "WHERE position <> ''",
)

# What a second row with the same key does.
_ON_CONFLICT = {
    # What an attempt was is settled when it is recorded first, whatever a resumed run makes of it later.
    "items": "DO NOTHING",
    "attempts": "DO NOTHING",
    "decisions": "DO NOTHING",
    # An answer stands; a call that failed may be answered after all when the run is resumed.
    "calls": "DO UPDATE SET {all} WHERE calls.status <> 'ok'",
    # An item that fails again, when its run is resumed or it is retried, says why it failed last. No attempts
    # are those of a call whose answer was no use before and was not bought again.
    "dead_letters": "DO UPDATE SET {all}, attempts = CASE excluded.attempts WHEN '[]' "
    "THEN dead_letters.attempts ELSE excluded.attempts END",
    # A score may be revised; one that arrives late, or again, does not undo a newer one.
    "feedback": "DO UPDATE SET {all} WHERE excluded.time >= feedback.time",
    "runs": "DO UPDATE SET config = excluded.config, status = excluded.status, ended = NULL, "
    "started = coalesce(runs.started, excluded.started)",
}


def insert_sql(table: str, on_conflict: str | None = None) -> str:
    """The statement that records one row; its parameters are the table's columns in order."""
    columns = [c.name for c in TABLES[table]]
    sql = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
    rule = on_conflict or _ON_CONFLICT.get(table)
    if rule is None:
        return sql
    return f"{sql} ON CONFLICT {rule.format(all=', '.join(f'{c} = excluded.{c}' for c in columns))}"


def create(db: sqlite3.Connection) -> None:
    """Make the tables. The caller holds a transaction."""
    db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
    db.execute("INSERT INTO meta VALUES ('schema', ?)", (str(SCHEMA_VERSION),))
    for table, columns in TABLES.items():
        spec = (f"{c.name} {_AFFINITY[c.type]}{' NOT NULL' if c.required else ''}" for c in columns)
        db.execute(f"CREATE TABLE {table} ({', '.join(spec)})")
    for index in _INDEXES:
        db.execute(index)


def open_database(path: Path, *, write: bool, timeout: float = 5.0) -> sqlite3.Connection:
    """Open a recording; with ``write``, make it where there is none.

    ``timeout`` is how many seconds to wait for another process's lock. The connection is in autocommit
    mode and may be used from any thread, by one at a time.

    Raises :class:`RecordingError`, which names the file: it is missing, no database, a database of
    something else, of a newer version, or cannot be written.
    """
    if not write and not path.exists():
        raise RecordingError(f"no recording '{path}'")
    if path.is_dir():
        raise RecordingError(f"the recording '{path}' is a folder")
    if write and not path.parent.exists():
        raise RecordingError(f"the recording '{path}' cannot be made: there is no folder '{path.parent}'")
    uri = f"{path.absolute().as_uri()}?{'mode=rwc' if write else _read_mode(path)}"
    try:
        db = sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise RecordingError(f"the recording '{path}' cannot be opened: {explain(error)}") from None
    try:
        if write:
            _prepare(db, path)
        else:
            db.execute("PRAGMA query_only = 1")
        _check(db, path)
    except sqlite3.Error as error:
        db.close()
        raise RecordingError(f"the recording '{path}' cannot be opened: {explain(error)}") from None
    except BaseException:
        db.close()
        raise
    return db


def _read_mode(path: Path) -> str:
    if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
        return "mode=rw"  # whoever may not write leaves the files beside it (-wal, -shm) behind
    if not path.with_name(path.name + "-wal").exists():
        return "mode=ro&immutable=1"  # a finished recording in a folder where those cannot be made
    return "mode=ro"


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    # A file of another kind is left as it is: look before the journal mode is changed.
    if _tables(db):
        _check(db, path)
    _wal(db)
    if not _tables(db):
        db.execute("BEGIN IMMEDIATE")
        try:
            if not _tables(db):  # else another process was faster
                create(db)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
    _add_columns(db)
    # NORMAL survives the death of the process at any moment; after a loss of power the last commits may be
    # missing, never the file's order.
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute("PRAGMA cache_size = -16000")  # KiB: holds the indexes of some 200,000 calls
    db.execute("PRAGMA wal_autocheckpoint = 4000")  # pages: fewer and larger, as index pages are hit again


def _add_columns(db: sqlite3.Connection) -> None:
    # Columns that a file made by an earlier version lacks; such ones may be NULL.
    def lacking() -> list[tuple[str, Column]]:
        found = []
        for table, columns in TABLES.items():
            there = {row[1] for row in db.execute(f"PRAGMA table_info({table})")}
            found += [(table, column) for column in columns if there and column.name not in there]
        return found

    if not lacking():
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        for table, column in lacking():  # else another process was faster
            db.execute(f"ALTER TABLE {table} ADD COLUMN {column.name} {_AFFINITY[column.type]}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _wal(db: sqlite3.Connection) -> None:
    # SQLite's busy timeout does not cover this change where two processes make the same new file.
    pause = threading.Event()
    for last in (False,) * 50 + (True,):
        try:
            db.execute("PRAGMA journal_mode = WAL").fetchone()
            return
        except sqlite3.OperationalError as error:
            if last or "locked" not in str(error):
                raise
            pause.wait(0.05)


def _tables(db: sqlite3.Connection) -> set[str]:
    return {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _check(db: sqlite3.Connection, path: Path) -> None:
    tables = _tables(db)
    row = db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone() if "meta" in tables else None
    if not tables:  # a run makes the file first, and the tables in one transaction after that
        raise RecordingError(f"the recording '{path}' is empty: nothing has been recorded in it yet")
    if row is None or not str(row[0]).isdecimal():
        raise RecordingError(f"'{path}' is a database, but no recording")
    if int(row[0]) > SCHEMA_VERSION:
        raise RecordingError(
            f"the recording '{path}' has version {row[0]}, and this chainwax knows up to {SCHEMA_VERSION}: "
            "it was made by a newer one"
        )
    if missing := TABLES.keys() - tables:
        raise RecordingError(f"the recording '{path}' lacks the table '{min(missing)}'")


def explain(error: BaseException) -> str:
    """SQLite's message in words that say what to do about it."""
    text = str(error)
    for part, words in (
        ("disk is full", "the disk is full"),
        ("locked", "another program holds it locked"),
        ("readonly", "it is read-only"),
        ("not a database", "it is no database"),
        ("malformed", "it is damaged"),
        ("unable to open", "its folder is missing, or cannot be written to"),
        ("no such column", "it is of an earlier chainwax, until a run writes to it"),
        ("disk I/O error", "the disk fails to read or write"),
    ):
        if part in text:
            return f"{words} (SQLite: {text})"
    return f"SQLite: {text}"
