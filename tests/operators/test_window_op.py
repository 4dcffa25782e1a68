from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import bytewax.operators as op
import pytest
from bytewax.dataflow import Dataflow
from bytewax.inputs import DynamicSource, StatelessSourcePartition
from bytewax.recovery import RecoveryConfig, init_db_dir
from bytewax.testing import TestingSink, TestingSource, run_main
from hypothesis import given, settings
from hypothesis import strategies as st

import chainwax.operators.window as module
from chainwax.operators.item import Batch, FailedItem, Item
from chainwax.operators.window import Session, Sliding, Tumbling, Windows, window
from chainwax.router.errors import ConfigError


@dataclass
class Outs:
    oks: list[Batch] = field(default_factory=list)
    late: list[Item] = field(default_factory=list)
    errs: list[FailedItem] = field(default_factory=list)


def dataflow(source: Any, windower: Windows, outs: Outs, **options: Any) -> Dataflow:
    flow = Dataflow("flow")
    out = window("w", op.input("in", flow, source), windower, **options)
    op.output("oks", out.oks, TestingSink(outs.oks))
    op.output("late", out.late, TestingSink(outs.late))
    op.output("errs", out.errs, TestingSink(outs.errs))
    return flow


def run(items: list[Item], windower: Windows, **options: Any) -> Outs:
    outs = Outs()
    run_main(dataflow(TestingSource(items), windower, outs, **options))
    return outs


def at(*times: Any, key: str = "a") -> list[Item]:
    return [Item(n, key=key, position=str(n), time=t) for n, t in enumerate(times)]


def seen(outs: Outs) -> list[tuple[str, list[Any]]]:
    return [(b.window_id, b.value) for b in outs.oks]


class TestShapes:
    def test_tumbling(self) -> None:
        outs = run(at(0.0, 9.9, 10.0, 25.0), Tumbling(10), by="event", live=False)
        assert seen(outs) == [("w/a/0", [0, 1]), ("w/a/1", [2]), ("w/a/2", [3])]
        assert [(b.opened, b.closed) for b in outs.oks] == [(0, 10), (10, 20), (20, 30)]
        assert [b.key for b in outs.oks] == ["a"] * 3

    def test_sliding_puts_an_item_in_each_window_that_covers_it(self) -> None:
        outs = run(at(7.0, 12.0), Sliding(10, every=5), by="event", live=False)
        assert seen(outs) == [("w/a/0", [0]), ("w/a/1", [0, 1]), ("w/a/2", [1])]
        assert [(b.opened, b.closed) for b in outs.oks] == [(0, 10), (5, 15), (10, 20)]

    def test_session_ends_at_a_gap(self) -> None:
        outs = run(at(0.0, 4.0, 20.0), Session(5), by="event", live=False)
        assert seen(outs) == [("w/a/0", [0, 1]), ("w/a/1", [2])]
        assert (outs.oks[0].opened, outs.oks[0].closed) == (0.0, 4.0)

    def test_keys_have_windows_of_their_own_and_no_key_is_one(self) -> None:
        items = [Item(0, "a", time=1.0), Item(1, "", time=2.0), Item(2, "", time=3.0)]
        outs = run(items, Tumbling(10), by="event", live=False)
        assert sorted(seen(outs)) == [("w/_/0", [1, 2]), ("w/a/0", [0])]
        assert {b.key for b in outs.oks} == {"", "a"}

    def test_before_1970(self) -> None:
        assert seen(run(at(-0.5, 0.5), Tumbling(1), by="event", live=False)) == [
            ("w/a/-1", [0]),
            ("w/a/0", [1]),
        ]

    def test_waits_for_items_out_of_order_and_sorts_them(self) -> None:
        outs = run(at(8.0, 11.0, 3.0, 30.0), Tumbling(10), by="event", wait_seconds=10, live=False)
        assert seen(outs) == [("w/a/0", [2, 0]), ("w/a/1", [1]), ("w/a/3", [3])]
        assert outs.late == []

    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.integers(0, 300), max_size=40), st.integers(0, 60))
    def test_nothing_is_lost_and_ids_depend_on_the_items_alone(self, times: list[int], wait: int) -> None:
        items = at(*map(float, times))
        first = run(items, Tumbling(10), by="event", wait_seconds=wait, live=False)
        numbers = [n for b in first.oks for n in b.value] + [i.value for i in first.late]
        assert sorted(numbers) == list(range(len(times)))
        for batch in first.oks:
            assert all(batch.window_id == f"w/a/{times[n] // 10}" for n in batch.value)
        again = run(items, Tumbling(10), by="event", wait_seconds=wait, live=False)
        assert seen(again) == seen(first)
        assert len({b.window_id for b in first.oks}) == len(first.oks)


