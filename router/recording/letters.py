"""Dead letters as they are recorded: read for a person or a retry, and marked once they are settled."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chainwax.router.errors import RecordingError, UnknownName
from chainwax.router.recording.reader import RecordingReader
from chainwax.router.recording.rows import Row, RunInfo, parse_json
from chainwax.router.recording.schema import explain, open_database
from chainwax.router.types import CallRef

__all__ = ["Letter", "letter_times", "names_in", "read_letter", "read_letters", "runs_with_letters", "settle"]

_COLUMNS = (
    "rowid, run, node, item_key, position, value, value_is_repr, error, message, attempts, time, item_time, "
    "window_id, parents, settled"
)


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter."""

    id: int
    """Its number in the file, which it keeps when its item fails again."""
    run: str
    node: str
    key: str
    position: str
    value: Any
    """As JSON holds it; where ``is_repr``, the ``repr`` of what JSON cannot hold."""
    is_repr: bool
    error: str
    """Class of the error."""
    message: str
    attempts: tuple[dict[str, Any], ...]
    """As :class:`~chainwax.router.types.Attempt` has them."""
    time: float
    """When it failed last."""
    item_time: float | None = None
    window_id: str | None = None
    parents: tuple[CallRef, ...] = ()
    settled: float | None = None
    """When a retry got it through; None while it is open."""


def read_letters(
    reader: RecordingReader,
    run: str | None = None,
    *,
    node: str | None = None,
    error: str | None = None,
    since: float | None = None,
    settled: bool = False,
) -> Iterator[Letter]:
    """The open dead letters in the order in which they came first; with ``settled`` those too.

    What is None does not narrow them down. Raises :class:`RecordingError`.
    """
    sql = (
        f"SELECT {_COLUMNS} FROM dead_letters WHERE run = coalesce(?, run) AND node = coalesce(?, node) "
        "AND error = coalesce(?, error) AND (? IS NULL OR time >= ?) AND (? OR settled IS NULL) "
        "ORDER BY rowid"
    )
    for row in reader._iterate(sql, (run, node, error, since, since, settled)):
        yield _letter(reader, row)


def read_letter(reader: RecordingReader, number: int) -> Letter:
    """The dead letter of a number. Raises :class:`UnknownName` with the nearest number that there is."""
    place = min(max(number, -(2**60)), 2**60)  # what SQLite can reckon with
    rows = reader._all(f"SELECT {_COLUMNS} FROM dead_letters WHERE rowid = ?", (place,))
    if not rows:
        near = "SELECT rowid FROM dead_letters ORDER BY abs(rowid - ?) LIMIT 20"
        known = [str(n) for (n,) in reader._all(near, (place,))]
        raise UnknownName(f"dead letter in '{reader.path}':", str(number), known)
    return _letter(reader, rows[0])


def names_in(reader: RecordingReader, column: Literal["node", "error"], run: str | None) -> list[str]:
    """The nodes or the errors that the dead letters name, settled ones included."""
    sql = f"SELECT DISTINCT {column} FROM dead_letters WHERE run = coalesce(?, run) ORDER BY 1"
    return [name for (name,) in reader._all(sql, (run,))]


def runs_with_letters(reader: RecordingReader) -> list[str]:
    """The runs that have dead letters, settled or not, oldest run first."""
    sql = "SELECT run FROM runs WHERE run IN (SELECT run FROM dead_letters) ORDER BY rowid"
    return [run for (run,) in reader._all(sql, ())]


def letter_times(reader: RecordingReader, run: str) -> dict[int, tuple[float, str]]:
    """When each open dead letter of a run failed last, and its position, by number."""
    sql = "SELECT rowid, time, position FROM dead_letters WHERE run = ? AND settled IS NULL"
    return {number: (time or 0.0, position) for number, time, position in reader._all(sql, (run,))}


def settle(path: Path, numbers: Iterable[int], time: float, run: RunInfo | None = None) -> None:
    """Mark dead letters as settled. ``run`` is the run as it was before, whose end is put back.

    Raises :class:`RecordingError` where it cannot be written; nothing is marked then.
    """
    with closing(open_database(path, write=True)) as db:
        try:
            db.execute("BEGIN IMMEDIATE")
            marked = [(time, number) for number in numbers]
            db.executemany("UPDATE dead_letters SET settled = ? WHERE rowid = ?", marked)
            if run is not None:
                # A retry is no end of a run that still goes on, or has yet to be resumed.
                end = (run.status, run.ended, run.run)
                db.execute("UPDATE runs SET status = ?, ended = ? WHERE run = ?", end)
            db.execute("COMMIT")
        except sqlite3.Error as error:
            raise RecordingError(f"the recording '{path}' cannot be written: {explain(error)}") from None


def _letter(reader: RecordingReader, row: Row) -> Letter:
    number, run, node, key, position, value, is_repr, error, message, attempts, time, *rest = row
    item_time, window_id, parents, settled = rest
    try:
        return Letter(
            number,
            run,
            node,
            key,
            position,
            parse_json(value),
            bool(is_repr),
            error,
            message,
            tuple(parse_json(attempts)),
            time or 0.0,
            item_time,
            window_id,
            tuple(CallRef(**ref) for ref in parse_json(parents) or ()),
            settled,
        )
    except (ValueError, TypeError, RecursionError) as broken:
        raise RecordingError(
            f"the recording '{reader.path}': dead letter {number} is malformed: {broken}"
        ) from None
