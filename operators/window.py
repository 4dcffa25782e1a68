"""Windows in time on Bytewax's own windowing: tumbling, sliding, session; by event or system time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import bytewax.operators as op
import bytewax.operators.windowing as bw
from bytewax.dataflow import Stream, operator

from chainwax.operators.item import Batch, FailedItem, Item
from chainwax.router.errors import ConfigError

__all__ = ["Session", "Sliding", "Tumbling", "WindowOut", "Windows", "window"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LONGEST = 100 * 365 * 86_400.0


def _check_seconds(what: str, seconds: float) -> None:
    if not isinstance(seconds, int | float) or not 1e-6 <= seconds <= _LONGEST:
        raise ConfigError(f"{what} must be seconds between a microsecond and 100 years, not {seconds!r}")


@dataclass(frozen=True, slots=True)
class Tumbling:
    """Windows of a fixed length, one after the other, aligned to 1970.

    >>> Tumbling(10)
    Tumbling(seconds=10)
    """

    seconds: float

    def __post_init__(self) -> None:
        _check_seconds("the length of a tumbling window", self.seconds)


@dataclass(frozen=True, slots=True)
class Sliding:
    """Windows of a fixed length of which a new one starts each ``every`` seconds: an item is in several."""

    seconds: float
    every: float

    def __post_init__(self) -> None:
        _check_seconds("the length of a sliding window", self.seconds)
        _check_seconds("the step of a sliding window", self.every)
        if self.every > self.seconds:
            raise ConfigError(
                f"a sliding window of {self.seconds} s that starts every {self.every} s leaves gaps in which "
                f"items are lost: 'every' must be at most 'seconds'"
            )


@dataclass(frozen=True, slots=True)
class Session:
    """Windows that end when nothing came for ``gap`` seconds."""

    gap: float

    def __post_init__(self) -> None:
        _check_seconds("the gap of a session", self.gap)


Windows = Tumbling | Sliding | Session


@dataclass(frozen=True)
class WindowOut:
    """The streams of :func:`window`."""

    oks: Stream[Batch]
    """Closed windows, their items in order of time."""
    late: Stream[Item]
    """Items whose windows were closed when they came, each once."""
    errs: Stream[FailedItem]
    """Items without a time that can be used."""


@operator
def window(
    step_id: str,
    up: Stream[Item],
    windower: Windows,
    *,
    by: Literal["system", "event"] = "system",
    wait_seconds: float = 0.0,
    live: bool = True,
) -> WindowOut:
    """Put items together by time, for each key (items without a key are together).

    ``by="event"`` goes by ``Item.time`` and waits ``wait_seconds`` for those out of order. Time goes on
    with the items of the key and, where the stream is ``live``, with the clock when none come. With
    ``live=False`` (a recorded stream) the items alone move the time, so that the windows are the same
    at any speed of the replay. For each key that was seen, a small state is kept: it tells what is late.

    ``Batch.window_id`` is the step, the key and a number that is the same in each run: for tumbling and
    sliding windows the count of windows since 1970, for sessions the count of sessions of the key. At
    the end of the stream all windows close.
    """
    step_id = step_id.rpartition(".")[2]  # Bytewax puts the flow's name before it
    if by not in ("system", "event"):
        raise ConfigError(f"step '{step_id}': a window goes by 'system' or 'event', not by {by!r}")
    if not (isinstance(wait_seconds, int | float) and 0 <= wait_seconds <= _LONGEST):
        raise ConfigError(f"step '{step_id}': wait_seconds must be 0 or more, not {wait_seconds!r}")
    event = by == "event"
    wait = timedelta(seconds=wait_seconds)
    clock = _EventClock(wait, live) if event else _SystemClock()
    shape = _Shape(windower, keep=event)

    # One predicate decides, so that an item that Bytewax's arithmetic could not hold never reaches it.
    room = 2 * (shape.span + wait)
    timed = op.branch("timed", up, lambda item: not event or _moment(item, room) is not None)
    errs = op.flat_map_batch("untimed", timed.falses, lambda items: [_untimed(step_id, i) for i in items])
    keyed = op.flat_map_batch("key", timed.trues, lambda items: [(item.key or "_", item) for item in items])
    out = bw.window("window", keyed, clock, shape, _Collect)
    bounds = _bounds(windower, event)
    oks = op.flat_map_batch(
        "batch",
        out.down,
        lambda closed: [_batch(step_id, key, number, items, bounds) for key, (number, items) in closed],
    )
    late = op.flat_map_batch("late", out.late, lambda events: [item for _, (_, item) in events])
    return WindowOut(oks, late, errs)


def _batch(step_id: str, key: str, number: int, items: list[Item], bounds: _Bounds) -> Batch:
    return Batch(items, f"{step_id}/{key}/{number}", items[0].key, *bounds(number, items))


_Bounds = Callable[[int, list[Item]], tuple[float | None, float | None]]


def _bounds(windower: Windows, event: bool) -> _Bounds:
    """What gives start and end of a window, in seconds since 1970."""
    if isinstance(windower, Session):
        return lambda _, items: (items[0].time, items[-1].time) if event else (None, None)
    every = windower.every if isinstance(windower, Sliding) else windower.seconds
    seconds = windower.seconds
    return lambda number, _: (number * every, number * every + seconds)


def _moment(item: Item, room: timedelta) -> datetime | None:
    """The item's time, or None where it has none or windows around it could not be reckoned."""
    time = item.time
    if not isinstance(time, int | float) or not math.isfinite(time):
        return None
    try:
        moment = datetime.fromtimestamp(time, UTC)
        _ = moment - room, moment + room
    except (OverflowError, ValueError, OSError):
        return None
    return moment


