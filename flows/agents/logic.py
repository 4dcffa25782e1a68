"""A group of listeners as a step of Bytewax."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import bytewax.operators as op
from bytewax.dataflow import Stream, operator
from bytewax.operators import StatefulBatchLogic
from typing_extensions import override

from chainwax.flows.agents.engine import AskingRun, Engine, EngineThread, Out
from chainwax.flows.agents.groups import Group
from chainwax.flows.agents.questions import Questions, messages_of, node_spec
from chainwax.flows.agents.saved import load_state
from chainwax.flows.chainstream._world import World
from chainwax.flows.nodes import AgentsNode
from chainwax.operators.item import Item
from chainwax.operators.llm import POLL
from chainwax.operators.pressure import Lane, Pressure
from chainwax.router import CallResult, LLMInterface, LLMManager, NodeSpec, Query, default_manager
from chainwax.router.types import call_id

__all__ = ["agents_step"]

_NAP = 0.0005
_State = tuple[bytes | None, list[list[tuple[str, Item]]], list[Out]]
"""What the listeners remember, what has not been worked off, and what came out and is not sent on."""
_NOTHING: _State = (None, [], [])


@operator
def agents_step(
    step_id: str,
    up: Stream[Any],
    node: AgentsNode,
    specs: Sequence[NodeSpec],
    manager: LLMManager | None,
    pressure: Pressure,
) -> Stream[Any]:
    """Run a group's listeners.

    Takes pairs of a stream's name and an item, and gives such pairs, with failures between them.
    """
    group = node.group
    shared = _Shared(group, node.world, Questions(node.sites), specs, manager, pressure)
    # One key: the order of a stream is that of its items, whatever they are about.
    keyed = op.flat_map_batch("key", up, lambda batch: [(group.id, pair) for pair in batch])
    run = op.stateful_batch("run", keyed, shared.build)
    return op.flat_map_batch("out", run, lambda batch: [out for _, out in batch])


class _Shared:
    """What the step needs on whichever worker it comes to be."""

    def __init__(
        self,
        group: Group,
        world: World,
        questions: Questions,
        specs: Sequence[NodeSpec],
        manager: LLMManager | None,
        pressure: Pressure,
    ) -> None:
        self.group = group
        self.world = world
        self.questions = questions
        self._specs = {spec.id: spec for spec in specs}
        self._manager = manager
        self._pressure = pressure
        self._interfaces: dict[str, LLMInterface] = {}
        self._lock = threading.Lock()

    def build(self, state: _State | None) -> StatefulBatchLogic[tuple[str, Item], Out, _State]:
        if state is not None:
            load_state(self.group, state[0], self.world)
        if not self.group.asks:
            return _Inline(self, state)
        settings = self.manager.settings
        lane = Lane(settings.defaults.max_in_flight or settings.run.max_in_flight)
        self._pressure.add(lane)
        return _Asking(self, lane, state)

    @property
    def manager(self) -> LLMManager:
        """The one that was given, else the process's own."""
        with self._lock:
            if self._manager is None:
                self._manager = default_manager()
            return self._manager

    def interface(self, run: AskingRun, node: str, kind: str) -> LLMInterface:
        """The interface of a node; one that nobody foresaw is made now."""
        interface = self._interfaces.get(node)
        if interface is None:
            spec = self._specs.get(node)
            if spec is None:
                assert run.listener is not None
                flow = next((spec.flow for spec in self._specs.values()), "flow")
                spec = replace(node_spec(node, run.listener, kind), flow=flow)
            self.manager.ensure_run(spec.flow)
            interface = self._interfaces[node] = self.manager.register(spec)
        return interface


class _Inline(StatefulBatchLogic[tuple[str, Item], Out, _State]):
    """A group that asks no model: it is worked off at once."""

    def __init__(self, shared: _Shared, state: _State | None) -> None:
        self._kept = shared.world.kept
        self._engine = Engine(shared.group, 1, _never)
        self._ready: list[Out] = []
        if state is not None:
            self._engine.restore(state[1])
            self._ready = state[2]

    @override
    def on_batch(self, values: list[tuple[str, Item]]) -> tuple[list[Out], bool]:
        out, self._ready = self._ready, []
        engine = self._engine
        for stream, item in values:
            if engine.listens(stream):
                engine.feed(stream, item)
        engine.pump(out)
        return out, StatefulBatchLogic.RETAIN

    @override
    def snapshot(self) -> _State:
        return (*self._engine.snapshot(), self._ready) if self._kept else _NOTHING


