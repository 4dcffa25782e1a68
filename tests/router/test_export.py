import gzip
import json
import sqlite3
import sys
from contextlib import closing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chainwax.router.answers import FreeText
from chainwax.router.errors import BackendDown, RecordingError
from chainwax.router.export import export_jsonl, export_parquet, import_recording, read_recording_lines
from chainwax.router.prompt import Prompt
from chainwax.router.recording import DeadLetter, RecordingReader, SqliteRecording
from chainwax.router.recording.schema import TABLES
from chainwax.router.types import (
    Arm,
    Attempt,
    CallRef,
    CallResult,
    Decision,
    Feedback,
    NodeSpec,
    Query,
    Usage,
)

NODE = NodeSpec("n", Prompt("{text}"), FreeText(), flow="f")
KINDS = ("run", "item", "call", "attempt", "feedback", "decision", "dead_letter")


def dump(path):
    """All rows of all tables in their order."""
    with closing(sqlite3.connect(path)) as db:
        return {table: db.execute(f"SELECT * FROM {table} ORDER BY rowid").fetchall() for table in TABLES}


def fill(rec, run="r1", text='hällo\n"quoted" \u2028 \0 €', value=None, number=1.5, item=None):
    rec.open_run(run, "f", {"models": {"m": {"tier": "local"}}})
    rec.items("s", [(f"{run}:1", "k", number, item), (f"{run}:2", "", None, object())])
    arm = Arm("m", effort="low")
    tries = [
        Attempt(f"{run}-c1", 1, Arm("x"), started=number, error="BackendDown: x"),
        Attempt(
            f"{run}-c1", 2, arm, "local", 2.0, 0.1, number, 0.2, text, Usage(1, 2, 3, 4), 0.1, 0.5,
            simulated=True, shadow=True, reused=True, invalid=True,
        ),
    ]  # fmt: skip
    query = Query(
        NODE, f"{run}-c1", [{"role": "user", "content": text}], text, "p", (CallRef("a", "b", "c"),), "w"
    )
    rec.result(query, CallResult(f"{run}-c1", "n", value, text, arm=arm, attempts=tries, cost_usd=0.1))
    failed = Query(NODE, f"{run}-c2", [{"role": "user", "content": ""}])
    rec.result(failed, CallResult(f"{run}-c2", "n", error=BackendDown(text)))
    rec.feedback([Feedback("n", 0.5, f"{run}-c1", correction=value, time=number, metric=text)])
    rec.decision(Decision("promoted", "n", {"why": value}))
    rec.dead_letters([DeadLetter("n", value, "E", text, "k", "p", tries), DeadLetter("n", {1: 2}, "E", "")])
    rec.close_run(run, "finished")


@pytest.fixture
def path(tmp_path):
    recording = tmp_path / "run.db"
    rec = SqliteRecording(recording)
    fill(rec, "r1", value={"a": [1, None, "ü"]}, item={"text": "x"})
    fill(rec, "r2")
    rec.close()
    return recording


def export(recording, run, out):
    write = export_parquet if out.suffix == ".parquet" else export_jsonl
    return write(recording, run, out)


SUFFIXES = ["jsonl", "jsonl.gz", "parquet"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_database_to_file_to_database_is_the_same(path, tmp_path, suffix):
    out, again = tmp_path / f"out.{suffix}", tmp_path / "again.db"
    count = export(path, None, out)
    assert import_recording(out, again) == count == sum(map(len, dump(path).values()))
    assert dump(again) == dump(path)
    assert all(dump(path).values()), "each table has something to lose"
    with closing(RecordingReader(again)) as one, closing(RecordingReader(path)) as other:
        assert one.find(["r1-c1", "r2-c2"]) == other.find(["r1-c1", "r2-c2"])
        assert [i.position for i in one.read_items("r1", "s")] == ["r1:1", "r1:2"]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.characters(exclude_categories=()), max_size=50),
    value=values,
    number=st.floats(allow_nan=True),
    item=values,
    suffix=st.sampled_from(SUFFIXES),
)
def test_whatever_is_recorded_comes_back(tmp_path_factory, text, value, number, item, suffix):
    folder = tmp_path_factory.mktemp("round")
    rec = SqliteRecording(folder / "run.db")
    fill(rec, "r", text, value, number, item)
    rec.close()
    export(folder / "run.db", "r", folder / f"out.{suffix}")
    import_recording(folder / f"out.{suffix}", folder / "again.db")
    assert dump(folder / "again.db") == dump(folder / "run.db")
    assert len(dump(folder / "run.db")["calls"]) == 2


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_run_alone_is_exported(path, tmp_path, suffix):
    export(path, "r2", tmp_path / f"out.{suffix}")
    import_recording(tmp_path / f"out.{suffix}", tmp_path / "again.db")
    everything = dump(path)
    for table, rows in dump(tmp_path / "again.db").items():
        assert rows == [row for row in everything[table] if row[0] == "r2"]


