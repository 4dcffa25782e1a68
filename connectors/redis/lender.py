"""Lends slots and minutes of models to processes on several machines, and adds up what they spend."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections import Counter
from collections.abc import Callable

from pydantic import TypeAdapter, ValidationError
from redis.exceptions import WatchError

from chainwax.connectors.redis.servers import AWAY, RedisServers
from chainwax.router.hub import LEASE, Hub
from chainwax.router.share import Away, Reply, Report

__all__ = ["RedisLender"]

log = logging.getLogger(__name__)

_HUB = TypeAdapter(Hub)
_TRIES = 50
_FORGET_S = int(8 * LEASE)


class RedisLender:
    """Keeps a :class:`~chainwax.router.hub.Hub` under one key, changed by one process at a time.

    The limits are those of all runs under the same prefix, what is spent is a run's own. The clock is that of
    Redis.
    """

    lends_slots = True

    def __init__(self, servers: RedisServers) -> None:
        self._servers = servers
        self._client = servers.loop_client()
        self._models = servers.key("lent")
        self._process = ""

    async def exchange(self, report: Report) -> Reply:
        """Tell and hear. Raises :class:`Away`."""
        self._process = report.process
        try:
            async with asyncio.timeout(2 * self._servers.config.timeout):
                return await self._exchange(report)
        except AWAY as error:
            raise Away(
                f"{self._servers.place} does not answer: {str(error) or type(error).__name__}"
            ) from None

    async def close(self) -> None:
        """Give back all that was lent."""
        try:
            async with asyncio.timeout(self._servers.config.timeout):
                await self._change(lambda hub, now: hub.forget(self._process))
        except AWAY as error:
            log.debug("what was lent is not given back, it expires: %s", error)
        finally:
            await self._client.aclose()

    async def _exchange(self, report: Report) -> Reply:
        reply = Reply({}, {})

        def lend(hub: Hub, now: float) -> None:
            reply.lent = hub.exchange(report.process, report.asks, now)
            reply.processes = len(hub.heard)

        await self._change(lend)
        if report.spent:
            key = self._servers.key("spent", report.run)
            pipe = self._client.pipeline(transaction=True)
            pipe.hset(key, report.process, json.dumps(report.spent))
            pipe.expire(key, int(self._servers.config.keep_hours * 3600))
            pipe.hvals(key)
            total: Counter[str] = Counter()
            for one in (await pipe.execute())[-1]:
                total.update(json.loads(one))
            reply.spent = total
        return reply

    async def _change(self, change: Callable[[Hub, float], None]) -> None:
        async with self._client.pipeline(transaction=True) as pipe:
            for _ in range(_TRIES):
                await pipe.watch(self._models)
                raw = await pipe.get(self._models)
                seconds, micros = await pipe.time()
                hub = self._hub(raw)
                change(hub, seconds + micros / 1e6)
                pipe.multi()
                pipe.set(self._models, _HUB.dump_json(hub), ex=_FORGET_S)
                try:
                    await pipe.execute()
                except WatchError:  # another process was faster
                    await asyncio.sleep(random.uniform(0.0, 0.005))
                    continue
                return
        raise TimeoutError("too many processes want to change the same key")

    def _hub(self, raw: str | None) -> Hub:
        if raw is None:
            return Hub()
        try:
            return _HUB.validate_json(raw)
        except ValidationError as error:
            log.warning("%s: '%s' holds something else: %s", self._servers.place, self._models, error.title)
            return Hub()