class TestLate:
    def test_late_items_have_a_stream(self) -> None:
        outs = run(at(1.0, 15.0, 2.0), Tumbling(10), by="event", live=False)
        assert seen(outs) == [("w/a/0", [0]), ("w/a/1", [1])]
        assert [i.value for i in outs.late] == [2]

    def test_a_late_item_is_late_once_in_sliding_windows(self) -> None:
        outs = run(at(100.0, 2.0), Sliding(10, every=1), by="event", live=False)
        assert [i.value for i in outs.late] == [1]

    def test_lateness_is_remembered_when_no_window_is_open(self) -> None:
        # Bytewax forgets a key whose windows are all closed, and would open window 0 again.
        items = at(1.0, 2.0)
        outs = Outs()
        run_main(dataflow(_Paused([items[1]], [items[0]]), Tumbling(0.05), outs, by="event"))
        assert seen(outs) == [("w/a/40", [1])]
        assert [i.value for i in outs.late] == [0]


class _Paused(DynamicSource[Item]):
    """Emits a list, rests for a while, and emits another."""

    def __init__(self, *lists: list[Item], rest: float = 0.25) -> None:
        self._lists = lists
        self._rest = timedelta(seconds=rest)

    def build(self, step_id: str, worker_index: int, worker_count: int) -> _PausedPartition:
        return _PausedPartition(iter(self._lists), self._rest)


class _PausedPartition(StatelessSourcePartition[Item]):
    def __init__(self, lists: Iterator[list[Item]], rest: timedelta) -> None:
        self._lists = lists
        self._rest = rest
        self._awake: datetime | None = None

    def next_batch(self) -> list[Item]:
        batch = next(self._lists)
        self._awake = datetime.now(UTC) + self._rest
        return batch

    def next_awake(self) -> datetime | None:
        return self._awake


