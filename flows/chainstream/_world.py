"""What agents say while they start: their streams, their listeners, in order. And what is running now."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from chainwax.router.errors import nearest

if TYPE_CHECKING:
    from chainwax.flows.chainstream.agent import Agent

__all__ = [
    "Invocation",
    "Listener",
    "World",
    "enter",
    "identifier",
    "invoked",
    "invoking",
    "world",
    "world_of",
]


@dataclass(slots=True, eq=False)
class Listener:
    """A function that hangs on a stream."""

    agent: Agent
    fn: Callable[[Any], Any]
    stream: str
    """The stream that it listens to."""
    output: str
    """The stream that its return value goes to."""
    id: str
    """Unlike any other of the flow's."""
    active: bool = True
    """Whether it is called; an agent that is stopped has none that are."""

    @property
    def name(self) -> str:
        """The function's own."""
        return getattr(self.fn, "__name__", type(self.fn).__name__)

    @property
    def shown(self) -> str:
        """For messages."""
        return f"'{self.name}' of agent '{self.agent.agent_id}'"


@dataclass(slots=True)
class World:
    """All agents of one run."""

    given: frozenset[str] = frozenset()
    """Streams that are there before any agent: those that a source is bound to."""
    offered: frozenset[str] = frozenset()
    """Streams that are made when an agent first asks for them: those that a sink is bound to."""
    open: bool = False
    """Whether all other streams are there too, once an agent asks for them."""
    legacy: bool = False
    """Whether agents of the older API run: streams are named without an agent, and made when asked for."""
    strict: bool = False
    """Whether lists of plain texts and dicts are dropped from prompts, as upstream does."""
    priorities: dict[str, int] = field(default_factory=dict)
    """By agent id, in place of the agents' own."""
    agents: dict[str, Agent] = field(default_factory=dict)
    streams: dict[str, str] = field(default_factory=dict)
    """Names of the streams, and the agent that made each; empty where none did."""
    asked: set[str] = field(default_factory=set)
    """Names of the streams that agents have asked for."""
    anonymous: set[str] = field(default_factory=set)
    listeners: list[Listener] = field(default_factory=list)
    kept: bool = True
    """Whether what listeners hold has to outlive the process."""
    running: bool = False
    """Whether the flow is made: what agents say from now on cannot change it."""

    trace: list[tuple[str, str, Any]] | None = None
    """Where prompts are written down, each with the place of its item and the id of the listener that asked,
    for whoever wants to see them."""

    def __post_init__(self) -> None:
        self.streams.update(dict.fromkeys(self.given, ""))

    def enter(self, agent: Agent) -> None:
        """Take an agent in. Raises ValueError where another has its id."""
        if agent.agent_id in self.agents:
            raise ValueError(f"there are two agents with the id {agent.agent_id!r}")
        self.agents[agent.agent_id] = agent

    def get(self, stream_id: str) -> str:
        """The stream of a name. Raises KeyError."""
        self.asked.add(stream_id)
        if stream_id not in self.streams:
            if self.open:
                self.given |= {stream_id}
            elif not self.legacy and stream_id not in self.offered:
                raise KeyError(f"no stream {stream_id!r}: {nearest(str(stream_id), self.streams)}")
            self.streams[stream_id] = ""
        return stream_id

    def create(self, stream_id: str, agent_id: str) -> str:
        """A new stream. Raises KeyError where there is one of this name."""
        if self.open and stream_id in self.given:
            self.given -= {stream_id}  # it was taken to come from outside
        elif stream_id in self.given:
            raise KeyError(f"there is a stream {stream_id!r} already: a source is bound to it")
        elif self.streams.get(stream_id):
            raise KeyError(f"there is a stream {stream_id!r} already")
        elif self.running:
            raise RuntimeError(
                f"agent '{agent_id}': stream '{stream_id}' cannot be made while the flow runs: its graph is "
                "made when the agents start; create it in __init__ or start"
            )
        self.streams[stream_id] = agent_id
        return stream_id

    def listen(self, agent: Agent, fn: Callable[[Any], Any], stream: str, output: str | None) -> str:
        """Hang a function on a stream; gives the name of the stream that its return value goes to."""
        if self.running:
            raise RuntimeError(
                f"agent '{agent.agent_id}': a listener cannot be added to '{stream}' while the flow runs: "
                "its graph is made when the agents start"
            )
        name = getattr(fn, "__name__", type(fn).__name__)
        stem = identifier(f"{agent.agent_id}-{name}")
        taken = {listener.id for listener in self.listeners}
        number = 1
        while (chosen := stem if number == 1 else f"{stem}-{number}") in taken:
            number += 1
        if output is None:
            output = f"[anonymous]__{chosen}"
            self.anonymous.add(output)
            self.streams[output] = agent.agent_id
        self.listeners.append(Listener(agent, fn, stream, output, chosen))
        return output

    def leave(self, agent: Agent, stream: str, fn: Callable[[Any], Any] | None) -> None:
        """Take an agent's listeners off a stream; with ``fn`` only that one."""
        off = [
            one
            for one in self.listeners
            if one.agent is agent and one.stream == stream and (fn is None or one.fn is fn)
        ]
        if self.running:
            for one in off:
                one.active = False
        else:
            self.listeners = [one for one in self.listeners if one not in off]

    def stop(self, agent_id: str, stopped: bool) -> None:
        """Stop an agent while the flow runs, or let it go on with what it held."""
        agent = self.agents[agent_id]
        if stopped:
            try:
                agent.stop()
            except Exception as error:
                agent.logger.warning("stop: %s: %s", type(error).__name__, error)
        for one in self.listeners:
            if one.agent is agent:
                one.active = not stopped


def identifier(text: str) -> str:
    """A text, of letters, digits, '_' and '-' alone, as names of nodes are."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in text)
    return plain if plain[:1].isalpha() or plain[:1] == "_" else f"_{plain}"


class Invocation(Protocol):
    """One call of a listener, as the API sees it."""

    time: float
    """When its item arrived, in seconds since 1970."""

    def emit(self, stream: str, item: Any) -> None:
        """Send an item to a stream."""
        ...

    def ask(self, kind: str, prompt: Any, frame: Any) -> str:
        """Have a model answer; ``frame`` is that of the code that asks."""
        ...


_world: World | None = None
_here = threading.local()


def world() -> World:
    """The world of the run that is being made or runs. Raises RuntimeError outside of one."""
    if _world is None:
        raise RuntimeError(
            "agents run with `chainwax run AGENT.py` or chainwax.flows.agents.run_agent: outside of a run "
            "there are no streams and no models"
        )
    return _world


def enter(made: World) -> None:
    """Have the API speak of this world from now on."""
    global _world
    _world = made


@contextmanager
def world_of(made: World) -> Iterator[World]:
    """Have the API speak of this world inside the block."""
    global _world
    before, _world = _world, made
    try:
        yield made
    finally:
        _world = before


def invoked() -> Invocation | None:
    """The call of a listener that this thread is in; None outside of one."""
    return getattr(_here, "invocation", None)


def invoking(invocation: Invocation | None) -> Invocation | None:
    """Say which call of a listener this thread is in; gives what it was in before."""
    before = getattr(_here, "invocation", None)
    _here.invocation = invocation
    return before


def parameters_of(fn: Callable[..., Any]) -> int:
    """How many parameters a function has."""
    return len(inspect.signature(fn).parameters)
