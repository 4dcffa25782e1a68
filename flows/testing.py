"""The test kit: a model that answers as told, cassettes, a virtual clock, and a flow run over a list.

>>> from chainwax.flows import Flow
>>> from chainwax.flows.testing import TestModel, run_flow
>>> flow = Flow("hello")
>>> _ = flow.source("names").query("greeting", "Greet {name}.").sink("out")
>>> run_flow(flow, [{"name": "Ada"}], model=TestModel("Hello!"))["out"]
[{'name': 'Ada', 'greeting': 'Hello!'}]
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bytewax.testing import run_main

from chainwax.connectors import InProcessBus, ItemsSource, ListSink
from chainwax.router import (
    SYSTEM_CLOCK,
    BackendRefused,
    ChainwaxError,
    Clock,
    LLMManager,
    ModelConfig,
    RecordingError,
    Settings,
    Tier,
    Usage,
    load_settings,
)
from chainwax.router.backends import Backend, Health, Reply, Request
from chainwax.router.types import content_key

if TYPE_CHECKING:
    from chainwax.flows.graph import Flow

__all__ = ["Cassette", "Outputs", "TestModel", "VirtualClock", "run_flow"]

Answers = str | Sequence[str | Exception] | Mapping[str, str] | Callable[[str], str]


class TestModel:
    """A model in memory, for unit tests.

    ``answers`` is one text for all; a list that is answered in turn, over and over, its exceptions raised;
    a mapping from a text that a prompt holds to the answer; or a function of the last message's text.
    ``latency`` is in seconds. ``prompts`` are the texts that were asked, ``most_at_once`` how many at most
    were in flight.
    """

    __test__ = False  # pytest takes a class of this name for tests

    batch_max = 1

    def __init__(
        self,
        answers: Answers = "ok",
        *,
        latency: float = 0.0,
        simulated: bool = False,
        slots: int | None = None,
    ) -> None:
        self.prompts: list[str] = []
        self.requests: list[Request] = []
        self.most_at_once = 0
        self.simulated = simulated
        self._answers = answers
        self._latency = latency
        self._slots = slots
        self._at_once = 0

    async def start(self) -> int | None:
        """The slots that it was made with."""
        return self._slots

    async def generate(self, request: Request) -> Reply:
        """Answer as told."""
        text = str(request.query.messages[-1]["content"])
        self.prompts.append(text)
        self.requests.append(request)
        asked = len(self.prompts) - 1
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if self._latency:
                await asyncio.sleep(self._latency)
            answer = self._answer(text, asked)
        finally:
            self._at_once -= 1
        if request.on_delta is not None:
            for start in range(0, len(answer), 4):
                request.on_delta(answer[start : start + 4])
                await asyncio.sleep(0)
        usage = Usage(input=max(1, len(text) // 4), output=max(1, len(answer) // 4))
        return Reply(answer, usage, finish_reason="stop", simulated=self.simulated)

    async def generate_batch(self, requests: Sequence[Request]) -> list[Reply | Exception]:
        """One after the other."""
        return [await self.generate(request) for request in requests]

    async def health(self) -> Health:
        """Always well."""
        return Health(True, slots=self._slots)

    async def close(self) -> None:
        """Nothing to give back."""

    def _answer(self, text: str, asked: int) -> str:
        answers = self._answers
        if isinstance(answers, str):
            return answers
        if callable(answers):
            return answers(text)
        if isinstance(answers, Mapping):
            for part, answer in answers.items():
                if part in text:
                    return answer
            raise BackendRefused(f"the test model has no answer for {text[:80]!r}")
        turn = answers[asked % len(answers)]
        if isinstance(turn, Exception):
            raise turn
        return turn


class Cassette:
    """Records what a real backend answers, once, and plays it back ever after.

    ``mode`` is ``once`` (play what is there, ask and record what is not), ``play`` (what is not there is an
    error) or ``record`` (begin anew). The file is JSON lines: a person can read it, and it holds no keys.
    """

    def __init__(
        self, path: str | Path, backend: Backend, *, mode: Literal["once", "play", "record"] = "once"
    ) -> None:
        self._path = Path(path)
        self._backend = backend
        self._mode = mode
        self._started = False
        self.simulated = backend.simulated
        self.batch_max = 1
        self._known: dict[str, Reply] = {}
        if mode == "record":
            self._path.unlink(missing_ok=True)
        elif self._path.exists():
            self._known = dict(self._read())

    async def start(self) -> int | None:
        """The real backend is started when it is first needed."""
        return None

    async def generate(self, request: Request) -> Reply:
        """From the cassette, else from the real backend."""
        query = request.query
        key = content_key(query.messages, request.arm, query.node.params, query.node.answer.key)
        known = self._known.get(key)
        if known is None:
            if self._mode == "play":
                raise BackendRefused(f"{self._path}: no answer is recorded for {query.messages[-1]!r:.120}")
            if not self._started:
                await self._backend.start()
                self._started = True
            known = await self._backend.generate(request)
            self._known[key] = known
            line = {"key": key, "messages": list(query.messages), "reply": asdict(known)}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        elif request.on_delta is not None:
            request.on_delta(known.text)
        return known

    async def generate_batch(self, requests: Sequence[Request]) -> list[Reply | Exception]:
        """One after the other."""
        return [await self.generate(request) for request in requests]

    async def health(self) -> Health:
        """The cassette itself is always well."""
        return Health(True, f"cassette {self._path.name}, {len(self._known)} answers")

    async def close(self) -> None:
        """Close the real backend, where it was needed."""
        if self._started:
            await self._backend.close()

    def _read(self) -> Iterator[tuple[str, Reply]]:
        for number, line in enumerate(self._path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                entry = json.loads(line)
                reply = entry["reply"]
                yield entry["key"], Reply(**{**reply, "usage": Usage(**reply["usage"])})
            except (ValueError, KeyError, TypeError) as error:
                raise RecordingError(f"{self._path}:{number}: no line of a cassette: {error}") from None


class VirtualClock:
    """A clock that moves when it is told to, or when somebody sleeps on it."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self._now = now

    def time(self) -> float:
        """Seconds since 1970."""
        return self._now

    def monotonic(self) -> float:
        """The same seconds: they never go back."""
        return self._now

    async def sleep(self, seconds: float) -> None:
        """Jump ahead at once."""
        self.advance(seconds)
        await asyncio.sleep(0)

    def advance(self, seconds: float) -> None:
        """Jump ahead. Raises ValueError for a step back."""
        if seconds < 0:
            raise ValueError(f"a clock does not go back, by {seconds} s")
        self._now += seconds