class _Asking(StatefulBatchLogic[tuple[str, Item], Out, _State]):
    """A group that asks models: it is worked off on a thread of its own."""

    def __init__(self, shared: _Shared, lane: Lane, state: _State | None) -> None:
        self._shared = shared
        self._lane = lane
        self._outbox: dict[str, tuple[LLMInterface, list[Query]]] = {}
        self._asked: dict[str, AskingRun] = {}
        engine = Engine(
            shared.group,
            lane.limit,
            self._ask,
            kept=shared.world.kept,
            trace=shared.world.trace,
        )
        self._thread = EngineThread(engine, self._send)
        if state is not None:
            self._thread.restore(state[1])
            self._thread.out.extend(state[2])

    # -- Bytewax's callbacks --------------------------------------------------------------------

    @override
    def on_batch(self, values: list[tuple[str, Item]]) -> tuple[list[Out], bool]:
        out: list[Out] = []
        thread = self._thread
        # Bytewax does not push back on work off the worker: wait here, at the bound.
        while thread.left > 2 * self._lane.limit and not thread.engine.halted:
            thread.check()
            self._drain(out)
            time.sleep(_NAP)
        thread.feed(values)
        self._drain(out)
        return out, StatefulBatchLogic.RETAIN

    @override
    def on_notify(self) -> tuple[list[Out], bool]:
        out: list[Out] = []
        self._drain(out)
        return out, StatefulBatchLogic.RETAIN

    @override
    def on_eof(self) -> tuple[list[Out], bool]:
        out: list[Out] = []
        while self._thread.left and not self._thread.engine.halted:
            self._thread.check()
            time.sleep(_NAP)
        self._thread.end()
        self._drain(out)
        return out, StatefulBatchLogic.RETAIN

    @override
    def notify_at(self) -> datetime | None:
        # As long as sources are held back on its account, it has to look again.
        thread = self._thread
        goes_on = thread.left > 0 and not thread.engine.halted
        waits = goes_on or bool(thread.out) or self._lane.backlog > 0
        return datetime.now(UTC) + POLL if waits else None

    @override
    def snapshot(self) -> _State:
        return self._thread.snapshot() if self._shared.world.kept else _NOTHING

    # -- inside ---------------------------------------------------------------------------------

    def _drain(self, out: list[Out]) -> None:
        self._thread.check()
        given = self._thread.out
        while given:
            out.append(given.popleft())
        self._lane.backlog = max(0, self._thread.left - self._lane.limit)

    def _send(self) -> None:
        """On the engine's thread: what its listeners asked goes to the router, all at once."""
        for interface, queries in self._outbox.values():
            interface.submit(queries, self._answered)
        self._outbox.clear()

    def _ask(self, run: AskingRun, kind: str, prompt: Any, frame: Any) -> None:
        messages = messages_of(prompt)
        assert run.listener is not None
        node = self._shared.questions.node_of(run.listener, frame)
        interface = self._shared.interface(run, node, kind)
        number = run.numbers[node] = run.numbers.get(node, -1) + 1
        position = f"{run.item.position}?{number}" if number else run.item.position
        # Two listeners may be at the same place of the source at once, and an item may come twice.
        identity = self._identity(interface, run, position, messages)
        while identity in self._asked:
            position += "#"
            identity = self._identity(interface, run, position, messages)
        self._asked[identity] = run
        query = Query(
            interface.node,
            identity,
            messages,
            run.item.key,
            position,
            (*run.item.calls, *run.refs),
            run.item.window_id,
        )
        self._outbox.setdefault(node, (interface, []))[1].append(query)

    def _identity(self, interface: LLMInterface, run: AskingRun, position: str, messages: Any) -> str:
        return call_id(self._shared.manager.run_id, interface.node, run.item.key, position, messages)

    def _answered(self, query: Query, result: CallResult) -> None:
        """Called from the router's threads."""
        self._thread.answer(self._asked.pop(query.call_id), result)


def _never(run: AskingRun, kind: str, prompt: object, frame: object) -> None:
    raise AssertionError("unreachable: nothing in this group asks")
