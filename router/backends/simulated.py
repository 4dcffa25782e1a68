"""The simulated tier: a model that is not there, whose accuracy, latency and price are stated.

For a cloud tier without a key. Every answer, and every record of one, is marked ``simulated``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chainwax.router.backends._simulation import SimulatedModel
from chainwax.router.backends.base import Health, Reply, Request
from chainwax.router.backends.openai import OpenAIBackend
from chainwax.router.backends.simserver import SimulationServer
from chainwax.router.config import ModelConfig
from chainwax.router.errors import BackendRefused
from chainwax.router.types import Query

__all__ = ["SimulatedBackend"]


class SimulatedBackend:
    """One simulated model; all of an event loop share one loopback server, or ask one that runs elsewhere.

    Raises :class:`~chainwax.router.errors.ConfigError` where the right answers cannot be read.
    """

    simulated = True

    def __init__(self, name: str, config: ModelConfig) -> None:
        self.name = name
        self.config = config
        self.batch_max = 1 if config.api == "chat" else OpenAIBackend.BATCH_MAX
        self._model = SimulatedModel(name, config.simulation)
        self._server: SimulationServer | None = None
        self._inner: OpenAIBackend | None = None
        self._served_as = ""

    async def start(self) -> int | None:
        """Serve the model on a loopback port, unless ``simulation.url`` names a server that does.

        How much it serves at once is for the limit to say.
        """
        url, self._served_as = self.config.simulation.url, self.name
        if url is None:
            self._server = SimulationServer.shared()
            self._served_as = await self._server.add(self._model)
            url = self._server.url
        # The provider is for rules to name; what answers speaks OpenAI's own dialect.
        settings = {"url": url, "model": self._served_as, "provider": "", "key_env": None}
        self._inner = OpenAIBackend(self.name, self.config.model_copy(update=settings), metadata=_metadata)
        return await self._inner.start()

    async def generate(self, request: Request) -> Reply:
        """Answer one request."""
        reply = await self._serving().generate(request)
        reply.simulated = True
        return reply

    async def generate_batch(self, requests: Sequence[Request]) -> list[Reply | Exception]:
        """Answer several requests with one prompt array."""
        replies = await self._serving().generate_batch(requests)
        for reply in replies:
            if isinstance(reply, Reply):
                reply.simulated = True
        return replies

    async def health(self) -> Health:
        """Always well while it is started; never raises."""
        if self._inner is None:
            return Health(False, "the backend was not started")
        health = await self._inner.health()
        health.detail = f"simulated {health.detail}".rstrip()
        return health

    async def close(self) -> None:
        """Stop serving the model."""
        if self._inner is not None:
            await self._inner.close()
            self._inner = None
        if self._server is not None:
            await self._server.remove(self._served_as)
            self._server = None

    def _serving(self) -> OpenAIBackend:
        if self._inner is None:
            raise BackendRefused(f"{self.name}: the backend was not started, or is closed")
        return self._inner


def _metadata(queries: Sequence[Query]) -> dict[str, Any]:
    items = [query.item_key for query in queries]
    return {"node": queries[0].node.id, "item": items if len(items) > 1 else items[0]}
