"""What a run did, in sums, and when: for reports and plots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from chainwax.router.recording.reader import RecordingReader
from chainwax.router.recording.rows import parse_json, quoted
from chainwax.router.types import UNUSED

__all__ = [
    "Answered",
    "ArmTotals",
    "Letters",
    "Moment",
    "NodeTotals",
    "answered",
    "items_of",
    "letters_of",
    "timeline",
    "totals",
]


@dataclass(slots=True)
class ArmTotals:
    """One arm of one node in one run."""

    used: int = 0
    """Calls that it answered."""
    answers: int = 0
    """Attempts that brought a text."""
    cost_usd: float = 0.0
    """Of all attempts, those answered from an earlier recording included."""
    reused: int = 0
    """Attempts that were answered from an earlier recording."""
    reused_usd: float = 0.0
    """What of the cost was not paid, because it was paid then."""
    simulated: bool = False


@dataclass(slots=True)
class NodeTotals:
    """One node in one run."""

    calls: int = 0
    """Calls that were answered."""
    errors: int = 0
    """Calls that failed."""
    scores: int = 0
    """Scores of answers that were used."""
    score_sum: float = 0.0
    arms: dict[str, ArmTotals] = field(default_factory=dict)

    @property
    def cost_usd(self) -> float:
        """Of all attempts."""
        return sum((arm.cost_usd for arm in self.arms.values()), 0.0)

    def arm(self, key: str) -> ArmTotals:
        """An arm's totals, made where there are none."""
        return self.arms.setdefault(key, ArmTotals())


@dataclass(frozen=True, slots=True)
class Letters:
    """The open dead letters of a run."""

    count: int = 0
    node: str = ""
    """Of the first one, as are error and message."""
    error: str = ""
    message: str = ""


class Moment(NamedTuple):
    """One call that was answered, with what it cost and what became of it."""

    time: float
    node: str
    cost_usd: float
    """Of all its attempts."""
    score: float | None
    """Mean of the scores that its answer got; None without one."""
    simulated: bool


class Answered(NamedTuple):
    """One call that was answered, and its answer."""

    node: str
    item_key: str
    position: str
    value: Any
    """As JSON holds it."""
    arm: str
    cost_usd: float
    """Of all its attempts, shadows included."""
    score: float | None
    """Mean of the scores that its answer got; None without one."""
    simulated: bool


def totals(reader: RecordingReader, run: str) -> dict[str, NodeTotals]:
    """What each node of a run did."""
    found: dict[str, NodeTotals] = {}

    def of(node: str) -> NodeTotals:
        return found.setdefault(node, NodeTotals())

    for node, arm, count in reader._all(
        "SELECT node, CASE status WHEN 'ok' THEN coalesce(arm, '') END, count(*) FROM calls WHERE run = ? "
        "GROUP BY 1, 2 ORDER BY 3 DESC",
        (run,),
    ):
        if arm is None:
            of(node).errors += count
        else:
            of(node).calls += count
            of(node).arm(arm).used += count
    for node, key, answers, cost, reused, reused_usd, simulated in reader._all(
        "SELECT node, arm, count(text), total(cost_usd), total(reused), "
        "total(CASE reused WHEN 1 THEN cost_usd END), max(simulated) FROM attempts WHERE run = ? "
        "GROUP BY 1, 2",
        (run,),
    ):
        arm = of(node).arm(key)
        arm.answers, arm.cost_usd, arm.simulated = answers, cost, bool(simulated)
        arm.reused, arm.reused_usd = int(reused), reused_usd
    # Other runs may speak on the same topics, of their calls or, late, of those of this run: a score belongs
    # to the run that made the call, whoever heard it.
    for node, scores, score_sum in reader._all(
        "SELECT f.node, count(score), total(score) FROM feedback f LEFT JOIN calls c USING (call_id) "
        "WHERE CASE call_id WHEN '' THEN f.run ELSE c.run END = ? "
        f"AND feedback_kind NOT IN ({quoted(UNUSED)}) GROUP BY 1",
        (run,),
    ):
        of(node).scores, of(node).score_sum = scores, score_sum
    return found


def letters_of(reader: RecordingReader, run: str) -> Letters:
    """How many open dead letters a run has, and what the first one says."""
    ((count,),) = reader._all("SELECT count(*) FROM dead_letters WHERE run = ? AND settled IS NULL", (run,))
    if not count:
        return Letters()
    ((node, error, message),) = reader._all(
        "SELECT node, error, message FROM dead_letters WHERE run = ? AND settled IS NULL "
        "ORDER BY rowid LIMIT 1",
        (run,),
    )
    return Letters(count, node, error, message)


def items_of(reader: RecordingReader, run: str) -> int:
    """How many items of its sources are recorded for a run."""
    ((count,),) = reader._all("SELECT count(*) FROM items WHERE run = ?", (run,))
    return int(count)


def answered(reader: RecordingReader, run: str) -> Iterator[Answered]:
    """The answered calls of a run in the order in which they were answered, with their answers."""
    sql = f"""
SELECT c.node, c.item_key, c.position, c.value, c.text, coalesce(c.arm, ''),
    (SELECT total(a.cost_usd) FROM attempts a WHERE a.call_id = c.call_id),
    (SELECT avg(f.score) FROM feedback f
     WHERE f.call_id = c.call_id AND f.feedback_kind NOT IN ({quoted(UNUSED)})),
    c.simulated
FROM calls c WHERE c.run = ? AND c.status = 'ok' ORDER BY c.rowid
"""
    for node, key, position, value, text, arm, cost, score, simulated in reader._iterate(sql, (run,)):
        said = text if value is None else parse_json(value)
        yield Answered(node, key, position, said, arm, cost, score, bool(simulated))


def timeline(reader: RecordingReader, run: str) -> Iterator[Moment]:
    """The answered calls of a run in the order in which they were answered.

    What was asked in the shadow of a call is part of its cost.
    """
    sql = f"""
SELECT coalesce(c.time, 0.0), c.node,
    (SELECT total(a.cost_usd) FROM attempts a WHERE a.call_id = c.call_id),
    (SELECT avg(f.score) FROM feedback f
     WHERE f.call_id = c.call_id AND f.feedback_kind NOT IN ({quoted(UNUSED)})),
    c.simulated
FROM calls c WHERE c.run = ? AND c.status = 'ok' ORDER BY c.rowid
"""
    for time, node, cost, score, simulated in reader._iterate(sql, (run,)):
        yield Moment(time, node, cost, score, bool(simulated))
