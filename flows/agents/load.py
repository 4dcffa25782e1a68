"""From agents' files to a flow."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from chainwax.flows.agents.groups import Group, grouped
from chainwax.flows.agents.questions import sites_of
from chainwax.flows.chainstream._world import World, enter, identifier
from chainwax.flows.chainstream.agent import Agent
from chainwax.flows.check import check_id
from chainwax.flows.graph import Flow
from chainwax.flows.nodes import AgentsNode, MergeNode, Node, Port, SinkNode, SourceNode
from chainwax.router.config import AgentsConfig
from chainwax.router.errors import ConfigError, UnknownName

__all__ = [
    "ARRIVALS",
    "agent_files",
    "agents_flow",
    "as_chainstream",
    "load_agents",
    "put_in_place",
    "start_agents",
    "world_for",
    "written_streams",
]

_IMPORTS = re.compile(rb"^\s*(?:import|from)\s+chainstream\b", re.MULTILINE)
_API = ("action", "agent", "context", "llm", "memory", "stream")
ARRIVALS = "arrivals"
"""The source of a flow whose items say themselves which stream they arrive on."""


def _is_agent_file(path: Path) -> bool:
    """Whether a file is written for ChainStream: it imports the module of that name."""
    if path.suffix != ".py" or not path.is_file():
        return False
    try:
        source = path.read_bytes()
    except OSError:
        return False
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        # An agent with a slip of the pen is one all the same: whoever loads it says what is wrong.
        return _IMPORTS.search(source) is not None
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        if any(name.partition(".")[0] == "chainstream" for name in names):
            return True
    return False


def _is_own(path: Path, folder: Path) -> bool:
    """Whether a file below a folder is the user's: not one of an environment or a hidden folder."""
    parts = path.relative_to(folder).parts
    return not any(part.startswith(".") or part == "site-packages" for part in parts)


def agent_files(place: Path) -> list[Path]:
    """The agents' files that a path names: itself, or all below a folder that are not hidden, by name."""
    if place.is_dir():
        return sorted(path for path in place.rglob("*.py") if _is_own(path, place) and _is_agent_file(path))
    return [place] if _is_agent_file(place) else []


def put_in_place() -> dict[str, ModuleType]:
    """Have ``import chainstream`` give chainwax's module; gives what was there before."""
    names = {"chainstream": "chainwax.flows.chainstream"}
    names.update({f"chainstream.{part}": f"chainwax.flows.chainstream.{part}" for part in _API})
    before = {
        name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "chainstream"
    }
    sys.modules.update({name: importlib.import_module(ours) for name, ours in names.items()})
    return before


@contextlib.contextmanager
def as_chainstream() -> Iterator[None]:
    """The same inside the block only, whatever is installed."""
    before = put_in_place()
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "chainstream"]:
            del sys.modules[name]
        sys.modules.update(before)


Load = Callable[[], ModuleType]


def start_agents(
    world: World,
    modules: Iterable[tuple[str, Load]],
    refused: Callable[[str, ConfigError], None] | None = None,
) -> dict[str, list[Agent]]:
    """Make and start the agents of modules; each module is given with its place, for messages.

    One that asks for a stream that another makes is started after it. The world and the module
    ``chainstream`` must be in place. Gives the agents by place.

    Raises :class:`ConfigError` where a file holds no agent, and where one cannot be made or started, chained
    to the agent's own exception; with ``refused`` it is called with each such place and error instead.
    """

    def refuse(place: str, error: ConfigError) -> None:
        if refused is None:
            raise error
        refused(place, error)

    waiting: list[tuple[str, type[Agent]]] = []
    for place, load in modules:
        try:
            waiting += [(place, cls) for cls in _classes(place, load())]
        except ConfigError as error:
            refuse(place, error)
    started: dict[str, list[Agent]] = {}
    while waiting:
        failed: list[tuple[str, type[Agent], BaseException]] = []
        for place, cls in waiting:
            kept = (dict(world.agents), dict(world.streams), set(world.anonymous), list(world.listeners))
            try:
                agent = cls()  # type: ignore[call-arg]  # agents name themselves
                agent.start()
            except (Exception, SystemExit) as error:
                world.agents, world.streams, world.anonymous, world.listeners = kept
                failed.append((place, cls, error))
            else:
                started.setdefault(place, []).append(agent)
        if len(failed) == len(waiting):
            for place, cls, raised in failed:
                refuse(place, _not_started(place, cls, raised))
            break
        waiting = [(place, cls) for place, cls, _ in failed]
    return started


def _not_started(place: str, cls: type[Agent], raised: BaseException) -> ConfigError:
    why, hint = f"{type(raised).__name__}: {raised}", ""
    if isinstance(raised, KeyError) and str(raised.args[0]).startswith("no stream "):
        why, hint = raised.args[0], " (a stream from outside is bound by --source NAME=URI)"
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(raised.__traceback__) if frame.filename == file]
    at = f"{place}:{lines[-1]}" if lines else place
    error = ConfigError(f"{at}: agent '{cls.__name__}' cannot be started: {why}{hint}")
    error.__cause__ = raised
    return error


