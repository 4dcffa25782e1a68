"""LLMInterface: what a node holds. It never executes a query; it hands it to its router."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from chainwax.router.errors import Cancelled
from chainwax.router.recorder import LLMInterfaceRecorder
from chainwax.router.recording import RecordedCall
from chainwax.router.router import LLMRouter
from chainwax.router.share import Away, ResponseStore
from chainwax.router.types import CallRef, CallResult, Message, NodeSpec, Query, call_id

if TYPE_CHECKING:
    from chainwax.router.manager import LLMManager

__all__ = ["Done", "LLMInterface"]

_LOOK_AGAIN = 0.5

Done = Callable[[Query, CallResult], None]
"""Takes an answer, on a thread of the router's; must be quick and must not raise."""


class LLMInterface:
    """One node's way to its models."""

    def __init__(
        self,
        manager: LLMManager,
        spec: NodeSpec,
        node: NodeSpec,
        router: LLMRouter,
        recorder: LLMInterfaceRecorder,
    ) -> None:
        self.spec = spec
        """As the flow says it."""
        self.node = node
        """As it is now, by the configuration and by what operators changed since."""
        self.router = router
        self.recorder = recorder
        self._manager = manager
        self._tasks: set[asyncio.Task[None]] = set()
        self._asked = itertools.count()

    def bind(
        self,
        value: Any,
        *,
        item_key: str = "",
        position: str = "",
        parents: tuple[CallRef, ...] = (),
        window_id: str | None = None,
        stream: Callable[[int, str], None] | None = None,
    ) -> Query:
        """A query about one item.

        Raises :class:`PromptFieldMissing` where the item does not have what the prompt names.
        """
        node = self.node
        messages = node.prompt.render(value, node=node.id)
        identity = call_id(self._manager.run_id, node, item_key, position, messages)
        return Query(node, identity, messages, item_key, position, parents, window_id, value, stream)

    def submit(self, queries: Sequence[Query], done: Done) -> None:
        """Hand queries to the router, from any thread; ``done`` is called once for each.

        Where the run is recorded, an answer is durable before ``done`` hears of it.
        """
        self._manager.loop.call_soon_threadsafe(self._accept, queries, done)

    def query(self, prompt: str | Sequence[Message], *, timeout: float | None = None) -> str:
        """Ask and wait. For programs without a stream; raises what went wrong.

        Must not be called on the router's own thread.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        # Without an item, the position is the number of the question.
        position = f"query:{next(self._asked)}"
        identity = call_id(self._manager.run_id, self.node, "", position, messages)
        answer: concurrent.futures.Future[CallResult] = concurrent.futures.Future()
        self.submit(
            [Query(self.node, identity, messages, position=position)], lambda _, r: answer.set_result(r)
        )
        result = answer.result(timeout)
        if result.error is not None:
            raise result.error
        return result.text or ""

    def change(self, node: NodeSpec) -> None:
        """Go on as the node is now. On the router's loop."""
        self.node = node
        self.router.change(node)

    async def drained(self) -> None:
        """Wait until nothing is in flight. On the router's loop."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.router.finish()

    def cancel(self) -> None:
        """Stop what is in flight; each query is answered with ``Cancelled``. On the router's loop."""
        for task in self._tasks:
            task.cancel()
        self.router.cancel()

    def _accept(self, queries: Sequence[Query], done: Done) -> None:
        self.recorder.submitted(len(queries))
        found: dict[str, RecordedCall] = {}
        if self._manager.resumed:
            found = self._manager.recording.find([q.call_id for q in queries])
            store = self._manager.store
            if store is not None and any(_unknown(found, q) for q in queries):
                self._keep(self._look_elsewhere(store, queries, found, done))
                return
        self._begin(queries, found, done)

    def _begin(self, queries: Sequence[Query], found: dict[str, RecordedCall], done: Done) -> None:
        for query in queries:
            self._keep(self._see_through(query, found.get(query.call_id), done))

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look_elsewhere(
        self, store: ResponseStore, queries: Sequence[Query], found: dict[str, RecordedCall], done: Done
    ) -> None:
        """Begin once it is known what other machines answered. While that cannot be told, nothing is paid."""
        try:
            while True:
                try:
                    found |= await store.find([q.call_id for q in queries if _unknown(found, q)])
                    break
                except Away:
                    await asyncio.sleep(_LOOK_AGAIN)
        except asyncio.CancelledError:
            for query in queries:
                result = CallResult(query.call_id, self.node.id)
                result.error = Cancelled(f"node '{self.node.id}': the run was stopped")
                self.recorder.finished(result)
                done(query, result)
            return
        self._begin(queries, found, done)

    async def _see_through(self, query: Query, found: RecordedCall | None, done: Done) -> None:
        result = await self.router.answer(query, found)
        self.recorder.finished(result)
        if self._manager.custom is not None:
            self._manager.custom.answered(query, result)
        self._manager.counterfactuals.answered(query, result)
        if self._manager.called is not None and result.arm is not None:
            self._manager.called(self._manager.run_id, query, result)
        if isinstance(result.error, Cancelled):
            for attempt in result.attempts:
                # Paid, though the call was not seen to its end.
                self._manager.recording.attempt(query, attempt)
            done(query, result)
        else:
            self._manager.recording.result(query, result, lambda: done(query, result))


def _unknown(found: dict[str, RecordedCall], query: Query) -> bool:
    call = found.get(query.call_id)
    return call is None or call.status != "ok"
