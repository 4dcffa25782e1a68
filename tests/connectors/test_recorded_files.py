"""Files, folders and globs: what is found, what is read, where each record stood."""

import gzip
import json
import sys
from datetime import UTC, datetime
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chainwax.connectors import BadRecord, ItemsSource, Record, RecordedSource, StopSwitch
from chainwax.connectors import readers as readers_module
from chainwax.router.errors import ConfigError


def lines(count, start=0):
    return "".join(
        json.dumps({"id": f"k{number}", "n": number}) + "\n" for number in range(start, start + count)
    )


def drain(partition, most=None):
    out = []
    try:
        while most is None or len(out) < most:
            out += partition.next_batch()
    except StopIteration:
        pass
    return out


def read(source, states=None):
    """All that a source emits, by part."""
    found = {}
    for part in source.list_parts():
        partition = source.build_part("in", part, (states or {}).get(part))
        found[part] = drain(partition)
        partition.close()
    return found


@pytest.fixture(params=["jsonl", "jsonl.gz", "parquet"])
def ten(request, tmp_path):
    path = tmp_path / f"ten.{request.param}"
    if request.param == "jsonl":
        path.write_text(lines(10))
    elif request.param == "jsonl.gz":
        path.write_bytes(gzip.compress(lines(10).encode()))
    else:
        rows = [json.loads(line) for line in lines(10).splitlines()]
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    return path


def test_reads_all(ten):
    ((part, records),) = read(RecordedSource(ten, batch_size=4)).items()
    assert part == ten.name
    assert records == [
        Record({"id": f"k{n}", "n": n}, f"k{n}", f"{ten.name}:{n + 1}", None) for n in range(10)
    ]


@pytest.mark.parametrize("taken", range(11))
@pytest.mark.parametrize("speed", ["max", "1x"])
def test_resumes_after_the_last_record(ten, taken, speed):
    source = RecordedSource(ten, batch_size=1, speed=speed)
    partition = source.build_part("in", ten.name, None)
    first = drain(partition, taken)
    state = partition.snapshot()
    partition.close()
    resumed = RecordedSource(ten, speed=speed).build_part("in", ten.name, state)
    rest = drain(resumed)
    resumed.close()
    assert [r.value["n"] for r in first + rest] == list(range(10))
    assert [r.position for r in rest] == [f"{ten.name}:{n}" for n in range(taken + 1, 11)]


def test_limit_holds_over_a_resume(ten):
    source = RecordedSource(ten, batch_size=2, limit=5)
    partition = source.build_part("in", ten.name, None)
    first = partition.next_batch()
    state = partition.snapshot()
    partition.close()
    resumed = source.build_part("in", ten.name, state)
    assert [r.value["n"] for r in first + drain(resumed)] == [0, 1, 2, 3, 4]
    resumed.close()


def test_the_stop_switch_ends_it_and_a_resume_goes_on(ten):
    stop = StopSwitch()
    partition = RecordedSource(ten, batch_size=3, stop=stop).build_part("in", ten.name, None)
    first = partition.next_batch()
    stop.set()
    with pytest.raises(StopIteration):
        partition.next_batch()
    state = partition.snapshot()
    partition.close()
    rest = read(RecordedSource(ten), {ten.name: state})[ten.name]
    assert [r.value["n"] for r in first + rest] == list(range(10))


def test_a_file_that_grew_is_read_on(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(lines(2).rstrip("\n"))
    partition = RecordedSource(path).build_part("in", "in.jsonl", None)
    assert len(drain(partition)) == 2
    state = partition.snapshot()
    partition.close()
    with path.open("a") as file:
        file.write("\n" + lines(1, start=2))
    assert [r.value["n"] for r in read(RecordedSource(path), {"in.jsonl": state})["in.jsonl"]] == [2]


@pytest.mark.parametrize("zipped", [False, True])
def test_a_file_that_shrank_is_refused(tmp_path, zipped):
    path = tmp_path / "in.jsonl"
    pack = gzip.compress if zipped else bytes
    path.write_bytes(pack(lines(5).encode()))
    source = RecordedSource(path)
    partition = source.build_part("in", "in.jsonl", None)
    drain(partition)
    state = partition.snapshot()
    partition.close()
    path.write_bytes(pack(lines(2).encode()))
    with pytest.raises(ConfigError, match=r"in\.jsonl is shorter than .* start a new run"):
        source.build_part("in", "in.jsonl", state)


def test_bad_lines_do_not_end_the_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(readers_module, "MAX_LINE", 1000)
    monkeypatch.setattr(readers_module, "READ_BYTES", 100)
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"id": 1}\n\n   \n{"id": \n"\xff"\n"' + b"x" * 5000 + b'"\n{"id": 2}\r\n' + b"y" * 1001
    )
    records = read(RecordedSource(path))["in.jsonl"]
    assert [(type(r), r.position) for r in records] == [
        (Record, "in.jsonl:1"),
        (BadRecord, "in.jsonl:4"),
        (BadRecord, "in.jsonl:5"),
        (BadRecord, "in.jsonl:6"),
        (Record, "in.jsonl:7"),
        (BadRecord, "in.jsonl:8"),
    ]
    assert records[3].error == "a line of 5003 bytes; at most 1000 are read"
    assert records[3].raw == ('"' + "x" * 999)
    assert records[5].error == "a line of 1001 bytes; at most 1000 are read"


