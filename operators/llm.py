"""The LLM operators: query, choose, extract. They ask a router and never block the worker on a call.

Bytewax's callbacks are synchronous, and nothing outside can wake a worker. So an LLM node is a stateful
step that hands its items to the router's loop and, while calls are in flight, looks every millisecond for
what is done. Its state is the items that are not answered yet: after a crash they are asked again, and the
recording answers what was paid for already.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import bytewax.operators as op
from bytewax.dataflow import Stream, operator
from bytewax.operators import StatefulBatchLogic
from pydantic import BaseModel
from typing_extensions import override

from chainwax.operators._shards import SHARDS, split, to_shards
from chainwax.operators.item import Batch, FailedItem, Item
from chainwax.operators.pressure import Lane, Pressure
from chainwax.router import (
    CallResult,
    Cancelled,
    Choice,
    FreeText,
    LLMInterface,
    LLMManager,
    NodeSpec,
    Prompt,
    Query,
    Structured,
    default_manager,
)

__all__ = ["LLMOut", "choose", "extract", "llm_node", "query"]

POLL = timedelta(milliseconds=1)
"""How often a step with calls in flight looks for answers: at 1 ms it takes 6 % of a core."""
_NAP = 0.0005


@dataclass(frozen=True)
class LLMOut:
    """Streams of an LLM operator."""

    oks: Stream[Item]
    """Answered items: their value with the answer added under the node's id."""

    errs: Stream[FailedItem]
    """Items that could not be answered, with the error and the attempts."""


def query(
    step_id: str,
    up: Stream[Any],
    prompt: str | Prompt,
    *,
    check: Callable[[str], object] | None = None,
    stream: bool = False,
    manager: LLMManager | None = None,
    ordered: bool = True,
    max_in_flight: int | None = None,
    **node: Any,
) -> LLMOut:
    """Ask a model for a text about each item.

    ``prompt`` names the item's fields (``{text}``); an item that is no mapping is ``{value}``.
    ``stream`` emits pieces, ``{"delta", "index", "is_end"}``, instead of the whole answer. Further
    keywords are those of :class:`~chainwax.router.NodeSpec`.
    """
    spec = NodeSpec(step_id, _prompt(prompt), FreeText(check), kind="query", **node)
    return llm_node(
        step_id, up, spec, manager=manager, ordered=ordered, max_in_flight=max_in_flight, stream=stream
    )


def choose(
    step_id: str,
    up: Stream[Any],
    prompt: str | Prompt,
    choices: Sequence[str],
    *,
    manager: LLMManager | None = None,
    ordered: bool = True,
    max_in_flight: int | None = None,
    **node: Any,
) -> LLMOut:
    """Have a model choose one of ``choices`` for each item."""
    spec = NodeSpec(step_id, _prompt(prompt), Choice(choices), kind="choose", **node)
    return llm_node(step_id, up, spec, manager=manager, ordered=ordered, max_in_flight=max_in_flight)


def extract(
    step_id: str,
    up: Stream[Any],
    prompt: str | Prompt,
    schema: type[BaseModel],
    *,
    manager: LLMManager | None = None,
    ordered: bool = True,
    max_in_flight: int | None = None,
    **node: Any,
) -> LLMOut:
    """Have a model fill a pydantic model from each item."""
    spec = NodeSpec(step_id, _prompt(prompt), Structured(schema), kind="extract", **node)
    return llm_node(step_id, up, spec, manager=manager, ordered=ordered, max_in_flight=max_in_flight)


@operator
def llm_node(
    step_id: str,
    up: Stream[Any],
    spec: NodeSpec,
    *,
    manager: LLMManager | None = None,
    ordered: bool = True,
    max_in_flight: int | None = None,
    stream: bool = False,
    shards: int = SHARDS,
    pressure: Pressure | None = None,
) -> LLMOut:
    """The operator behind the others: one LLM node of a graph.

    Takes a stream of items, of batches (each item of a batch is asked for, the batch reaches the model's
    queue as one, and items come out), or of anything else, which becomes an item. ``ordered`` emits in
    input order for each item key. At most ``max_in_flight`` calls are held in each worker; None takes the
    configuration's. ``manager`` None takes the process's own. ``pressure`` is told how much waits, for
    sources that look at it.
    """
    shared = _Shared(spec, manager, ordered, max_in_flight, stream, pressure)
    keyed = to_shards("shard", up, shards)
    asked = op.stateful_batch("ask", keyed, shared.build)
    return LLMOut(split("oks", asked, Item), split("errs", asked, FailedItem))


