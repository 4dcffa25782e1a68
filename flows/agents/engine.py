"""Runs the listeners of one group: in the order of arrival, with many questions to models in flight.

A listener is a plain function that waits while a model answers. Each call of one is a greenlet of one thread:
where it asks, the thread goes on with others, and comes back when the answer is there. Bytewax's own threads
cannot have greenlets (to Python they are new at each call), so :class:`EngineThread` brings its own.

Items that arrived are worked off in order, each with all that it causes inside the group before the next: so
the outputs, and what the state is when a listener sees an item, do not depend on how long models take.
Listeners without a state may run ahead of their turn; what they send waits for it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from greenlet import GreenletExit, greenlet

from chainwax.flows.agents.groups import Group, Member
from chainwax.flows.agents.questions import FunctionRaised
from chainwax.flows.agents.saved import dump_state
from chainwax.flows.chainstream._world import Listener, invoking
from chainwax.flows.chainstream.stream import copied, items_of
from chainwax.operators.item import FailedItem, Item
from chainwax.router.errors import Cancelled
from chainwax.router.types import CallRef, CallResult

__all__ = ["Ask", "AskingRun", "Delivery", "Engine", "EngineThread", "Out", "Run"]

Out = tuple[str, Item] | FailedItem
"""An item with the stream that it goes to, or what could not be worked off."""


class Run:
    """The listeners of one delivery, one after the other, without models."""

    __slots__ = (
        "done",
        "failures",
        "item",
        "listener",
        "member",
        "outputs",
        "outside",
        "prompts",
        "refs",
        "runs",
        "time",
    )

    def __init__(self, item: Item, now: float, outside: frozenset[str]) -> None:
        self.item = item
        self.time = now
        """When the item arrived."""
        self.outside = outside
        """Streams that others listen to."""
        self.listener: Listener | None = None
        """The one that runs."""
        self.runs: Member | None = None
        self.member = 0
        self.outputs: list[tuple[str, Any, int, Any]] = []
        """Stream, value, which listener sent it, and what others get: the value as it was then."""
        self.failures: list[FailedItem] = []
        self.refs: list[CallRef] = []
        self.prompts: list[tuple[str, Any]] = []
        """With the id of the listener that asked."""
        self.done = False

    def emit(self, stream: str, item: Any) -> None:
        """Send an item to a stream."""
        assert self.runs is not None
        self.runs.check_write(stream)
        self.send(stream, item)

    def send(self, stream: str, value: Any) -> None:
        """The same, where it is known that the stream is one of the listener's."""
        self.outputs.append((stream, value, self.member, copied(value) if stream in self.outside else None))

    def ask(self, kind: str, prompt: Any, frame: Any) -> str:
        """Nobody foresaw that this group would ask a model."""
        raise RuntimeError(f"'{frame.f_code.co_name}' asks a model, which its source does not show")


class AskingRun(Run):
    """The same, in a greenlet that waits for models."""

    __slots__ = ("_engine", "answer", "delivery", "greenlet", "numbers")

    def __init__(self, engine: Engine, delivery: Delivery, now: float) -> None:
        super().__init__(delivery.item, now, engine.outside)
        self._engine = engine
        self.delivery = delivery
        self.greenlet: greenlet | None = None
        self.answer: CallResult | None = None
        self.numbers: dict[str, int] = {}
        """How often each node was asked in this run."""

    def ask(self, kind: str, prompt: Any, frame: Any) -> str:
        """Ask and wait, while the worker goes on with others."""
        prompt = copied(prompt)  # a conversation that the agent goes on with is still asked as it is now
        assert self.listener is not None
        self.prompts.append((self.listener.id, prompt))
        self._engine.asks(self, kind, prompt, frame)
        self._engine.main.switch()
        result = self.answer
        assert result is not None
        if isinstance(result.error, Cancelled):
            raise GreenletExit
        if isinstance(result.error, FunctionRaised):
            raise result.error.original
        if result.error is not None:
            raise result.error
        self.refs.append(result.ref)
        return result.text or ""


class Delivery:
    """An item on a stream, and the run of the listeners that hang on it."""

    __slots__ = ("children", "item", "run", "stream")

    def __init__(self, stream: str, item: Item) -> None:
        self.stream = stream
        self.item = item
        self.run: Run | None = None
        self.children: list[Delivery] | None = None
        """What it caused inside the group, once its run is over."""


Ask = Callable[[AskingRun, str, Any, Any], None]
"""Sends the question of a run on its way: run, the model's kind, prompt, frame of the code that asks."""


