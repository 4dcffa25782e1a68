"""What a recording holds of a node's calls to train a model of its own on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chainwax.router.recording.rows import parse_json, quoted
from chainwax.router.recording.schema import open_database
from chainwax.router.types import NO_END, NO_QUALITY, FeedbackKind, Message

__all__ = ["Answered", "answered_calls", "labelled_calls"]

_CHUNK = 500

_CALLS = """
SELECT c.call_id, c.item_key, coalesce(c.time, 0.0), c.messages, c.text, c.arm, c.simulated
FROM calls c JOIN runs r ON r.run = c.run
WHERE r.flow = ? AND c.node = ? AND c.status = 'ok' AND c.text IS NOT NULL
ORDER BY c.time DESC, c.rowid DESC LIMIT ?
"""


_LABELLED = f"""
SELECT count(DISTINCT f.call_id) FROM feedback f
JOIN calls c ON c.call_id = f.call_id JOIN runs r ON r.run = c.run
WHERE r.flow = ? AND c.node = ? AND c.status = 'ok'
    AND (f.correction IS NOT NULL AND f.path IS NULL OR f.score >= ?)
    AND f.feedback_kind NOT IN ({quoted(NO_QUALITY)})
"""


@dataclass(slots=True)
class Answered:
    """One answered call with what became of it."""

    call_id: str
    item_key: str
    time: float
    messages: Sequence[Message]
    text: str
    """The answer that was served."""
    arm: str
    """The key of the arm that gave it."""
    simulated: bool
    scores: list[tuple[FeedbackKind, float]] = field(default_factory=list)
    """Of the served answer."""
    corrections: list[Any] = field(default_factory=list)
    """What was said to be right, oldest first."""
    said: dict[str, str] = field(default_factory=dict)
    """What each arm that was asked answered, by its key; shadows too."""


def answered_calls(path: Path, flow: str, node: str, *, most: int) -> Iterator[Answered]:
    """The newest ``most`` answered calls of a node over all runs of its flow, newest first.

    Raises :class:`~chainwax.router.errors.RecordingError` where the file cannot be read.
    """
    with closing(open_database(path, write=False)) as db:
        rows = db.execute(_CALLS, (flow, node, most)).fetchall()
        for start in range(0, len(rows), _CHUNK):
            calls = {
                row[0]: Answered(
                    row[0], row[1], row[2], parse_json(row[3]), row[4], row[5] or "", bool(row[6])
                )
                for row in rows[start : start + _CHUNK]
            }
            ids = list(calls)
            marks = ",".join("?" * len(ids))
            for call_id, arm, kind, score, correction in db.execute(
                # What an item's end result should have been is no right answer of the last of its calls.
                "SELECT call_id, arm, feedback_kind, score, iif(path IS NULL, correction, NULL) "
                f"FROM feedback WHERE call_id IN ({marks}) "
                f"AND feedback_kind NOT IN ({quoted(NO_END)}) ORDER BY time, rowid",
                ids,
            ):
                call = calls[call_id]
                if arm == call.arm and score is not None:
                    call.scores.append((FeedbackKind(kind), score))
                if correction is not None:
                    call.corrections.append(parse_json(correction))
            said: defaultdict[str, dict[str, str]] = defaultdict(dict)
            for call_id, arm, text in db.execute(
                "SELECT call_id, arm, text FROM attempts "
                f"WHERE call_id IN ({marks}) AND text IS NOT NULL AND error IS NULL ORDER BY started, number",
                ids,
            ):
                said[call_id][arm] = text
            for call_id, call in calls.items():
                call.said = said[call_id]
                yield call


def labelled_calls(path: Path, flow: str, node: str, good: float) -> int:
    """Of how many calls it is recorded what is right: by a correction, or a score from ``good`` on.

    Raises :class:`~chainwax.router.errors.RecordingError` where the file cannot be read.
    """
    with closing(open_database(path, write=False)) as db:
        return int(db.execute(_LABELLED, (flow, node, good)).fetchone()[0])
