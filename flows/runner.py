"""Running a flow from the command line: how it runs, how it stops, what it leaves behind."""

from __future__ import annotations

import os
import re
import signal
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from bytewax.dataflow import Dataflow
from bytewax.errors import BytewaxRuntimeError
from bytewax.recovery import RecoveryConfig
from bytewax.run import cli_main
from rich.console import Console

from chainwax.connectors import open_bus, open_redis
from chainwax.flows.job import Bound, Job, checked, state_of
from chainwax.flows.load import user_frame
from chainwax.flows.panics import without_panics
from chainwax.flows.progress import Progress, counted, money
from chainwax.flows.relay import RelayBus, RelayLender
from chainwax.flows.report import RunReport, make_report
from chainwax.flows.serve import serving
from chainwax.flows.state import RunState, recovery_from
from chainwax.flows.tally import Tally, counted_letters, counted_source
from chainwax.flows.watched import watch
from chainwax.router import ChainwaxError, LLMManager, RecordingError
from chainwax.router.background import Background
from chainwax.router.feedback import FeedbackBus
from chainwax.router.recording import RecordingReader
from chainwax.router.recording.totals import Letters, items_of, letters_of, totals
from chainwax.router.share import ALL, Lender, ResponseStore

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Ended", "Job", "Outcome", "run_job", "run_member"]


@dataclass(slots=True)
class Outcome:
    """How it went."""

    report: RunReport
    exit_code: int
    """0 finished, 1 failed or not recorded, 3 stopped by its budget, 130 and 143 by a signal."""
    errors: list[str] = field(default_factory=list)
    """What to tell the person besides the report, one line each."""


@dataclass(slots=True)
class Ended:
    """How the flow itself ended."""

    failed: bool = False
    gave_up: bool = False
    """Whether Bytewax failed and not the flow: a process beside this one is gone."""
    stopped_by: int = 0
    """The signal that stopped it."""
    spent: float | None = None
    """Dollars, where its budget stopped it."""
    errors: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """As the recording says it."""
        if self.failed:
            return "failed"
        return "stopped" if self.stopped_by or self.spent is not None else "finished"


_SPENT = 3
"""The exit code of a run that its budget stopped."""


class Teller(Protocol):
    """Who tells the person what a run does; called from signal handlers too."""

    def note(self, text: str) -> None:
        """Something that happens now."""
        ...

    def last_words(self, text: str) -> None:
        """The process ends with this line."""
        ...


def run_job(job: Job, console: Console, *, live: bool) -> Outcome:
    """Run a flow to its end, or until it is stopped.

    ``console`` is standard error's; ``live`` says whether it may draw a line that changes.

    Raises :class:`ConfigError` and :class:`RecordingError` before anything has begun. What goes wrong
    later is in the outcome, whose outputs are complete as far as it says ``finished``.
    """
    bound = checked(job)
    raised = _watched(bound)
    state = state_of(job)
    with (
        closing(state) if state is not None else nullcontext(),
        serving(job.serve, job.flow.id, console) as status,
    ):
        if state is not None and state.finished:
            return already_finished(job, str(state.run_id), console)
        tally = Tally()
        manager, dataflow = _compiled(job, bound, tally, lambda manager: _begin(job, manager, state, console))
        status.follow(
            lambda: "draining" if job.stop.is_set() else "running",
            lambda: (counted(manager, tally), manager.snapshot()),
        )
        with (
            nullcontext() if job.debug else without_panics(),
            Progress(lambda: counted(manager, tally), console=console, live=live) as progress,
        ):
            recovery = None if state is None else state.recovery
            ended = _drive(job, manager, dataflow, recovery, progress, raised)
            seconds = progress.seconds
        if state is not None:
            state.end(ended.status)
    report = report_of(job, manager.snapshot(), tally, ended.status, seconds)
    if ended.status == "stopped":
        if ended.spent is not None and job.backfill is not None:
            budget = money(job.backfill.budget or 0.0)
            ended.errors.append(
                f"stopped: its budget of {budget} is spent ({money(ended.spent)}): the same command with a "
                "larger one goes on"
            )
        else:
            ended.errors.append(how_to_go_on(job))
        return Outcome(report, 128 + ended.stopped_by if ended.stopped_by else _SPENT, ended.errors)
    return Outcome(report, 1 if ended.errors else 0, ended.errors)


