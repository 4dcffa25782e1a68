"""An adapter in a running vLLM server, loaded and taken out by the server's own endpoints.

``POST /v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``, with ``lora_name`` and ``lora_path``; the
server has them where it was started with ``--enable-lora`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``.
It forgets its adapters when it is started anew: a call that finds its own gone loads it again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import httpx

from chainwax.router.backends._adapter import Bare
from chainwax.router.backends._http import is_loopback, server_message
from chainwax.router.backends.base import Health, Reply, Request
from chainwax.router.backends.openai import OpenAIBackend
from chainwax.router.config import ModelConfig
from chainwax.router.errors import BackendDown, BackendError, BackendRefused

__all__ = ["VllmAdapter"]

_SECONDS = 60.0
_GONE = ("does not exist", "NotFoundError", "HTTP 404")


class VllmAdapter:
    """A model that is an adapter of the server's model: ``config.model`` is its name there.

    ``path`` is the adapter's folder as the server sees it. ``key`` is the server's, where it wants one.
    """

    simulated = False

    def __init__(self, name: str, config: ModelConfig, path: str, bare: Bare, key: str = "") -> None:
        self.name = name
        self.config = config
        self._path = path
        self._key = key
        self._inner = OpenAIBackend(name, config, messages=bare.as_message)
        self.batch_max = self._inner.batch_max
        self._loading = asyncio.Lock()
        self._loaded = 0
        """How often it was loaded."""
        self._fault: str | None = None

    async def start(self) -> int | None:
        """Load the adapter; where that fails each call tries again, and says why."""
        slots = await self._inner.start()
        try:
            await self._load(0)
        except BackendError as error:
            self._fault = str(error)
        return slots

    async def generate(self, request: Request) -> Reply:
        """Answer one request, with the adapter loaded again where the server has lost it."""
        if not self._loaded:
            await self._load(0)
        seen = self._loaded
        try:
            return await self._inner.generate(request)
        except BackendRefused as error:
            if not any(sign in str(error) for sign in _GONE):
                raise
            await self._load(seen)
            return await self._inner.generate(request)

    async def generate_batch(self, requests: Sequence[Request]) -> list[Reply | Exception]:
        """Answer several requests; the adapter must be there."""
        if not self._loaded:
            await self._load(0)
        return await self._inner.generate_batch(requests)

    async def health(self) -> Health:
        """Ask the server; never raises."""
        return Health(False, self._fault) if self._fault is not None else await self._inner.health()

    async def close(self) -> None:
        """Take the adapter out of the server; another process that uses it loads it again."""
        if self._loaded:
            with contextlib.suppress(BackendError):  # it is gone already, or the server is
                await self._tell("unload_lora_adapter", {"lora_name": self.config.model})
            self._loaded = 0
        await self._inner.close()

    async def _load(self, seen: int) -> None:
        async with self._loading:
            if self._loaded > seen:
                return  # another call was here first
            told = {"lora_name": self.config.model, "lora_path": self._path}
            try:
                await self._tell("load_lora_adapter", told)
            except BackendRefused as error:
                if "already been loaded" not in str(error):
                    raise
            self._loaded += 1
            self._fault = None

    async def _tell(self, what: str, body: dict[str, str]) -> None:
        """Raises :class:`BackendDown`, or :class:`BackendRefused` with what the server says."""
        url = f"{self.config.url.rstrip('/')}/{what}"
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            async with httpx.AsyncClient(timeout=_SECONDS, trust_env=not is_loopback(url)) as client:
                answer = await client.post(url, json=body, headers=headers)
        except httpx.HTTPError as error:
            raise BackendDown(f"{self.name}: {type(error).__name__}: {error}") from None
        if answer.is_success:
            return
        try:
            said = server_message(answer.json(), self._key)
        except ValueError:
            said = ""
        if answer.status_code == 404 and what == "load_lora_adapter" and "lora" not in said.lower():
            said += " (start the server with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True)"
        kind = BackendDown if answer.status_code >= 500 else BackendRefused
        raise kind(f"{self.name}: {what}: HTTP {answer.status_code} {said}".rstrip())