def _prompt(prompt: str | Prompt) -> Prompt:
    return prompt if isinstance(prompt, Prompt) else Prompt(prompt)


class _Shared:
    """One LLM step: what its logics need. The interface is made when a worker first builds one."""

    def __init__(
        self,
        spec: NodeSpec,
        manager: LLMManager | None,
        ordered: bool,
        max_in_flight: int | None,
        stream: bool,
        pressure: Pressure | None,
    ) -> None:
        self.spec = spec
        self.ordered = ordered
        self.stream = stream
        self._manager = manager
        self._pressure = pressure
        self._max_in_flight = max_in_flight
        self._interface: LLMInterface | None = None
        self._lock = threading.Lock()
        self._local = threading.local()

    def build(self, state: _State | None) -> _Logic:
        with self._lock:
            if self._interface is None:
                manager = self._manager or default_manager()
                manager.ensure_run(self.spec.flow)
                self._interface = manager.register(self.spec)
                own = manager.settings.nodes.get(self.spec.id)
                self._limit = (
                    (own.max_in_flight if own else None)
                    or self._max_in_flight
                    or manager.settings.defaults.max_in_flight
                    or manager.settings.run.max_in_flight
                )
        lane = getattr(self._local, "lane", None)
        if lane is None:
            lane = self._local.lane = Lane(self._limit)
            if self._pressure is not None:
                self._pressure.add(lane)
        return _Logic(self, self._interface, lane, state)


@dataclass
class _State:
    """A snapshot: items that were not answered, in order, and the next position to give."""

    waiting: list[Item]
    next_position: int


_Out = Item | FailedItem


