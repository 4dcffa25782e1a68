"""Recorded streams as Bytewax sources: files and lists, and what all such sources share.

All of them resume after the last record that was emitted, end early when their `StopSwitch` is set,
and are read as fast as they go or at the pace of their own time stamps.
"""

from __future__ import annotations

import glob
import math
import threading
from abc import abstractmethod
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition
from typing_extensions import override

from chainwax.connectors.readers import FORMATS, Fields, ItemsReader, Reader, State
from chainwax.connectors.record import AnyRecord, Record, StopSwitch
from chainwax.router.clock import SYSTEM_CLOCK, Clock
from chainwax.router.errors import ConfigError, nearest

__all__ = ["ItemsSource", "PacedSource", "RecordedSource", "missing", "parse_speed"]

LONGEST_NAP = 0.1
"""Seconds after which a waiting partition looks at its stop switch again."""


def parse_speed(speed: str | float) -> float | None:
    """How many times as fast as it was recorded; None for as fast as it goes.

    >>> parse_speed("max"), parse_speed("1x"), parse_speed("2.5"), parse_speed(10)
    (None, 1.0, 2.5, 10.0)

    Raises ConfigError where it is neither.
    """
    if speed == "max":
        return None
    try:
        factor = float(speed.removesuffix("x") if isinstance(speed, str) else speed)
    except ValueError:
        factor = math.nan
    if not (math.isfinite(factor) and factor > 0):
        raise ConfigError(f"speed '{speed}' is not a pace: say max, 1x or another factor above 0 such as 10x")
    return factor


class _Pace:
    """When a record is due. Shared by the partitions of a process, so that they stay in step."""

    def __init__(self, factor: float, clock: Clock) -> None:
        self._factor = factor
        self._clock = clock
        self._lock = threading.Lock()
        self._first = math.inf
        self._started = 0.0

    def begin(self, time: float | None) -> None:
        """Tell the time stamp of a partition's first record: the earliest of all is due at once."""
        if time is None:
            return
        with self._lock:
            if self._first == math.inf:
                self._started = self._clock.time()
            self._first = min(self._first, time)

    def wait(self, time: float | None) -> float:
        """Seconds until a record is due; a record without a time stamp comes with the one before it."""
        if time is None:
            return 0.0
        if self._first == math.inf:
            self.begin(time)
        return self._started + (time - self._first) / self._factor - self._clock.time()


class _Partition(StatefulSourcePartition[AnyRecord, tuple[int, State]]):
    """One reader, read in batches or, with a pace, one record ahead of what is due."""

    def __init__(
        self,
        reader: Reader,
        emitted: int,
        limit: int | None,
        batch_size: int,
        stop: StopSwitch,
        pace: _Pace | None,
    ) -> None:
        self._reader = reader
        self._emitted = emitted
        self._limit = math.inf if limit is None else limit
        self._batch_size = batch_size
        self._stop = stop
        self._pace = pace
        self._ahead: list[AnyRecord] = []
        self._state = reader.state
        if pace:
            self._ahead = reader.read(1)
            if self._ahead:
                pace.begin(_time(self._ahead[0]))

    @override
    def next_batch(self) -> list[AnyRecord]:
        room = int(min(self._batch_size, self._limit - self._emitted))
        if self._stop.is_set() or room <= 0:
            raise StopIteration
        if self._pace:
            batch = self._due(self._pace, room)
        else:
            batch = self._reader.read(room)
            self._state = self._reader.state
            if not batch:
                raise StopIteration
        self._emitted += len(batch)
        return batch

    def _due(self, pace: _Pace, room: int) -> list[AnyRecord]:
        if not self._ahead:
            raise StopIteration
        batch: list[AnyRecord] = []
        while self._ahead and len(batch) < room and pace.wait(_time(self._ahead[0])) <= 0:
            batch += self._ahead
            self._state = self._reader.state
            self._ahead = self._reader.read(1)
        return batch

    @override
    def next_awake(self) -> datetime | None:
        if not self._pace or not self._ahead:
            return None
        wait = self._pace.wait(_time(self._ahead[0]))
        if wait <= 0:
            return None
        return datetime.fromtimestamp(SYSTEM_CLOCK.time() + min(wait, LONGEST_NAP), UTC)

    @override
    def snapshot(self) -> tuple[int, State]:
        return (self._emitted, self._state)

    @override
    def close(self) -> None:
        self._reader.close()


def _time(record: AnyRecord) -> float | None:
    return record.time if isinstance(record, Record) else None