def test_a_line_is_what_is_promised(path, tmp_path):
    export_jsonl(path, "r1", tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert {line["version"] for line in lines} == {1}
    assert tuple(dict.fromkeys(line["kind"] for line in lines)) == KINDS
    call = next(line for line in lines if line["kind"] == "call")
    assert call["messages"][0]["role"] == "user"
    assert call["parents"] == [{"node": "a", "call_id": "b", "arm": "c", "context": ""}]
    assert call["value"] == {"a": [1, None, "ü"]}
    assert call["simulated"] is True
    assert "error" not in call


def test_parquet_is_a_table_that_can_be_asked(path, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    export_parquet(path, None, tmp_path / "out.parquet")
    table = parquet.read_table(tmp_path / "out.parquet", filters=[("kind", "=", "attempt")])
    assert table.num_rows == 4
    assert sum(table["cost_usd"].to_pylist()) == pytest.approx(0.2)
    assert set(table["version"].to_pylist()) == {1}


def test_importing_twice_changes_nothing_but_dead_letters_without_a_place(path, tmp_path):
    export_jsonl(path, None, tmp_path / "out.jsonl")
    before = dump(path)
    import_recording(tmp_path / "out.jsonl", path)
    after = dump(path)
    assert len(after.pop("dead_letters")) == len(before.pop("dead_letters")) + 2
    assert after == before


GOOD = {"version": 1, "kind": "run", "run": "r9", "flow": "f", "status": "finished"}


def line(**changes):
    record = {**GOOD, **changes}
    return json.dumps({k: v for k, v in record.items() if v != "DROP"}).encode()


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b'{"version": 1, "kind": "ru', "no JSON"),
        (b"[1, 2]", "no JSON object, but list"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (line().decode().encode("utf-16"), "not UTF-8"),
        (b"[" * 100_000, "no JSON"),
        (b'{"version": 1, "kind": "run", "x": ' + b"[" * 900 + b"]" * 900 + b"}", "unknown key 'x'"),
        (b'{"version": 1, "kind": "call", "cost_usd": ' + b"9" * 5000 + b"}", "no JSON"),
        (
            b'{"version": 1, "kind": "call", "cost_usd": ' + b"9" * 400 + b"}",
            "'cost_usd' of a call must be a number",
        ),
        (line(version=2), "unknown version 2"),
        (line(version=True), "unknown version True"),
        (line(version="DROP"), "unknown version None"),
        (line(kind="calls"), "unknown kind 'calls': did you mean 'call'?"),
        (line(kind=["run"]), "unknown kind"),
        (line(kind="DROP"), "unknown kind None"),
        (line(stauts="x"), "unknown key 'stauts' in a run: did you mean 'status'?"),
        (line(**{"x" * 100_000: 1}), "unknown key 'xxx"),
        (line(flow="DROP"), "a run lacks 'flow'"),
        (line(flow=None), "a run lacks 'flow'"),
        (line(flow=3), "'flow' of a run must be a text, not 3"),
        (line(started="now"), "'started' of a run must be a number, not 'now'"),
        (line(kind="attempt", flow="DROP", status="DROP", number=1.5), "must be a whole number"),
        (line(kind="attempt", flow="DROP", status="DROP", number=2**63), "must be a whole number"),
        (
            line(kind="attempt", flow="DROP", status="DROP", invalid=1),
            "'invalid' of a attempt must be true or false",
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_bad_line_is_named_and_nothing_is_imported(tmp_path, bad, says, suffix):
    source = tmp_path / f"in.{suffix}"
    content = line(config={}) + b"\n\n" + bad + b"\n" + line(run="later", config={}) + b"\n"
    source.write_bytes(gzip.compress(content) if suffix == "jsonl.gz" else content)
    with pytest.raises(RecordingError) as caught:
        import_recording(source, tmp_path / "run.db")
    message = str(caught.value)
    assert message.startswith(f"{source}:3: ")
    assert says in message
    assert len(message) < 1000
    assert not any(dump(tmp_path / "run.db").values())


def test_an_endless_line_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("chainwax.router.export._LONGEST_LINE", 1000)
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(b"x" * 10_000_000))
    with pytest.raises(RecordingError, match=r"in\.jsonl\.gz:1: the line is longer than 1000 bytes"):
        list(read_recording_lines(tmp_path / "in.jsonl.gz"))


def test_a_byte_order_mark_and_a_missing_last_newline_are_forgiven(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + line(config={}))
    assert [r["run"] for r in read_recording_lines(tmp_path / "in.jsonl")] == ["r9"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.jsonl.gz", gzip.compress(b"x\n" * 1000)[:-12]),
        ("in.jsonl.gz", b"no gzip at all"),
        ("in.jsonl.gz", gzip.compress(b"\n" * 100)[:12] + b"\xff" * 40),
        ("in.parquet", b"no parquet at all"),
        ("in.parquet", b""),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordingError) as caught:
        import_recording(tmp_path / name, tmp_path / "run.db")
    assert str(caught.value).startswith(str(tmp_path / name))


def test_a_bad_row_of_parquet_is_named(path, tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    source = tmp_path / "in.parquet"
    good = {**GOOD, "config": "{}"}
    for bad, says in (
        ({**good, "config": "{"}, "no JSON"),
        ({**good, "kind": "rnu"}, "did you mean 'run'"),
        ({**good, "version": 7}, "unknown version 7"),
    ):
        parquet.write_table(pa.Table.from_pylist([good, bad]), source)
        with pytest.raises(RecordingError, match=r"in\.parquet:2: ") as caught:
            import_recording(source, tmp_path / "run.db")
        assert says in str(caught.value)


def test_missing_files_runs_and_folders_are_named(path, tmp_path):
    with pytest.raises(RecordingError, match=r"none\.jsonl"):
        import_recording(tmp_path / "none.jsonl", tmp_path / "x.db")
    with pytest.raises(RecordingError, match=r"no recording '.*none\.db'"):
        export_jsonl(tmp_path / "none.db", None, tmp_path / "out.jsonl")
    for suffix in SUFFIXES:
        with pytest.raises(RecordingError, match="no run 'r7': did you mean 'r"):
            export(path, "r7", tmp_path / f"out.{suffix}")
        with pytest.raises(RecordingError, match=r"nowhere.*cannot be written"):
            export(path, "r1", tmp_path / "nowhere" / f"out.{suffix}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.db"], "no half file is left behind"


def test_parquet_without_pyarrow_names_the_extra(path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RecordingError, match="extra 'parquet'"):
        export_parquet(path, None, tmp_path / "out.parquet")
    with pytest.raises(RecordingError, match="extra 'parquet'"):
        import_recording(tmp_path / "in.parquet", tmp_path / "x.db")


def test_a_recording_is_exported_as_it_was_at_one_moment_while_it_is_written(path, tmp_path):
    rec = SqliteRecording(path)
    fill(rec, "r3")
    assert rec.flush(5)
    export_jsonl(path, "r3", tmp_path / "out.jsonl")
    rec.close()
    assert sum(r["kind"] == "call" for r in read_recording_lines(tmp_path / "out.jsonl")) == 2
