"""Any OpenAI-compatible server: OpenAI, vLLM, SGLang, TGI, Ollama, llama.cpp and many more.

This is the hot path of every call, so what stays the same (headers, parameters, constraints) is
serialised once for each node and arm, and only the prompt is serialised for each call.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, TypeVar

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport
from pydantic_core import PydanticSerializationError, from_json, to_json
from yarl import URL

from chainwax.router.backends._flavours import constraint, unwrap
from chainwax.router.backends._http import (
    BODY_LIMIT,
    error_for,
    is_loopback,
    read_body,
    read_events,
    server_message,
)
from chainwax.router.backends._replies import Stream, reply_of, share_usage, texts_of, usage_of
from chainwax.router.backends.base import Health, Reply, Request
from chainwax.router.config import ModelConfig
from chainwax.router.errors import (
    BackendDown,
    BackendError,
    BackendGarbled,
    BackendRefused,
    BackendTimeout,
    ConfigError,
    nearest,
)
from chainwax.router.types import Arm, Message, NodeSpec, Query

__all__ = ["OpenAIBackend"]

_T = TypeVar("_T")

_CONTROL_SECONDS = 3.0
_KEEP_ALIVE = 4.0
"""Seconds an idle connection is kept: uvicorn and llama.cpp close theirs after 5, and a request that
crosses with the close is lost."""
_KNOWN_NODES = 1024
_REFUSABLE: dict[str, str | None] = {"temperature": None, "max_tokens": "max_completion_tokens"}
"""Parameters that some models refuse, and the name that those models know them by."""


class _Unsupported(BackendRefused):
    """The server takes the request only without a parameter, as OpenAI's reasoning models do."""

    def __init__(self, message: str, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class OpenAIBackend:
    """A model behind an OpenAI-compatible server.

    ``metadata`` makes the ``metadata`` field of a body from the queries in it; ``fields`` stand in every
    body; ``messages`` says what is sent in place of a query's own messages.

    Raises :class:`ConfigError` for a ``url`` that is none.
    """

    BATCH_MAX = 32
    """Prompts in one request of the completions API."""

    simulated = False

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        *,
        metadata: Callable[[Sequence[Query]], dict[str, Any]] | None = None,
        fields: Mapping[str, Any] | None = None,
        messages: Callable[[Query], Sequence[Message]] | None = None,
    ) -> None:
        try:
            base = URL(config.url.rstrip("/"))
        except ValueError as error:
            raise ConfigError(f"models.{name}.url: {error}: {config.url[:80]!r}") from None
        if base.scheme not in ("http", "https") or not base.host:
            raise ConfigError(f"models.{name}.url: not a web address: {config.url[:80]!r}")
        self.name = name
        self.config = config
        self._metadata = metadata
        self._fields = fields or {}
        self._messages = messages or (lambda query: query.messages)
        self._chat = config.api == "chat"
        self._base = base
        self._url = base / "chat" / "completions" if self._chat else base / "completions"
        # Ollama's completions API takes one prompt only.
        self.batch_max = 1 if self._chat or config.provider == "ollama" else self.BATCH_MAX
        self._llamacpp = config.provider == "llamacpp"
        self._unsupported: frozenset[str] = frozenset()
        self._constants: dict[tuple[NodeSpec, Arm, bool], tuple[bytes, bool]] = {}
        self._session: aiohttp.ClientSession | None = None
        self._unusable: str | None = "the backend was not started"
        self._key = ""

    async def start(self) -> int | None:
        """Read the key, open the pool of connections, and ask llama.cpp for its slots."""
        headers = {**self.config.headers, "Content-Type": "application/json", "Accept-Encoding": "identity"}
        self._unusable = None
        if self.config.key_env is not None:
            self._key = os.environ.get(self.config.key_env, "").strip()
            if not self._key or not self._key.isascii() or not self._key.isprintable():
                fault = "holds no key that a header can carry" if self._key else "is not set"
                self._unusable = (
                    f"models.{self.name}.key_env: the environment variable {self.config.key_env} {fault}"
                )
                self._key = ""
            else:
                headers["Authorization"] = f"Bearer {self._key}"
        # llama.cpp ends a connection after each stream without saying so: nobody must use it again.
        keep: dict[str, Any] = {"force_close": True} if self._llamacpp else {"keepalive_timeout": _KEEP_ALIVE}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, **keep),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            trust_env=not is_loopback(self.config.url),
        )
        return await self._slots() if self._llamacpp else None

    async def close(self) -> None:
        """Close all connections; requests under way fail as :class:`BackendDown`."""
        self._unusable = "the backend is closed"
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def generate(self, request: Request) -> Reply:
        """Answer one request."""
        try:
            for _ in _REFUSABLE:
                try:
                    return await self._generate(request)
                except _Unsupported as error:
                    self._do_without(error.parameter)
            return await self._generate(request)
        except BackendError as error:
            raise self._named(error) from None

    async def generate_batch(self, requests: Sequence[Request]) -> list[Reply | Exception]:
        """Answer several requests with one prompt array for all that share their parameters."""
        groups: dict[tuple[bytes, bool], list[int]] = {}
        for index, request in enumerate(requests):
            constant = self._constant(request.query.node, request.arm, streamed=False)
            groups.setdefault(constant, []).append(index)
        replies: list[Reply | Exception] = [BackendGarbled("not answered")] * len(requests)

        async def one(constant: bytes, wrapped: bool, indexes: list[int]) -> None:
            group = [requests[i] for i in indexes]
            try:
                answers: Sequence[Reply | Exception] = await self._batch(constant, wrapped, group)
            except BackendError as error:
                answers = [self._named(error)] * len(group)
            for index, answer in zip(indexes, answers, strict=True):
                replies[index] = answer

        await asyncio.gather(*(one(*constant, indexes) for constant, indexes in groups.items()))
        return replies

    async def health(self) -> Health:
        """Ask for the list of models, or llama.cpp for its health; never raises."""
        if self._unusable is not None:
            return Health(False, self._unusable)
        try:
            status, data = await self._get(
                self._base.parent / "health" if self._llamacpp else self._base / "models"
            )
        except Exception as error:
            return Health(False, f"cannot be reached: {type(error).__name__}: {error}".rstrip(": "))
        if status in (401, 403):
            return Health(
                False, f"refuses the key in {self.config.key_env or '(key_env is not set)'} (HTTP {status})"
            )
        if status >= 300 and status != 404:  # some servers have no list of models
            return Health(False, f"HTTP {status} {server_message(data, self._key)}".rstrip())
        if self._llamacpp:
            return Health(True, slots=await self._slots())
        models = [m["id"] for m in data["data"] if isinstance(m.get("id"), str)] if _is_list(data) else []
        if models and self.config.model not in models:
            return Health(True, f"does not list '{self.config.model}': {nearest(self.config.model, models)}")
        return Health(True)

    async def _generate(self, request: Request) -> Reply:
        query = request.query
        # llama.cpp frees the slot of an abandoned call only where its answer was being streamed.
        streamed = self._llamacpp or request.on_delta is not None
        constant, wrapped = self._constant(query.node, request.arm, streamed)
        body = self._body(constant, [query])
        if streamed:
            started = perf_counter()

            async def read(response: aiohttp.ClientResponse) -> Reply:
                return await self._read_stream(response, request, wrapped, started)

            return await self._post(body, request.timeout, read)
        raw = await self._post(body, request.timeout, read_body)
        return reply_of(self._parse(raw), query, chat=self._chat, wrapped=wrapped)

    async def _batch(self, constant: bytes, wrapped: bool, group: list[Request]) -> list[Reply | Exception]:
        queries = [request.query for request in group]
        body = self._body(constant, queries)
        data = self._parse(await self._post(body, max(r.timeout for r in group), read_body))
        answers = texts_of(data, len(group))
        texts = [answer[0] if isinstance(answer, tuple) else "" for answer in answers]
        whole = usage_of(data, queries[0], texts[0]) if data.get("usage") else None
        # llama.cpp's usage counts the first prompt alone.
        usages = share_usage(whole, queries, texts, first_only=self._llamacpp)
        return [
            Reply(unwrap(answer[0]) if wrapped else answer[0], usage, None, answer[1])
            if isinstance(answer, tuple)
            else self._named(answer)
            for answer, usage in zip(answers, usages, strict=True)
        ]

    async def _read_stream(
        self, response: aiohttp.ClientResponse, request: Request, wrapped: bool, started: float
    ) -> Reply:
        if response.content_type == "application/json":  # the server does not stream
            data = self._parse(await read_body(response))
            reply = reply_of(data, request.query, chat=self._chat, wrapped=wrapped)
            if request.on_delta is not None:
                request.on_delta(reply.text)
            return reply
        # A wrapped choice is not to be shown with its wrapping: it is handed over whole.
        stream = Stream(self._chat, None if wrapped else request.on_delta, started)
        async for event in read_events(response):
            if event == b"[DONE]":
                stream.done = True
                break
            stream.add(self._parse(event), self._key)
        reply = stream.reply(request.query, wrapped=wrapped)
        if wrapped and request.on_delta is not None:
            request.on_delta(reply.text)
        return reply

    async def _post(
        self, body: bytes, timeout: float, read: Callable[[aiohttp.ClientResponse], Awaitable[_T]]
    ) -> _T:
        if self._unusable is not None or self._session is None:
            raise BackendRefused(self._unusable or "the backend is closed")
        try:
            # One limit for the whole answer: a server that trickles bytes is a server that is late.
            async with (
                asyncio.timeout(timeout),
                self._session.post(self._url, data=body, allow_redirects=False) as response,
            ):
                if 200 <= response.status < 300:
                    return await read(response)
                error, data = await error_for(response, self._key)
                raise _unsupported(error, data)
        except TimeoutError:
            raise BackendTimeout(f"no whole answer within {timeout:g} s") from None
        except aiohttp.ClientPayloadError as error:
            raise BackendGarbled(f"the answer broke off: {error}") from None
        except aiohttp.ClientResponseError as error:
            raise BackendGarbled(f"the answer is no HTTP: {error.message}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise BackendDown(f"{type(error).__name__}: {error}") from None

    async def _get(self, url: URL) -> tuple[int, Any]:
        # httpx over the same pool: control calls are rare, and only the hot path is worth aiohttp itself.
        body = b""
        control = httpx.AsyncClient(transport=AiohttpTransport(client=self._session), trust_env=False)
        async with asyncio.timeout(_CONTROL_SECONDS), control.stream("GET", str(url)) as response:
            async for part in response.aiter_bytes():
                body += part
                if len(body) > BODY_LIMIT:
                    raise BackendGarbled(f"the answer has more than {BODY_LIMIT} bytes")
        try:
            return response.status_code, from_json(body)
        except ValueError:
            return response.status_code, None

    async def _slots(self) -> int | None:
        try:
            _, data = await self._get(self._base.parent / "props")
            slots = data["total_slots"]
        except Exception:
            return None  # the requests will say what is wrong
        return slots if isinstance(slots, int) and slots > 0 else None

    def _parse(self, raw: bytes) -> dict[str, Any]:
        try:
            data = from_json(raw)
        except ValueError as error:
            what = f"no valid JSON ({error})" if raw.strip() else "empty"
            raise BackendGarbled(f"the answer is {what}") from None
        if not isinstance(data, dict):
            raise BackendGarbled(f"the answer is no JSON object but {type(data).__name__}")
        return data

    def _body(self, constant: bytes, queries: Sequence[Query]) -> bytes:
        try:
            if self._chat:
                prompt = b',"messages":' + to_json(self._messages(queries[0]))
            else:
                texts = [prompt_of(self._messages(query)) for query in queries]
                prompt = b',"prompt":' + to_json(texts if len(texts) > 1 else texts[0])
            if self._metadata is not None:
                prompt += b',"metadata":' + to_json(self._metadata(queries))
        except PydanticSerializationError as error:
            raise BackendRefused(f"the prompt cannot be written as JSON: {error}") from None
        return constant + prompt + b"}"

    def _constant(self, node: NodeSpec, arm: Arm, streamed: bool) -> tuple[bytes, bool]:
        """The body up to the prompt, and whether a choice comes back wrapped."""
        key = (node, arm, streamed)
        found = self._constants.get(key)
        if found is not None:
            return found
        if len(self._constants) >= _KNOWN_NODES:  # nodes made for one call each must not pile up
            self._constants.clear()
        params = node.params
        held = constraint(self.config.provider, self.config.api, node.answer)
        fields: dict[str, Any] = {
            "model": self.config.model,
            "temperature": params.temperature,
            "max_tokens": arm.max_tokens if arm.max_tokens is not None else params.max_tokens,
            "stop": list(params.stop) or None,
            "seed": params.seed,
            "reasoning_effort": arm.effort or params.effort,
        }
        for name in self._unsupported:
            value, other_name = fields.pop(name), _REFUSABLE[name]
            if other_name is not None:
                fields[other_name] = value
        fields = {name: value for name, value in fields.items() if value is not None}
        fields |= {**held.fields, **self._fields}
        if streamed:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        made = self._constants[key] = (to_json(fields)[:-1], held.wrapped)
        return made

    def _named(self, error: BackendError) -> BackendError:
        error.args = (f"{self.name}: {error}",)
        return error

    def _do_without(self, parameter: str) -> None:
        self._unsupported |= {parameter}
        self._constants.clear()


def prompt_of(messages: Sequence[Message]) -> str:
    """The messages as one text, for the API that takes no messages.

    Raises :class:`BackendRefused` for a message that is not text.
    """
    texts = [message.get("content") for message in messages]
    if not all(isinstance(text, str) for text in texts):
        raise BackendRefused('the completions API takes text only: use api = "chat"')
    return "\n\n".join(texts)  # type: ignore[arg-type]


def _unsupported(error: BackendError, data: Any) -> BackendError:
    """The error itself, or :class:`_Unsupported` where leaving a parameter out will help."""
    detail = data.get("error") if isinstance(data, dict) else None
    if not isinstance(error, BackendRefused) or not isinstance(detail, dict):
        return error
    parameter, code = detail.get("param"), detail.get("code")
    if code in ("unsupported_parameter", "unsupported_value") and parameter in _REFUSABLE:
        return _Unsupported(str(error), parameter)
    return error


def _is_list(data: Any) -> bool:
    return (
        isinstance(data, dict)
        and isinstance(data.get("data"), list)
        and all(isinstance(m, dict) for m in data["data"])
    )
