"""Running a flow from the command line: what it is bound to, how it stops, what it leaves behind."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from bytewax.dataflow import Dataflow
from bytewax.errors import BytewaxRuntimeError
from bytewax.inputs import Source
from bytewax.outputs import Sink
from bytewax.recovery import RecoveryConfig
from bytewax.run import cli_main
from rich.console import Console

from chainwax.connectors import InProcessBus, StopSwitch, open_sink, open_source, parse_uri
from chainwax.connectors.recorded import PacedSource
from chainwax.flows.graph import Flow
from chainwax.flows.load import user_frame
from chainwax.flows.nodes import LLMNode
from chainwax.flows.panics import without_panics
from chainwax.flows.preflight import check_nodes
from chainwax.flows.progress import Progress
from chainwax.flows.report import RunReport, make_report
from chainwax.flows.state import RunState
from chainwax.flows.tally import Tally, counted_letters, counted_source
from chainwax.router import ChainwaxError, ConfigError, LLMManager, RecordingError, Settings
from chainwax.router.backends import Backend
from chainwax.router.errors import UnknownName
from chainwax.router.recording import RecordingReader
from chainwax.router.recording.totals import Letters, items_of, letters_of, totals

__all__ = ["Job", "Outcome", "run_job"]


@dataclass(slots=True, kw_only=True)
class Job:
    """What is to be run."""

    flow: Flow
    settings: Settings
    sources: Mapping[str, str | Source[Any]]
    """A URI, or the source itself, by name."""
    sinks: Mapping[str, str | Sink[Any]]
    """A URI, or the sink itself, by name."""
    stop: StopSwitch = field(default_factory=StopSwitch)
    """Also given to the sources that are given as such."""
    dead_letters: str | None = None
    state: Path | None = None
    fresh: bool = False
    run_id: str | None = None
    workers: int = 1
    speed: str | None = None
    """For sources whose URI does not say."""
    backends: Mapping[str, Backend] = field(default_factory=dict)
    """In place of the configured ones."""
    asks: bool = True
    """Whether models are asked, so that their keys must be there."""
    config_file: str | None = None
    """For messages."""
    debug: bool = False


@dataclass(slots=True)
class Outcome:
    """How it went."""

    report: RunReport
    exit_code: int
    """0 finished, 1 failed or not recorded, 130 and 143 stopped."""
    errors: list[str] = field(default_factory=list)
    """What to tell the person besides the report, one line each."""


def run_job(job: Job, console: Console, *, live: bool) -> Outcome:
    """Run a flow to its end, or until it is stopped.

    ``console`` is standard error's; ``live`` says whether it may draw a line that changes.

    Raises :class:`ConfigError` and :class:`RecordingError` before anything has begun. What goes wrong
    later is in the outcome, whose outputs are complete as far as it says ``finished``.
    """
    sources, sinks, letters_sink = _bound(job)
    found = check_nodes(job.flow, job.settings, ask=job.asks, file=job.config_file)
    if found.every_problem:
        raise ConfigError("\n".join(found.every_problem))
    state = _state_of(job)
    with closing(state) if state is not None else nullcontext():
        tally = Tally()
        manager = LLMManager(job.settings, bus=InProcessBus(), backends=job.backends)
        try:
            _begin(job, manager, state, console)
            dataflow = job.flow.compile(
                {name: counted_source(source, tally) for name, source in sources.items()},
                sinks,
                dead_letters=counted_letters(letters_sink, tally),
                manager=manager,
                live=not all(isinstance(source, PacedSource) for source in sources.values()),
            )
        except BaseException:
            manager.close(status="failed", drain=False)
            raise
        return _run(job, manager, dataflow, tally, state, console, live)


def _run(
    job: Job,
    manager: LLMManager,
    dataflow: Dataflow,
    tally: Tally,
    state: RunState | None,
    console: Console,
    live: bool,
) -> Outcome:
    errors: list[str] = []
    failed = False
    with (
        nullcontext() if job.debug else without_panics(),
        Progress(manager, tally, console=console, live=live) as progress,
    ):
        stopping = _Stopping(job, manager, progress)
        with stopping:
            try:
                _run_bytewax(dataflow, job, state.recovery if state is not None else None)
            except Exception as error:
                failed = True
                errors.append(_explained(error, job))
            stopped_by = stopping.signal
            status = "failed" if failed else "stopped" if stopped_by else "finished"
            try:
                manager.close(status=status, drain=not failed)
            except RecordingError as error:
                errors.append(str(error))
        seconds = progress.seconds
    if state is not None:
        state.end(status)
    report = _report(job, manager, tally, status, seconds)
    if stopped_by and not failed:
        errors.append(_how_to_go_on(job))
        return Outcome(report, 128 + stopped_by, errors)
    return Outcome(report, 1 if errors else 0, errors)


def _run_bytewax(dataflow: Dataflow, job: Job, recovery: RecoveryConfig | None) -> None:
    try:
        cli_main(  # type: ignore[no-untyped-call]
            dataflow,
            workers_per_process=job.workers,
            epoch_interval=timedelta(seconds=job.settings.run.epoch_seconds),
            recovery_config=recovery,
        )
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(f"Bytewax gave up: {error}") from error


class _Stopping:
    """Ctrl-C and SIGTERM: the first lets the run drain, the second ends the process at once."""

    def __init__(self, job: Job, manager: LLMManager, progress: Progress) -> None:
        self.signal: int = 0
        self._stop = job.stop
        self._manager = manager
        self._progress = progress
        self._before: dict[int, Any] = {}
        manager.on_fatal = self._lost_rows

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._heard)

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _lost_rows(self) -> None:
        self._stop.set()
        self._progress.note("stopping: the recording cannot be written, and too much waits for it")

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal = number
            self._stop.set()
            self._progress.note("stopping: what is under way is finished first; once more to stop at once")
            return
        # Whatever was answered is in the recording already, or is on its way there.
        saved = self._manager.recording.flush(1.0)
        end = "\r\x1b[K\x1b[?25h" if sys.stderr.isatty() else ""
        words = "stopped at once; all answers are in the recording" if saved else "stopped at once"
        os.write(sys.stderr.fileno(), f"{end}{words}\n".encode())
        os._exit(128 + number)


def _bound(job: Job) -> tuple[dict[str, Source[Any]], dict[str, Sink[Any]], Sink[Any] | None]:
    add: list[str] = []
    for what, wanted, given in (
        ("source", job.flow.sources, job.sources),
        ("sink", job.flow.sinks, job.sinks),
    ):
        for name in given:
            if name not in wanted:
                raise UnknownName(f"{what} of the flow '{job.flow.id}':", name, wanted)
        add += [f"--{what} {name}={_EXAMPLE[what]}" for name in wanted if name not in given]
    if add:
        raise ConfigError(f"flow '{job.flow.id}': not all of it is bound: add {' '.join(add)}")
    _check_files(job)
    sources: dict[str, Source[Any]] = {
        name: open_source(source, name=name, stop=job.stop, speed=job.speed)
        if isinstance(source, str)
        else source
        for name, source in job.sources.items()
    }
    sinks: dict[str, Sink[Any]] = {
        name: open_sink(sink, name=name) if isinstance(sink, str) else sink
        for name, sink in job.sinks.items()
    }
    letters = open_sink(job.dead_letters, name="dead letters") if job.dead_letters else None
    return sources, sinks, letters


_EXAMPLE = {"source": "FILE.jsonl", "sink": "OUT.jsonl"}


def _check_files(job: Job) -> None:
    """A sink begins its file anew: it must be nobody else's."""
    taken: dict[Path, str] = {}
    uses = [(f"source '{name}'", uri) for name, uri in job.sources.items() if isinstance(uri, str)]
    uses += [(f"sink '{name}'", uri) for name, uri in job.sinks.items() if isinstance(uri, str)]
    if job.dead_letters:
        uses.append(("--dead-letters", job.dead_letters))
    if job.settings.run.recording is not None:
        taken[job.settings.run.recording.resolve()] = "the recording"
    for who, uri in uses:
        parts = parse_uri(uri)
        if parts.scheme != "file":
            continue
        path = Path(parts.path).resolve()
        # Two sources may read one file; a device keeps nothing that could be lost.
        if path in taken and not who.startswith("source") and not path.is_char_device():
            raise ConfigError(f"{who} ({uri}): {taken[path]} is this file already")
        taken.setdefault(path, who)


