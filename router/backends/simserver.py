"""The simulated tier's server: OpenAI's API on a loopback port, answered by stated accuracy.

Calls go over real HTTP, so that queues, timeouts and records see what they would see of a real
server; what is answered is made up, and every answer says ``"simulated": true``.

Beside the usual fields a request may carry ``metadata: {"node": …, "item": …}``, by which the server
looks up what the right answer would be; for a prompt array ``item`` is a list.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

from aiohttp import web
from pydantic_core import from_json, to_json

from chainwax.router.backends._flavours import choices_of
from chainwax.router.backends._simulation import SimulatedModel
from chainwax.router.errors import ConfigError, nearest

__all__ = ["SimulationServer"]

_BODY_LIMIT = 64 * 1024 * 1024
_PIECES = 8
_ids = itertools.count(1)


class SimulationServer:
    """One server for all simulated models of an event loop; ``port`` 0 takes a free one."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._address = host, port
        self._models: dict[str, SimulatedModel] = {}
        self._runner: web.AppRunner | None = None
        self._lock = asyncio.Lock()
        self.url = ""
        """The base URL up to and with ``/v1``, once a model has been added."""

    @classmethod
    def shared(cls) -> SimulationServer:
        """The running loop's server."""
        loop = asyncio.get_running_loop()
        if loop not in _of_loop:
            _of_loop[loop] = cls()
        return _of_loop[loop]

    async def add(self, model: SimulatedModel) -> str:
        """Serve a model; the name to call it by, which differs from its own where that is taken."""
        name = next(n for n in _names(model.name) if n not in self._models)
        self._models[name] = model
        async with self._lock:
            if self._runner is None:
                await self._start()
        return name

    async def remove(self, name: str) -> None:
        """Stop serving a model; without any the server ends."""
        self._models.pop(name, None)
        async with self._lock:
            if not self._models and self._runner is not None:
                runner, self._runner = self._runner, None
                await runner.cleanup()

    async def _start(self) -> None:
        app = web.Application(client_max_size=_BODY_LIMIT)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/v1/models", self._list)
        # Whoever stops the server waits for no answer any more.
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, *self._address)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}/v1"

    async def _list(self, _: web.Request) -> web.Response:
        data = [{"id": n, "object": "model", "created": 0, "owned_by": "simulation"} for n in self._models]
        return _json({"object": "list", "data": data, "simulated": True})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        try:
            body, model = await self._read(request)
            messages = body.get("messages")
            if not isinstance(messages, list) or not messages:
                raise _BadRequest("'messages' must be a list that is not empty")
            node, item = _asked(body)
            text = _answer(model, body, node, item)
        except (_BadRequest, ConfigError) as error:
            return _refusal(error)
        contents = (m.get("content") if isinstance(m, dict) else m for m in messages)
        sent = sum(_tokens(c if isinstance(c, str) else str(c)) for c in contents)
        usage = _usage(sent, _tokens(text))
        if body.get("stream"):
            return await _stream(request, body, text, usage, model.latency())
        await asyncio.sleep(model.latency())
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        return _json(_frame(body, "chat.completion") | {"choices": [choice], "usage": usage})

    async def _completions(self, request: web.Request) -> web.Response:
        try:
            body, model = await self._read(request)
            if body.get("stream"):
                raise _BadRequest("the simulated completions API does not stream: use chat completions")
            prompt = body.get("prompt")
            prompts = prompt if isinstance(prompt, list) else [prompt]
            if not prompts or not all(isinstance(p, str) for p in prompts):
                raise _BadRequest("'prompt' must be a text or a list of texts")
            node, item = _asked(body)
            items = item if isinstance(item, list) else [item] * len(prompts)
            if len(items) != len(prompts):
                raise _BadRequest(f"{len(prompts)} prompts, but {len(items)} items in 'metadata'")
            texts = [_answer(model, body, node, each) for each in items]
        except (_BadRequest, ConfigError) as error:
            return _refusal(error)
        await asyncio.sleep(model.latency())
        choices = [
            {"index": i, "text": text, "finish_reason": "stop", "logprobs": None}
            for i, text in enumerate(texts)
        ]
        usage = _usage(sum(map(_tokens, prompts)), sum(map(_tokens, texts)))
        return _json(_frame(body, "text_completion") | {"choices": choices, "usage": usage})

    async def _read(self, request: web.Request) -> tuple[dict[str, Any], SimulatedModel]:
        try:
            body = from_json(await request.read())
        except ValueError as error:
            raise _BadRequest(f"the body is no JSON: {error}") from None
        if not isinstance(body, dict):
            raise _BadRequest("the body is no JSON object")
        name = str(body.get("model"))
        if name not in self._models:
            raise _BadRequest(f"no simulated model '{name[:80]}': {nearest(name, self._models)}")
        return body, self._models[name]


_of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, SimulationServer] = WeakKeyDictionary()


class _BadRequest(Exception):
    """The request is not what the API takes."""


def _names(name: str) -> Iterable[str]:
    return itertools.chain([name], (f"{name}#{i}" for i in itertools.count(2)))


def _asked(body: dict[str, Any]) -> tuple[str, Any]:
    metadata = body.get("metadata")
    if not isinstance(metadata, dict):
        return "", ""
    return str(metadata.get("node", "")), metadata.get("item", "")


def _answer(model: SimulatedModel, body: dict[str, Any], node: str, item: Any) -> str:
    try:
        schema = body["response_format"]["json_schema"]["schema"]
    except (KeyError, TypeError):
        schema = None
    choices = choices_of(schema)
    text = model.answer(node, str(item), choices, schema if isinstance(schema, dict) else None)
    return to_json({"answer": text}).decode() if choices is not None else text


def _tokens(text: str) -> int:
    return max(1, -(-len(text) // 4))


def _usage(sent: int, made: int) -> dict[str, Any]:
    details = {"prompt_tokens_details": {"cached_tokens": 0}}
    return {"prompt_tokens": sent, "completion_tokens": made, "total_tokens": sent + made} | details


def _frame(body: dict[str, Any], kind: str) -> dict[str, Any]:
    return {
        "id": f"simulated-{next(_ids)}",
        "object": kind,
        "created": int(time.time()),
        "model": body["model"],
        "simulated": True,
    }


def _json(data: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(body=to_json(data), status=status, content_type="application/json")


def _refusal(error: Exception) -> web.Response:
    detail = {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}
    return _json({"error": detail, "simulated": True}, status=400)


async def _stream(
    request: web.Request, body: dict[str, Any], text: str, usage: dict[str, Any], latency: float
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    frame = _frame(body, "chat.completion.chunk")
    options = body.get("stream_options")
    wants_usage = isinstance(options, dict) and options.get("include_usage") is True

    async def send(choices: list[dict[str, Any]], **more: Any) -> None:
        await response.write(b"data: " + to_json(frame | {"choices": choices} | more) + b"\n\n")

    # Half of the time passes before the first token, as with a real prompt, the rest between the pieces.
    await asyncio.sleep(latency / 2)
    size = max(1, -(-len(text) // _PIECES))
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    for index, piece in enumerate(pieces):
        if index:
            await asyncio.sleep(latency / 2 / len(pieces))
        delta = {"content": piece} if index else {"role": "assistant", "content": piece}
        await send([{"index": 0, "delta": delta, "finish_reason": None}])
    await send([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    if wants_usage:
        await send([], usage=usage)
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response