def _untimed(step_id: str, item: Item) -> FailedItem:
    what = "has no event time" if item.time is None else f"has the event time {str(item.time)[:40]!r}"
    return FailedItem(
        item, step_id, "NoEventTime", f"the item {what}; a window by event needs seconds since 1970"
    )


class _Collect(bw.WindowLogic[Item, list[Item], list[Item]]):
    """Collects a window's items. Bytewax's own deep-copies all of them at each epoch."""

    def __init__(self, resumed: list[Item] | None) -> None:
        self._items = list(resumed or ())

    def on_value(self, value: Item) -> Iterable[list[Item]]:
        self._items.append(value)
        return ()

    def on_merge(self, original: _Collect) -> Iterable[list[Item]]:
        self._items += original._items
        return ()

    def on_close(self) -> Iterable[list[Item]]:
        return (self._items,)

    def snapshot(self) -> list[Item]:
        return list(self._items)


class _Shape(bw.Windower[Any]):
    """Bytewax's windower for one of ours."""

    def __init__(self, windower: Windows, *, keep: bool) -> None:
        self._keep = keep
        self._inner: bw.Windower[Any]
        match windower:
            case Tumbling(seconds):
                self.span = timedelta(seconds=seconds)
                self._inner = bw.TumblingWindower(self.span, _EPOCH)
            case Sliding(seconds, every):
                self.span = timedelta(seconds=seconds)
                self._inner = bw.SlidingWindower(self.span, timedelta(seconds=every), _EPOCH)
            case Session(gap):
                self.span = timedelta(seconds=gap)
                self._inner = bw.SessionWindower(self.span)
            case _:
                raise ConfigError(f"a window is Tumbling, Sliding or Session, not {windower!r}")

    def build(self, resume_state: Any) -> bw.WindowerLogic[Any]:
        return _ShapeLogic(self._inner.build(resume_state), self._keep)


class _ShapeLogic(bw.WindowerLogic[Any]):
    """Bytewax's own logic, changed in two points.

    A key without an open window is not forgotten when ``keep`` is set: with it Bytewax would forget how
    late it is, and open a closed window again. And an item is late once, not once for each window that
    it would have been in.
    """

    def __init__(self, inner: bw.WindowerLogic[Any], keep: bool) -> None:
        self._inner = inner
        self._keep = keep

    def open_for(self, timestamp: datetime) -> Iterable[int]:
        return self._inner.open_for(timestamp)

    def late_for(self, timestamp: datetime) -> Iterable[int]:
        return list(self._inner.late_for(timestamp))[-1:]

    def merged(self) -> Iterable[tuple[int, int]]:
        return self._inner.merged()

    def close_for(self, watermark: datetime) -> Iterable[tuple[int, bw.WindowMetadata]]:
        return self._inner.close_for(watermark)

    def notify_at(self) -> datetime | None:
        return self._inner.notify_at()

    def is_empty(self) -> bool:
        return not self._keep and self._inner.is_empty()

    def snapshot(self) -> Any:
        return self._inner.snapshot()


class _SystemClock(bw.Clock[Item, datetime]):
    """The system's time, which here never goes back: Bytewax's own ends the flow when it does."""

    def build(self, resume_state: datetime | None) -> _SystemTime:
        return _SystemTime(resume_state)


class _SystemTime(bw.ClockLogic[Item, datetime]):
    def __init__(self, resumed: datetime | None) -> None:
        self._now = resumed or datetime.now(UTC)
        self.before_batch()

    def before_batch(self) -> None:
        self._now = max(self._now, datetime.now(UTC))

    def on_item(self, value: Item) -> tuple[datetime, datetime]:
        return self._now, self._now

    def on_notify(self) -> datetime:
        self.before_batch()
        return self._now

    def on_eof(self) -> datetime:
        return bw.UTC_MAX

    def to_system_utc(self, timestamp: datetime) -> datetime | None:
        return timestamp

    def snapshot(self) -> datetime:
        return self._now


@dataclass(frozen=True)
class _EventClock(bw.Clock[Item, datetime]):
    """The items' own time.

    Bytewax's EventClock has the same meaning but asks to be woken at the *event's* time: with events of
    the past it takes a whole core while it waits. And after a restart it counts the time that the flow
    was down, so that all that waited in the meantime would be late.
    """

    wait: timedelta
    live: bool

    def build(self, resume_state: datetime | None) -> _EventTime:
        return _EventTime(self.wait, self.live, resume_state)


class _EventTime(bw.ClockLogic[Item, datetime]):
    def __init__(self, wait: timedelta, live: bool, resumed: datetime | None) -> None:
        self._wait = wait
        self._live = live
        self._base = resumed or bw.UTC_MIN
        """The watermark when it was last moved by an item, which was at ``_seen``."""
        self._now = self._seen = datetime.now(UTC)

    def before_batch(self) -> None:
        self._now = max(self._now, datetime.now(UTC))

    def _watermark(self) -> datetime:
        return self._base + (self._now - self._seen) if self._live else self._base

    def on_item(self, value: Item) -> tuple[datetime, datetime]:
        # The predicate before this step let only times through that datetime can hold.
        moment = datetime.fromtimestamp(value.time or 0.0, UTC)
        watermark = self._watermark()
        if moment - self._wait > watermark:
            self._base = watermark = moment - self._wait
            self._seen = self._now
        return moment, watermark

    def on_notify(self) -> datetime:
        self.before_batch()
        return self._watermark()

    def on_eof(self) -> datetime:
        return bw.UTC_MAX

    def to_system_utc(self, timestamp: datetime) -> datetime | None:
        if not self._live:
            return None
        try:
            return self._seen + (timestamp - self._base)
        except OverflowError:
            return None

    def snapshot(self) -> datetime:
        return self._watermark()