class PacedSource(FixedPartitionedSource[AnyRecord, tuple[int, State]]):
    """What all recorded sources share; a subclass says which parts there are and how each is read.

    ``speed`` is ``max``, ``1x`` or another factor; ``limit`` the first so many records of each
    part, unreadable ones counted; ``batch_size`` the most records handed on at once.
    """

    ends = True
    """What it reads was recorded and comes to an end; windows then go by the records' own time alone."""

    def __init__(
        self,
        *,
        speed: str | float = "max",
        limit: int | None = None,
        batch_size: int = 100,
        stop: StopSwitch | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        for name, value, least in (("limit", limit, 0), ("batch_size", batch_size, 1)):
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}: it must be at least {least}")
        self._factor = parse_speed(speed)
        self._clock = clock
        self._paced: dict[str, _Pace] = {}
        self._lock = threading.Lock()
        self._limit = limit
        self._batch_size = batch_size
        self._stop = stop or StopSwitch()

    @abstractmethod
    def open_part(self, part: str, state: State | None) -> Reader:
        """A reader of one part, from where ``state`` says. Raises ConfigError where it cannot."""

    @override
    def build_part(self, step_id: str, for_part: str, resume_state: tuple[int, State] | None) -> _Partition:
        emitted, state = resume_state or (0, None)
        reader = self.open_part(for_part, state)
        return _Partition(reader, emitted, self._limit, self._batch_size, self._stop, self._pace_of(for_part))

    def _pace_of(self, part: str) -> _Pace | None:
        """The pace that the parts of one run share; a part that is built again begins a new run."""
        if self._factor is None:
            return None
        with self._lock:
            if part in self._paced:
                self._paced.clear()
            pace = next(iter(self._paced.values()), None) or _Pace(self._factor, self._clock)
            self._paced[part] = pace
            return pace


class RecordedSource(PacedSource):
    """Records from a file, from all files of a folder that are recorded streams, or from a glob.

    A file is JSON lines (``.jsonl``, ``.ndjson``, also ``.gz``) or Parquet (extra ``parquet``).
    Each is a partition of its own; with a pace, the files keep to one time line.

    >>> RecordedSource("tickets.jsonl", key="customer", time="created", speed="10x")  # doctest: +SKIP

    ``key`` and ``time`` name the fields that hold a record's key and time; without them ``id`` or
    ``key``, and ``time``, ``timestamp`` or ``ts`` are taken where they are there. Positions are
    ``<file>:<line or row>``, counted from 1. Raises ConfigError where there is nothing to read.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        key: str | None = None,
        time: str | None = None,
        speed: str | float = "max",
        limit: int | None = None,
        batch_size: int = 100,
        stop: StopSwitch | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        super().__init__(speed=speed, limit=limit, batch_size=batch_size, stop=stop, clock=clock)
        self._fields = Fields(key, time)
        self._files = _find(Path(path))

    @override
    def list_parts(self) -> list[str]:
        return list(self._files)

    @override
    def open_part(self, part: str, state: State | None) -> Reader:
        path = self._files[part]
        return FORMATS[_ending(path)](path, part, self._fields, state)


class ItemsSource(PacedSource):
    """Records from a list in memory; the list must be the same on a resume.

    Values become records at ``<name>:<index>``, counted from 0; a `Record` or `BadRecord` in the
    list is handed on as it is.
    """

    def __init__(
        self,
        items: Sequence[Any],
        *,
        name: str = "items",
        key: str | None = None,
        time: str | None = None,
        speed: str | float = "max",
        limit: int | None = None,
        batch_size: int = 100,
        stop: StopSwitch | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        super().__init__(speed=speed, limit=limit, batch_size=batch_size, stop=stop, clock=clock)
        self._fields = Fields(key, time)
        self._items = items
        self._name = name

    @override
    def list_parts(self) -> list[str]:
        return [self._name]

    @override
    def open_part(self, part: str, state: State | None) -> Reader:
        return ItemsReader(self._items, part, self._fields, state)


def _ending(path: Path) -> str:
    """The ending that tells the format, longest first: ``.jsonl.gz`` before ``.gz``."""
    name = path.name.lower()
    return max((ending for ending in FORMATS if name.endswith(ending)), key=len, default="")


def _is_stream(file: Path) -> bool:
    return bool(_ending(file)) and file.is_file() and not file.name.startswith(".")


def _find(path: Path) -> dict[str, Path]:
    """The files of a path by their partition's name, in order."""
    if path.is_dir():
        found = {file.name: file for file in sorted(path.iterdir()) if _is_stream(file)}
        if not found:
            raise ConfigError(f"{path} holds no recorded stream; known endings: {', '.join(FORMATS)}")
        return found
    if not path.exists() and glob.has_magic(str(path)):
        matches = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        files = [file for file in matches if file.is_file()]
        if not files:
            raise ConfigError(f"no file matches {path}")
        # Names below the fixed part of the pattern: unlike bare names they are unique.
        fixed = next(index for index, part in enumerate(path.parts) if glob.has_magic(part))
        found = {Path(*file.parts[fixed:]).as_posix(): file for file in files}
    elif path.exists():
        found = {path.name: path}
    else:
        raise ConfigError(missing(path))
    for file in found.values():
        if not _ending(file):
            raise ConfigError(
                f"{file} is no recorded stream: ending '{file.suffix}', {nearest(file.suffix, FORMATS)}"
            )
    return found


def missing(path: Path, *, any_file: bool = False) -> str:
    """What to say of a path that does not exist: the nearest one that does."""
    folder = path.parent
    if not folder.is_dir():
        return f"{path} does not exist: there is no folder {folder}"
    names = [file.name for file in folder.iterdir() if any_file or file.is_dir() or _is_stream(file)]
    return f"{path} does not exist: {nearest(path.name, names)}"
