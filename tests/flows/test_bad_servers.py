"""Whole flows against real HTTP servers that misbehave: a clear dead letter, and the rest goes on."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from aiohttp import web
from bytewax.testing import run_main

from chainwax.connectors import InProcessBus, ItemsSource, ListSink
from chainwax.flows import Flow
from chainwax.router import LLMManager, load_settings

Handler = Callable[[web.Request, str], Awaitable[web.StreamResponse]]


def reply(text: str) -> web.Response:
    usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return web.json_response({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage})


@contextmanager
def server(bad: Handler) -> Iterator[str]:
    """A server that answers well, but for questions with 'bad' in them."""

    async def chat(request: web.Request) -> web.StreamResponse:
        text = json.loads(await request.read())["messages"][-1]["content"]
        return await bad(request, text) if "bad" in text else reply(f"fine: {text}")

    loop = asyncio.new_event_loop()
    started: list[Any] = []
    ready = threading.Event()

    async def start() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", chat)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        started.extend([runner, runner.addresses[0][1]])
        ready.set()

    thread = threading.Thread(target=lambda: (loop.run_until_complete(start()), loop.run_forever()))
    thread.start()
    ready.wait(5)
    try:
        yield f"http://127.0.0.1:{started[1]}/v1"
    finally:
        asyncio.run_coroutine_threadsafe(started[0].cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def run(url: str, **model: Any) -> tuple[list[Any], list[Any]]:
    flow = Flow("hard")
    flow.source("in").query("ask", "{text}").sink("out")
    settings = load_settings(
        run={"recording": None},
        models={"m": {"tier": "strongest", "url": url, "model": "m", "retries": 1, "timeout": 0.5, **model}},
    )
    source = [{"text": f"{'bad' if n % 5 == 2 else 'good'} {n}"} for n in range(15)]
    out: list[Any] = []
    letters: list[Any] = []
    with LLMManager(settings, bus=InProcessBus()) as manager:
        manager.begin_run("hard")
        sinks = {"out": ListSink(out)}
        dead = ListSink(letters)
        run_main(flow.compile({"in": ItemsSource(source)}, sinks, dead_letters=dead, manager=manager))
    return out, letters


async def _status(status: int, request: web.Request, text: str, **headers: str) -> web.Response:
    return web.json_response({"error": {"message": f"no: {status}"}}, status=status, headers=headers)


async def too_many(request: web.Request, text: str) -> web.StreamResponse:
    return await _status(429, request, text, **{"Retry-After": "0"})


async def broken(request: web.Request, text: str) -> web.StreamResponse:
    return await _status(500, request, text)


async def refused(request: web.Request, text: str) -> web.StreamResponse:
    return await _status(400, request, text)


async def truncated(request: web.Request, text: str) -> web.StreamResponse:
    return web.Response(body=b'{"choices": [{"mess', content_type="application/json")


async def empty(request: web.Request, text: str) -> web.StreamResponse:
    return web.Response(body=b"", content_type="application/json")


async def html(request: web.Request, text: str) -> web.StreamResponse:
    return web.Response(body=b"<html>gateway</html>", content_type="text/html")


async def slow(request: web.Request, text: str) -> web.StreamResponse:
    await asyncio.sleep(5)
    return reply("too late")


async def never_ends(request: web.Request, text: str) -> web.StreamResponse:
    response = web.StreamResponse()
    response.content_type = "application/json"
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.05)


async def hangs_up(request: web.Request, text: str) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (too_many, "BackendBusy"),
        (broken, "BackendDown"),
        (refused, "BackendRefused"),
        (truncated, "BackendGarbled"),
        (empty, "BackendGarbled"),
        (html, "BackendGarbled"),
        (slow, "BackendTimeout"),
        (never_ends, "BackendTimeout"),
        (hangs_up, "BackendDown"),
    ],
)
def test_what_the_server_does_to_some_items_costs_only_those(bad: Handler, error: str) -> None:
    begun = time.monotonic()
    with server(bad) as url:
        out, letters = run(url)
    assert sorted(v["text"] for v in out) == sorted(f"good {n}" for n in range(15) if n % 5 != 2)
    assert sorted(letter["item"]["text"] for letter in letters) == ["bad 12", "bad 2", "bad 7"]
    assert {(letter["node"], letter["error"]) for letter in letters} == {("ask", error)}
    assert all(letter["message"].startswith("m: ") for letter in letters)
    assert time.monotonic() - begun < 20


def test_a_server_that_is_not_there_is_said_for_each_item() -> None:
    out, letters = run("http://127.0.0.1:9/v1", retries=0)
    assert out == []
    assert len(letters) == 15
    assert {letter["error"] for letter in letters} == {"BackendDown"}


def test_a_missing_key_is_named_and_never_asked_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with server(broken) as url:
        out, letters = run(url, key_env="NO_SUCH_KEY")
    assert out == []
    assert len(letters) == 15
    assert "NO_SUCH_KEY" in letters[0]["message"]
