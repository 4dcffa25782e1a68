"""Processes that run one flow together, and one that watches over those of them that are on this machine.

Bytewax ends all processes of a cluster when one of them dies. All are then started again, each by the one
that watches over it, and go on from the last epoch: what was answered meanwhile is not asked again, for it is
in the recording, which those of one machine share, or in Redis.
"""

from __future__ import annotations

import signal
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from rich.console import Console

from chainwax.flows.job import Job, checked, state_of
from chainwax.flows.member import Orders
from chainwax.flows.merged import merged
from chainwax.flows.place import Place
from chainwax.flows.processes import Message, Process
from chainwax.flows.progress import Counts, Progress
from chainwax.flows.relay import Relay
from chainwax.flows.runner import Outcome, already_finished, how_to_go_on, report_of, say_what_is_known
from chainwax.flows.serve import serving
from chainwax.flows.state import RunState
from chainwax.flows.tally import Tally
from chainwax.router import ConfigError, RecordingError
from chainwax.router.recording import RecordingReader, SqliteRecording
from chainwax.router.recording.totals import items_of, totals

__all__ = ["Command", "run_cluster"]

_GRACE = 10.0
"""Seconds that the others have, when one has died, to wait for what they have asked."""
_HURRY = 3.0
"""Seconds that all have when they are to stop at once."""
_STEP = 0.05
"""Seconds from one process to the next: the later ones then find the earlier ones listening."""
_STARTS = 5
"""Starts in a row that may fail without the run getting on."""
_LOOK = 1.0
"""Seconds that processes have to say what their recorders know."""
_HUNG = 120.0
"""Seconds without a word from a process, which has one thread that tells how it gets on all the time."""
_CALM = 60.0
"""Seconds after which a start is taken to have gone well, whatever came of it."""


@dataclass(frozen=True, slots=True)
class Command:
    """What the processes have to be told, because a job holds it as objects."""

    flow: str
    """As the command line names it."""
    config: Path | None
    processes: int
    place: Place | None = None
    """Where the others are on other machines: ``processes`` is 1 then."""
    legacy: bool = False
    """Whether the agents are of ChainStream's older API, whatever the configuration says."""

    @property
    def count(self) -> int:
        """Of all machines."""
        return self.processes if self.place is None else len(self.place.addresses)

    @property
    def here(self) -> Sequence[int]:
        """Which of them are on this machine."""
        return range(self.processes) if self.place is None else (self.place.index,)


def run_cluster(job: Job, command: Command, console: Console, *, live: bool) -> Outcome:
    """Run a flow in several processes, or one of those, to its end, or until it is stopped.

    Sources and sinks of the job must be URIs. For the rest as :func:`~chainwax.flows.runner.run_job`.
    """
    path = job.settings.run.recording
    option = "--processes" if command.place is None else "-i"
    if job.state is None:
        raise ConfigError(
            f"{option} needs --state DIR: when a process dies, all go on from what is kept there"
        )
    if path is None:
        raise ConfigError(
            f"{option} needs a recording, and the configuration says that there is none: it is how the "
            "processes know what was answered already"
        )
    checked(job)
    state = state_of(job, command.count, None if command.place is None else command.place.index)
    assert state is not None
    with closing(state):
        if state.finished:
            return already_finished(job, str(state.run_id), console)
        run_id = state.run_id or job.settings.run.id
        if run_id is None and command.place is not None:
            raise ConfigError("-i needs --run-id ID, the same on all machines: it is one run")
        run_id = run_id or uuid.uuid4().hex[:12]
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(SqliteRecording(path)) as recording:
            # Made here, and not by all at once; they then write down how they are configured.
            known = recording.open_run(run_id, job.flow.id, {})
            spent = recording.spent(run_id)
        say_what_is_known(run_id, state.resumed, known, console)
        if command.place is not None:
            _say_what_is_not_shared(job, console)
        state.begin(run_id)
        cluster = _Cluster(job, command, state, path, console, spent)
        with (
            serving(job.serve, job.flow.id, console) as status,
            Progress(cluster.look, console=console, live=live) as progress,
            _listening(cluster, progress),
        ):
            status.follow(cluster.standing, cluster.seen, command.processes)
            cluster.run()
            seconds = progress.seconds
        return cluster.outcome(seconds)


