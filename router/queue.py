"""The queue in front of a model server: who is served next, and how many at once.

Order is node priority, then deadline, then arrival. A waiting call rises by one level of priority for
each :data:`AGEING` seconds, so that low priority never starves. At most ``limit`` calls are in flight:
a batching server given more than it has slots for only makes high priority wait behind low.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Callable
from typing import Final

from chainwax.router.clock import SYSTEM_CLOCK, Clock

__all__ = ["AGEING", "CallQueue"]

AGEING: Final = 30.0
"""Seconds of waiting that are worth one level of priority."""


class CallQueue:
    """Slots of one server, handed out in order. Used from the router's loop alone."""

    def __init__(self, limit: int, clock: Clock = SYSTEM_CLOCK) -> None:
        self.limit = limit
        self.permits: int | None = None
        """Calls that may go in this minute; None where nothing but the slots limits them."""
        self.lacking: Callable[[], None] | None = None
        """Called when a call waits that more slots or permits would let go."""
        self.in_flight = 0
        self.most_in_flight = 0
        """Since whoever looks at it set it back."""
        self._clock = clock
        self.waiting: list[tuple[int, float, int, asyncio.Future[None]]] = []
        """Calls that wait for a slot, as a heap; some of them may be cancelled."""
        self._arrivals = 0
        self.closed_until = 0.0
        """Until when nothing is handed out; 0.0 where it is."""
        self._reopening: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Calls that wait for a slot."""
        return len(self.waiting)

    async def enter(self, priority: int = 0, deadline: float | None = None, *, again: bool = False) -> None:
        """Wait for a slot. ``again`` puts a call that the server sent back at the front of its class."""
        if self.in_flight < self.limit and self.permits != 0 and not self.waiting and not self.closed_until:
            self._go()
            return
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arrivals += 1
        rank = int(self._clock.monotonic() / AGEING) - priority
        arrival = -self._arrivals if again else self._arrivals
        due = -math.inf if again else (math.inf if deadline is None else deadline)
        heapq.heappush(self.waiting, (rank, due, arrival, slot))
        if self.lacking is not None and not self.closed_until:
            self.lacking()
        try:
            await slot
        except asyncio.CancelledError:
            if slot.done() and not slot.cancelled():
                # The slot was handed over in the same moment: pass it on.
                if self.permits is not None:
                    self.permits += 1
                self.leave()
            raise

    def leave(self) -> None:
        """Give a slot back."""
        self.in_flight -= 1
        if self.waiting:
            self.hand_out()

    def resize(self, limit: int) -> None:
        """Have so many in flight at most from now on; 0 lets nobody in, and what is in flight goes on."""
        self.limit = limit
        self.hand_out()

    def close_for(self, seconds: float) -> None:
        """Hand out nothing for so long, as a server asked for with Retry-After."""
        until = self._clock.monotonic() + seconds
        if until <= self.closed_until:
            return
        self.closed_until = until
        if self._reopening is not None:
            self._reopening.cancel()
        self._reopening = asyncio.get_running_loop().call_later(seconds, self._reopen)

    def shut(self) -> None:
        """Hand out nothing any more."""
        self.closed_until = math.inf
        if self._reopening is not None:
            self._reopening.cancel()

    @property
    def closed(self) -> bool:
        """Whether the server asked to be left alone for now."""
        return bool(self.closed_until)

    def _reopen(self) -> None:
        self.closed_until = 0.0
        self._reopening = None
        self.hand_out()

    def hand_out(self) -> None:
        """Let go who may: there are more slots or permits."""
        if self.closed_until:
            return
        while self.waiting and self.in_flight < self.limit and self.permits != 0:
            slot = heapq.heappop(self.waiting)[3]
            if not slot.done():  # a cancelled call left its place behind
                self._go()
                slot.set_result(None)
        if self.waiting and self.lacking is not None:
            self.lacking()

    def _go(self) -> None:
        self.in_flight += 1
        if self.in_flight > self.most_in_flight:
            self.most_in_flight = self.in_flight
        if self.permits is not None:
            self.permits -= 1
