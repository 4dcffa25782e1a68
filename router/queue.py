"""The queue in front of a model server: who is served next, and how many at once.

Order is node priority, then deadline, then arrival. A waiting call rises by one level of priority for
each :data:`AGEING` seconds, so that low priority never starves. At most ``limit`` calls are in flight:
a batching server given more than it has slots for only makes high priority wait behind low.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from typing import Final

from chainwax.router.clock import SYSTEM_CLOCK, Clock

__all__ = ["AGEING", "CallQueue"]

AGEING: Final = 30.0
"""Seconds of waiting that are worth one level of priority."""


class CallQueue:
    """Slots of one server, handed out in order. Used from the router's loop alone."""

    def __init__(self, limit: int, clock: Clock = SYSTEM_CLOCK) -> None:
        self.limit = limit
        self.in_flight = 0
        self._clock = clock
        self._waiting: list[tuple[int, float, int, asyncio.Future[None]]] = []
        self._arrivals = 0
        self._closed_until = 0.0
        self._reopening: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Calls that wait for a slot."""
        return len(self._waiting)

    async def enter(self, priority: int = 0, deadline: float | None = None, *, again: bool = False) -> None:
        """Wait for a slot. ``again`` puts a call that the server sent back at the front of its class."""
        if self.in_flight < self.limit and not self._waiting and not self._closed_until:
            self.in_flight += 1
            return
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arrivals += 1
        rank = int(self._clock.monotonic() / AGEING) - priority
        arrival = -self._arrivals if again else self._arrivals
        due = -math.inf if again else (math.inf if deadline is None else deadline)
        heapq.heappush(self._waiting, (rank, due, arrival, slot))
        try:
            await slot
        except asyncio.CancelledError:
            if slot.done() and not slot.cancelled():
                self.leave()  # the slot was handed over in the same moment: pass it on
            raise

    def leave(self) -> None:
        """Give a slot back."""
        self.in_flight -= 1
        if self._waiting:
            self._hand_out()

    def resize(self, limit: int) -> None:
        """Have so many in flight at most from now on; 0 lets nobody in, and what is in flight goes on."""
        self.limit = limit
        self._hand_out()

    def close_for(self, seconds: float) -> None:
        """Hand out nothing for so long, as a server asked for with Retry-After."""
        until = self._clock.monotonic() + seconds
        if until <= self._closed_until:
            return
        self._closed_until = until
        if self._reopening is not None:
            self._reopening.cancel()
        self._reopening = asyncio.get_running_loop().call_later(seconds, self._reopen)

    def shut(self) -> None:
        """Hand out nothing any more."""
        self._closed_until = math.inf
        if self._reopening is not None:
            self._reopening.cancel()

    @property
    def closed(self) -> bool:
        """Whether the server asked to be left alone for now."""
        return bool(self._closed_until)

    def _reopen(self) -> None:
        self._closed_until = 0.0
        self._reopening = None
        self._hand_out()

    def _hand_out(self) -> None:
        if self._closed_until:
            return
        while self._waiting and self.in_flight < self.limit:
            slot = heapq.heappop(self._waiting)[3]
            if not slot.done():  # a cancelled call left its place behind
                self.in_flight += 1
                slot.set_result(None)
