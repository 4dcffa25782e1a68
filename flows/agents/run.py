"""One agent over a list of arrivals, through the same flow as on the command line."""

from __future__ import annotations

import importlib.util
import itertools
import linecache
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from bytewax.testing import cluster_main, run_main

from chainwax.connectors import InProcessBus, ItemsSource, ListSink, Record
from chainwax.flows.agents.load import (
    ARRIVALS,
    agents_flow,
    as_chainstream,
    start_agents,
    written_streams,
)
from chainwax.flows.agents.questions import FunctionRaised
from chainwax.flows.chainstream._world import Listener, World, world_of
from chainwax.router import LLMManager, ModelConfig, Settings, Tier, Usage, load_settings
from chainwax.router.backends import Backend, Health, Reply, Request

__all__ = ["AgentRun", "run_agent"]

_numbers = itertools.count(1)


class AgentRun(NamedTuple):
    """What came of it."""

    outputs: dict[str, list[Any]]
    """The items of each stream that an agent has named, in order."""
    prompts: list[Any]
    """What models were asked, as the agent gave it: arrival by arrival, and then as far as listeners go."""
    errors: list[dict[str, Any]]
    """What listeners raised, in the same order: ``exception`` (the message), ``error`` (the class),
    ``function_name``, ``agent_id``, ``stream``, ``output_stream_id`` and ``item``."""


def run_agent(
    path_or_source: str | Path,
    arrivals: Iterable[tuple[str, Any, float]],
    model: Callable[[Any], str] | Backend | None = None,
    *,
    workers: int = 1,
    streams: Sequence[str] = (),
    legacy: bool = False,
    strict: bool = False,
    settings: Settings | None = None,
) -> AgentRun:
    """Run an agent's file, or the text of one, over items that arrive.

    ``arrivals`` are (stream, item, seconds), in order; the streams are there when the agent starts, and so
    are those of ``streams``. ``model`` is called with each prompt and gives the answer; what it raises
    reaches the agent. ``workers`` are Bytewax's. ``legacy`` runs agents of the older API, ``strict`` drops
    lists of plain texts from prompts, as upstream does. ``settings`` are for models of one's own.

    Raises :class:`ConfigError` where the agent cannot be started.
    """
    came = [(stream, item, float(seconds)) for stream, item, seconds in arrivals]
    given = list(dict.fromkeys([*(stream for stream, _, _ in came), *streams]))
    world = World(frozenset(given), legacy=legacy, strict=strict)
    world.trace = []
    world.kept = False
    place, load = _module(path_or_source)
    with as_chainstream(), world_of(world):
        start_agents(world, [(place, load)])
        named = [name for name in world.streams if name not in world.anonymous]
        return _run(world, came, given, named, model, workers, settings)


def _run(
    world: World,
    came: Sequence[tuple[str, Any, float]],
    given: Sequence[str],
    named: Sequence[str],
    model: Callable[[Any], str] | Backend | None,
    workers: int,
    settings: Settings | None,
) -> AgentRun:
    listeners = {listener.id: listener for listener in world.listeners}
    written = written_streams(world, given)
    outputs: dict[str, list[Any]] = {name: [] for name in named if name not in given or name in written}
    flow = agents_flow("agents", world, sources=given, sinks=written, arrivals=True)
    world.running = True
    letters: list[dict[str, Any]] = []
    if settings is None:
        settings = _free_settings()
    backends: Mapping[str, Backend] = {}
    if model is not None:
        backend = _Function(model) if callable(model) else model
        backends = dict.fromkeys(settings.models, backend)
    records = [
        Record((stream, item), "", f"{ARRIVALS}:{number}", seconds)
        for number, (stream, item, seconds) in enumerate(came)
    ]
    with LLMManager(settings, bus=InProcessBus(), backends=backends) as manager:
        manager.begin_run(flow.id, nodes=flow.specs().values())
        dataflow = flow.compile(
            {ARRIVALS: ItemsSource(records, name=ARRIVALS)},
            {name: ListSink(outputs[name]) for name in flow.sinks},
            dead_letters=ListSink(letters),
            manager=manager,
            workers=workers,
        )
        if workers == 1:
            run_main(dataflow)
        else:
            cluster_main(dataflow, [], 0, worker_count_per_proc=workers, epoch_interval=timedelta(seconds=10))
        manager.settle()
    assert world.trace is not None
    # Steps run beside each other: which of two listeners came first is said by the stream, not by chance.
    order = {listener: number for number, listener in enumerate(listeners)}
    asked = sorted(world.trace, key=lambda entry: (_place(entry[0]), order[entry[1]]))
    letters.sort(key=lambda letter: (_place(letter["position"]), order[letter["node"]]))
    return AgentRun(outputs, [prompt for _, _, prompt in asked], [_error(one, listeners) for one in letters])


def _place(position: str) -> tuple[int, int, list[list[int]]]:
    """The arrival, how many listeners lie between it and the item, and which item of theirs it was."""
    arrival, *path = position.rpartition(":")[2].split("/")
    return int(arrival), len(path), [[int(number) for number in step.split(".")] for step in path]


def _error(letter: Mapping[str, Any], listeners: Mapping[str, Listener]) -> dict[str, Any]:
    listener = listeners[letter["node"]]
    return {
        "exception": letter["message"],
        "error": letter["error"],
        "function_name": listener.name,
        "agent_id": listener.agent.agent_id,
        "stream": listener.stream,
        "output_stream_id": listener.output,
        "item": letter["item"],
    }


def _module(path_or_source: str | Path) -> tuple[str, Callable[[], ModuleType]]:
    text = str(path_or_source)
    name = f"chainwax_agent_{next(_numbers)}"
    if isinstance(path_or_source, Path) or ("\n" not in text and text.endswith(".py")):
        path = Path(path_or_source)
        return str(path), lambda: execute(name, str(path), path.read_text(encoding="utf-8"))
    return "the agent", lambda: execute(name, f"<{name}>", text)


def execute(name: str, file: str, source: str) -> ModuleType:
    """A module of a source text, whose lines can be looked up as those of a file."""
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = file
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    sys.modules[name] = module
    try:
        exec(compile(source, file, "exec"), vars(module))  # what running an agent is
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _free_settings() -> Settings:
    model = ModelConfig(
        tier=Tier.strongest,
        backend="simulated",
        input_cost_per_token=0.0,
        output_cost_per_token=0.0,
        types=("text", "text+image", "text+audio", "text+image+audio"),
        retries=0,
    )
    return load_settings(run={"recording": None, "seed": 0}, models={"model": model})


class _Function:
    """A function in the place of a model."""

    simulated = False
    batch_max = 1

    def __init__(self, model: Callable[[Any], str]) -> None:
        self._model = model

    async def start(self) -> int | None:
        """As many at once as come."""
        return None

    async def generate(self, request: Request) -> Reply:
        """What the function says."""
        try:
            text = self._model(list(request.query.messages))
        except Exception as error:
            raise FunctionRaised(error) from error
        return Reply(text, Usage(), finish_reason="stop", simulated=False)

    async def generate_batch(self, requests: Sequence[Request]) -> list[Reply | Exception]:
        """One after the other."""
        return [await self.generate(request) for request in requests]

    async def health(self) -> Health:
        """Always well."""
        return Health(True)

    async def close(self) -> None:
        """Nothing to give back."""
