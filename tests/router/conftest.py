"""What the tests of the recording share: nodes, calls, a clock that stands still."""

import sqlite3

import pytest

from chainwax.router.answers import Choice, FreeText
from chainwax.router.prompt import Prompt
from chainwax.router.recording import SqliteRecording
from chainwax.router.types import Arm, Attempt, CallResult, NodeSpec, Params, Query

TEAM = NodeSpec("team", Prompt("Which team?\n\n{text}"), Choice(["billing", "technical"]), flow="support")
DRAFT = NodeSpec(
    "draft", Prompt("Answer.\n\n{text}"), FreeText(), flow="support", params=Params(max_tokens=9)
)


class Clock:
    def __init__(self, now=1_000.0):
        self.now = now

    def time(self):
        return self.now

    def monotonic(self):
        return self.now

    async def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.db"


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def rec(path, clock):
    recording = SqliteRecording(path, clock=clock)
    recording.open_run("r1", "support", {})
    yield recording
    recording.close()


def attempt(call_id, number=1, model="small", **fields):
    fields = {"text": "billing", "started": 10.0, "cost_usd": 0.001, **fields}
    return Attempt(call_id, number, Arm(model), "local", **fields)


def query(call_id, node=TEAM, **fields):
    return Query(node, call_id, [{"role": "user", "content": "hello"}], **fields)


def answered(call_id, node=TEAM, value="billing", text="billing", attempts=None, **fields):
    attempts = [attempt(call_id, text=text)] if attempts is None else attempts
    arm = attempts[-1].arm if attempts else None
    cost = sum(a.cost_usd for a in attempts)
    return CallResult(call_id, node.id, value, text, arm=arm, attempts=attempts, cost_usd=cost, **fields)


def put(rec, call_id, node=TEAM, **fields):
    asked = {k: fields.pop(k) for k in ("item_key", "position") if k in fields}
    rec.result(query(call_id, node, **asked), answered(call_id, node, **fields))


def rows(path, table):
    db = sqlite3.connect(path)
    db.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in db.execute(f"SELECT * FROM {table} ORDER BY rowid")]
    finally:
        db.close()
