"""Replays at the pace of the records' own time stamps."""

import json
import time
from datetime import UTC, datetime
from itertools import pairwise

import bytewax.operators as op
import pytest
from bytewax.dataflow import Dataflow
from bytewax.testing import run_main

from chainwax.connectors import ItemsSource, ListSink, RecordedSource, parse_speed
from chainwax.router.errors import ConfigError


class FakeClock:
    def __init__(self, now=5000.0):
        self.now = now

    def time(self):
        return self.now

    def monotonic(self):
        return self.now

    async def sleep(self, seconds):
        self.now += seconds


def at(*times):
    return [{"id": str(number), "time": when} for number, when in enumerate(times)]


def keys(batch):
    return "".join(record.key for record in batch)


def start(source, part="items"):
    return source.build_part("in", part, None)


def test_records_come_when_they_are_due():
    clock = FakeClock()
    partition = start(ItemsSource(at(100, 110, 110, 130), speed="10x", clock=clock))
    assert partition.next_awake() is None
    assert keys(partition.next_batch()) == "0"
    clock.now += 0.99
    assert partition.next_awake() is not None
    assert keys(partition.next_batch()) == ""
    clock.now += 0.01
    assert partition.next_awake() is None
    assert keys(partition.next_batch()) == "12"
    clock.now += 1.99
    assert keys(partition.next_batch()) == ""
    clock.now += 0.02
    assert keys(partition.next_batch()) == "3"
    with pytest.raises(StopIteration):
        partition.next_batch()


def test_a_late_reader_catches_up_in_batches():
    clock = FakeClock()
    partition = start(ItemsSource(at(0, 1, 2, 3, 4, 50), speed="1x", clock=clock, batch_size=2))
    clock.now += 10
    assert [keys(partition.next_batch()) for _ in range(4)] == ["01", "23", "4", ""]


def test_records_without_a_time_and_from_the_past_come_at_once():
    clock = FakeClock()
    items = [
        {"id": "0"},
        {"id": "1", "time": 100},
        {"id": "2"},
        {"id": "3", "time": 7},
        {"id": "4", "time": 101},
    ]
    partition = start(ItemsSource(items, speed=1, clock=clock))
    assert keys(partition.next_batch()) == "0123"
    clock.now += 1
    assert keys(partition.next_batch()) == "4"


def test_a_snapshot_holds_what_was_emitted_not_what_was_read_ahead():
    clock = FakeClock()
    source = ItemsSource(at(0, 10, 20), speed="1x", clock=clock)
    partition = start(source)
    assert keys(partition.next_batch()) == "0"
    resumed = source.build_part("in", "items", partition.snapshot())
    # A resumed stream begins at once, whatever time has passed.
    assert keys(resumed.next_batch()) == "1"
    clock.now += 10
    assert keys(resumed.next_batch()) == "2"


def test_files_keep_to_one_time_line(tmp_path):
    for name, first in (("a_later", 160), ("b_sooner", 100), ("c_last", 500)):
        text = "".join(json.dumps(item) + "\n" for item in at(first, first + 30))
        (tmp_path / f"{name}.jsonl").write_text(text)
    clock = FakeClock()
    source = RecordedSource(tmp_path, speed="1x", clock=clock)
    for _run in range(2):
        later, sooner, last = (start(source, part) for part in source.list_parts())
        assert (keys(later.next_batch()), keys(sooner.next_batch())) == ("", "0")
        clock.now += 30
        assert (keys(later.next_batch()), keys(sooner.next_batch())) == ("", "1")
        clock.now += 30
        assert keys(later.next_batch()) == "0"
        clock.now += 30
        assert keys(later.next_batch()) == "1"
        assert keys(last.next_batch()) == ""
        last.close()
        later.close()
        sooner.close()


def test_waiting_is_cut_short_so_that_a_stop_is_seen():
    partition = start(ItemsSource(at(0, 1_000_000), speed="1x"))
    partition.next_batch()
    awake = partition.next_awake()
    assert 0 < (awake - datetime.now(UTC)).total_seconds() <= 0.1


def test_under_bytewax():
    # 30 s of stream at 100x: 0.3 s.
    arrived = []

    def stamp(record):
        arrived.append(time.monotonic())
        return ("", record.key)

    out = []
    flow = Dataflow("flow")
    records = op.input("in", flow, ItemsSource(at(0, 10, 10, 30), speed="100x"))
    op.output("out", op.map("stamp", records, stamp), ListSink(out))
    run_main(flow)
    assert out == ["0", "1", "2", "3"]
    gaps = [later - earlier for earlier, later in pairwise(arrived)]
    # Never early; late only as far as a busy machine makes it.
    assert sum(gaps) >= 0.25
    assert gaps[2] > 0.1
    assert arrived[-1] - arrived[0] < 3


@pytest.mark.parametrize(
    ("speed", "factor"),
    [("max", None), ("1x", 1), ("10x", 10), ("2.5", 2.5), (3, 3), ("0.5x", 0.5), ("1e3x", 1000)],
)
def test_speeds(speed, factor):
    assert parse_speed(speed) == factor


@pytest.mark.parametrize("speed", ["", "x", "fast", "0x", "-1x", "nan", "inf", "10xx", 0, -2.0, float("nan")])
def test_what_is_no_speed(speed):
    with pytest.raises(ConfigError, match="is not a pace: say max, 1x or another factor"):
        parse_speed(speed)