def _state_of(job: Job) -> RunState | None:
    if job.state is None:
        return None
    recording = job.settings.run.recording
    bound = {
        "flow": job.flow.id,
        "sources": {name: uri for name, uri in job.sources.items() if isinstance(uri, str)},
        "sinks": {name: uri for name, uri in job.sinks.items() if isinstance(uri, str)},
        "recording": None if recording is None else str(recording.resolve()),
    }
    return RunState(job.state, bound, run_id=job.run_id, fresh=job.fresh)


def _begin(job: Job, manager: LLMManager, state: RunState | None, console: Console) -> None:
    run_id = state.run_id if state is not None else job.run_id
    resumed = state is not None and state.resumed
    known = manager.begin_run(job.flow.id, run_id, resume=resumed)
    if state is not None:
        state.begin(manager.run_id)
    if resumed:
        console.print(
            f"going on with run {manager.run_id}, which was not finished", markup=False, highlight=False
        )
    elif known:
        console.print(
            f"run {manager.run_id} is in the recording already: what it answered is not asked again",
            markup=False,
            highlight=False,
        )
    for spec in job.flow.specs().values():
        manager.register(spec)


def _report(job: Job, manager: LLMManager, tally: Tally, status: str, seconds: float) -> RunReport:
    kinds = {node.id: node.kind for node in job.flow.nodes.values() if isinstance(node, LLMNode)}
    first = tally.first or {}
    letters = Letters(tally.letters, *(str(first.get(name, "")) for name in ("node", "error", "message")))
    items = tally.items
    of_nodes = None
    path = job.settings.run.recording
    if path is not None:
        try:
            with closing(RecordingReader(path)) as reader:
                of_nodes = totals(reader, manager.run_id)
                letters = max(letters, letters_of(reader, manager.run_id), key=lambda found: found.count)
                items = max(items, items_of(reader, manager.run_id))
        except RecordingError:
            of_nodes = None  # it was told why when it was closed
    return make_report(
        manager.snapshot(),
        kinds,
        flow=job.flow.id,
        status=status,
        seconds=seconds,
        items=items,
        letters=letters,
        totals=of_nodes,
        recording=None if path is None else str(path),
    )


