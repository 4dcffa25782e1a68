"""LLMInstance: one concrete model behind one backend, with its queue and its recorder."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from chainwax.router.backends.base import Backend, Health, Reply, Request
from chainwax.router.clock import SYSTEM_CLOCK, Clock
from chainwax.router.config import ModelConfig
from chainwax.router.errors import (
    BackendBusy,
    BackendDown,
    BackendError,
    BackendGarbled,
    BackendRefused,
    BackendTimeout,
    ConfigError,
)
from chainwax.router.gate import Gate
from chainwax.router.prices import Price
from chainwax.router.queue import CallQueue
from chainwax.router.recorder import LLMRecorder
from chainwax.router.share import ALL, Share
from chainwax.router.types import Arm, Attempt, Decision, Query, Tier

__all__ = ["LLMInstance"]

DEFAULT_LIMIT = 16
"""Requests in flight where neither the configuration nor the server says."""
DOWN_AFTER = 5
"""Failures in a row after which calls that have another model go there."""
DOWN_FOR = 15.0
"""Seconds until a model that is down is tried again."""
_FAILING = (BackendDown, BackendTimeout, BackendRefused, BackendGarbled)
"""What a model that is no use now answers with: it may be gone, or its key refused."""
GATHER = 0.01
"""Seconds that a server which takes prompts together is made to wait for more of them."""


class LLMInstance:
    """A model that can be asked. All methods run on the router's loop unless they say otherwise."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        backend: Backend,
        price: Price,
        clock: Clock = SYSTEM_CLOCK,
        share: Share = ALL,
        *,
        lent: bool = False,
    ) -> None:
        """``share`` is this process's part of the slots; with ``lent`` they come from a lender.

        Raises :class:`ConfigError` where a fixed part is none.
        """
        self.name = name
        self.config = config
        self.tier = Tier(config.tier)
        self.backend = backend
        self.price = price
        self.recorder = LLMRecorder(clock)
        # An embedded engine is the process's own; all other servers are there for all processes.
        here = config.backend in ("llamacpp", "head")
        self._share = ALL if here else share
        self.lent = lent and not here
        """Whether its slots are lent."""
        self.has_rate = config.requests_per_minute is not None or config.tokens_per_minute is not None
        """Whether there is a limit for each minute."""
        self.slots = config.limit
        """Of the whole model; None where nobody has told yet."""
        self.answered = 0
        """Requests that have ended."""
        self.tokens = 0
        """Tokens that they took, in and out."""
        self.queue = CallQueue(0 if self.lent else self._part(config.limit or DEFAULT_LIMIT), clock)
        self.arms: tuple[Arm, ...] = tuple(
            Arm(name, effort=effort, max_tokens=limit, precision=config.precision)
            for effort in (config.efforts or (None,))
            for limit in (config.output_limits or (None,))
        )
        self.announce: Callable[[Decision], None] | None = None
        """Told when the model goes down, and when it is back."""
        self._clock = clock
        self._failures = 0
        self._down_until = 0.0
        self._started: asyncio.Future[None] | None = None
        self._group: list[tuple[Request, asyncio.Future[Reply]]] = []
        self._groups: set[asyncio.Task[None]] = set()

    @property
    def serves(self) -> bool:
        """Whether it is worth asking now: not down, not closed by its server. Safe from any thread."""
        return self.serves_at(self._clock.monotonic())

    def serves_at(self, now: float) -> bool:
        """The same, where that is the time of its clock."""
        return now >= self._down_until and not self.queue.closed_until

    async def start(self) -> None:
        """Get the backend ready, once, however many ask for it."""
        if self._started is None:
            self._started = asyncio.get_running_loop().create_future()
            try:
                slots = await self.backend.start()
                if self.config.limit is None:
                    self.slots = slots or DEFAULT_LIMIT
                    if not self.lent:
                        self.queue.limit = self._part(self.slots)
                        self.queue.hand_out()
                self._started.set_result(None)
            except Exception as error:
                self._started.set_exception(error)
        await asyncio.shield(self._started)

    async def ask(
        self,
        query: Query,
        arm: Arm,
        *,
        number: int,
        again: bool = False,
        propensity: float | None = None,
        shadow: bool = False,
        deadline: float | None = None,
        on_delta: Callable[[str], None] | None = None,
        gate: Gate | None = None,
    ) -> tuple[Attempt, BackendError | None]:
        """Make one attempt, once a slot is free.

        ``number`` counts the call's attempts; ``again`` says that the same model is asked again. Where
        ``gate`` is closed by then, the slot is given back, and is waited for once more when it opens.
        Returns the attempt, and the error where it failed; never raises but when it is cancelled.
        """
        clock = self._clock
        node = query.node
        arrived = clock.monotonic()
        unready: Exception | None = None
        if self.slots is None and (self._started is None or not self._started.done()):
            # It is the server that says how many it serves at once.
            try:
                await self.start()
            except Exception as caught:
                unready = caught
        await self.queue.enter(node.priority, deadline, again=again)
        while gate is not None and not gate.claim():
            self.queue.leave()
            await gate.reopened()
            await self.queue.enter(node.priority, deadline, again=again)
        begun = clock.monotonic()
        attempt = Attempt(
            query.call_id, number, arm, self.tier.value, clock.time(), begun - arrived, shadow=shadow
        )
        attempt.propensity = propensity
        attempt.simulated = self.backend.simulated
        error: BackendError | None = None
        recorded_s: float | None = None
        in_flight = self.queue.in_flight
        try:
            if unready is not None:
                raise unready
            if self._started is None or not self._started.done():
                await self.start()
                begun = clock.monotonic()
            request = Request(query, arm, node.timeout or self.config.timeout, on_delta)
            if self.backend.batch_max > 1 and on_delta is None:
                reply = await self._with_others(request)
            else:
                reply = await self.backend.generate(request)
            attempt.text = reply.text
            attempt.usage = reply.usage
            attempt.first_token_s = reply.first_token_s
            attempt.logprob = reply.logprob
            attempt.simulated = reply.simulated
            recorded_s = reply.recorded_s
            attempt.reused = recorded_s is not None
            if self._failures >= DOWN_AFTER and self.announce is not None:
                self.announce(Decision("model_up", "", {"model": self.name}))
            self._failures = 0
        except BackendError as caught:
            error = caught
        except Exception as caught:
            # A fault of ours in a backend must cost this call only.
            error = BackendRefused(f"{self.name}: {type(caught).__name__}: {caught}")
        finally:
            self.answered += 1
            self.tokens += attempt.usage.input + attempt.usage.output
            self.queue.leave()
        attempt.latency_s = clock.monotonic() - begun if recorded_s is None else recorded_s
        if error is not None:
            attempt.error = f"{type(error).__name__}: {error}"
            self._suffer(error)
        else:
            attempt.cost_usd = self.price.cost(attempt.usage, attempt.latency_s, in_flight)
        return attempt, error

    def pause_before(self, error: BackendError, tries: int) -> float:
        """Seconds to wait before the same model is asked again: what the server says, else jittered."""
        if error.retry_after is not None:
            return error.retry_after
        return random.uniform(0.0, min(30.0, 0.25 * 2.0**tries))

    async def health(self) -> Health:
        """What the backend says of itself, once it has been started."""
        try:
            await self.start()
        except Exception as error:
            return Health(False, str(error))
        return await self.backend.health()

    async def close(self) -> None:
        """Finish what is on its way and close the backend."""
        if self._groups:
            await asyncio.gather(*self._groups, return_exceptions=True)
        if self._started is not None:
            await self.backend.close()

    def _part(self, slots: int) -> int:
        """This process's fixed part. Raises :class:`ConfigError` where it is none."""
        part = self._share.slots(slots)
        if part < 1:
            raise ConfigError(
                f"model '{self.name}' has {slots} slots, and {self._share.of} processes ask it: with [redis] "
                "they lend them to each other, else there may be no more processes than slots"
            )
        return part

    def _suffer(self, error: BackendError) -> None:
        if isinstance(error, BackendBusy):
            self.queue.close_for(
                error.retry_after if error.retry_after is not None else random.uniform(0.1, 0.5)
            )
        elif isinstance(error, _FAILING):
            self._failures += 1
            if self._failures >= DOWN_AFTER:
                self._down_until = self._clock.monotonic() + DOWN_FOR
            if self._failures == DOWN_AFTER and self.announce is not None:
                why = {"model": self.name, "failures": DOWN_AFTER, "last": f"{type(error).__name__}: {error}"}
                self.announce(Decision("model_down", "", why))

    async def _with_others(self, request: Request) -> Reply:
        """Send the request together with those that come within :data:`GATHER` seconds."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Reply] = loop.create_future()
        self._group.append((request, answer))
        if len(self._group) >= min(self.backend.batch_max, self.queue.limit):
            self._send_group()
        elif len(self._group) == 1:
            loop.call_later(GATHER, self._send_group)
        return await answer

    def _send_group(self) -> None:
        group, self._group = self._group, []
        if group:
            task = asyncio.get_running_loop().create_task(self._serve_group(group))
            self._groups.add(task)
            task.add_done_callback(self._groups.discard)

    async def _serve_group(self, group: list[tuple[Request, asyncio.Future[Reply]]]) -> None:
        try:
            replies = await self.backend.generate_batch([request for request, _ in group])
        except Exception as error:
            replies = [error] * len(group)
        for (_, answer), reply in zip(group, replies, strict=True):
            if answer.done():
                continue
            if isinstance(reply, Exception):
                answer.set_exception(reply)
            else:
                answer.set_result(reply)