@dataclass
class Outputs(Mapping[str, list[Any]]):
    """What a run gave: the items of each sink by its name."""

    sinks: dict[str, list[Any]]
    dead_letters: list[Any] = field(default_factory=list)
    snapshot: dict[str, Any] = field(default_factory=dict)
    """Recorders and routers at the end, as ``chainwax models --json`` shows them."""

    def __getitem__(self, sink: str) -> list[Any]:
        return self.sinks[sink]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sinks)

    def __len__(self) -> int:
        return len(self.sinks)


def run_flow(
    flow: Flow,
    items: Sequence[Any] | Mapping[str, Sequence[Any]],
    *,
    model: Backend | None = None,
    models: Mapping[str, Backend] | None = None,
    settings: Settings | None = None,
    clock: Clock | None = None,
) -> Outputs:
    """Run a flow over items, in this process, to the end.

    ``items`` are those of the only source, or by source name. ``model`` answers everything; ``models`` are
    backends by name, dearest tier first; both are free of charge. For prices, tiers and policies give
    ``settings`` too, whose models of the same names the backends stand in for. Without a recording in
    ``settings`` nothing is written.
    """
    backends = dict(models or {"test": model or TestModel()})
    if settings is None:
        tiers = [Tier.strongest, Tier.standard, Tier.local]
        settings = load_settings(
            run={"recording": None, "seed": 0},
            models={
                name: ModelConfig(
                    tier=tiers[min(number, 2)],
                    backend="simulated",
                    input_cost_per_token=0.0,
                    output_cost_per_token=0.0,
                )
                for number, name in enumerate(backends)
            },
        )
    by_source = dict(items) if isinstance(items, Mapping) else {_only_source(flow): items}
    sinks: dict[str, list[Any]] = {name: [] for name in flow.sinks}
    dead_letters: list[Any] = []
    with LLMManager(settings, bus=InProcessBus(), backends=backends, clock=clock or SYSTEM_CLOCK) as manager:
        # Nodes are given here and not in a worker: one that no model can serve is told plainly.
        manager.begin_run(flow.id, nodes=flow.specs().values())
        dataflow = flow.compile(
            {name: ItemsSource(list(values)) for name, values in by_source.items()},
            {name: ListSink(out) for name, out in sinks.items()},
            dead_letters=ListSink(dead_letters),
            manager=manager,
        )
        run_main(dataflow)
        manager.settle()
        snapshot = manager.snapshot()
    return Outputs(sinks, dead_letters, snapshot)


def _only_source(flow: Flow) -> str:
    names = list(flow.sources)
    if len(names) != 1:
        raise ChainwaxError(f"flow '{flow.id}' has the sources {names}: give the items by source name")
    return names[0]
