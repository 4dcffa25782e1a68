"""The rows that one transaction writes together."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from chainwax.router.recording import rows as make
from chainwax.router.recording.reader import latest_call
from chainwax.router.recording.rows import DeadLetter, Row
from chainwax.router.recording.schema import TABLES, insert_sql
from chainwax.router.types import Attempt, CallResult, Decision, Feedback, Query

__all__ = ["INSERT", "NEW_RUN", "UNSTORABLE", "Group"]

INSERT = {table: insert_sql(table) for table in TABLES}
NEW_RUN = insert_sql("runs", "DO NOTHING")

UNSTORABLE = (
    UnicodeError,
    OverflowError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    sqlite3.DataError,
    sqlite3.IntegrityError,
)
"""What SQLite says of a row that it cannot hold, as opposed to a file that cannot be written."""

# In the order of writing: feedback last, for it looks its call up.
_ORDER = ("items", "calls", "attempts", "decisions", "dead_letters", "feedback")
_CALL_ID, _NODE, _ITEM_KEY, _ARM = (
    [c.name for c in TABLES["feedback"]].index(name) for name in ("call_id", "node", "item_key", "arm")
)


class Group:
    """Rows by table, made from the router's types and not yet durable.

    Making a row raises whatever other people's values raise; the group is as before then.
    """

    def __init__(self, content_keys: bool) -> None:
        self._content_keys = content_keys
        self._tables: dict[str, list[Row]] = {table: [] for table in _ORDER}
        self._ends: list[Row] = []
        self._snapshots: dict[str, str] = {}
        self._wants_index = False

    def __len__(self) -> int:
        """The number of rows."""
        return sum(map(len, self._tables.values())) + len(self._ends) + len(self._snapshots)

    def __bool__(self) -> bool:
        """Whether there is anything to write."""
        return self._wants_index or len(self) > 0

    def end(self, run: str, status: str, now: float) -> None:
        """A run ended."""
        self._ends.append(make.storable((status, now, run)))

    def snapshot(self, run: str, snapshot: Mapping[str, Any]) -> None:
        """What the recorders of a run say now, in place of what they said before."""
        self._snapshots[f"snapshot:{run}"] = make.json_text(snapshot)

    def state(self, flow: str, state: str) -> None:
        """What the routers of a flow know, in place of what they knew before."""
        self._snapshots[f"state:{flow}"] = state

    def attempt(self, run: str, query: Query, attempt: Attempt) -> None:
        """An attempt on its own."""
        self._tables["attempts"].append(make.attempt_row(run, query, attempt, self._content_keys))

    def result(self, run: str, query: Query, result: CallResult, now: float) -> None:
        """A call with all its attempts."""
        call = make.call_row(run, query, result, now)
        self._tables["attempts"] += [
            make.attempt_row(run, query, attempt, self._content_keys) for attempt in result.attempts
        ]
        self._tables["calls"].append(call)

    def feedback(self, run: str, feedback: Sequence[Feedback]) -> None:
        """Scores."""
        self._tables["feedback"] += [make.feedback_row(run, f) for f in feedback]

    def decision(self, run: str, decision: Decision, now: float) -> None:
        """A decision."""
        self._tables["decisions"].append(make.decision_row(run, decision, now))

    def dead_letters(self, run: str, letters: Sequence[DeadLetter], now: float) -> None:
        """Dead letters."""
        self._tables["dead_letters"] += [make.dead_letter_row(run, letter, now) for letter in letters]

    def items(self, run: str, source: str, items: Sequence[tuple[str, str, float | None, Any]]) -> None:
        """Items of a source."""
        self._tables["items"] += [make.item_row(run, source, *item) for item in items]

    def nothing(self) -> None:
        """No row, only somebody who waits for those before."""

    def index(self) -> None:
        """An index of the calls by node and item key."""
        self._wants_index = True

    def write(self, db: sqlite3.Connection) -> list[str]:
        """Write all in one transaction.

        Where SQLite cannot hold a row, they are written one by one, with what it cannot hold replaced. Those
        that even then cannot be kept are left out: the table and the reason of each are returned.

        Raises sqlite3.Error where the file cannot be written; then nothing of the group is.
        """
        try:
            self._transaction(db, _insert)
            return []
        except UNSTORABLE:
            refused: list[str] = []

            def carefully(db: sqlite3.Connection, table: str, rows: list[Row]) -> None:
                for row in rows:
                    try:
                        _insert(db, table, [make.storable(row)])
                    except UNSTORABLE as error:
                        refused.append(f"{table}: {error}")

            self._transaction(db, carefully)
            return refused

    def _transaction(
        self, db: sqlite3.Connection, insert: Callable[[sqlite3.Connection, str, list[Row]], None]
    ) -> None:
        db.execute("BEGIN IMMEDIATE")
        try:
            for table, rows in self._tables.items():
                if rows:
                    insert(db, table, rows)
            for end in self._ends:
                db.execute("UPDATE runs SET status = ?, ended = ? WHERE run = ?", end)
            db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(self._snapshots.items()))
            if self._wants_index:
                _index_items(db)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise


def _insert(db: sqlite3.Connection, table: str, rows: list[Row]) -> None:
    if table == "feedback":
        rows = [_about(db, row) for row in rows]
    db.executemany(INSERT[table], rows)


def _about(db: sqlite3.Connection, row: Row) -> Row:
    """A score with the call and the arm that it is about, where it does not name them itself."""
    call_id, arm = row[_CALL_ID], row[_ARM]
    if call_id and arm:
        return row
    if not call_id:
        _index_items(db)
        call_id = latest_call(db, row[_NODE], row[_ITEM_KEY]) or ""
    if call_id and not arm:
        found = db.execute("SELECT arm FROM calls WHERE call_id = ?", (call_id,)).fetchone()
        arm = (found and found[0]) or ""
    filled = list(row)
    filled[_CALL_ID], filled[_ARM] = call_id, arm
    return tuple(filled)


def _index_items(db: sqlite3.Connection) -> None:
    # Only made where it is wanted: it costs each call some 5 µs, a fifth of all that recording takes.
    db.execute("CREATE INDEX IF NOT EXISTS calls_item ON calls(node, item_key)")