class Engine:
    """One group's listeners on one worker.

    ``limit`` is how many calls of listeners may wait for models at once. ``kept`` says that the state will be
    asked for. Where a listener may change an item, each that arrives is copied: sinks, recordings and other
    groups still want it as it was.
    """

    def __init__(
        self,
        group: Group,
        limit: int,
        ask: Ask,
        *,
        kept: bool = True,
        trace: list[tuple[str, str, Any]] | None = None,
    ) -> None:
        self.asks = ask
        self.main = greenlet.getcurrent()
        self.halted = False
        """Whether a question was called off: nothing goes on, all that is left is in the snapshot."""
        self._group = group
        self._limit = limit
        self._trace = trace
        self._copies = any(member.touches.changes_item for member in group.members)
        self._members: dict[str, list[Member]] = {}
        for member in group.members:
            self._members.setdefault(member.listener.stream, []).append(member)
        self._free = {
            stream
            for stream, members in self._members.items()
            if not any(place in group.state for member in members for place in member.touches.reads)
        }
        """Streams whose listeners have no state."""
        self._saves = {
            stream
            for stream, members in self._members.items()
            if kept and stream not in self._free and any(member.asks for member in members)
        }
        """Streams whose listeners have one and may wait for a model in the middle of changing it."""
        self.outside = frozenset(group.outputs)
        self._waits = group.asks
        self._arrivals: deque[deque[Delivery]] = deque()
        self._startable: deque[Delivery] = deque()
        self._answered: deque[tuple[AskingRun, CallResult]] = deque()
        self._running = 0
        self._before: bytes | None = None

    @property
    def left(self) -> int:
        """Items that arrived and are not worked off."""
        return len(self._arrivals)

    def listens(self, stream: str) -> bool:
        """Whether a listener hangs on a stream."""
        return stream in self._members

    def feed(self, stream: str, item: Item) -> None:
        """Take an item that arrived on a stream that is listened to."""
        if self._copies:
            item = item.with_value(copied(item.value))
        delivery = Delivery(stream, item)
        self._arrivals.append(deque((delivery,)))
        if self._waits:
            self._may_start(delivery)

    def answer(self, run: AskingRun, result: CallResult) -> None:
        """An answer has come."""
        self._answered.append((run, result))

    def pump(self, out: list[Out]) -> None:
        """Go on as far as it goes without waiting."""
        self.main = greenlet.getcurrent()
        moved = True
        while moved and not self.halted:
            moved = False
            while self._answered and not self.halted:
                run, result = self._answered.popleft()
                run.answer = result
                self._switch(run)
                moved = True
            while self._startable and self._running < self._limit and not self.halted:
                delivery = self._startable.popleft()
                if delivery.run is None:
                    self._start(delivery)
                    moved = True
            moved |= self._in_turn(out)

    def snapshot(self) -> tuple[bytes | None, list[list[tuple[str, Item]]]]:
        """The state, and what is not worked off: of each arrival what it has caused so far.

        Raises :class:`ConfigError` where the state cannot be kept.
        """
        left = [[(delivery.stream, delivery.item) for delivery in tree] for tree in self._arrivals]
        state = self._before if self._before is not None else dump_state(self._group)
        return state, left

    def restore(self, left: list[list[tuple[str, Item]]]) -> None:
        """Go on with what was left over."""
        for caused in left:
            tree = deque(Delivery(stream, item) for stream, item in caused)
            self._arrivals.append(tree)
            if self._waits:
                for delivery in tree:
                    self._may_start(delivery)

    # -- inside ---------------------------------------------------------------------------------

    def _may_start(self, delivery: Delivery) -> None:
        if delivery.stream in self._free:
            self._startable.append(delivery)

    def _in_turn(self, out: list[Out]) -> bool:
        """Work off what is at the front; whether anything was."""
        moved = False
        while self._arrivals and not self.halted:
            tree = self._arrivals[0]
            if not tree:
                self._arrivals.popleft()
                continue
            delivery = tree[0]
            if delivery.run is None:
                if delivery.stream in self._saves:
                    self._before = dump_state(self._group)
                self._start(delivery)
            run = delivery.run
            assert run is not None
            if not run.done:
                break
            moved = True
            self._before = None
            tree.popleft()
            out += run.failures
            if self._trace is not None:
                self._trace += [(delivery.item.position, asked, prompt) for asked, prompt in run.prompts]
            if run.outputs:
                out += self._sent(run, outside=True)
                tree.extend(self._caused(delivery))
        return moved

    def _caused(self, delivery: Delivery) -> list[Delivery]:
        if delivery.children is None:
            assert delivery.run is not None
            delivery.children = [
                Delivery(stream, item) for stream, item in self._sent(delivery.run, outside=False)
            ]
        return delivery.children

    def _sent(self, run: Run, *, outside: bool) -> list[tuple[str, Item]]:
        """What a run sent, as items with places of their own: the same ones whenever it is run again."""
        streams = self.outside if outside else self._members.keys()
        root = run.item
        calls = (*root.calls, *run.refs) if run.refs else root.calls
        when = run.time if root.time is None else root.time
        return [
            (
                stream,
                Item(
                    shown if outside else value,
                    root.key,
                    f"{root.position}/{member}.{number}",
                    when,
                    calls,
                    root.window_id,
                ),
            )
            for number, (stream, value, member, shown) in enumerate(run.outputs)
            if stream in streams
        ]

    def _start(self, delivery: Delivery) -> None:
        now = time.time() if delivery.item.time is None else delivery.item.time
        members = self._members[delivery.stream]
        if not self._waits:
            run = delivery.run = Run(delivery.item, now, self.outside)
            before = invoking(run)
            _call_all(run, members)
            invoking(before)
            return
        waiting = delivery.run = AskingRun(self, delivery, now)
        waiting.greenlet = greenlet(_call_all)
        self._running += 1
        self._switch(waiting, waiting, members)

    def _switch(self, run: AskingRun, *args: Any) -> None:
        assert run.greenlet is not None
        run.greenlet.parent = self.main
        before = invoking(run)
        run.greenlet.switch(*args)
        invoking(before)
        if run.greenlet.dead:
            self._running -= 1
            if not run.done:
                self.halted = True
            elif run.delivery.stream in self._free:
                for child in self._caused(run.delivery):
                    self._may_start(child)


