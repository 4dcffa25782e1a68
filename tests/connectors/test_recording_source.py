"""The items of an earlier run, read back from its recording."""

import sqlite3

import pytest

from chainwax.connectors import BadRecord, Record, RecordingSource
from chainwax.router.errors import ConfigError, RecordingError
from chainwax.router.recording import SqliteRecording


@pytest.fixture
def recorded(tmp_path):
    path = tmp_path / "run.db"
    recording = SqliteRecording(path)
    recording.open_run("monday", "flow", {})
    recording.items("tickets", [(f"t.jsonl:{n}", f"k{n}", 100.0 + n, {"n": n}) for n in range(1, 6)])
    recording.items("orders", [("o:1", "", None, "text")])
    recording.open_run("tuesday", "flow", {})
    recording.items("tickets", [("t.jsonl:1", "k1", None, {"n": "tuesday"})])
    recording.open_run("wednesday", "flow", {})
    recording.close()
    return path


def drain(partition):
    out = []
    try:
        while True:
            out += partition.next_batch()
    except StopIteration:
        return out


def read(source, state=None):
    (part,) = source.list_parts()
    partition = source.build_part("in", part, state)
    try:
        return drain(partition)
    finally:
        partition.close()


def test_positions_keys_and_times_are_those_of_then(recorded):
    source = RecordingSource(recorded, run="monday", source="tickets", batch_size=2)
    assert read(source) == [Record({"n": n}, f"k{n}", f"t.jsonl:{n}", 100.0 + n) for n in range(1, 6)]
    assert read(RecordingSource(recorded, run="monday", source="orders")) == [Record("text", "", "o:1", None)]


def test_latest_is_the_newest_run_that_has_items(recorded):
    source = RecordingSource(recorded)
    assert (source.run, source.source) == ("tuesday", "tickets")
    assert RecordingSource(recorded, source="orders").run == "monday"


def test_a_resume_keeps_to_its_run(recorded):
    source = RecordingSource(recorded, run="monday", source="tickets", batch_size=2)
    partition = source.build_part("in", "items", None)
    first = partition.next_batch()
    state = partition.snapshot()
    partition.close()
    rest = read(RecordingSource(recorded, run="latest"), state)
    assert [r.value["n"] for r in first + rest] == [1, 2, 3, 4, 5]


def test_pace(recorded):
    source = RecordingSource(recorded, run="monday", source="tickets", speed="1000x")
    partition = source.build_part("in", "items", None)
    assert len(partition.next_batch()) == 1
    partition.close()


def test_malformed_values_do_not_end_the_stream(recorded):
    db = sqlite3.connect(recorded)
    db.execute(
        "UPDATE items SET value = '{\"n\": ' WHERE position IN ('t.jsonl:2', 't.jsonl:5') AND run = 'monday'"
    )
    db.execute("UPDATE items SET value = '\"<object>\"', value_is_repr = 1 WHERE position = 't.jsonl:3'")
    db.commit()
    db.close()
    for size in (1, 2, 100):
        records = read(RecordingSource(recorded, run="monday", source="tickets", batch_size=size))
        assert [type(r) for r in records] == [Record, BadRecord, BadRecord, Record, BadRecord]
        assert records[1].position == "tickets#2"
        assert "run 'monday': the recorded value is malformed" in records[1].error
        assert records[2] == BadRecord(
            "t.jsonl:3", "<object>", "JSON could not hold this value when it was recorded"
        )


def test_a_recording_that_breaks_midway_says_so(recorded):
    source = RecordingSource(recorded, run="monday", source="tickets")
    partition = source.build_part("in", "items", None)
    db = sqlite3.connect(recorded)
    db.execute("DROP TABLE items")
    db.commit()
    db.close()
    (bad,) = drain(partition)
    assert "run.db' lacks the table 'items'" in bad.error
    state = partition.snapshot()
    partition.close()
    assert state[1][-1] is True


def test_what_cannot_be_found(recorded, tmp_path):
    with pytest.raises(ConfigError, match=r"ran\.db does not exist: did you mean 'run\.db'"):
        RecordingSource(tmp_path / "ran.db")
    with pytest.raises(RecordingError, match="no run 'mnday': did you mean 'monday'"):
        RecordingSource(recorded, run="mnday")
    with pytest.raises(ConfigError, match=r"unknown source .*'ticket': did you mean 'tickets'"):
        RecordingSource(recorded, run="monday", source="ticket")
    with pytest.raises(ConfigError, match=r"unknown source .*'ticket': did you mean 'tickets'"):
        RecordingSource(recorded, source="ticket")
    with pytest.raises(ConfigError, match=r"has 2 sources \(orders, tickets\): name one by source="):
        RecordingSource(recorded, run="monday")
    with pytest.raises(ConfigError, match=r"has 0 sources \(none\)"):
        RecordingSource(recorded, run="wednesday")
    (tmp_path / "other.db").write_text("not a database, but long enough to be looked at by SQLite" * 50)
    with pytest.raises(RecordingError, match=r"other\.db"):
        RecordingSource(tmp_path / "other.db")
    SqliteRecording(tmp_path / "empty.db").close()
    with pytest.raises(ConfigError, match=r"no run in the recording '.*empty\.db' has items"):
        RecordingSource(tmp_path / "empty.db")