def run_member(
    job: Job, ready: Callable[[LLMManager, Tally], AbstractContextManager[Teller]]
) -> tuple[Ended, Mapping[str, Any]]:
    """Run one process's part of a flow; how it ended, and what its recorders say.

    ``ready`` is called when all is prepared: entering what it gives waits until the others are ready too.
    Raises as :func:`run_job` does.
    """
    assert job.member is not None
    specs = job.flow.specs().values()
    tally = Tally()
    bound = checked(job)
    raised = _watched(bound)

    def begin(manager: LLMManager) -> None:
        # The others may have answered something already: look everything up.
        manager.begin_run(job.flow.id, job.run_id, resume=True, nodes=specs)

    manager, dataflow = _compiled(job, bound, tally, begin)
    with ready(manager, tally) as teller:
        ended = _drive(job, manager, dataflow, recovery_from(job.member.store), teller, raised)
    return ended, manager.snapshot()


class _Raised(NamedTuple):
    """What sources and sinks raised, which Bytewax may not tell of."""

    working: list[Exception]
    closing: list[Exception]


def _watched(bound: Bound) -> _Raised:
    raised = _Raised([], [])
    for what in (*bound.sources.values(), *bound.sinks.values(), bound.letters):
        if what is not None:
            watch(what, raised.working.append, raised.closing.append)
    return raised


def _compiled(
    job: Job, bound: Bound, tally: Tally, begin: Callable[[LLMManager], None]
) -> tuple[LLMManager, Dataflow]:
    share = ALL if job.member is None else job.member.share
    if job.backfill is not None:
        share = replace(share, fraction=job.backfill.share)
    bus, lender, store = _shared(job)
    manager = LLMManager(
        job.settings, bus=bus, backends=job.backends, share=share, lender=lender, store=store
    )
    manager.parts.update(job.flow.parts)
    try:
        begin(manager)
        if job.beforehand is not None:
            job.beforehand(manager)
        if job.backfill is not None:
            manager.background = Background(
                manager,
                budget=job.backfill.budget,
                spent=_paid_before(manager),
                on_spent=job.stop.set,
            )
        dataflow = job.flow.compile(
            {name: counted_source(source, tally) for name, source in bound.sources.items()},
            bound.sinks,
            dead_letters=counted_letters(bound.letters, tally),
            manager=manager,
            live=not all(getattr(source, "ends", False) for source in bound.sources.values()),
            entries=job.entries,
            workers=share.of * job.workers,
        )
    except BaseException:
        manager.close(status="failed", drain=False)
        raise
    return manager, dataflow


def _shared(job: Job) -> tuple[FeedbackBus, Lender | None, ResponseStore | None]:
    """What this process shares with others, each of it by the widest way there is."""
    settings = job.settings
    line = None if job.member is None else job.member.line
    bus: FeedbackBus
    if line is not None and settings.bus.kind == "memory":
        bus = RelayBus(line)
    else:
        bus = open_bus(settings.bus, job.flow.id)
    if settings.redis.url is not None:
        return bus, *open_redis(settings.redis)
    return bus, None if line is None else RelayLender(line), None


def _drive(
    job: Job,
    manager: LLMManager,
    dataflow: Dataflow,
    recovery: RecoveryConfig | None,
    teller: Teller,
    raised: _Raised,
) -> Ended:
    """Run the dataflow and close the manager."""
    ended = Ended()
    with _Stopping(job, manager, teller) as stopping:
        try:
            _run_bytewax(dataflow, job, recovery)
            # All epochs are over by now, and kept: to begin again would change nothing.
            ended.errors += [_explained(error, job) for error in raised.closing[:1]]
            if job.afterwards is not None:
                job.afterwards(manager)
        except Exception as error:
            ended.failed = True
            if isinstance(error, _BytewaxGaveUp) and raised.working:
                error = raised.working[0]
            ended.gave_up = isinstance(error, _BytewaxGaveUp)
            ended.errors.append(_explained(error, job))
        ended.stopped_by = stopping.signal
        if manager.background is not None and manager.background.exhausted:
            ended.spent = manager.background.spent
        try:
            # One of several processes is started again at once: what is paid for is worth waiting for.
            drain: bool | Literal["sent"] = "sent" if ended.failed and job.member else not ended.failed
            # Not all of it was read, whatever Bytewax thinks: it is to be resumed.
            ended.failed = ended.failed or stopping.fatal
            manager.close(status=ended.status, drain=drain)
        except RecordingError as error:
            ended.errors.append(str(error))
    return ended


class _BytewaxGaveUp(RuntimeError):
    """A panic of Bytewax's own, which it raises past all that catches exceptions."""


def _run_bytewax(dataflow: Dataflow, job: Job, recovery: RecoveryConfig | None) -> None:
    place = {}
    if job.member is not None:
        place = {"process_id": job.member.share.index, "addresses": list(job.member.addresses)}
    try:
        cli_main(
            dataflow,
            workers_per_process=job.workers,
            epoch_interval=timedelta(seconds=job.settings.run.epoch_seconds),
            recovery_config=recovery,
            **place,
        )
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise _BytewaxGaveUp(f"Bytewax gave up: {error}") from error