def test_a_resume_goes_on_after_a_line_that_was_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(readers_module, "MAX_LINE", 100)
    path = tmp_path / "in.jsonl"
    path.write_text('"' + "x" * 500 + '"\n{"id": "after"}\n')
    source = RecordedSource(path, batch_size=1)
    partition = source.build_part("in", "in.jsonl", None)
    assert isinstance(partition.next_batch()[0], BadRecord)
    state = partition.snapshot()
    partition.close()
    after = Record({"id": "after"}, "after", "in.jsonl:2", None)
    assert read(source, {"in.jsonl": state}) == {"in.jsonl": [after]}


def test_a_very_long_line_takes_bounded_memory(tmp_path):
    path = tmp_path / "in.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(40):
            file.write(b"[" * (1 << 20))
        file.write(b'\n{"id": "after"}\n')
    bad, after = read(RecordedSource(path))["in.jsonl.gz"]
    assert bad.error == f"a line of {(40 << 20) + 1} bytes; at most {16 << 20} are read"
    assert len(bad.raw) == 1000
    assert after == Record({"id": "after"}, "after", "in.jsonl.gz:2", None)


def test_a_batch_of_long_lines_is_cut_short(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(f'"{"x" * (1 << 20)}"\n' * 10)
    partition = RecordedSource(path).build_part("in", "in.jsonl", None)
    assert len(partition.next_batch()) == 4
    assert len(drain(partition)) == 6
    partition.close()


def test_a_truncated_archive_is_read_as_far_as_it_goes(tmp_path):
    path = tmp_path / "in.jsonl.gz"
    whole = gzip.compress(lines(5000).encode())
    path.write_bytes(whole[: len(whole) // 2])
    partition = RecordedSource(path).build_part("in", "in.jsonl.gz", None)
    records = drain(partition)
    state = partition.snapshot()
    partition.close()
    good, bad = records[:-1], records[-1]
    assert len(good) > 1000
    assert [r.value["n"] for r in good] == list(range(len(good)))
    assert isinstance(bad, BadRecord)
    assert bad.error.startswith(f"the archive is cut off after line {len(good)}: ")
    assert bad.position == f"in.jsonl.gz:{len(good) + 1}"
    assert read(RecordedSource(path), {"in.jsonl.gz": state}) == {"in.jsonl.gz": []}


def test_a_damaged_archive_says_so(tmp_path):
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(lines(3).encode()) + b"and more")
    records = read(RecordedSource(path))["in.jsonl.gz"]
    assert [type(r) for r in records] == [Record] * 3 + [BadRecord]
    assert "the archive is damaged after line 3" in records[-1].error


def test_packing_is_told_by_the_bytes_not_the_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(lines(2).encode()))
    (tmp_path / "b.jsonl.gz").write_text(lines(3))
    (tmp_path / "empty.jsonl.gz").write_bytes(b"")
    assert {part: len(records) for part, records in read(RecordedSource(tmp_path)).items()} == {
        "a.jsonl": 2,
        "b.jsonl.gz": 3,
        "empty.jsonl.gz": 0,
    }


def test_a_folder_is_a_part_for_each_stream(tmp_path):
    for name in ("b.jsonl", "a.ndjson", "notes.txt", ".hidden.jsonl"):
        (tmp_path / name).write_text(lines(1))
    (tmp_path / "inner.jsonl").mkdir()
    source = RecordedSource(tmp_path)
    assert source.list_parts() == ["a.ndjson", "b.jsonl"]
    assert read(source)["b.jsonl"][0].position == "b.jsonl:1"


def test_a_glob_keeps_what_tells_files_apart(tmp_path):
    for day in ("mon", "tue"):
        (tmp_path / day).mkdir()
        (tmp_path / day / "in.jsonl").write_text(lines(1))
    assert RecordedSource(tmp_path / "*" / "in.jsonl").list_parts() == ["mon/in.jsonl", "tue/in.jsonl"]
    assert RecordedSource(f"{tmp_path}/**/*.jsonl").list_parts() == ["mon/in.jsonl", "tue/in.jsonl"]
    assert RecordedSource(f"{tmp_path}/mon/*").list_parts() == ["in.jsonl"]


def test_a_name_with_magic_characters_is_taken_as_it_is_where_it_exists(tmp_path):
    (tmp_path / "in[1].jsonl").write_text(lines(1))
    assert RecordedSource(tmp_path / "in[1].jsonl").list_parts() == ["in[1].jsonl"]


def test_what_cannot_be_found(tmp_path):
    (tmp_path / "tickets.jsonl").write_text(lines(1))
    (tmp_path / "notes.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"tikets\.jsonl does not exist: did you mean 'tickets\.jsonl'\?"):
        RecordedSource(tmp_path / "tikets.jsonl")
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere"):
        RecordedSource(tmp_path / "nowhere" / "in.jsonl")
    with pytest.raises(ConfigError, match=r"no file matches .*x\*"):
        RecordedSource(tmp_path / "x*")
    with pytest.raises(ConfigError, match=r"ending '\.json', did you mean '\.jsonl'\?"):
        RecordedSource(tmp_path / "notes.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty holds no recorded stream; known endings: \.jsonl"):
        RecordedSource(tmp_path / "empty")


def test_a_file_that_goes_away_before_it_is_opened(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(lines(1))
    source = RecordedSource(path)
    path.unlink()
    with pytest.raises(ConfigError, match=r"in\.jsonl cannot be read: No such file"):
        source.build_part("in", "in.jsonl", None)


@pytest.mark.parametrize("options", [{"limit": -1}, {"batch_size": 0}, {"speed": "fast"}, {"speed": 0}])
def test_bad_options(tmp_path, options):
    (tmp_path / "in.jsonl").write_text("")
    with pytest.raises(ConfigError, match=next(iter(options))):
        RecordedSource(tmp_path / "in.jsonl", **options)


def test_parquet_values(tmp_path):
    path = tmp_path / "in.parquet"
    at = datetime(2026, 3, 2, 8, 0, 20, 5, tzinfo=UTC)
    nanos = pa.array([int(at.timestamp()) * 10**9 + 5_001], pa.timestamp("ns", "UTC"))
    table = pa.table(
        {"id": [7], "time": nanos, "cost": [Decimal("1.50")], "tags": [["a", "b"]], "raw": [b"\xff"]}
    )
    pq.write_table(table, path)
    (record,) = read(RecordedSource(path))["in.parquet"]
    assert record.key == "7"
    assert record.time == at.timestamp()
    assert record.value == {"id": 7, "time": at, "cost": Decimal("1.50"), "tags": ["a", "b"], "raw": b"\xff"}


def test_parquet_without_rows(tmp_path):
    pq.write_table(pa.table({"id": pa.array([], pa.string())}), tmp_path / "in.parquet")
    assert read(RecordedSource(tmp_path / "in.parquet")) == {"in.parquet": []}


def test_what_is_no_parquet(tmp_path):
    path = tmp_path / "in.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(ConfigError, match=r"in\.parquet cannot be read as Parquet"):
        RecordedSource(path).build_part("in", "in.parquet", None)


def test_a_damaged_parquet_is_read_as_far_as_it_goes(tmp_path):
    path = tmp_path / "in.parquet"
    rows = [{"id": f"key-{number}" * 50} for number in range(4000)]
    pq.write_table(
        pa.Table.from_pylist(rows), path, row_group_size=1000, compression="zstd", use_dictionary=False
    )
    group = pq.ParquetFile(path).metadata.row_group(2).column(0)
    data = bytearray(path.read_bytes())
    start = group.data_page_offset
    data[start : start + 200] = b"\xff" * 200
    path.write_bytes(data)
    partition = RecordedSource(path).build_part("in", "in.parquet", None)
    records = drain(partition)
    state = partition.snapshot()
    partition.close()
    assert [r.value["id"] for r in records[:-1]] == [row["id"] for row in rows[:2000]]
    assert "the file is damaged after row 2000" in records[-1].error
    assert read(RecordedSource(path), {"in.parquet": state}) == {"in.parquet": []}


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "in.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'chainwax\[parquet\]'"):
        RecordedSource(tmp_path / "in.parquet").build_part("in", "in.parquet", None)


def test_a_list():
    ready = Record("ready", "k", "elsewhere:9", 1.0)
    bad = BadRecord("elsewhere:10", "?", "bad")
    source = ItemsSource([{"id": "a"}, "text", ready, bad], batch_size=3)
    assert source.list_parts() == ["items"]
    assert read(source) == {
        "items": [Record({"id": "a"}, "a", "items:0"), Record("text", "", "items:1"), ready, bad]
    }
    assert read(source, {"items": (3, (3,))}) == {"items": [bad]}
    assert read(ItemsSource([{"n": 1}], name="mine", key="n")) == {"mine": [Record({"n": 1}, "1", "mine:0")]}
