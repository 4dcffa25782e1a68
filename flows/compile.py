"""From the graph to Bytewax: each node becomes one step or a few, all failures end in one place.

Steps work on whole batches of what Bytewax hands over. A step's own name is the node's id; helping steps
have a ``:`` in theirs, which no id can have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import bytewax.operators as op
from bytewax.dataflow import Dataflow
from bytewax.dataflow import Stream as ByteStream
from bytewax.inputs import Source
from bytewax.outputs import FixedPartitionedSink, Sink

from chainwax.connectors.sinks import ConsoleSink, JsonLinesSink, to_json
from chainwax.flows import steps
from chainwax.flows.agents.line import run_line
from chainwax.flows.agents.logic import agents_step
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
    SinkNode,
    SourceNode,
    StatefulMapNode,
    WindowNode,
)
from chainwax.operators._shards import shards_for
from chainwax.operators.batch import batch
from chainwax.operators.feedback import feedback
from chainwax.operators.item import Batch, FailedItem, Item
from chainwax.operators.llm import llm_node
from chainwax.operators.pressure import Pressure
from chainwax.operators.window import window
from chainwax.router.errors import ConfigError, UnknownName
from chainwax.router.manager import LLMManager

if TYPE_CHECKING:
    from chainwax.flows.graph import Flow

__all__ = ["compile_flow"]


def compile_flow(
    flow: Flow,
    sources: Mapping[str, Source[Any]],
    sinks: Mapping[str, Sink[Any]],
    *,
    dead_letters: Sink[Any] | None = None,
    manager: LLMManager | None = None,
    live: bool = True,
    entries: Mapping[str, Source[Any]] | None = None,
    workers: int = 1,
) -> Dataflow:
    """A flow as a Bytewax dataflow, which ``bytewax.run`` and ``bytewax.testing.run_main`` run.

    ``sources`` and ``sinks`` say by node id what reads and writes. A source emits records of
    ``chainwax.connectors``, or anything else, which is then an item whose position is a hash of its content.
    A sink that is partitioned gets ``(key, value)``, another the value alone; one with
    ``takes_items = True`` gets an :class:`~chainwax.connectors.Outgoing` as its value. One with a method
    ``encode`` has it called before, so that what it refuses goes to the dead letters; one with a method
    ``belongs_to`` is told the manager's run.

    What fails goes to ``dead_letters`` as :func:`~chainwax.flows.steps.dead_letter` makes it; with None it
    is logged, without its content. ``manager`` None takes the process's own for the LLM nodes; with one that
    records, the sources' items and the dead letters are recorded too. ``live`` False says that the sources
    are recorded streams: windows by event time then close by the items' time alone, the same at any speed.
    ``entries`` are sources of ready-made items and batches that go into the node of their name, beside what
    comes from upstream: what a retry of dead letters is made of. ``workers`` says how many Bytewax workers
    there will be, in all processes, so that each gets as many of the calls.

    Raises :class:`ConfigError` where a source or a sink is missing or is none of the flow's.
    """
    _check_bound("source", flow.sources, sources, Source)
    _check_bound("sink", flow.sinks, sinks, Sink)
    return _Compiler(flow, sources, sinks, manager, live, entries or {}, shards_for(workers)).compile(
        dead_letters
    )


def _check_bound(what: str, wanted: list[str], given: Mapping[str, Any], kind: type) -> None:
    for name in given:
        if name not in wanted:
            raise UnknownName(f"{what} of the flow:", name, wanted)
    for name in wanted:
        if name not in given:
            raise ConfigError(f"node '{name}': nothing is given for this {what}: {what}s={{'{name}': …}}")
        if not isinstance(given[name], kind):
            raise ConfigError(f"node '{name}': {str(given[name])[:80]!r} is no Bytewax {what}")


def waits_twice(nodes: Mapping[str, Node], sink: str) -> bool:
    """Whether outputs of a sink that come from one item the same way may come at different times.

    Pieces of a streamed answer do, and items that come both through a window and past it.
    """
    found: set[str] = set()
    left = [sink]
    while left:
        id = left.pop()
        if id not in found:
            found.add(id)
            left += [port.node for port in nodes[id].inputs]
    up = [nodes[id] for id in found]
    streamed = any(isinstance(node, LLMNode) and node.stream for node in up)
    merged = any(isinstance(node, MergeNode) for node in up)
    return streamed or (merged and any(isinstance(node, BatchNode | WindowNode) for node in up))


class _Compiler:
    def __init__(
        self,
        flow: Flow,
        sources: Mapping[str, Source[Any]],
        sinks: Mapping[str, Sink[Any]],
        manager: LLMManager | None,
        live: bool,
        entries: Mapping[str, Source[Any]],
        shards: int,
    ) -> None:
        self._flow = flow
        self._sources = sources
        self._sinks = sinks
        self._manager = manager
        self._live = live
        self._entries = entries
        self._shards = shards
        self._pressure = Pressure()
        self._specs = flow.specs()
        self._dataflow = Dataflow(flow.id)
        self._streams: dict[Port, ByteStream[Any]] = {}
        self._errs: list[ByteStream[FailedItem]] = []

    def compile(self, dead_letters: Sink[Any] | None) -> Dataflow:
        for node in self._flow.nodes.values():
            self._node(node)
        taken = {port for node in self._flow.nodes.values() for port in node.inputs}
        for port, stream in self._streams.items():
            if port.name == "late" and port not in taken:
                self._errs.append(
                    op.flat_map_batch(f"{port.node}:late", stream, steps.late_letters(port.node))
                )
        failed = op.merge("chainwax:failed", *self._errs)
        letters = op.flat_map_batch("chainwax:letters", failed, steps.Letters(self._manager))
        # Letters of one item have all in common but what they say.
        self._output("chainwax:dead-letters", letters, dead_letters or steps.LogSink(), by_value=True)
        return self._dataflow

    def _node(self, node: Node) -> None:
        ups = [self._streams[port] for port in node.inputs]
        if node.id in self._entries:
            source = steps.held_back(self._entries[node.id], self._pressure)
            entered = op.input(f"{node.id}:entry", self._dataflow, source)
            ups[0] = op.merge(f"{node.id}:entered", ups[0], entered)
        match node:
            case SourceNode(id):
                source = steps.held_back(self._sources[id], self._pressure)
                read = op.input(id, self._dataflow, source)
                self._keep(id, op.flat_map_batch(f"{id}:items", read, steps.Reader(id, self._manager)))
            case MapNode(id, _, fn):
                self._work(id, ups[0], steps.map_each(id, fn))
            case FilterNode(id, _, fn):
                self._work(id, ups[0], steps.filter_each(id, fn))
            case FlatMapNode(id, _, fn):
                self._work(id, ups[0], steps.flat_map_each(id, fn))
            case KeyNode(id, _, fn):
                self._work(id, ups[0], steps.key_each(id, fn))
            case BranchNode(id, _, fn):
                sorted_ = op.flat_map_batch(id, ups[0], steps.branch_each(id, fn))
                for name in ("yes", "no", "failed"):
                    side = op.flat_map_batch(f"{id}:{name}", sorted_, steps.pick(name))
                    if name == "failed":
                        self._errs.append(side)
                    else:
                        self._streams[Port(id, name)] = side
            case StatefulMapNode(id, _, stateful):
                keyed = op.flat_map_batch(f"{id}:key", ups[0], steps.by_key)
                mapped = op.stateful_batch(id, keyed, lambda state: steps.StatefulMap(id, stateful, state))
                self._keep(id, op.flat_map_batch(f"{id}:items", mapped, steps.without_key))
            case MergeNode(id):
                self._streams[Port(id)] = op.merge(id, *ups)
            case BatchNode(id, _, size, seconds):
                batches = batch(id, ups[0], size=size, seconds=seconds)
                self._streams[Port(id)] = batches.oks
                self._errs.append(batches.errs)
            case WindowNode(id, _, windower, by, wait):
                windows = window(id, ups[0], windower, by=by, wait_seconds=wait, live=self._live)
                self._streams[Port(id)] = windows.oks
                self._streams[Port(id, "late")] = windows.late
                self._errs.append(windows.errs)
            case LLMNode(id):
                self._ask(node, ups[0])
            case AgentsNode():
                self._listen(node, ups)
            case FeedbackNode(id, _, score, about, metric, kind):
                up = ups[0]
                if self._flow.info(node.inputs[0].node).batched and node.inputs[0].name != "late":
                    up = op.flat_map_batch(f"{id}:items", up, steps.unpacked)
                scored = feedback(
                    id,
                    up,
                    score,
                    about=about,
                    metric=metric,
                    kind=kind,
                    manager=self._manager,
                )
                self._streams[Port(id)] = scored.oks
                self._errs.append(scored.errs)
            case SinkNode(id):
                self._sink(id, ups[0])
            case _:
                raise ConfigError(
                    f"node '{node.id}': nothing is known of nodes of the class {type(node).__name__}"
                )

    def _ask(self, node: LLMNode, up: ByteStream[Item | Batch]) -> None:
        asked = llm_node(
            node.id,
            up,
            self._specs[node.id],
            manager=self._manager,
            ordered=node.ordered,
            max_in_flight=node.max_in_flight,
            stream=node.stream,
            shards=self._shards,
            pressure=self._pressure,
        )
        self._streams[Port(node.id)] = asked.oks
        self._errs.append(asked.errs)

    def _listen(self, node: AgentsNode, ups: list[ByteStream[Item]]) -> None:
        if node.group.is_line and node.tags != (None,):
            up = ups[0] if len(ups) == 1 else op.merge(f"{node.id}:fed", *ups)
            self._ran(node, op.flat_map_batch(node.id, up, run_line(node.group)))
            return
        tagged = [
            op.flat_map_batch(f"{node.id}:in{number}", up, steps.tagged(tag))
            for number, (up, tag) in enumerate(zip(ups, node.tags, strict=True))
        ]
        fed = tagged[0] if len(tagged) == 1 else op.merge(f"{node.id}:fed", *tagged)
        specs = [self._specs[site.node] for site in node.sites]
        self._ran(node, agents_step(node.id, fed, node, specs, self._manager, self._pressure))

    def _ran(self, node: AgentsNode, ran: ByteStream[Any]) -> None:
        alone = len(node.ports) == 1
        for number, name in enumerate(node.ports):
            self._streams[Port(node.id, name)] = op.flat_map_batch(
                f"{node.id}:out{number}", ran, steps.of_stream(name, alone=alone)
            )
        self._errs.append(op.flat_map_batch(f"{node.id}:failed", ran, steps.failures_of))

    def _work(self, node_id: str, up: ByteStream[Item | Batch], work: steps.Work) -> None:
        self._keep(node_id, op.flat_map_batch(node_id, up, work))

    def _keep(self, node_id: str, mixed: ByteStream[Any]) -> None:
        """Part what went well from what failed."""
        parted = op.branch(f"{node_id}:ok", mixed, steps.is_ok)
        self._streams[Port(node_id)] = parted.trues
        self._errs.append(parted.falses)

    def _sink(self, node_id: str, up: ByteStream[Item | Batch]) -> None:
        sink = self._sinks[node_id]
        encode = to_json if isinstance(sink, JsonLinesSink | ConsoleSink) else getattr(sink, "encode", None)
        if encode is not None:
            # What cannot be written goes to the dead letters instead of ending up half-written.
            written = op.flat_map_batch(f"{node_id}:json", up, steps.map_each(node_id, encode))
            parted = op.branch(f"{node_id}:ok", written, steps.is_ok)
            self._errs.append(parted.falses)
            up = parted.trues
        self._output(node_id, up, sink, by_value=waits_twice(self._flow.nodes, node_id))

    def _output(self, step_id: str, up: ByteStream[Any], sink: Sink[Any], *, by_value: bool) -> None:
        tell = getattr(sink, "belongs_to", None)
        if tell is not None and self._manager is not None:
            manager = self._manager
            tell(lambda: manager.run_id, by_value=by_value)
        values: Callable[[list[Any]], list[Any]] = steps.plain_values
        if isinstance(sink, FixedPartitionedSink):
            values = steps.outgoing if getattr(sink, "takes_items", False) else steps.keyed_values
        op.output(step_id, op.flat_map_batch(f"{step_id}:values", up, values), sink)