class _Stopping:
    """Ctrl-C and SIGTERM: the first lets the run drain, the second ends the process at once."""

    def __init__(self, job: Job, manager: LLMManager, teller: Teller) -> None:
        self.signal: int = 0
        self.fatal = False
        """Whether it stops because it must."""
        self._stop = job.stop
        self._manager = manager
        self._teller = teller
        self._before: dict[int, Any] = {}
        manager.on_fatal = self._cannot_go_on

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _begin(self) -> None:
        self._stop.set()
        self._manager.stop_waiting()  # a pause must not hold up the end

    def _cannot_go_on(self) -> None:
        self.fatal = True
        self._begin()
        why = self._manager.lost or "the recording cannot be written, and too much waits for it"
        self._teller.note(f"stopping: {why}")

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal = number
            self._begin()
            self._teller.note("stopping: what is under way is finished first; once more to stop at once")
            return
        # Whatever was answered is in the recording already, or is on its way there.
        saved = self._manager.recording.flush(1.0)
        self._teller.last_words(
            "stopped at once; all answers are in the recording" if saved else "stopped at once"
        )
        os._exit(128 + number)


def _begin(job: Job, manager: LLMManager, state: RunState | None, console: Console) -> None:
    run_id = state.run_id if state is not None else job.run_id
    resumed = state is not None and state.resumed
    was_finished = run_id is not None and _status(job, run_id) == "finished"
    known = manager.begin_run(job.flow.id, run_id, resume=resumed, nodes=job.flow.specs().values())
    if state is not None:
        state.begin(manager.run_id)
    say_what_is_known(manager.run_id, resumed, known, console, was_finished=was_finished)


def _status(job: Job, run: str) -> str | None:
    path = job.settings.run.recording
    if path is None or not path.exists():
        return None
    with closing(RecordingReader(path)) as reader:
        return reader.status_of(run)


def _paid_before(manager: LLMManager) -> float:
    """What earlier starts of the run cost."""
    if not isinstance(manager.recording, RecordingReader):
        return 0.0
    nodes = totals(manager.recording, manager.run_id).values()
    return sum(arm.cost_usd - arm.reused_usd for node in nodes for arm in node.arms.values())


def already_finished(job: Job, run: str, console: Console) -> Outcome:
    """A run that is to be run once and was: its report once more, and nothing is done."""
    console.print(f"run {run} is finished already: nothing is done", markup=False, highlight=False)
    said: Any = None
    if job.settings.run.recording is not None:
        with closing(RecordingReader(job.settings.run.recording)) as reader:
            said = reader.snapshot_of(run)
    snapshot = said or {"run": run, "models": {}, "interfaces": {}}
    return Outcome(report_of(job, snapshot, Tally(), "finished", 0.0), 0)


def say_what_is_known(
    run_id: str, resumed: bool, known: bool, console: Console, *, was_finished: bool = False
) -> None:
    """Tell of a run that was begun before, or that is in the recording."""
    if resumed:
        console.print(f"going on with run {run_id}, which was not finished", markup=False, highlight=False)
    elif known:
        console.print(
            f"run {run_id} is {'finished' if was_finished else 'in the recording'} already: what it answered "
            "is not asked again",
            markup=False,
            highlight=False,
        )


def report_of(job: Job, snapshot: Mapping[str, Any], tally: Tally, status: str, seconds: float) -> RunReport:
    """The report on a whole run, from its recording and what the recorders said last."""
    kinds = {spec.id: spec.kind for spec in job.flow.specs().values()}
    first = tally.first or {}
    letters = Letters(tally.letters, *(str(first.get(name, "")) for name in ("node", "error", "message")))
    items = tally.items
    of_nodes = None
    path = job.settings.run.recording
    if path is not None:
        try:
            with closing(RecordingReader(path)) as reader:
                of_nodes = totals(reader, snapshot["run"])
                letters = max(letters, letters_of(reader, snapshot["run"]), key=lambda found: found.count)
                items = max(items, items_of(reader, snapshot["run"]))
        except RecordingError:
            of_nodes = None  # it was told why when it was closed
    return make_report(
        snapshot,
        kinds,
        flow=job.flow.id,
        status=status,
        seconds=seconds,
        items=items,
        letters=letters,
        totals=of_nodes,
        recording=None if path is None else str(path),
    )


def how_to_go_on(job: Job) -> str:
    """What to do after a stop."""
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
    known = isinstance(what, ChainwaxError | _BytewaxGaveUp)
    text = str(what) if known else f"{type(what).__name__}: {what}"
    at = f" ({place[0]}:{place[1]})" if place else ""
    hint = ""
    if job.state is not None and "pickle" in text:
        hint = "; with --state all that a node holds between items is saved, and has to be picklable"
    return f"flow '{job.flow.id}' failed{where}: {text}{at}{hint}"