def _how_to_go_on(job: Job) -> str:
    if job.state is not None:
        return f"stopped; the same command goes on where it stopped (--state {job.state})"
    return "stopped; with --state DIR the same command would go on where it stopped"


def _explained(error: Exception, job: Job) -> str:
    """The one line that says what ended the flow; everything with ``--debug``."""
    step = ""
    what: BaseException = error
    # Bytewax wraps what a step raises, once for each of its own layers.
    while isinstance(what, BytewaxRuntimeError):
        found = re.search(r'step "([^"]+)"', str(what))
        if found:  # flow.node.operator, flow.node:helper
            step = re.split(r"[.:]", found[1].partition(".")[2])[0] or step
        if what.__cause__ is None:
            break
        what = what.__cause__
    if job.debug:
        traceback.print_exception(error)
    place = user_frame(what)
    where = f" at node '{step}'" if step in job.flow.nodes else ""
    text = str(what) if isinstance(what, ChainwaxError) else f"{type(what).__name__}: {what}"
    at = f" ({place[0]}:{place[1]})" if place else ""
    hint = ""
    if job.state is not None and "pickle" in text:
        hint = "; with --state all that a node holds between items is saved, and has to be picklable"
    return f"flow '{job.flow.id}' failed{where}: {text}{at}{hint}"
