"""What a recording is asked: calls by id, answers by content, items, and all feedback to learn from."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from chainwax.router.errors import RecordingError, nearest
from chainwax.router.recording.rows import (
    ATTEMPT_COLUMNS,
    Learned,
    RecordedCall,
    RecordedItem,
    Row,
    RunInfo,
    attempt_of,
    parse_json,
    path_of,
)
from chainwax.router.recording.schema import explain, open_database
from chainwax.router.types import Arm, Attempt, CallRef, FeedbackKind

__all__ = ["RecordingReader", "control_rows", "latest_call"]

T = TypeVar("T")

_CHUNK = 500  # ids in one statement

# Feedback belongs to the run of its call, which may be an earlier one than the run that it came in.
_FOLD = """
SELECT f.node, f.arm, f.score, f.feedback_kind, coalesce(f.time, 0.0),
    (SELECT coalesce(sum(a.cost_usd), 0.0) FROM attempts a WHERE a.call_id = f.call_id AND a.arm = f.arm),
    f.metric, f.source, f.call_id, coalesce(c.item_key, f.item_key), r.run, coalesce(c.context, ''),
    coalesce(f.weight, 1.0), f.path
FROM feedback f
LEFT JOIN calls c ON c.call_id = f.call_id
JOIN runs r ON r.run = coalesce(c.run, f.run)
WHERE r.flow = :flow AND f.arm <> '' AND f.score IS NOT NULL AND CASE WHEN :node IS NULL THEN 1
    WHEN f.path IS NULL THEN f.node = :node
    ELSE instr(f.path, json_quote(:node)) > 0 END