class TestClocks:
    def test_a_live_window_of_the_past_closes_by_the_clock_without_spinning(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        woken = 0
        notify = module._EventTime.on_notify

        def counted(self: Any) -> datetime:
            nonlocal woken
            woken += 1
            return notify(self)

        monkeypatch.setattr(module._EventTime, "on_notify", counted)
        outs = Outs()
        other = Item("after", key="b", time=5000.0)
        source = _Paused([Item("before", key="a", time=1000.0)], [other], rest=0.4)
        run_main(dataflow(source, Tumbling(0.1), outs, by="event"))
        # The first window came before the item that followed later, so the clock has closed it.
        assert [b.value for b in outs.oks] == [["before"], ["after"]]
        assert 1 <= woken < 50

    def test_a_recorded_stream_is_moved_by_its_items_alone(self) -> None:
        outs = Outs()
        source = _Paused([Item(0, "a", time=1.0)], [Item(1, "a", time=1.01)], rest=0.2)
        run_main(dataflow(source, Tumbling(0.05), outs, by="event", live=False))
        assert outs.late == []
        assert [b.value for b in outs.oks] == [[0, 1]]

    def test_system_time_may_go_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        start = datetime(2024, 1, 1, tzinfo=UTC)
        offsets = iter([0, 0, 1, -3600, -3600, *[-3600] * 100])

        class Backwards(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return start + timedelta(seconds=next(offsets))

        monkeypatch.setattr(module, "datetime", Backwards)
        outs = run(at(None, None, None), Tumbling(600))
        assert [n for b in outs.oks for n in b.value] == [0, 1, 2]

    def test_by_system_time_no_item_needs_a_time(self) -> None:
        outs = run(at(None, "nonsense", 3.0), Session(3600))
        assert seen(outs) == [("w/a/0", [0, 1, 2])]
        assert (outs.oks[0].opened, outs.oks[0].closed) == (None, None)
        assert outs.errs == []

    def test_by_system_time_windows_close_on_the_way(self) -> None:
        outs = Outs()
        source = _Paused([Item(0, "a")], [Item(1, "a")], rest=0.3)
        run_main(dataflow(source, Session(0.1), outs))
        assert seen(outs) == [("w/a/0", [0]), ("w/a/1", [1])]


class TestBadInput:
    @pytest.mark.parametrize(
        "time",
        [None, math.nan, math.inf, -math.inf, 1e30, -1e30, 253_402_300_799.0, "2024-01-01", [1], {}],
        ids=repr,
    )
    def test_an_item_without_a_usable_time_goes_to_errs(self, time: Any) -> None:
        outs = run([*at(time), Item("good", "a", time=5.0)], Tumbling(10), by="event", live=False)
        assert [b.value for b in outs.oks] == [["good"]]
        (failed,) = outs.errs
        assert failed.node == "w"
        assert failed.error == "NoEventTime"
        assert "seconds since 1970" in failed.message

    @pytest.mark.parametrize("windower", [Tumbling(10), Sliding(10, 5), Session(10)], ids=repr)
    def test_the_ends_of_time_do_not_end_the_flow(self, windower: Windows) -> None:
        outs = run(at(-62_135_596_800.0, 253_402_300_000.0, 1.0), windower, by="event", live=False)
        assert len(outs.oks) + len(outs.late) + len(outs.errs) >= 3

    @pytest.mark.parametrize("bad", [0, -1, 1e-9, math.inf, math.nan, 1e12, "10", None])
    def test_lengths_are_checked(self, bad: Any) -> None:
        for make in (Tumbling, Session, lambda s: Sliding(s, 1), lambda s: Sliding(10, s)):
            with pytest.raises(ConfigError, match=r"must be seconds between|leaves gaps"):
                make(bad)

    def test_sliding_windows_leave_no_gaps(self) -> None:
        with pytest.raises(ConfigError, match="'every' must be at most 'seconds'"):
            Sliding(5, every=10)

    def test_options_are_checked(self) -> None:
        for options, message in (
            ({"by": "evnt"}, "step 'w': a window goes by 'system' or 'event'"),
            ({"wait_seconds": -1}, "step 'w': wait_seconds must be 0 or more"),
            ({"wait_seconds": math.nan}, "step 'w': wait_seconds must be 0 or more"),
        ):
            with pytest.raises(ConfigError, match=message):
                run([], Tumbling(1), **options)
        with pytest.raises(ConfigError, match="Tumbling, Sliding or Session"):
            run([], "10s")  # type: ignore[arg-type]


def test_values_are_compared_and_shown() -> None:
    assert Tumbling(10) == Tumbling(10.0) != Tumbling(11)
    assert repr(Sliding(10, every=5)) == "Sliding(seconds=10, every=5)"
    assert len({Session(1), Session(1), Session(2)}) == 2


@pytest.mark.parametrize("cut", [1, 3, 4])
@pytest.mark.parametrize("windower", [Tumbling(10), Session(5)], ids=repr)
def test_a_restart_goes_on_where_it_was(tmp_path: Path, windower: Windows, cut: int) -> None:
    init_db_dir(tmp_path, 1)
    items: list[Any] = at(1.0, 3.0, 22.0, 23.0, 24.0, 50.0)
    unbroken = run(items, windower, by="event", live=False)
    broken = Outs()
    source = TestingSource([*items[:cut], TestingSource.ABORT(), *items[cut:]])
    flow = dataflow(source, windower, broken, by="event", live=False)
    for _ in range(2):
        run_main(flow, epoch_interval=timedelta(0), recovery_config=RecoveryConfig(tmp_path))
    assert dict(seen(broken)) == dict(seen(unbroken))


def test_a_snapshot_does_not_change_afterwards() -> None:
    logic = module._Collect(None)
    logic.on_value(Item(1))
    snapshot = logic.snapshot()
    logic.on_value(Item(2))
    assert snapshot == [Item(1)]
    resumed = module._Collect(snapshot)
    resumed.on_value(Item(3))
    assert snapshot == [Item(1)]


def test_the_time_that_a_flow_was_down_makes_nothing_late(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = module._EventClock(timedelta(0), live=True)
    before = clock.build(None)
    before.before_batch()
    before.on_item(Item(0, time=100.0))
    state = before.snapshot()

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(days=1)

    monkeypatch.setattr(module, "datetime", Tomorrow)
    after = clock.build(state)
    after.before_batch()
    moment, watermark = after.on_item(Item(1, time=101.0))
    assert moment >= watermark
