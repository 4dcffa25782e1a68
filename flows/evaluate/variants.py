"""One flow over one stream under one routing: what it cost, answered and gave."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition
from rich.console import Console
from typing_extensions import override

from chainwax.connectors import Outgoing, StopSwitch, open_source
from chainwax.flows.evaluate.labels import Labels, Origins, Teacher, scored_by_flow
from chainwax.flows.evaluate.similarity import Measure, plain
from chainwax.flows.graph import Flow
from chainwax.flows.job import Job
from chainwax.flows.replay import KnownAnswers, recorded_answers
from chainwax.flows.runner import Outcome, run_job
from chainwax.router import ConfigError, LLMManager, Settings
from chainwax.router.config import BusConfig, NodeConfig
from chainwax.router.recording import RecordingReader
from chainwax.router.recording.totals import Answered, answered
from chainwax.router.types import Form, Mode

__all__ = ["Kept", "Plan", "Stopped", "Stream", "Variant", "fixed", "run_variant", "unhindered"]

_NUMBERS = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class Kept:
    """One item that came out, with the place that it came from."""

    value: Any
    """As JSON holds it."""
    position: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A routing that is tried."""

    name: str
    models: Mapping[str, str] | None
    """The model of each node; None leaves them to the router."""


@dataclass(slots=True)
class Variant:
    """What came of a routing."""

    plan: Plan
    run: str
    seconds: float
    cost_usd: float
    """Of all attempts, at today's prices, those answered from the recording included."""
    paid_usd: float
    """What of it was paid now."""
    items: int
    letters: int
    simulated: tuple[str, ...]
    answers: list[Answered]
    outputs: dict[str, list[Kept]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The plan's."""
        return self.plan.name


class Stopped(Exception):
    """A variant did not come to its end: the evaluation does not go on."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__("\n".join(outcome.errors))
        self.outcome = outcome


@dataclass(slots=True)
class Stream:
    """What is evaluated: a flow, made anew for each routing, and the stream that it reads."""

    load: Callable[[], Flow]
    """Makes the flow: agents keep a state of their own, so each routing needs others."""
    settings: Settings
    sources: Mapping[str, str]
    """URIs; the streams must end."""
    recording: Path
    """Where all variants are recorded, and answers that were bought before are found."""
    labels: Labels | None = None
    measure: Measure = Measure.fields
    late: int = 50
    """Answers of a node after which its router hears what a label says of one."""
    workers: int = 1
    speed: str | None = None
    debug: bool = False


def unhindered(settings: Settings, recording: Path) -> Settings:
    """The same configuration, where nothing is remembered of other runs, and what is said stays here."""
    run = settings.run.model_copy(
        update={
            "id": None,
            "recording": recording,
            "learn_from_recording": False,
            "record_items": True,
            "content_keys": True,
        }
    )
    every = {name: _enforced(node) for name, node in settings.nodes.items()}
    return settings.model_copy(
        update={
            "run": run,
            "bus": BusConfig(),
            "nodes": every,
            "defaults": settings.defaults.model_copy(update={"mode": Mode.enforce}),
        }
    )


def _enforced(node: NodeConfig) -> NodeConfig:
    return node if node.mode is None else node.model_copy(update={"mode": Mode.enforce})


def fixed(settings: Settings, models: Mapping[str, str]) -> Settings:
    """The same with one model for each node, which nothing else is asked beside or after."""
    nodes = dict(settings.nodes)
    for node, model in models.items():
        nodes[node] = nodes.get(node, NodeConfig()).model_copy(
            update={"form": Form.direct, "model": model, "certify": 0.0, "budget": None, "latency": None}
        )
    defaults = settings.defaults.model_copy(update={"certify": None, "budget": None, "latency": None})
    return settings.model_copy(update={"nodes": nodes, "defaults": defaults})


def run_variant(
    stream: Stream, plan: Plan, known: KnownAnswers, origins: Origins | None, console: Console
) -> Variant:
    """Run the flow once, as the plan wants it, buying only what is not known.

    ``origins`` are needed where labels teach the router.

    Raises :class:`Stopped` where it does not come to its end, and what :func:`run_job` raises.
    """
    settings = unhindered(stream.settings, stream.recording)
    if plan.models is not None:
        settings = fixed(settings, plan.models)
    flow = stream.load()
    stop = StopSwitch()
    sources = {
        name: open_source(uri, name=name, stop=stop, speed=stream.speed or "max")
        for name, uri in stream.sources.items()
    }
    for name, source in sources.items():
        if not getattr(source, "ends", False):
            raise ConfigError(
                f"source '{name}' ({stream.sources[name]}) never ends: a stream is evaluated that is recorded"
            )
    sinks = {name: _KeptSink() for name in flow.sinks}
    teachers: list[Teacher] = []

    def prepare(manager: LLMManager) -> None:
        if plan.models is None and stream.labels is not None and origins is not None:
            teacher = Teacher(
                manager,
                stream.labels,
                origins,
                stream.measure,
                late=stream.late,
                silent=scored_by_flow(flow),
            )
            teachers.append(teacher)
            manager.called = teacher.called

    def finish(manager: LLMManager) -> None:
        manager.settle()
        for teacher in teachers:
            teacher.finish()

    known.refresh()
    job = Job(
        flow=flow,
        settings=settings,
        sources=sources,
        sinks=sinks,
        stop=stop,
        workers=stream.workers,
        backends=recorded_answers(settings.models, known, only=False),
        debug=stream.debug,
        beforehand=prepare,
        afterwards=finish,
    )
    outcome = run_job(job, console, live=console.is_terminal)
    report = outcome.report
    if outcome.exit_code:
        raise Stopped(outcome)
    with closing(RecordingReader(stream.recording)) as reader:
        return Variant(
            plan,
            report.run,
            report.seconds,
            report.cost_usd,
            report.cost_usd - report.reused_usd,
            report.items,
            report.letters.count,
            report.simulated,
            list(answered(reader, report.run)),
            {name: sink.in_order() for name, sink in sinks.items()},
        )


def _natural(position: str) -> list[Any]:
    # Every second part is a number.
    return [int(part) if at % 2 else part for at, part in enumerate(_NUMBERS.split(position))]


class _KeptPart(StatefulSinkPartition[Any, None]):
    def __init__(self, kept: list[Kept]) -> None:
        self._kept = kept

    @override
    def write_batch(self, values: list[Outgoing]) -> None:
        self._kept += [Kept(plain(one.value), one.position) for one in values]

    @override
    def snapshot(self) -> None:
        return None


class _KeptSink(FixedPartitionedSink[Any, None]):
    """Keeps what comes out in memory."""

    takes_items = True

    def __init__(self) -> None:
        self._kept: list[Kept] = []

    @override
    def list_parts(self) -> list[str]:
        return ["kept"]

    @override
    def build_part(self, step_id: str, for_part: str, resume_state: None) -> _KeptPart:
        return _KeptPart(self._kept)

    def in_order(self) -> list[Kept]:
        """In the order of the stream, which does not depend on how long models took.

        What comes from windows has no place in a source: such a stream stays as it came.
        """
        if any(one.position.startswith("window:") for one in self._kept):
            return self._kept
        return sorted(self._kept, key=lambda one: _natural(one.position))
