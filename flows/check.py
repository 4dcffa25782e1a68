"""What a flow refuses, each with a message that names the node; and what it knows of each node."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from chainwax.flows.nodes import (
    AgentsNode,
    BatchNode,
    BranchNode,
    FeedbackNode,
    FilterNode,
    FlatMapNode,
    KeyNode,
    LLMNode,
    MapNode,
    MergeNode,
    Node,
    Port,
    SourceNode,
    StatefulMapNode,
    WindowNode,
    specs_in,
)
from chainwax.router.errors import ConfigError, UnknownName, nearest

__all__ = [
    "Facts",
    "blame",
    "check_function",
    "check_id",
    "downstream_of",
    "facts_of",
    "in_order",
    "warnings_of",
]

_ID = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a node from what lies upstream of it."""

    depth: int
    """LLM nodes upstream on the longest path."""
    upstream: tuple[str, ...]
    """Ids of all LLM nodes upstream."""
    fields: frozenset[str] | None
    """Names that each item has that the node emits; None where nobody can know."""
    batched: bool
    """Whether the node emits batches."""


@contextmanager
def blame(node_id: str) -> Iterator[None]:
    """Make a :class:`ConfigError` from inside name the node."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"node '{node_id}': {error}") from None


def check_id(what: str, name: object) -> None:
    """Refuse a name that cannot be an id: Bytewax, TOML keys and diagrams must all be able to hold it."""
    if not isinstance(name, str) or not _ID.fullmatch(name):
        raise ConfigError(
            f"{what} {str(name)[:80]!r} cannot be an id: an id is of letters, digits, '_' and '-', "
            f"and begins with a letter or '_'"
        )


def check_function(fn: Any, params: int, receives: str, *, generator: bool = False) -> None:
    """Refuse what cannot be called with so many arguments, or gives no value when it is called."""
    if not callable(fn):
        raise ConfigError(f"{fn!r} is no function")
    name = getattr(fn, "__name__", repr(fn))
    if inspect.iscoroutinefunction(fn) or inspect.isasyncgenfunction(fn):
        raise ConfigError(f"'{name}' is an async function; the functions of a flow are plain ones")
    if not generator and inspect.isgeneratorfunction(fn):
        raise ConfigError(f"'{name}' is a generator function; only flat_map takes one")
    try:
        signature = inspect.signature(fn)
    except (ValueError, TypeError):
        return  # some builtins do not tell
    try:
        signature.bind(*[None] * params)
    except TypeError:
        raise ConfigError(f"'{name}' takes {signature}, but it is called with {receives}") from None


def in_order(nodes: Iterable[Node]) -> list[Node]:
    """The nodes, each after those that it hangs on.

    Raises :class:`ConfigError` for duplicate ids, streams of unknown nodes, and cycles, naming each node
    on one of them.
    """
    by_id: dict[str, Node] = {}
    for node in nodes:
        check_id("the node's name", node.id)
        if node.id in by_id:
            raise ConfigError(f"node '{node.id}': there are two nodes of this id")
        by_id[node.id] = node
    for node in by_id.values():
        with blame(node.id):
            for port in node.inputs:
                _check_port(port, by_id)
    sorter = TopologicalSorter({n.id: [p.node for p in n.inputs] for n in by_id.values()})
    try:
        return [by_id[name] for name in sorter.static_order()]
    except CycleError as error:
        # The sorter lists the cycle against the stream's direction.
        path = " → ".join(f"'{name}'" for name in error.args[1])
        raise ConfigError(f"the flow goes in a circle, which a stream cannot: {path}") from None


def facts_of(node: Node, nodes: Mapping[str, Node], facts: Mapping[str, Facts]) -> Facts:
    """Check a node whose upstream nodes were checked before, and say what is known of it.

    Raises :class:`ConfigError` that names the node.
    """
    with blame(node.id):
        for port in node.inputs:
            _check_port(port, nodes)
        _check_inputs(node)
        _check_functions(node)
        known = [facts[port.node] for port in node.inputs]
        batched = _batched(node, [facts[p.node].batched and p.name != "late" for p in node.inputs])
        upstream = dict.fromkeys(name for f in known for name in f.upstream)
        upstream.update((spec.id, None) for p in node.inputs for spec in specs_in(nodes[p.node]))
        depths = [facts[p.node].depth + bool(specs_in(nodes[p.node])) for p in node.inputs]
        if isinstance(node, FeedbackNode):
            _check_about(node, tuple(upstream), nodes)
        return Facts(
            max(depths, default=0), tuple(upstream), _fields(node, [f.fields for f in known]), batched
        )


def _check_port(port: Port, nodes: Mapping[str, Node]) -> None:
    if port.node not in nodes:
        raise UnknownName("node upstream", port.node, nodes)
    kind, ports = nodes[port.node].kind, nodes[port.node].ports
    if port.name not in ports:
        raise ConfigError(
            f"'{port.node}' is a {kind} and has no stream {port.name!r}: {nearest(port.name, ports)}"
        )


def _check_inputs(node: Node) -> None:
    count = len(node.inputs)
    if isinstance(node, SourceNode):
        if count:
            raise ConfigError("a source has nothing upstream")
    elif isinstance(node, MergeNode):
        if count < 2:
            raise ConfigError("a merge needs at least two streams")
        twice = next((p for p in node.inputs if node.inputs.count(p) > 1), None)
        if twice is not None:
            raise ConfigError(
                f"the stream of '{twice.node}' is merged with itself, which would double its items"
            )
    elif isinstance(node, AgentsNode):
        if not count:
            raise ConfigError("nothing feeds its listeners")
    elif count != 1:
        raise ConfigError(f"a {node.kind} has one stream upstream, not {count}")


def _check_functions(node: Node) -> None:
    match node:
        case MapNode() | FilterNode() | BranchNode() | KeyNode():
            check_function(node.fn, 1, "the item's value alone")
        case FlatMapNode():
            check_function(node.fn, 1, "the item's value alone", generator=True)
        case StatefulMapNode():
            check_function(node.fn, 2, "(state, value)")
        case FeedbackNode():
            check_function(node.score, 1, "the item's value alone")
        case BatchNode():
            if not isinstance(node.size, int) or node.size < 1:
                raise ConfigError(f"the size of a batch must be 1 or more, not {node.size!r}")
            if not isinstance(node.seconds, int | float) or not 0 < node.seconds < 86_400 * 365:
                raise ConfigError(
                    f"the seconds of a batch must be above 0 and below a year, not {node.seconds!r}"
                )
        case WindowNode():
            if node.by not in ("system", "event"):
                raise ConfigError(
                    f"a window goes by 'system' or 'event': {nearest(str(node.by), ('system', 'event'))}"
                )
            if not isinstance(node.wait, int | float) or not 0 <= node.wait < 86_400 * 365:
                raise ConfigError(f"'wait' must be seconds, 0 or more and below a year, not {node.wait!r}")


def _batched(node: Node, upstream: list[bool]) -> bool:
    match node:
        case BatchNode() | WindowNode():
            if any(upstream):
                raise ConfigError(f"a {node.kind} takes single items, but they are collected already")
            return True
        case MergeNode():
            if len(set(upstream)) > 1:
                raise ConfigError("a stream of batches cannot be merged with one of single items")
            return upstream[0]
        case FilterNode() | BranchNode() | KeyNode():
            return upstream[0]
    return False


def _fields(node: Node, upstream: list[frozenset[str] | None]) -> frozenset[str] | None:
    match node:
        case SourceNode(fields=fields) | MapNode(fields=fields):
            return fields
        case FlatMapNode(fields=fields) | StatefulMapNode(fields=fields):
            return fields
        case MergeNode():
            known = [fields for fields in upstream if fields is not None]
            return frozenset.intersection(*known) if len(known) == len(upstream) else None
        case LLMNode():
            fields = upstream[0]
            if fields is None:
                return None
            for name in node.spec.prompt.fields:
                if name not in fields:
                    raise ConfigError(
                        f"the prompt names {{{name}}}, which its items lack: {nearest(name, fields)}"
                    )
            return fields | {node.id}
        case AgentsNode():
            return None
    return upstream[0]


def _check_about(node: FeedbackNode, upstream: tuple[str, ...], nodes: Mapping[str, Node]) -> None:
    if not upstream:
        raise ConfigError("feedback is about answers of LLM nodes, and none is upstream")
    for name in node.about:
        if name in upstream:
            continue
        if name not in nodes:
            raise UnknownName("node in about:", name, upstream)
        if not isinstance(nodes[name], LLMNode):
            raise ConfigError(f"about names '{name}', which is a {nodes[name].kind} and no LLM node")
        raise ConfigError(f"about names '{name}', which is not upstream; upstream are: {', '.join(upstream)}")


def downstream_of(nodes: Mapping[str, Node]) -> dict[str, tuple[str, ...]]:
    """For each node all that can be reached from it. ``nodes`` are in order of the stream."""
    place = {name: i for i, name in enumerate(nodes)}
    reached: dict[str, set[str]] = {name: set() for name in nodes}
    for name in reversed(list(nodes)):
        for port in nodes[name].inputs:
            reached[port.node] |= {name} | reached[name]
    return {name: tuple(sorted(after, key=place.__getitem__)) for name, after in reached.items()}


def warnings_of(nodes: Mapping[str, Node], facts: Mapping[str, Facts]) -> list[str]:
    """What works and is probably not meant."""
    used = {port for node in nodes.values() for port in node.inputs}
    found = []
    for node in nodes.values():
        if isinstance(node, AgentsNode):
            continue  # what an agent sends to nobody is its own business
        # Late items without a stream of their own go to the dead letters, so they are not lost.
        loose = [port for port in node.ports if port != "late" and Port(node.id, port) not in used]
        if loose and not isinstance(node, FeedbackNode):
            which = f"its stream '{loose[0]}'" if loose[0] else "its stream"
            if len(loose) < 2:
                found.append(f"node '{node.id}': {which} ends nowhere: no sink and no feedback follows")
            else:
                found.append(f"node '{node.id}': its streams end nowhere: no sink and no feedback follows")
        if isinstance(node, LLMNode):
            if not node.spec.prompt.fields:
                found.append(
                    f"node '{node.id}': its prompt names no field, so it asks the same for every item"
                )
            above = facts[node.inputs[0].node].fields
            if above is not None and node.id in above:
                found.append(
                    f"node '{node.id}': its answer takes the place of the item's own field '{node.id}'"
                )
    return found
