"""The gate that a node's calls pass right before they are sent: where a pause, or a run's end, holds them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from chainwax.router.errors import Cancelled

__all__ = ["Gate"]


class Gate:
    """One node's gate. Used from the router's loop alone.

    What is sent already is not touched by it: what is closed here waits, and nothing of it is lost.
    """

    def __init__(self, node: str) -> None:
        self.allows: Callable[[], bool] | None = None
        """Asked besides, for each request: whether the run may pay for it. It ends the gate if not."""
        self._node = node
        self._paused = False
        self._ended = False
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def paused(self) -> bool:
        """Whether it is closed for now."""
        return self._paused

    def claim(self) -> bool:
        """Whether a request may be sent now; true is said once for each that is."""
        return not self._paused and (self.allows is None or self.allows())

    async def reopened(self) -> None:
        """Wait until it is worth claiming again. Raises :class:`Cancelled` where the run ends before that."""
        while True:
            if self._ended:
                raise Cancelled(f"node '{self._node}': the run was stopped before this was asked")
            if not self._paused:
                return
            wait: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.add(wait)
            try:
                await wait
            finally:
                self._waiting.discard(wait)

    def pause(self) -> None:
        """Let nothing pass from now on."""
        self._paused = True

    def resume(self) -> None:
        """Let all pass again."""
        self._paused = False
        self._wake()

    def end(self) -> None:
        """The run ends: what would have to wait is given back as not asked, now and from now on."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        for wait in self._waiting:
            if not wait.done():
                wait.set_result(None)
