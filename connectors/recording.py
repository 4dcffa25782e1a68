"""The items of an earlier run, out of its recording, as a source."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from typing_extensions import override

from chainwax.connectors.readers import Reader, State
from chainwax.connectors.record import AnyRecord, BadRecord, Record, StopSwitch
from chainwax.connectors.recorded import PacedSource, missing
from chainwax.router.clock import SYSTEM_CLOCK, Clock
from chainwax.router.errors import ConfigError, RecordingError, UnknownName
from chainwax.router.recording import RecordedItem, RecordingReader

__all__ = ["RecordingSource"]


class _RunReader:
    """The items of one source of one run.

    Its state is (run, source, items read, whether a damaged recording has ended): run and source too,
    for ``latest`` is another run once this one is recorded.
    """

    def __init__(self, path: Path, state: State) -> None:
        self.state: State = state
        self._recording = RecordingReader(path)
        self._rows = self._from(state[2])

    def _from(self, skip: int) -> Iterator[RecordedItem]:
        run, source, *_ = self.state
        return self._recording.read_items(run, source, skip=skip)

    def read(self, count: int) -> list[AnyRecord]:
        """The next records, at most ``count``; none at the end."""
        run, source, number, ended = self.state
        out: list[AnyRecord] = []
        if ended:
            return out
        try:
            for item in islice(self._rows, count):
                out.append(_record(item))  # noqa: PERF401 - what came before an error must stay
        except (ValueError, RecursionError) as error:
            # One unreadable value ends the iterator, not the stream.
            position = f"{source}#{number + len(out) + 1}"
            out.append(BadRecord(position, "", f"run '{run}': the recorded value is malformed: {error}"))
            self._rows = self._from(number + len(out))
        except RecordingError as error:
            ended = True
            out.append(BadRecord(f"{source}#{number + len(out) + 1}", "", str(error)))
        self.state = (run, source, number + len(out), ended)
        return out

    def close(self) -> None:
        """Close the recording."""
        self._recording.close()


def _record(item: RecordedItem) -> AnyRecord:
    if item.is_repr:
        return BadRecord.of(
            item.position, str(item.value), "JSON could not hold this value when it was recorded"
        )
    return Record(item.value, item.key, item.position, item.time)


class RecordingSource(PacedSource):
    """What a source of an earlier run emitted, with the positions, keys and times of then.

    ``run`` is a run's id, or ``latest``: the newest that has items (of ``source``, where that is
    given). ``source`` may be left out where the run has one only. Raises ConfigError or
    RecordingError where there is nothing to read.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        run: str = "latest",
        source: str | None = None,
        speed: str | float = "max",
        limit: int | None = None,
        batch_size: int = 100,
        stop: StopSwitch | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        super().__init__(speed=speed, limit=limit, batch_size=batch_size, stop=stop, clock=clock)
        self._path = Path(path)
        if not self._path.exists():
            raise ConfigError(missing(self._path, any_file=True))
        reader = RecordingReader(self._path)
        try:
            self.run, self.source = _choose(reader, run, source)
        finally:
            reader.close()

    @override
    def list_parts(self) -> list[str]:
        return ["items"]

    @override
    def open_part(self, part: str, state: State | None) -> Reader:
        return _RunReader(self._path, state or (self.run, self.source, 0, False))


def _choose(reader: RecordingReader, run: str, source: str | None) -> tuple[str, str]:
    """The run and the source that are meant."""
    if run != "latest":
        reader.require_run(run)
        names = reader.sources(run)
    else:
        names = []
        for info in reversed(reader.runs()):
            names = reader.sources(info.run)
            if names and (source is None or source in names):
                run = info.run
                break
        else:
            if source is None:
                raise ConfigError(f"no run in the recording '{reader.path}' has items")
            every = {name for info in reader.runs() for name in reader.sources(info.run)}
            raise UnknownName(f"source in the recording '{reader.path}'", source, every)
    if source is not None:
        if source not in names:
            raise UnknownName(f"source of run '{run}' in '{reader.path}'", source, names)
        return run, source
    if len(names) != 1:
        known = ", ".join(names) or "none"
        raise ConfigError(
            f"run '{run}' in '{reader.path}' has {len(names)} sources ({known}): name one by source="
        )
    return run, names[0]