class EngineThread:
    """An engine on a thread of its own. ``flush`` is called on it each time that it has gone on.

    What it gives is in ``out``, from which the worker takes. All methods are the worker's.
    """

    def __init__(self, engine: Engine, flush: Callable[[], None]) -> None:
        self.engine = engine
        self.out: deque[Out] = deque()
        self.fed = 0
        """Arrivals that were handed over …"""
        self.done = 0
        """… and of those, how many are worked off; written by the engine's thread."""
        self.failed: BaseException | None = None
        self._flush = flush
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="chainwax-agents", daemon=True)
        self._thread.start()

    @property
    def left(self) -> int:
        """Arrivals that are not worked off."""
        return self.fed - self.done

    def feed(self, values: Sequence[tuple[str, Item]]) -> None:
        """Hand items over."""
        heard = [(stream, item) for stream, item in values if self.engine.listens(stream)]
        if heard:
            self.fed += len(heard)

            def take() -> None:
                for stream, item in heard:
                    self.engine.feed(stream, item)

            self._inbox.put(take)

    def answer(self, run: AskingRun, result: CallResult) -> None:
        """An answer has come. From any thread."""
        self._inbox.put(lambda: self.engine.answer(run, result))

    def restore(self, left: list[list[tuple[str, Item]]]) -> None:
        """Go on with what was left over."""
        self.fed += len(left)
        self._inbox.put(lambda: self.engine.restore(left))

    def snapshot(self) -> tuple[bytes | None, list[list[tuple[str, Item]]], list[Out]]:
        """The engine's, and what it gave that the worker has not taken."""
        if not self._thread.is_alive():
            self.check()
            return (*self.engine.snapshot(), list(self.out))
        told: SimpleQueue[Any] = SimpleQueue()

        def tell() -> None:
            try:
                told.put((*self.engine.snapshot(), list(self.out)))
            except Exception as error:
                told.put(error)

        self._inbox.put(tell)
        while True:
            try:
                found = told.get(timeout=0.5)
            except Empty:
                self.check()
                continue
            if isinstance(found, Exception):
                raise found
            return found  # type: ignore[no-any-return]

    def end(self) -> None:
        """Nothing more is handed over: the thread ends."""
        self._inbox.put(None)
        self._thread.join()

    def check(self) -> None:
        """Raise what ended the thread, where something did."""
        if self.failed is not None:
            raise self.failed

    def _serve(self) -> None:
        try:
            while (do := self._inbox.get()) is not None:
                do()
                self._go_on_when_idle()
        except BaseException as error:
            self.failed = error

    def _go_on_when_idle(self) -> None:
        if not self._inbox.empty():
            return  # all that waits is taken first, so that what it asks goes out together
        given: list[Out] = []
        before = self.engine.left
        self.engine.pump(given)
        self.out += given
        self.done += before - self.engine.left
        self._flush()


def _call_all(run: Run, members: Sequence[Member]) -> None:
    for number, member in enumerate(members):
        listener = run.listener = member.listener
        if not listener.active:
            continue
        run.runs = member
        run.member = number
        try:
            returned = listener.fn(run.item.value)
            if returned is not None:
                for value in items_of(returned):
                    run.send(listener.output, value)
        except (Exception, SystemExit) as error:  # an agent that exits ends nothing but its own item
            run.failures.append(FailedItem.of(run.item, listener.id, error))
    run.done = True
