"""What is said from outside to a recording: changes to its flow, decisions that were made by hand."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from chainwax.router.control import Change, changes_of
from chainwax.router.errors import RecordingError
from chainwax.router.recording.reader import RecordingReader, control_rows
from chainwax.router.recording.rows import decision_row, storable
from chainwax.router.recording.schema import explain, insert_sql, open_database
from chainwax.router.types import Decision

__all__ = ["read_controls", "write_controls", "write_decision"]


def read_controls(reader: RecordingReader, flow: str) -> list[Change]:
    """What was said of a flow, in its order."""
    return [change for _, change in changes_of(flow, reader.controls(flow))]


def write_controls(path: Path, changes: Sequence[Change]) -> None:
    """Say what is to be changed from now on; each takes the place of what was said of its node and setting.

    The flow's processes look every two seconds. Several may say something at once. Raises
    :class:`RecordingError` where the file is missing, no recording, or cannot be written.
    """
    if not path.exists():
        raise RecordingError(f"no recording '{path}'")
    with closing(open_database(path, write=True)) as db:
        try:
            db.execute("BEGIN IMMEDIATE")
            for change in changes:
                _add(db, change)
            db.execute("COMMIT")
        except sqlite3.Error as error:
            raise RecordingError(f"the recording '{path}' cannot be written: {explain(error)}") from None


def write_decision(path: Path, run: str, decision: Decision, now: float) -> None:
    """Record what was decided beside a run. Raises :class:`RecordingError` where that cannot be written."""
    with closing(open_database(path, write=True)) as db:
        try:
            db.execute(insert_sql("decisions"), storable(decision_row(run, decision, now)))
        except sqlite3.Error as error:
            raise RecordingError(f"the recording '{path}' cannot be written: {explain(error)}") from None


def _add(db: sqlite3.Connection, change: Change) -> None:
    key = f"control:{change.flow}"
    row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    known = list(changes_of(change.flow, control_rows(row[0]) if row else ()))
    number = max((number for number, _ in known), default=0) + 1
    kept = [(n, one) for n, one in known if (one.node, one.setting) != (change.node, change.setting)]
    rows = [{"number": n, **asdict(one)} for n, one in (*kept, (number, change))]
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(rows)))
