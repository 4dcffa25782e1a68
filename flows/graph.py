"""The graph that a person writes: a flow, its streams, and what is known of them before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Unpack

from pydantic import BaseModel

from chainwax.flows.check import (
    Facts,
    blame,
    check_function,
    check_id,
    downstream_of,
    facts_of,
    in_order,
    warnings_of,
)
from chainwax.flows.compile import compile_flow
from chainwax.flows.decide import consumers_of, decider, rerun
from chainwax.flows.draw import draw_mermaid, draw_svg
from chainwax.flows.nodes import (
    AgentsNode,
    BatchNode,
    BranchNode,
    FeedbackNode,
    FilterNode,
    FlatMapNode,
    KeyNode,
    LLMNode,
    LLMOptions,
    MapNode,
    MergeNode,
    Node,
    Port,
    SinkNode,
    SourceNode,
    StatefulMapNode,
    WindowNode,
    llm_spec,
    specs_in,
)
from chainwax.operators.window import Windows
from chainwax.router.answers import AnswerForm, Choice, FreeText, Structured
from chainwax.router.errors import ConfigError, UnknownName
from chainwax.router.manager import LLMManager
from chainwax.router.types import FeedbackKind, NodeSpec

if TYPE_CHECKING:
    from bytewax.dataflow import Dataflow
    from bytewax.inputs import Source
    from bytewax.outputs import Sink

__all__ = ["Branches", "Flow", "NodeInfo", "Stream", "WindowStream"]


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """What the graph knows of one node."""

    id: str
    kind: str
    priority: int
    depth: int
    """LLM nodes upstream on the longest path."""
    upstream: tuple[str, ...]
    """Ids of the LLM nodes upstream."""
    downstream: tuple[str, ...]
    """Ids of all nodes that can be reached."""
    fields: frozenset[str] | None
    """Names that each item has that the node emits; None where it is not known."""
    batched: bool
    """Whether it emits batches."""


class Flow:
    r"""A stream graph.

    Each step is a node with an id of its own; what a flow can see is wrong it refuses at once, with a
    :class:`~chainwax.router.errors.ConfigError` that names the node.

    >>> flow = Flow("support")
    >>> tickets = flow.source("tickets", fields=["text"])
    >>> team = tickets.choose("team", "Which team?\n\n{text}", ["billing", "technical"])
    >>> team.filter("hard", lambda item: item["team"] == "technical").sink("out")
    >>> flow.info("team").downstream
    ('hard', 'out')
    """

    def __init__(self, id: str, *, target: float | None = None) -> None:
        """``target`` is the least quality of the end result, as a share of the strongest models'."""
        check_id("the flow's name", id)
        if target is not None and not (isinstance(target, int | float) and 0 < target <= 1):
            raise ConfigError(f"flow '{id}': its target must be above 0 and at most 1, not {target!r}")
        self.id = id
        self.target = target
        self._nodes: dict[str, Node] = {}
        self._facts: dict[str, Facts] = {}
        self._downstream: dict[str, tuple[str, ...]] | None = None
        self._specs: dict[str, NodeSpec] | None = None

    @classmethod
    def from_nodes(cls, id: str, nodes: Iterable[Node]) -> Flow:
        """A flow of nodes that a program made, in any order.

        Raises :class:`ConfigError` as the methods do, and for cycles.
        """
        flow = cls(id)
        for node in in_order(nodes):
            flow._add(node)
        return flow

    def __repr__(self) -> str:
        return f"Flow({self.id!r}, {len(self._nodes)} nodes)"

    def _add(self, node: Node) -> None:
        check_id("the node's name", node.id)
        if node.id in self._nodes:
            raise ConfigError(f"node '{node.id}': there is a {self._nodes[node.id].kind} of this id already")
        self._facts[node.id] = facts_of(node, self._nodes, self._facts)
        self._nodes[node.id] = node
        self._downstream = self._specs = None

    # What it is made of

    @property
    def nodes(self) -> Mapping[str, Node]:
        """All nodes by id, each after those that it hangs on."""
        return MappingProxyType(self._nodes)

    @property
    def sources(self) -> list[str]:
        """Ids of the sources."""
        return [node.id for node in self._nodes.values() if isinstance(node, SourceNode)]

    @property
    def sinks(self) -> list[str]:
        """Ids of the sinks."""
        return [node.id for node in self._nodes.values() if isinstance(node, SinkNode)]

    @property
    def parts(self) -> dict[str, Callable[[bool], None]]:
        """What of it can be stopped (called with True) and started while it runs, by name: its agents."""
        worlds = [node.world for node in self._nodes.values() if isinstance(node, AgentsNode)]
        return {name: partial(world.stop, name) for world in worlds for name in world.agents}

    @property
    def warnings(self) -> list[str]:
        """What works and is probably not meant, for instance a stream that ends nowhere."""
        return warnings_of(self._nodes, self._facts)

    def source(
        self, id: str, *, schema: type[BaseModel] | None = None, fields: Iterable[str] | None = None
    ) -> Stream:
        """A source of items; what it reads is said when the flow is compiled.

        With ``schema`` or ``fields`` the names that each item has are known, and prompts are checked
        against them. Items themselves are not validated.
        """
        if schema is not None:
            with blame(id):
                if fields is not None:
                    raise ConfigError("a source takes either schema or fields")
                if not (isinstance(schema, type) and issubclass(schema, BaseModel)):
                    raise ConfigError(f"the schema must be a pydantic model, not {schema!r}")
            fields = schema.model_fields
        self._add(SourceNode(id, fields=_names(id, fields)))
        return Stream(self, Port(id))

    def merge(self, id: str, *streams: Stream) -> Stream:
        """Several streams in one; the order is that of arrival."""
        for stream in streams:
            if stream.flow is not self:
                raise ConfigError(
                    f"node '{id}': the stream of '{stream.id}' belongs to the flow '{stream.flow.id}', "
                    f"not to '{self.id}'"
                )
        self._add(MergeNode(id, tuple(stream.port for stream in streams)))
        return Stream(self, Port(id))

    # What it knows

    def build(self) -> Flow:
        """Check what can only be checked when the flow is complete; returns the flow itself.

        Raises :class:`ConfigError` for a flow without a source.
        """
        if not self.sources:
            raise ConfigError(f"flow '{self.id}': it has no source")
        return self

    def info(self, id: str) -> NodeInfo:
        """What is known of a node. Raises :class:`UnknownName`."""
        if id not in self._nodes:
            raise UnknownName(f"node of the flow '{self.id}':", id, self._nodes)
        if self._downstream is None:
            self._downstream = downstream_of(self._nodes)
        node, facts = self._nodes[id], self._facts[id]
        priority = node.spec.priority if isinstance(node, LLMNode) else 0
        return NodeInfo(
            id,
            node.kind,
            priority,
            facts.depth,
            facts.upstream,
            self._downstream[id],
            facts.fields,
            facts.batched,
        )

    def specs(self) -> dict[str, NodeSpec]:
        """The LLM nodes as the router knows them, by id. Raises as :meth:`build`."""
        self.build()
        if self._specs is None:
            self._specs = {}
            consumers = consumers_of(self._nodes.values())
            ways = rerun(self._nodes, consumers)
            for node in self._nodes.values():
                info = self.info(node.id)
                for spec in specs_in(node):
                    self._specs[spec.id] = replace(
                        spec,
                        flow=self.id,
                        depth=info.depth,
                        downstream=info.downstream,
                        upstream=info.upstream,
                        flow_target=self.target,
                        decide=decider(node.id, consumers) if isinstance(node, LLMNode) else None,
                        again=ways.get(node.id, {}),
                    )
        return dict(self._specs)

    # What becomes of it

    def mermaid(self) -> str:
        """The graph as a Mermaid diagram."""
        return draw_mermaid(self.build())

    def svg(self) -> str:
        """The graph as a picture that stands alone."""
        return draw_svg(self.build())

    def draw(self, path: str | Path) -> Path:
        """Write the diagram to a file; its name ends in ``.mmd`` or ``.svg``."""
        path = Path(path)
        drawers = {".mmd": self.mermaid, ".svg": self.svg}
        if path.suffix not in drawers:
            raise ConfigError(f"cannot draw '{path.name}': a drawing is .mmd (Mermaid) or .svg")
        path.write_text(drawers[path.suffix](), encoding="utf-8")
        return path

    def compile(
        self,
        sources: Mapping[str, Source[Any]],
        sinks: Mapping[str, Sink[Any]],
        *,
        dead_letters: Sink[Any] | None = None,
        manager: LLMManager | None = None,
        live: bool = True,
        entries: Mapping[str, Source[Any]] | None = None,
        workers: int = 1,
    ) -> Dataflow:
        """The flow as a Bytewax dataflow; see :func:`~chainwax.flows.compile.compile_flow`."""
        return compile_flow(
            self.build(),
            sources,
            sinks,
            dead_letters=dead_letters,
            manager=manager,
            live=live,
            entries=entries,
            workers=workers,
        )