def _say_what_is_not_shared(job: Job, console: Console) -> None:
    settings = job.settings
    for shared, what in (
        (settings.redis.url is not None, "[redis]: limits and budgets are split evenly, and a machine "
         "asks again what only another one was answered"),
        (settings.bus.kind == "kafka", '[bus] kind = "kafka": the routers of each machine learn alone'),
    ):  # fmt: skip
        if not shared:
            console.print(f"without {what}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _listening(cluster: _Cluster, progress: Progress) -> Iterator[None]:
    """Ctrl-C and SIGTERM: the first lets all drain, the second ends them at once."""

    def heard(number: int, frame: FrameType | None) -> None:
        if not cluster.heard:
            progress.note("stopping: what is under way is finished first; once more to stop at once")
        cluster.stop(number)

    before = {number: signal.signal(number, heard) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Cluster:
    """One run: started, and started again, until it is over."""

    def __init__(
        self,
        job: Job,
        command: Command,
        state: RunState,
        recording: Path,
        console: Console,
        spent: Mapping[str, float],
    ) -> None:
        self.heard: list[int] = []
        """The signals that came; the first is the one that the run was stopped by."""
        self._job = job
        self._command = command
        self._state = state
        self._recording = recording
        self._console = console
        self._relay = Relay(spent) if command.place is None else None
        self._inbox: SimpleQueue[tuple[Process, Message] | None] = SimpleQueue()
        self._processes: Sequence[Process] = ()
        self._before = Counts()  # what earlier starts counted
        self._starts = 0
        self._going = False  # whether all processes were told to go
        self._told_to_stop = 0
        self._failed = False
        self._errors: list[str] = []

    def stop(self, number: int) -> None:
        """A signal came; called from its handler."""
        self.heard.append(number)
        self._inbox.put(None)

    def look(self) -> Counts:
        """The counters of all processes; items that are read again are counted again."""
        now = [self._before, *(process.counts for process in self._processes)]
        return Counts(*map(sum, zip(*now, strict=True)))

    def standing(self) -> str:
        """How far the run is: ``starting`` is also what it does when it is started again."""
        return "draining" if self.heard else "running" if self._going else "starting"

    def seen(self) -> tuple[Counts, Mapping[str, Any]]:
        """The counters, and what the recorders of all processes say; from any thread."""
        processes = self._processes
        if self._going:
            for process in processes:
                process.ask_for_snapshot()
        until = time.monotonic() + (_LOOK if self._going else 0.0)
        said = [found for process in processes if (found := process.seen(until)) is not None]
        return self.look(), merged(said) if said else {}

    def run(self) -> None:
        """See the run through."""
        in_vain = 0
        epoch, known = self._state.epoch(), self._recorded()
        while not self.heard:
            begun = time.monotonic()
            dead = self._once()
            if dead is not None and self.heard and self._told_to_stop < 2:
                self._errors += dead.errors
            if dead is None or self.heard:
                break
            before, epoch = epoch, self._state.epoch()
            knew, known = known, self._recorded()
            got_on = epoch > before or time.monotonic() - begun > _CALM or (dead.was_killed and known > knew)
            in_vain = 0 if got_on else in_vain + 1
            if dead.hopeless or in_vain >= _STARTS:
                self._failed = True
                self._errors += dead.errors or [dead.fate]
                if not dead.hopeless:
                    self._errors.append(
                        f"given up: {in_vain} times in a row a process died before the run got on; "
                        f"{how_to_go_on(self._job).partition('; ')[2]}"
                    )
                break
            whom = "it is" if self._command.place else f"all {self._command.count} are"
            self._say(f"{dead.fate}: {whom} started again from the last epoch")
            for line in dead.errors:
                self._say(f"  {line}")
            self._pause(0.0 if got_on else min(0.1 * 2.0**in_vain, 8.0))

    def outcome(self, seconds: float) -> Outcome:
        """What came of it; also written down."""
        status = "failed" if self._failed else "stopped" if self.heard else "finished"
        for process in self._processes:
            if process.well:
                self._errors += [line for line in process.errors if line not in self._errors]
        self._state.end(status)
        snapshot = self._snapshot()
        try:
            with closing(SqliteRecording(self._recording)) as recording:
                recording.snapshot(snapshot["run"], snapshot)
                recording.close_run(snapshot["run"], status)
        except RecordingError as error:
            self._errors.append(str(error))
        tally = Tally()
        if not self._job.settings.run.record_items or (self._starts == 1 and not self._state.resumed):
            tally.items = self.look().items
        report = report_of(self._job, snapshot, tally, status, seconds)
        if status != "stopped":
            return Outcome(report, 1 if self._errors else 0, self._errors)
        code = 1 if self._errors else 128 + self.heard[0]
        if self._told_to_stop > 1:
            self._errors.append("stopped at once; all answers are in the recording")
        return Outcome(report, code, [*self._errors, how_to_go_on(self._job)])

    # -- one start ------------------------------------------------------------------------------

    def _once(self) -> Process | None:
        """Start all and see them to their end; the one that died, where one did."""
        counts, self._processes = self.look(), ()
        self._before = counts._replace(in_flight=0)
        self._starts += 1
        place = self._command.place
        with _free_addresses(self._command.count) if place is None else _given(place) as (addresses, let_go):
            self._processes = [self._begun(index, addresses) for index in self._command.here]
            try:
                if self._all_ready():
                    let_go()
                    for process in self._processes:
                        process.tell("go\n")
                        time.sleep(_STEP)
                    self._going = True
                    self._until_over()
            finally:
                self._going = False
                for process in self._processes:
                    process.kill()
                if self._relay is not None:
                    self._relay.close()
        self._take(0.0)
        dead = [process for process in self._processes if not process.well and not process.killed]
        # One that only lost another is not to blame, unless there is nobody else.
        return next((process for process in dead if not process.gave_up), dead[0] if dead else None)

    def _begun(self, index: int, addresses: Sequence[str]) -> Process:
        orders = self._orders(index, addresses)
        with nullcontext() if self._relay is None else self._relay.connect(index) as line:
            return Process(
                index,
                len(addresses),
                orders,
                self._inbox,
                keep=self._state.lock,
                line=None if line is None else line.fileno(),
            )

    def _orders(self, index: int, addresses: Sequence[str]) -> str:
        job = self._job
        config = self._command.config
        return Orders(
            flow=self._command.flow,
            config=None if config is None else str(config),
            legacy=self._command.legacy,
            sources=_uris(job.sources),
            sinks=_uris(job.sinks),
            dead_letters=job.dead_letters,
            run_id=str(self._state.run_id),
            state=str(self._state.folder),
            store=str(self._state.store),
            workers=job.workers,
            speed=job.speed,
            config_file=job.config_file,
            debug=job.debug,
            index=index,
            addresses=addresses,
        ).line()

    def _all_ready(self) -> bool:
        """Wait until all are; False where one died or all are to stop: nothing has begun then."""
        while not all(process.ready for process in self._processes):
            self._take(0.1)
            if self.heard or any(process.over for process in self._processes):
                return False
        return True

    def _until_over(self) -> None:
        until = float("inf")
        self._told_to_stop = 0
        for process in self._processes:
            process.heard_at = time.monotonic()
        while not all(process.over for process in self._processes):
            self._take(0.1)
            now = time.monotonic()
            for process in self._processes:
                if now - process.heard_at > _HUNG and not process.over:
                    process.end_hung(_HUNG)
            if until == float("inf") and any(p.over and not p.well for p in self._processes):
                # Bytewax ends the others. What they have asked is paid for: let it be recorded.
                until = now + _GRACE
                self._going = False
            while self._told_to_stop < min(len(self.heard), 2):
                self._told_to_stop += 1
                for process in self._processes:
                    process.signal(signal.SIGTERM)
                if self._told_to_stop == 2:
                    until = min(until, now + _HURRY)
            if now > until:
                return

    def _take(self, patience: float) -> None:
        """Take what the processes have told, waiting for the first of it."""
        while True:
            try:
                told = self._inbox.get(timeout=patience) if patience else self._inbox.get_nowait()
            except Empty:
                return
            patience = 0.0
            if told is None or told[0] not in self._processes:
                continue
            process, message = told
            for line in process.take(message):
                self._say(line)
            if process.stops and not self.heard and not any(p.over for p in self._processes):
                # On its own account: it was sent a signal, or its recording loses rows.
                self._say(f"{process.name}: {process.stops}")
                self.heard.append(signal.SIGTERM)

    # -- helpers --------------------------------------------------------------------------------

    def _recorded(self) -> int:
        """How far the run has come: items and calls in the recording."""
        run = str(self._state.run_id)
        try:
            with closing(RecordingReader(self._recording)) as reader:
                nodes = totals(reader, run).values()
                return items_of(reader, run) + sum(node.calls + node.errors for node in nodes)
        except RecordingError:
            return 0

    def _snapshot(self) -> Mapping[str, Any]:
        said = [process.snapshot for process in self._processes if process.snapshot is not None]
        if said:
            return merged(said)
        run = str(self._state.run_id)
        try:
            with closing(RecordingReader(self._recording)) as reader:
                found = reader.snapshot_of(run)
        except RecordingError:
            found = None
        return found or {"run": run, "models": {}, "interfaces": {}, "certified": {}}

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.heard and time.monotonic() < end:
            time.sleep(0.05)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _uris(bound: Mapping[str, Any]) -> dict[str, str]:
    for name, what in bound.items():
        if not isinstance(what, str):
            raise ConfigError(f"'{name}': only what a URI names can be opened in several processes")
    return dict(bound)


@contextmanager
def _given(place: Place) -> Iterator[tuple[Sequence[str], Any]]:
    yield place.addresses, lambda: None


@contextmanager
def _free_addresses(count: int) -> Iterator[tuple[Sequence[str], Any]]:
    """Addresses on this machine that nobody uses, held until they are let go."""
    sockets = [socket.socket() for _ in range(count)]

    def let_go() -> None:
        for held in sockets:
            held.close()

    try:
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        yield [f"127.0.0.1:{held.getsockname()[1]}" for held in sockets], let_go
    finally:
        let_go()