ORDER BY f.time, f.rowid
"""


class RecordingReader:
    """Reads a recording, also while it is written. Safe to use from any thread.

    Raises :class:`~chainwax.router.errors.RecordingError`, which names the file, where it is missing, no
    recording, or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._db = open_database(self.path, write=False)

    def find(self, call_ids: Sequence[str]) -> dict[str, RecordedCall]:
        """What is durably recorded of the calls with these ids; unknown ids are left out."""
        found: dict[str, RecordedCall] = {}
        for ids, marks in _chunks(call_ids):
            for row in self._all(
                "SELECT call_id, node, status, value, text, arm, error, message, cost_usd, waited_s "
                f"FROM calls WHERE call_id IN ({marks})",
                ids,
            ):
                call_id, node, status, value, text, arm, error, message, cost, waited = row
                found[call_id] = RecordedCall(
                    call_id,
                    node,
                    status,
                    value=parse_json(value),
                    text=text,
                    arm=None if arm is None else Arm(arm),
                    error=error,
                    message=message,
                    cost_usd=cost or 0.0,
                    waited_s=waited or 0.0,
                )
            for row in self._all(
                f"SELECT {ATTEMPT_COLUMNS}, node FROM attempts WHERE call_id IN ({marks}) "
                "ORDER BY started, number",
                ids,
            ):
                attempt = attempt_of(row[:-1])
                call = found.get(attempt.call_id)
                if call is None:
                    call = found[attempt.call_id] = RecordedCall(attempt.call_id, row[-1], "unfinished")
                call.attempts.append(attempt)
                # The call's row holds the arm's key alone; its parts are those of the attempt at it.
                if call.arm is not None and call.arm.model == attempt.arm.key:
                    call.arm = attempt.arm
        return found

    def find_content(self, keys: Sequence[str]) -> dict[str, Attempt]:
        """Answers by :func:`~chainwax.router.types.content_key`, over all runs; unknown keys are left out.

        For each key the newest valid answer, or the newest invalid one where there is no other. Only
        recordings made with ``content_keys`` have any.
        """
        found: dict[str, Attempt] = {}
        for ids, marks in _chunks(keys):
            for row in self._all(
                f"SELECT {ATTEMPT_COLUMNS}, content_key FROM attempts WHERE content_key IN ({marks}) "
                "AND text IS NOT NULL ORDER BY (error IS NULL), rowid",
                ids,
            ):
                found[row[-1]] = attempt_of(row[:-1])
        return found

    def answers_after(self, row: int) -> Iterator[tuple[int, str, Attempt]]:
        """All valid answers with a content key that were recorded after a row: row, key and attempt."""
        sql = (
            f"SELECT {ATTEMPT_COLUMNS}, rowid, content_key FROM attempts WHERE rowid > ? "
            "AND content_key IS NOT NULL AND text IS NOT NULL AND error IS NULL ORDER BY rowid"
        )
        for found in self._iterate(sql, (row,)):
            yield found[-2], found[-1], attempt_of(found[:-2])

    def spent(self, run_id: str) -> dict[str, float]:
        """Dollars that a run has paid by now, by node."""
        return dict(
            self._all(
                "SELECT node, total(cost_usd) FROM attempts WHERE run = ? AND reused = 0 GROUP BY 1",
                (run_id,),
            )
        )

    def ref_of(self, call_id: str) -> CallRef | None:
        """A call that was answered: its node, its arm's key, its context."""
        rows = self._all(
            "SELECT node, call_id, arm, coalesce(context, '') FROM calls "
            "WHERE call_id = ? AND arm IS NOT NULL",
            (call_id,),
        )
        return CallRef(*rows[0]) if rows else None

    def latest_call(self, node: str, item_key: str) -> str | None:
        """The id of the call that a node made last about an item key, for feedback that names only those."""
        with self._lock:
            return _guarded(self.path, lambda: latest_call(self._db, node, item_key))

    def fold(self, flow: str, node: str | None = None) -> Iterator[Learned]:
        """All scores of a flow, or of one node of it, over all runs, in the order of their time.

        To a node belong the scores of the paths that go through it. Each comes with the arm that it is
        about; scores that cannot be tied to an arm are left out.
        """
        for row in self._iterate(_FOLD, {"flow": flow, "node": node}):
            through = path_of(row[-1])
            if node is None or not through or any(ref.node == node for ref in through):
                yield Learned._make((*row[:3], FeedbackKind(row[3]), *row[4:-1], through))

    def snapshot_of(self, run: str) -> Any:
        """What the recorders of a run said last; None where they said nothing."""
        rows = self._all("SELECT value FROM meta WHERE key = ?", (f"snapshot:{run}",))
        return parse_json(rows[0][0]) if rows else None

    def controls(self, flow: str) -> list[dict[str, Any]]:
        """What operators changed of a flow while it runs, in the order in which they said it."""
        rows = self._all("SELECT value FROM meta WHERE key = ?", (f"control:{flow}",))
        return control_rows(rows[0][0]) if rows else []

    def kept_state(self, flow: str) -> str | None:
        """What the routers of a flow knew when it was kept last; None where it never was."""
        rows = self._all("SELECT value FROM meta WHERE key = ?", (f"state:{flow}",))
        return rows[0][0] if rows else None

    def runs(self) -> list[RunInfo]:
        """All runs, oldest first."""
        rows = self._all("SELECT run, flow, config, started, ended, status FROM runs ORDER BY rowid", ())
        return [RunInfo(run, flow, parse_json(config), *rest) for run, flow, config, *rest in rows]

    def running(self) -> list[str]:
        """The runs that were begun and did not say that they ended, oldest first."""
        return [
            run for (run,) in self._all("SELECT run FROM runs WHERE status = 'running' ORDER BY rowid", ())
        ]

    def status_of(self, run: str) -> str | None:
        """``running``, ``finished``, ``stopped`` or ``failed``; None where there is no such run."""
        rows = self._all("SELECT status FROM runs WHERE run = ?", (run,))
        return rows[0][0] if rows else None

    def require_run(self, run: str) -> RunInfo:
        """The run with this id; raises :class:`RecordingError` with the nearest id that there is."""
        runs = {info.run: info for info in self.runs()}
        if run not in runs:
            raise RecordingError(f"the recording '{self.path}' has no run '{run}': {nearest(run, runs)}")
        return runs[run]

    def sources(self, run: str) -> list[str]:
        """The names of the sources whose items are recorded for a run."""
        return [
            name
            for (name,) in self._all("SELECT DISTINCT source FROM items WHERE run = ? ORDER BY 1", (run,))
        ]

    def read_items(self, run: str, source: str, *, skip: int = 0) -> Iterator[RecordedItem]:
        """The items of a source in the order in which they came, from the ``skip``-th on."""
        sql = (
            "SELECT position, item_key, time, value, value_is_repr FROM items "
            "WHERE run = ? AND source = ? ORDER BY rowid LIMIT -1 OFFSET ?"
        )
        for position, key, time, value, is_repr in self._iterate(sql, (run, source, skip)):
            yield RecordedItem(position, key, time, parse_json(value), bool(is_repr))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _all(self, sql: str, parameters: Sequence[Any]) -> list[Row]:
        with self._lock:
            return _guarded(self.path, lambda: self._db.execute(sql, parameters).fetchall())

    def _iterate(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any]) -> Iterator[Row]:
        # A connection of its own: whoever iterates may take long, and others read meanwhile.
        with closing(open_database(self.path, write=False)) as db:
            try:
                yield from db.execute(sql, parameters)
            except sqlite3.Error as error:
                raise RecordingError(
                    f"the recording '{self.path}' cannot be read: {explain(error)}"
                ) from None


def control_rows(text: str) -> list[dict[str, Any]]:
    """What a recording holds of changes to a flow; what is not written so is passed over."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def latest_call(db: sqlite3.Connection, node: str, item_key: str) -> str | None:
    """The id of the newest call of a node about an item key."""
    row = db.execute(
        "SELECT call_id FROM calls WHERE node = ? AND item_key = ? ORDER BY rowid DESC LIMIT 1",
        (node, item_key),
    ).fetchone()
    return None if row is None else str(row[0])


def _guarded(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except sqlite3.Error as error:
        raise RecordingError(f"the recording '{path}' cannot be read: {explain(error)}") from None


def _chunks(ids: Sequence[str]) -> Iterator[tuple[Sequence[str], str]]:
    for start in range(0, len(ids), _CHUNK):
        chunk = list(ids[start : start + _CHUNK])
        yield chunk, ",".join("?" * len(chunk))
