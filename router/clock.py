"""Time as a part that can be exchanged: the real clock here, a virtual one in the test kit."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

__all__ = ["SYSTEM_CLOCK", "Clock", "SystemClock"]


class Clock(Protocol):
    """What the router, the recorders and a replayed source ask the time of."""

    def time(self) -> float:
        """Time of day in seconds since 1970, UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back, for durations."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait on the router's loop."""
        ...


class SystemClock:
    """The machine's own clock."""

    def time(self) -> float:
        """Time of day in seconds since 1970, UTC."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds that never go back."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait on the running loop."""
        await asyncio.sleep(seconds)


SYSTEM_CLOCK = SystemClock()
