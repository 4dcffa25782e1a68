"""A recording whose file cannot be opened or written: nothing hangs, nothing is lost that need not be."""

import os
import shutil
import sqlite3
import subprocess
import threading
from contextlib import closing, contextmanager

import pytest

from chainwax.router.answers import FreeText
from chainwax.router.errors import RecordingError
from chainwax.router.prompt import Prompt
from chainwax.router.recording import RecordingReader, SqliteRecording, writer
from chainwax.router.types import Arm, Attempt, CallResult, Feedback, NodeSpec, Query

NODE = NodeSpec("n", Prompt("{text}"), FreeText())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.db"


@pytest.fixture
def told():
    return []


@pytest.fixture
def rec(path, told):
    recording = SqliteRecording(path, on_error=told.append, retry_s=0.05)
    recording.open_run("r1", "f", {})
    return recording


def put(rec, call_id, on_durable=None, size=10):
    attempt = Attempt(call_id, 1, Arm("m"), started=1.0, text="t" * size)
    result = CallResult(call_id, "n", "t", "t", arm=Arm("m"), attempts=[attempt])
    rec.result(Query(NODE, call_id, [{"role": "user", "content": "x"}]), result, on_durable)


def put_all(rec, ids, size=10):
    """Hand calls over and wait until each was called back."""
    done = threading.Semaphore(0)
    for call_id in ids:
        put(rec, call_id, done.release, size)
    for _ in ids:
        assert done.acquire(timeout=10), "a result hangs on the recording"


def wait_until(condition):
    pause = threading.Event()
    for _ in range(400):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError("it never came")


def found(path, ids):
    with closing(RecordingReader(path)) as reader:
        return set(reader.find(ids))


IDS = [f"c{i}" for i in range(300)]


def fill(rec):
    pages = rec._write_db.execute("PRAGMA page_count").fetchone()[0]
    rec._write_db.execute(f"PRAGMA max_page_count = {pages}")


def test_a_full_disk_holds_up_no_result_and_all_rows_arrive_later(rec, path, told):
    put_all(rec, IDS[:5])
    fill(rec)
    put_all(rec, IDS[5:], size=500)
    assert rec.failed is not None
    assert not rec.flush(0.5)
    assert not rec.fatal
    assert len(told) == 1, "told once, however often it is tried"
    assert "the disk is full" in told[0]
    assert str(path) in told[0]

    rec._write_db.execute("PRAGMA max_page_count = 100000")
    wait_until(lambda: rec.failed is None)
    put_all(rec, ["later"])
    rec.close()
    assert found(path, [*IDS, "later"]) == {*IDS, "later"}
    assert rec.lost == 0


def test_a_second_failure_is_told_again(rec, told):
    for _ in range(2):
        fill(rec)
        put_all(rec, [f"x{len(told)}"], size=50_000)
        rec._write_db.execute("PRAGMA max_page_count = 100000")
        wait_until(lambda: rec.failed is None)
    rec.close()
    assert len(told) == 2


def test_close_says_how_many_rows_are_missing_and_why(rec, path):
    fill(rec)
    put_all(rec, IDS[:4], size=50_000)
    rec.feedback([Feedback("n", 1.0, "c1", arm="m")])
    with pytest.raises(
        RecordingError, match=r"^9 rows are missing in the recording '.*run\.db': the disk is full"
    ):
        rec.close()
    assert found(path, IDS[:4]) == set()


def test_too_many_waiting_rows_are_fatal_and_say_so(path, told):
    rec = SqliteRecording(path, on_error=told.append, retry_s=0.05, most_rows=20)
    rec.open_run("r1", "f", {})
    fill(rec)
    put_all(rec, ["first"], size=50_000)
    for i in range(30):
        put_all(rec, [f"c{i}"], size=5_000)
    assert rec.fatal
    assert len(told) == 2
    assert "fatal" in told[1]
    assert "20 rows wait" in told[1]
    assert str(path) in told[1]
    rec._write_db.execute("PRAGMA max_page_count = 100000")
    with pytest.raises(RecordingError, match=r"^42 rows are missing"):
        rec.close()
    assert len(found(path, ["first", *IDS[:30]])) == 10


def test_a_file_that_is_locked_too_long_is_waited_for_in_memory(rec, path, told, monkeypatch):
    rec._write_db.execute("PRAGMA busy_timeout = 50")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        put_all(rec, IDS[:10])
        assert "another program holds it locked" in rec.failed
        other.execute("ROLLBACK")
    rec.close()
    assert len(told) == 1
    assert found(path, IDS[:10]) == set(IDS[:10])


def test_a_database_that_is_read_only_is_waited_for_in_memory(rec, path, told):
    rec._write_db.execute("PRAGMA query_only = 1")
    put_all(rec, IDS[:10])
    assert "read-only" in rec.failed
    rec._write_db.execute("PRAGMA query_only = 0")
    wait_until(lambda: rec.failed is None)
    rec.close()
    assert found(path, IDS[:10]) == set(IDS[:10])


