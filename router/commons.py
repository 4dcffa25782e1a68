"""One process's dealings with what all processes share: it tells, hears, and sets limits accordingly."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from chainwax.router.clock import Clock
from chainwax.router.hub import NEVER, Ask, Lent
from chainwax.router.instance import LLMInstance
from chainwax.router.purse import Purse
from chainwax.router.share import Away, Lender, Report

__all__ = ["Commons"]

log = logging.getLogger("chainwax")

_EVERY = 0.5
"""Seconds between two reports of a process that lacks nothing."""
_GAP = 0.002
"""Seconds that what comes together is reported together in."""
_RETRY = 0.5


class Commons:
    """Reports to a lender, whenever something is lacking and twice a second. On the router's loop.

    ``purses`` gives the nodes that have a budget. ``part`` is this process's of each minute. ``lost`` is
    called with the reason, again and again, once the lender has been away for ``patience`` seconds.
    """

    def __init__(
        self,
        lender: Lender,
        instances: Mapping[str, LLMInstance],
        purses: Callable[[], Mapping[str, tuple[Purse, float]]],
        *,
        run_id: Callable[[], str],
        part: float = 1.0,
        patience: float,
        lost: Callable[[str], None],
        clock: Clock,
    ) -> None:
        self._lender = lender
        self._instances: dict[str, LLMInstance] = {}
        self._purses = purses
        self._run_id = run_id
        self._part = part
        self._patience = patience
        self._lost = lost
        self._clock = clock
        self._process = uuid.uuid4().hex[:12]
        self._wake = asyncio.Event()
        self._told: dict[str, float] = {}
        """When a model of which there was too little is worth asking for again."""
        self._heard: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        for instance in instances.values():
            self.add(instance)

    def add(self, instance: LLMInstance) -> None:
        """Report a model from now on; one that has no limits for all processes is passed over."""
        if not (instance.lent and self._lender.lends_slots) and not instance.has_rate:
            return
        self._instances[instance.name] = instance
        self._told[instance.name] = 0.0
        instance.queue.lacking = partial(self._lacking, instance.name)
        if instance.has_rate:
            instance.queue.permits = 0
        self._wake.set()

    def start(self) -> None:
        """Begin to report."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def refresh(self) -> None:
        """Wait until it is known what others have spent."""
        if self._heard is None:
            self._heard = asyncio.get_running_loop().create_future()
        self._wake.set()
        await asyncio.shield(self._heard)

    async def close(self) -> None:
        """Give back all that was lent."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        with contextlib.suppress(Away):
            await self._lender.close()

    def _lacking(self, name: str) -> None:
        # Who was told how little there is asks again when there may be more, not for each call that comes.
        if self._clock.monotonic() >= self._told[name]:
            self._wake.set()

    async def _run(self) -> None:
        away_since: float | None = None
        clock = self._clock
        while True:
            begun = clock.monotonic()
            self._wake.clear()
            try:
                again = await self._exchange()
            except Away as error:
                if away_since is None:
                    away_since = begun
                    log.warning("%s: nothing new is asked until it is back", error)
                for instance in self._instances.values():
                    if instance.lent:
                        instance.queue.limit = 0
                if clock.monotonic() - away_since >= self._patience:
                    self._lost(f"{error}; it was away for {self._patience:g} s")
                await clock.sleep(_RETRY)
                continue
            if away_since is not None:
                log.warning("what the processes share is back after %.1f s", clock.monotonic() - away_since)
                away_since = None
            await clock.sleep(_GAP)
            await self._pause(min(again, _EVERY) if self._lender.lends_slots else again)

    async def _pause(self, seconds: float) -> None:
        """Wait so long, but not when something is lacking that may be there."""
        loop = asyncio.get_running_loop()
        tasks: list[asyncio.Task[Any]] = [loop.create_task(self._wake.wait())]
        if seconds < NEVER:
            tasks.append(loop.create_task(self._clock.sleep(seconds)))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _exchange(self) -> float:
        """Report and take what comes; in how many seconds there may be more of what is lacking."""
        asks = {name: self._ask(instance) for name, instance in self._instances.items()}
        purses = self._purses()
        spent = {node: dollars for node, (_, dollars) in purses.items()}
        reply = await self._lender.exchange(Report(self._process, self._run_id(), asks, spent))
        for node, (purse, dollars) in purses.items():
            purse.heard(dollars, reply.spent.get(node, 0.0), reply.processes)
        if self._heard is not None:
            heard, self._heard = self._heard, None
            heard.set_result(None)
        now = self._clock.monotonic()
        soonest = NEVER
        for name, lent in reply.lent.items():
            queue = self._instances[name].queue
            lacks = len(queue) > 0 and lent.again_s < NEVER
            self._told[name] = now + lent.again_s if lacks else 0.0
            self._give(self._instances[name], lent)
            if lacks and not queue.closed:
                soonest = min(soonest, lent.again_s)
        return soonest

    def _ask(self, instance: LLMInstance) -> Ask:
        queue = instance.queue
        waiting = 0 if queue.closed else len(queue)
        config = instance.config
        need = queue.in_flight + waiting
        ask = Ask(
            instance.slots,
            floor=queue.in_flight,
            want=max(need, queue.most_in_flight),
            requests_per_minute=self._of_minute(config.requests_per_minute),
            tokens_per_minute=self._of_minute(config.tokens_per_minute),
            answered=instance.answered,
            tokens=instance.tokens,
        )
        queue.most_in_flight = queue.in_flight
        room = max(0, queue.limit - queue.in_flight)
        if self._lender.lends_slots and instance.lent:
            # Until the answer is there it starts none in place of those that end, and no others.
            queue.limit = min(queue.limit, queue.in_flight)
        else:
            ask.slots = ask.want = queue.limit
        if queue.permits is not None:
            # A permit is only asked for by a call that has a slot: it is used in the minute that it is of.
            if not waiting:
                ask.spare, queue.permits = queue.permits, 0
            else:
                wanted = min(waiting, max(room, 1 if instance.lent else 0))
                ask.permits = max(0, wanted - queue.permits)
        return ask

    def _of_minute(self, number: int | None) -> float | None:
        return None if number is None else number * self._part

    def _give(self, instance: LLMInstance, lent: Lent) -> None:
        queue = instance.queue
        if instance.lent and self._lender.lends_slots:
            queue.limit = lent.slots
        if queue.permits is not None:
            queue.permits += lent.permits
        queue.hand_out()
