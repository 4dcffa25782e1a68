"""What is to be run, and what it is bound to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bytewax.inputs import Source
from bytewax.outputs import Sink

from chainwax.connectors import StopSwitch, open_sink, open_source, parse_uri
from chainwax.flows.agents.saved import check_state
from chainwax.flows.graph import Flow
from chainwax.flows.nodes import AgentsNode
from chainwax.flows.preflight import check_nodes
from chainwax.flows.relay import RelayLine
from chainwax.flows.serve import Address
from chainwax.flows.state import RunState
from chainwax.router import ConfigError, LLMManager, Settings
from chainwax.router.backends import Backend
from chainwax.router.errors import UnknownName
from chainwax.router.share import Share

__all__ = ["Backfill", "Bound", "Job", "Member", "checked", "state_of"]


@dataclass(frozen=True, slots=True)
class Member:
    """One of several processes that run a flow together."""

    share: Share
    addresses: Sequence[str]
    """Host and port of each process, in order."""
    store: Path
    """The recovery store, or this machine's part of it."""
    line: RelayLine | None = None
    """To whoever watches over all of them, where all are on this machine."""


@dataclass(frozen=True, slots=True)
class Backfill:
    """How a run beside a live one keeps out of its way."""

    share: float
    """The most of each model's limit that it takes, above 0 and at most 1."""
    budget: float | None = None
    """Dollars for the whole run, earlier starts included."""


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
    entries: Mapping[str, Source[Any]] = field(default_factory=dict)
    """Items that begin at a node, by its name."""
    asks: bool = True
    """Whether models are asked, so that their keys must be there."""
    config_file: str | None = None
    """For messages."""
    debug: bool = False
    serve: Address | None = None
    """Where to tell how the run is; nowhere where it is None."""
    beforehand: Callable[[LLMManager], None] | None = None
    """Called when the run has begun and before its flow does."""
    afterwards: Callable[[LLMManager], None] | None = None
    """Called when the flow has ended and before its manager does: feedback may still be on its way."""
    backfill: Backfill | None = None
    """Set where the run is one in the background."""
    member: Member | None = None
    """Set where this process is one of several; the run is then begun and ended by whoever started it."""


class Bound(NamedTuple):
    """A job's sources and sinks, opened."""

    sources: dict[str, Source[Any]]
    sinks: dict[str, Sink[Any]]
    letters: Sink[Any] | None


def checked(job: Job) -> Bound:
    """Sources and sinks, opened. Raises :class:`ConfigError` with all that is wrong with the job."""
    bound = _bound(job)
    _check_agents(job.flow, kept=job.state is not None)
    found = check_nodes(job.flow, job.settings, ask=job.asks, file=job.config_file)
    if found.every_problem:
        raise ConfigError("\n".join(found.every_problem))
    return bound


def _check_agents(flow: Flow, *, kept: bool) -> None:
    """Refuse agents whose state could not be brought back, where it would have to be."""
    for node in flow.nodes.values():
        if not isinstance(node, AgentsNode):
            continue
        node.world.kept = kept
        if kept and (why := check_state(node.group)) is not None:
            raise ConfigError(f"with --state all that listeners hold is kept: {why}")


def _bound(job: Job) -> Bound:
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
    return Bound(sources, sinks, letters)


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


def state_of(job: Job, parts: int = 1, part: int | None = None) -> RunState | None:
    """The run's state folder, where it has one; see :class:`RunState`."""
    if job.state is None:
        return None
    recording = job.settings.run.recording
    bound = {
        "flow": job.flow.id,
        "sources": {name: uri for name, uri in job.sources.items() if isinstance(uri, str)},
        "sinks": {name: uri for name, uri in job.sinks.items() if isinstance(uri, str)},
        "recording": None if recording is None else str(recording.resolve()),
    }
    return RunState(job.state, bound, run_id=job.run_id, fresh=job.fresh, parts=parts, part=part)
