"""Sources and sinks under Bytewax itself: whole runs, crashes, resumes, stops, several workers."""

import gzip
import json
import threading
import time
from datetime import timedelta

import bytewax.operators as op
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bytewax.dataflow import Dataflow
from bytewax.errors import BytewaxRuntimeError
from bytewax.recovery import RecoveryConfig, init_db_dir
from bytewax.testing import cluster_main, run_main

from chainwax.connectors import (
    BadRecord,
    ItemsSource,
    JsonLinesSink,
    ListSink,
    RecordedSource,
    RecordingSource,
    SinkError,
    StopSwitch,
)
from chainwax.router.recording import SqliteRecording

NO_TIME = timedelta(0)


def build(source, sink, step=lambda record: record.value):
    flow = Dataflow("flow")
    records = op.input("in", flow, source)
    op.output("out", op.map("pair", records, lambda record: ("", step(record))), sink)
    return flow


@pytest.fixture
def recovery(tmp_path):
    folder = tmp_path / "recovery"
    folder.mkdir()
    init_db_dir(folder, 1)
    return RecoveryConfig(str(folder))


def write_rows(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=70)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".db":
        recording = SqliteRecording(path)
        recording.open_run("first", "flow", {})
        recording.items("in", [(f"in:{row['n']}", "k", None, row) for row in rows])
        recording.close()
    else:
        path.write_text(text)


class Crash:
    """Raises at certain numbers, once each."""

    def __init__(self, *at):
        self.at = set(at)

    def __call__(self, record):
        if record.value["n"] in self.at:
            self.at.remove(record.value["n"])
            raise RuntimeError("crash")
        return record.value


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "in.parquet", "run.db"])
@pytest.mark.parametrize("epoch", [NO_TIME, timedelta(seconds=10)])
def test_output_is_exact_through_crashes(tmp_path, recovery, name, epoch):
    rows = [{"n": number, "text": "\xe9" * (number % 7)} for number in range(300)]
    write_rows(tmp_path / name, rows)
    out = tmp_path / "new" / "folder" / "out.jsonl"
    kind = RecordingSource if name == "run.db" else RecordedSource
    crash = Crash(0, 41, 42, 155, 299)
    for attempt in range(6):
        # All is built anew, as in a new process.
        flow = build(kind(tmp_path / name, batch_size=7), JsonLinesSink(out), crash)
        if attempt < 5:
            with pytest.raises(BytewaxRuntimeError):
                run_main(flow, epoch_interval=epoch, recovery_config=recovery)
        else:
            run_main(flow, epoch_interval=epoch, recovery_config=recovery)
    assert not crash.at
    assert [json.loads(line) for line in out.read_text("utf-8").splitlines()] == rows


def test_what_the_crash_had_written_past_the_snapshot_is_cut(tmp_path, recovery):
    rows = [{"n": number} for number in range(100)]
    write_rows(tmp_path / "in.jsonl", rows)
    out = tmp_path / "out.jsonl"
    crash = Crash(60)
    flow = build(RecordedSource(tmp_path / "in.jsonl", batch_size=1), JsonLinesSink(out), crash)
    long = timedelta(seconds=10)
    with pytest.raises(BytewaxRuntimeError):
        run_main(flow, epoch_interval=long, recovery_config=recovery)
    # The first epoch never closed: what it wrote is there, and is written again.
    assert len(out.read_text().splitlines()) == 60
    run_main(flow, epoch_interval=long, recovery_config=recovery)
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows


def test_a_list_is_exact_through_a_crash(recovery):
    rows = [{"n": number} for number in range(50)]
    out = []
    crash = Crash(33)
    flow = build(ItemsSource(rows, batch_size=4), ListSink(out), crash)
    with pytest.raises(BytewaxRuntimeError):
        run_main(flow, epoch_interval=NO_TIME, recovery_config=recovery)
    assert 0 < len(out) < 50
    run_main(flow, epoch_interval=NO_TIME, recovery_config=recovery)
    assert out == rows


@pytest.mark.parametrize("speed", ["max", "1x"])
def test_stop_drains_and_a_resume_goes_on(tmp_path, recovery, speed):
    # With 1x the file would take 1,000 s: the switch must be seen while waiting.
    rows = [{"n": number, "time": 1000 if number < 100 else 2000} for number in range(200)]
    write_rows(tmp_path / "in.jsonl", rows)
    stop = StopSwitch()

    def step(record):
        if record.value["n"] == 57 and speed == "max":
            stop.set()
        return record.value

    if speed == "1x":
        threading.Timer(0.3, stop.set).start()
    out = []
    flow = build(
        RecordedSource(tmp_path / "in.jsonl", batch_size=10, speed=speed, stop=stop), ListSink(out), step
    )
    started = time.monotonic()
    run_main(flow, epoch_interval=timedelta(seconds=10), recovery_config=recovery)
    assert time.monotonic() - started < 5
    assert out == rows[: 60 if speed == "max" else 100]
    resumed = build(RecordedSource(tmp_path / "in.jsonl"), ListSink(out))
    run_main(resumed, recovery_config=recovery)
    assert out == rows


def test_files_are_spread_over_workers(tmp_path):
    for part in range(3):
        write_rows(tmp_path / f"{part}.jsonl", [{"n": part * 100 + number} for number in range(100)])
    out = tmp_path / "out.jsonl"
    threads = set()

    def step(record):
        threads.add(threading.get_ident())
        return record.value

    flow = build(RecordedSource(tmp_path, batch_size=5), JsonLinesSink(out), step)
    cluster_main(flow, [], 0, worker_count_per_proc=2)
    assert sorted(json.loads(line)["n"] for line in out.read_text().splitlines()) == list(range(300))
    assert len(threads) == 2


def test_bad_lines_travel_with_the_good(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"n": 1}\n{"n": \n\n\xff\xfe\n{"n": 2}\n')
    out = []
    run_main(build(RecordedSource(tmp_path / "in.jsonl"), ListSink(out), lambda record: record))
    assert [type(record) is BadRecord for record in out] == [False, True, True, False]
    assert out[1].raw == '{"n": \n'


def test_a_new_run_begins_the_output_anew(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("old\n" * 100)
    run_main(build(ItemsSource([1, 2]), JsonLinesSink(out)))
    assert out.read_text() == "1\n2\n"


def test_an_output_that_lost_what_was_written_is_refused(tmp_path, recovery):
    out = tmp_path / "out.jsonl"
    flow = build(ItemsSource([1, 2]), JsonLinesSink(out))
    run_main(flow, recovery_config=recovery)
    out.write_text("1")
    with pytest.raises(BytewaxRuntimeError) as caught:
        run_main(flow, recovery_config=recovery)
    assert "out.jsonl has 1 bytes, but 4 were written" in str(root(caught.value))
    assert out.read_text() == "1"


def test_a_full_disk_ends_the_run_with_the_name_of_the_file():
    flow = build(ItemsSource([1, 2]), JsonLinesSink("/dev/full"))
    with pytest.raises((BytewaxRuntimeError, SinkError)) as caught:
        run_main(flow)
    error = root(caught.value)
    assert isinstance(error, SinkError)
    assert str(error) == "/dev/full cannot be written: No space left on device"


def root(error):
    while error.__cause__ is not None and not isinstance(error, SinkError):
        error = error.__cause__
    return error