@pytest.mark.parametrize("names", [["run.db"], ["run.db", "run.db-wal", "run.db-shm"]], ids=["alone", "all"])
def test_a_deleted_file_is_written_anew_with_all_it_held(rec, path, told, monkeypatch, names):
    monkeypatch.setattr(writer, "_LOOK_S", 0.0)
    rec._next_look = 0.0
    put_all(rec, IDS[:50])
    for name in names:
        (path.parent / name).unlink()
    put_all(rec, IDS[50:])
    assert len(told) == 1
    assert "was deleted while in use" in told[0]
    assert len(rec.find(IDS)) == len(IDS), "whoever reads sees the new file"
    rec.close()
    assert found(path, IDS) == set(IDS)
    with closing(RecordingReader(path)) as reader:
        assert [info.run for info in reader.runs()] == ["r1"]


def test_a_file_deleted_right_before_the_end_is_written_anew(rec, path):
    put_all(rec, IDS[:50])
    path.unlink()
    put(rec, "last")
    rec.close()
    assert found(path, [*IDS[:50], "last"]) == {*IDS[:50], "last"}


def test_a_folder_that_is_gone_keeps_the_rows_until_it_is_back(rec, path, told, monkeypatch):
    monkeypatch.setattr(writer, "_LOOK_S", 0.0)
    rec._next_look = 0.0
    put_all(rec, IDS[:50])
    shutil.rmtree(path.parent)
    put_all(rec, IDS[50:100])
    assert rec.failed is not None
    path.parent.mkdir()
    wait_until(lambda: rec.failed is None)
    rec.close()
    assert found(path, IDS[:100]) == set(IDS[:100])


def test_a_file_that_was_replaced_by_something_else_is_left_alone(rec, path, monkeypatch):
    monkeypatch.setattr(writer, "_LOOK_S", 0.0)
    rec._next_look = 0.0
    put_all(rec, IDS[:5])
    path.unlink()
    path.write_text("my diary, not a database at all, and longer than any header of one would be" * 20)
    put_all(rec, IDS[5:10])
    assert "another file was put in its place" in rec.failed
    with pytest.raises(RecordingError, match="10 rows are missing"):
        rec.close()
    assert path.read_text().startswith("my diary")


@contextmanager
def mounted(disk):
    """A disk of 1 MB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root to mount a small disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a small disk")
    try:
        yield
    finally:
        # Lazy: a test that failed may still hold a file open, and must not leave the disk behind.
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_that_is_really_full(tmp_path, told):
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted(disk):
        rec = SqliteRecording(disk / "run.db", on_error=told.append, retry_s=0.05)
        rec.open_run("r1", "f", {})
        put_all(rec, IDS[:3])
        (disk / "ballast").write_bytes(b"x" * 500_000)
        put_all(rec, IDS[3:], size=4_000)
        assert "the disk is full" in rec.failed
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        wait_until(lambda: rec.failed is None)
        rec.close()
        assert found(disk / "run.db", IDS) == set(IDS)
        assert len(told) == 1


def test_a_finished_recording_is_read_from_a_disk_that_is_read_only(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted(disk):
        rec = SqliteRecording(disk / "run.db")
        rec.open_run("r1", "f", {})
        put_all(rec, IDS[:3])
        rec.close()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert found(disk / "run.db", IDS) == set(IDS[:3])
        assert "cannot be written to" in refused(disk / "run.db")


# -- files that cannot be opened ----------------------------------------------------------------


def refused(path, opener=SqliteRecording):
    with pytest.raises(RecordingError) as caught:
        opener(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_file_that_is_no_database_is_named_and_left_as_it_is(path):
    path.write_bytes(b"hello, I am a text file\n" * 100)
    assert "no database" in refused(path)
    assert "no database" in refused(path, RecordingReader)
    assert path.read_bytes() == b"hello, I am a text file\n" * 100


def test_a_database_of_something_else_is_left_as_it_is(path):
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE cats (name)")
    before = path.read_bytes()
    assert "no recording" in refused(path)
    assert path.read_bytes() == before


def test_a_newer_version_is_refused(path):
    SqliteRecording(path).close()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE meta SET value = '2' WHERE key = 'schema'")
    assert "version 2" in refused(path)
    assert "made by a newer one" in refused(path, RecordingReader)


def test_a_recording_that_lacks_a_table_is_refused(path):
    SqliteRecording(path).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("DROP TABLE attempts")
    assert "lacks the table 'attempts'" in refused(path)


def test_missing_files_and_folders_are_named(tmp_path):
    assert "no recording" in refused(tmp_path / "none.db", RecordingReader)
    assert "is a folder" in refused(tmp_path)
    assert "there is no folder" in refused(tmp_path / "nowhere" / "run.db")


def test_an_odd_file_name_is_taken_as_it_is(tmp_path):
    odd = tmp_path / "a b?mode=ro#%20ü.db"
    SqliteRecording(odd).close()
    assert [p.name for p in tmp_path.iterdir()] == [odd.name]


def test_an_empty_file_becomes_a_recording(path):
    path.touch()
    SqliteRecording(path).close()
    assert found(path, ["x"]) == set()


def test_a_damaged_recording_is_an_error_that_names_it(rec, path):
    put_all(rec, IDS)
    rec.close()
    content = bytearray(path.read_bytes())
    for start in range(4096, len(content), 4096):
        content[start : start + 2048] = b"\xee" * 2048
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=r"run\.db") as caught, closing(RecordingReader(path)) as reader:
        reader.find(IDS)
    assert "damaged" in str(caught.value)