def _classes(place: str, module: ModuleType) -> list[type[Agent]]:
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Agent)
        and value.__module__ == module.__name__
        and getattr(value, "is_agent", False)
    ]
    if not found:
        raise ConfigError(f"{place}: there is no agent in it, a class of cs.agent.Agent")
    # What agents of the file have in common, and which cannot be made by itself, is no agent.
    return [
        cls for cls in found if not (_needs_more(cls) and any(cls in other.__mro__[1:] for other in found))
    ]


def _needs_more(cls: type[Agent]) -> bool:
    wanted = inspect.signature(cls).parameters.values()
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(one.default is one.empty and one.kind in named for one in wanted)


def world_for(config: AgentsConfig, sources: Iterable[str] | None, sinks: Iterable[str] | None) -> World:
    """A world as the configuration wants it; without sources all streams are there that are asked for."""
    return World(
        frozenset(sources or ()),
        frozenset(sinks or ()),
        open=sources is None,
        legacy=config.legacy,
        strict=config.strict,
        priorities=dict(config.priority),
    )


def load_agents(
    place: str,
    modules: Sequence[tuple[str, Load]],
    config: AgentsConfig,
    sources: Iterable[str] | None,
    sinks: Iterable[str] | None,
) -> Flow:
    """The flow of agents' modules; the API speaks of its world from now on.

    ``sources`` and ``sinks`` are the names of the streams that are bound; None takes all that the agents
    need, and all that they name. Raises :class:`ConfigError` as :func:`start_agents` and
    :func:`agents_flow`.
    """
    world = world_for(config, sources, sinks)
    put_in_place()
    enter(world)
    start_agents(world, modules)
    for name in config.priority:
        if name not in world.agents:
            raise UnknownName("agent in [agents.priority]:", name, world.agents)
    for name in sources or ():
        if name not in world.asked:
            raise UnknownName("stream for --source, which no agent asks for:", name, world.asked)
    world.running = True
    written = {stream for group in grouped(world) for stream in group.outputs}
    if sources is None:
        # What is only written to does not come from outside; with the older API, what is written to at all.
        heard = {listener.stream for listener in world.listeners} - (written if config.legacy else set())
        world.given &= heard
    if sinks is None:
        sinks = [name for name in written_streams(world, world.given) if name not in world.given]
    stem = Path(place).resolve().stem
    return agents_flow(identifier(stem), world, sources=sorted(world.given), sinks=list(sinks))


def written_streams(world: World, given: Iterable[str]) -> list[str]:
    """The streams with a name that something may come to when something comes to those that are given."""
    reached = set(given)
    written: set[str] = set()
    for group in grouped(world):
        if not reached.isdisjoint(group.inputs):
            written.update(group.outputs)
            reached.update(group.outputs)
    return [name for name in world.streams if name in written and name not in world.anonymous]


def agents_flow(
    id: str,
    world: World,
    *,
    sources: Sequence[str],
    sinks: Sequence[str],
    arrivals: bool = False,
) -> Flow:
    """The flow of started agents, with their streams of these names as its sources and sinks.

    With ``arrivals`` there is a single source instead, whose items are pairs of a stream's name and a value.

    Raises :class:`ConfigError` for names that no agent knows.
    """
    groups = grouped(world)
    written = {stream for group in groups for stream in group.outputs}
    for name in sources:
        check_id("the source's name", name)
    known = {stream for stream in world.streams if stream not in world.anonymous}
    for name in sinks:
        check_id("the sink's name", name)
        if name not in known:
            raise UnknownName("stream for --sink:", name, known)
    if not arrivals and (both := set(sources) & set(sinks)):
        raise ConfigError(
            f"--sink {min(both)}: --source {min(both)} is bound to the same stream, and one stream cannot be "
            "both: let the agent write to a stream of its own"
        )
    nodes: list[Node] = []
    if arrivals:
        nodes.append(SourceNode(ARRIVALS))
    else:
        nodes += [SourceNode(name) for name in sources]
    ports: dict[str, list[Port]] = {name: [Port(name)] for name in sources} if not arrivals else {}
    given = set(sources)
    for group in groups:
        inputs: list[tuple[Port, str | None]] = []
        if arrivals and given & set(group.inputs):
            inputs.append((Port(ARRIVALS), None))
        for stream in group.inputs:
            inputs += [(port, stream) for port in ports.get(stream, ())]
        if not inputs:
            continue  # nothing ever comes to it
        nodes.append(_node(group, world, inputs))
        for stream in group.outputs:
            ports.setdefault(stream, []).append(Port(group.id, stream))
    for name in sinks:
        found = ports.get(name, [])
        if not found:
            raise ConfigError(
                f"--sink {name}: nothing is ever written to this stream"
                + ("" if name in written else ": no listener writes to it")
            )
        if len(found) > 1:
            nodes.append(MergeNode(f"{name}-all", tuple(found)))
            found = [Port(f"{name}-all")]
        nodes.append(SinkNode(name, (found[0],)))
    return Flow.from_nodes(id, nodes)


def _node(group: Group, world: World, inputs: list[tuple[Port, str | None]]) -> AgentsNode:
    sites = [site for member in group.members for site in sites_of(member.listener, member.touches.questions)]
    return AgentsNode(
        group.id,
        tuple(dict.fromkeys(port for port, _ in inputs)),
        group,
        world,
        tuple(tag for _, tag in dict(inputs).items()),
        tuple(sites),
    )