class Branches(NamedTuple):
    """The two streams of a branch."""

    yes: Stream
    no: Stream


@dataclass(frozen=True, slots=True)
class Stream:
    """Items on their way from a node. Each method adds a node; none of them changes an item.

    Functions that are given get the item's value alone (of a batch: the list of values). One that fails
    sends its item to the dead letters. ``pure`` says that a function does nothing but compute: such ones
    may be run again on another model's answer, to see whether it would have made a difference.
    """

    flow: Flow
    port: Port

    @property
    def id(self) -> str:
        """The node that it comes from."""
        return self.port.node

    def __repr__(self) -> str:
        port = f".{self.port.name}" if self.port.name else ""
        return f"<Stream {self.flow.id}.{self.port.node}{port}>"

    def _then(self, node: Node) -> Stream:
        self.flow._add(node)
        return Stream(self.flow, Port(node.id))

    def map(
        self, id: str, fn: Callable[[Any], Any], *, fields: Iterable[str] | None = None, pure: bool = True
    ) -> Stream:
        """Another value for each item; a batch becomes a single item. ``fields`` names the new value's."""
        return self._then(MapNode(id, (self.port,), fn, _names(id, fields), pure))

    def filter(self, id: str, fn: Callable[[Any], object], *, pure: bool = True) -> Stream:
        """Only the items that the function says yes to."""
        return self._then(FilterNode(id, (self.port,), fn, pure))

    def flat_map(
        self,
        id: str,
        fn: Callable[[Any], Iterable[Any]],
        *,
        fields: Iterable[str] | None = None,
        pure: bool = True,
    ) -> Stream:
        """Any number of values for each item."""
        return self._then(FlatMapNode(id, (self.port,), fn, _names(id, fields), pure))

    def branch(self, id: str, fn: Callable[[Any], object], *, pure: bool = True) -> Branches:
        """Two streams: the items that the function says yes to, and the others."""
        self.flow._add(BranchNode(id, (self.port,), fn, pure))
        return Branches(Stream(self.flow, Port(id, "yes")), Stream(self.flow, Port(id, "no")))

    def merge(self, id: str, *others: Stream) -> Stream:
        """This stream and others in one."""
        return self.flow.merge(id, self, *others)

    def key(self, id: str, fn: Callable[[Any], str | int]) -> Stream:
        """Say what each item is about: order, windows and states are kept for each key."""
        return self._then(KeyNode(id, (self.port,), fn))

    def batch(self, id: str, *, size: int, seconds: float) -> Stream:
        """Collect up to ``size`` items, for at most ``seconds``."""
        return self._then(BatchNode(id, (self.port,), size, seconds))

    def window(
        self, id: str, windower: Windows, *, by: Literal["system", "event"] = "system", wait: float = 0.0
    ) -> WindowStream:
        """Collect items by time, for each key: ``Tumbling``, ``Sliding`` or ``Session``.

        By ``event`` the items' own time counts, and ``wait`` is how many seconds they may be out of order.
        Later ones are in the stream ``late``, or the dead letters where nothing takes it.
        """
        if not isinstance(windower, Windows):
            raise ConfigError(f"node '{id}': a window is Tumbling, Sliding or Session, not {windower!r}")
        self.flow._add(WindowNode(id, (self.port,), windower, by, wait))
        return WindowStream(self.flow, Port(id))

    def stateful_map(
        self, id: str, fn: Callable[[Any, Any], tuple[Any, Any]], *, fields: Iterable[str] | None = None
    ) -> Stream:
        """``fn(state, value)`` gives the new state and the new value; each key's first state is None.

        A state is not changed in place but replaced, and can be pickled: it is kept for a restart.
        """
        return self._then(StatefulMapNode(id, (self.port,), fn, _names(id, fields)))

    def query(
        self,
        id: str,
        prompt: str,
        *,
        check: Callable[[str], object] | None = None,
        stream: bool = False,
        **options: Unpack[LLMOptions],
    ) -> Stream:
        """Ask for a text; the item gains it as the field ``id``.

        ``check`` may refuse an answer by raising ValueError or returning False. With ``stream`` an item
        comes out for each piece, whose field is ``{"delta", "index", "is_end"}``.
        """
        if check is not None:
            with blame(id):
                check_function(check, 1, "the answer's text alone")
        return self._ask(id, "query", prompt, lambda: FreeText(check), options, stream)

    def choose(self, id: str, prompt: str, choices: Sequence[str], **options: Unpack[LLMOptions]) -> Stream:
        """Ask for one of some texts; the item gains it as the field ``id``."""
        return self._ask(id, "choose", prompt, lambda: Choice(choices), options)

    def extract(self, id: str, prompt: str, schema: type[BaseModel], **options: Unpack[LLMOptions]) -> Stream:
        """Ask for a pydantic model; the item gains it as the field ``id``."""
        return self._ask(id, "extract", prompt, lambda: Structured(schema), options)

    def _ask(
        self,
        id: str,
        kind: str,
        prompt: str,
        answer: Callable[[], AnswerForm],
        options: LLMOptions,
        stream: bool = False,
    ) -> Stream:
        with blame(id):
            spec = llm_spec(id, kind, prompt, answer(), options)
        ordered = options.get("ordered")
        return self._then(
            LLMNode(
                id,
                (self.port,),
                spec,
                True if ordered is None else ordered,
                options.get("max_in_flight"),
                stream,
            )
        )

    def feedback(
        self,
        id: str,
        score: Callable[[Any], Any],
        *,
        about: Iterable[str] | None = None,
        metric: str = "score",
        kind: FeedbackKind | str = FeedbackKind.downstream,
    ) -> Stream:
        """Score what became of the answers; the items go on unchanged (batches one by one).

        ``about`` names LLM nodes upstream whose answers the score is one of. Left out, it is a score of the
        item's end result, and each answer on the item's way gets its share of credit and blame.
        """
        about = (about,) if isinstance(about, str) else tuple(about or ())
        try:
            kind = FeedbackKind(kind)
        except ValueError:
            with blame(id):
                raise UnknownName("kind of feedback", str(kind), list(FeedbackKind)) from None
        return self._then(FeedbackNode(id, (self.port,), score, about, metric, kind))

    def sink(self, id: str) -> None:
        """Where the items' values go; what writes them is said when the flow is compiled."""
        self._then(SinkNode(id, (self.port,)))


class WindowStream(Stream):
    """The stream of a window's batches."""

    __slots__ = ()

    @property
    def late(self) -> Stream:
        """The items that came after their window was closed."""
        return Stream(self.flow, Port(self.port.node, "late"))


def _names(node_id: str, fields: Iterable[str] | None) -> frozenset[str] | None:
    if fields is None:
        return None
    if isinstance(fields, str):
        raise ConfigError(f"node '{node_id}': fields must be a list of names, not the text {fields!r}")
    return frozenset(fields)