class _Logic(StatefulBatchLogic[Any, Any, _State]):
    """One shard of one LLM step on one worker."""

    def __init__(self, shared: _Shared, interface: LLMInterface, lane: Lane, state: _State | None) -> None:
        self._id = shared.spec.id
        self._ordered = shared.ordered
        self._stream = shared.stream
        self._interface = interface
        self._lane = lane
        self._pending: dict[int, Item] = {}  # all that is not answered yet, in order of arrival
        self._backlog: deque[int] = deque()  # of those, what is not submitted yet
        self._numbers: dict[str, int] = {}  # call id → number, of what is in flight
        self._done: deque[tuple[str, CallResult | tuple[int, str]]] = deque()
        # Outcomes that wait for an earlier item of their key, each with whether it is the last.
        self._held: dict[int, list[tuple[_Out | None, bool]]] = {}
        self._of_key: dict[str, deque[int]] = {}
        self._pieces: dict[int, int] = {}  # pieces of a streamed answer that came so far
        self._cancelled: list[Item] = []
        self._next_number = 0
        self._next_position = 0
        if state is not None:
            self._next_position = state.next_position
            for item in state.waiting:
                self._take(item)

    # -- Bytewax's callbacks --------------------------------------------------------------------

    @override
    def on_batch(self, values: list[Any]) -> tuple[list[Any], bool]:
        out: list[_Out] = []
        # Bytewax does not push back on work off the worker: wait here, at the bound.
        while len(self._backlog) > self._lane.limit:
            self._drain(out)
            self._submit(out)
            if len(self._backlog) > self._lane.limit:
                time.sleep(_NAP)
        for value in values:
            if type(value) is Batch:
                for item in value.items:
                    self._take(replace(item, window_id=value.window_id))
            else:
                self._take(value)
        self._drain(out)
        self._submit(out)
        return out, StatefulBatchLogic.RETAIN

    @override
    def on_notify(self) -> tuple[list[Any], bool]:
        out: list[_Out] = []
        if self._done or self._backlog:
            self._drain(out)
            self._submit(out)
        return out, StatefulBatchLogic.RETAIN

    @override
    def on_eof(self) -> tuple[list[Any], bool]:
        # No notification comes after the end of the input: wait for everything now.
        out: list[_Out] = []
        while self._pending:
            self._drain(out)
            self._submit(out)
            if self._pending and not self._done:
                time.sleep(_NAP)
        return out, StatefulBatchLogic.RETAIN

    @override
    def notify_at(self) -> datetime | None:
        return datetime.now(UTC) + POLL if self._pending else None

    @override
    def snapshot(self) -> _State:
        return _State([*self._cancelled, *self._pending.values()], self._next_position)

    # -- inside ---------------------------------------------------------------------------------

    def _take(self, item: Item) -> None:
        if not item.position:
            # Items of a foreign stream are counted: the count is in the snapshot, so a resume that
            # brings the same items gives them the same positions, and so the same calls.
            item = replace(item, position=f"{self._id}:{self._next_position}")
            self._next_position += 1
        number = self._next_number
        self._next_number += 1
        self._pending[number] = item
        self._backlog.append(number)
        self._lane.backlog += 1
        if self._ordered:
            line = self._of_key.get(item.key)
            if line is None:
                self._of_key[item.key] = deque((number,))
            else:
                line.append(number)

    def _submit(self, out: list[_Out]) -> None:
        room = self._lane.room()
        if room <= 0 or not self._backlog:
            return
        queries: list[Query] = []
        while self._backlog and len(queries) < room:
            number = self._backlog.popleft()
            self._lane.backlog -= 1
            item = self._pending[number]
            try:
                query = self._interface.bind(
                    item.value,
                    item_key=item.key,
                    position=item.position,
                    parents=item.calls,
                    window_id=item.window_id,
                )
            except Exception as error:
                self._emit(number, FailedItem.of(item, self._id, error), True, out)
                continue
            if query.call_id in self._numbers:
                # The same item came twice, over two branches: its place tells the calls apart.
                self._pending[number] = replace(item, position=f"{item.position}#")
                self._backlog.appendleft(number)
                self._lane.backlog += 1
                continue
            if self._stream:
                query.stream = self._receiver(query.call_id)
            self._numbers[query.call_id] = number
            queries.append(query)
        if queries:
            self._lane.submitted += len(queries)
            self._interface.submit(queries, self._answered)

    def _answered(self, query: Query, result: CallResult) -> None:
        """Called from the router's threads."""
        self._done.append((query.call_id, result))
        self._lane.answered += 1

    def _receiver(self, call_id: str) -> Callable[[int, str], None]:
        return lambda index, delta: self._done.append((call_id, (index, delta)))

    def _drain(self, out: list[_Out]) -> None:
        done = self._done
        while done:
            # One pass, taking from the left: what arrives meanwhile stays for the next.
            call_id, result = done.popleft()
            if type(result) is tuple:
                number = self._numbers[call_id]
                index, delta = result
                self._pieces[number] = index + 1
                self._emit(number, self._piece(self._pending[number], delta, index, False), False, out)
                continue
            assert isinstance(result, CallResult)
            number = self._numbers.pop(call_id)
            item = self._pending[number]
            if result.error is None:
                self._answer(number, item, result, out)
            elif isinstance(result.error, Cancelled):
                # The run is stopping: the item stays in the snapshot, to be asked when it resumes.
                self._cancelled.append(item)
                self._emit(number, None, True, out)
            else:
                self._emit(number, FailedItem.of(item, self._id, result.error, result.attempts), True, out)

    def _answer(self, number: int, item: Item, result: CallResult, out: list[_Out]) -> None:
        value = result.value
        if self._stream:
            index = self._pieces.pop(number, 0)
            if not index:  # answered from the recording, or by a server that does not stream
                self._emit(number, self._piece(item, result.text or "", 0, False), False, out)
                index = 1
            value = {"delta": "", "index": index, "is_end": True}
        answered = Item(
            merged(item.value, self._id, value),
            item.key,
            item.position,
            item.time,
            (*item.calls, result.ref),
            item.window_id,
        )
        self._emit(number, answered, True, out)

    def _piece(self, item: Item, delta: str, index: int, is_end: bool) -> Item:
        piece = {"delta": delta, "index": index, "is_end": is_end}
        return item.with_value(merged(item.value, self._id, piece))

    def _emit(self, number: int, outcome: _Out | None, last: bool, out: list[_Out]) -> None:
        """Send an outcome on, once all earlier items of its key have gone.

        ``last`` says that nothing more comes of this item.
        """
        if not self._ordered:
            if outcome is not None:
                out.append(outcome)
            if last:
                del self._pending[number]
            return
        key = self._pending[number].key
        line = self._of_key[key]
        if line[0] != number:
            self._held.setdefault(number, []).append((outcome, last))
            return
        if outcome is not None:
            out.append(outcome)
        while last:
            del self._pending[line.popleft()]
            if not line:
                del self._of_key[key]
                return
            last = False
            for held, ended in self._held.pop(line[0], ()):
                last = ended
                if held is not None:
                    out.append(held)


def merged(value: Any, node: str, answer: Any) -> dict[str, Any]:
    if type(value) is dict:
        return {**value, node: answer}
    if isinstance(value, Mapping):
        return {**dict(value), node: answer}
    if isinstance(value, BaseModel):
        return {**dict(value), node: answer}
    return {"value": value, node: answer}
