"""The OpenAI-compatible backend against real loopback servers, well-behaved and not."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import openai
import pytest
from aiohttp import web
from pydantic import BaseModel

from chainwax.router.answers import Choice, FreeText, Structured
from chainwax.router.backends import make_backend
from chainwax.router.backends.base import Request
from chainwax.router.backends.openai import OpenAIBackend
from chainwax.router.config import ModelConfig
from chainwax.router.errors import (
    BackendBusy,
    BackendDown,
    BackendGarbled,
    BackendRefused,
    BackendTimeout,
    ConfigError,
)
from chainwax.router.prompt import Prompt
from chainwax.router.types import Arm, NodeSpec, Params, Query

KEY = "sk-very-secret-0123456789"


class Ticket(BaseModel):
    product: str
    count: int = 1


def node(answer=None, **params):
    return NodeSpec(id="n", prompt=Prompt("{text}"), answer=answer or FreeText(), params=Params(**params))


def query(at=None, text="Is it broken?"):
    return Query(at or node(), "call", [{"role": "user", "content": text}], item_key="t-1")


def request(at=None, *, text="Is it broken?", timeout=5.0, arm=None, on_delta=None):
    return Request(query(at, text), arm or Arm("m"), timeout, on_delta)


def chat(content, usage=None, finish="stop"):
    message = {"role": "assistant", "content": content}
    data = {"id": "x", "choices": [{"index": 0, "message": message, "finish_reason": finish}]}
    return data if usage is None else data | {"usage": usage}


class Server:
    """Answers what it is told to, and keeps what it was asked."""

    def __init__(self, handler: Callable[[web.Request, dict], object]) -> None:
        self.handler = handler
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.paths: list[str] = []

    async def handle(self, incoming: web.Request) -> web.StreamResponse:
        raw = await incoming.read()
        body = json.loads(raw) if raw else {}
        self.bodies.append(body)
        self.headers.append(dict(incoming.headers))
        self.paths.append(incoming.path)
        answer = self.handler(incoming, body)
        if asyncio.iscoroutine(answer):
            answer = await answer
        return answer if isinstance(answer, web.StreamResponse) else web.json_response(answer)


@asynccontextmanager
async def served(handler, **config) -> AsyncIterator[tuple[OpenAIBackend, Server]]:
    server = Server(handler)
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", server.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    backend = make_backend("m", ModelConfig(**{"tier": "standard", "model": "gpt-x", "url": url} | config))
    assert isinstance(backend, OpenAIBackend)
    await backend.start()
    try:
        yield backend, server
    finally:
        await backend.close()
        await runner.cleanup()


@asynccontextmanager
async def raw_server(talk) -> AsyncIterator[OpenAIBackend]:
    """A server of bytes, for what no HTTP library would send."""

    async def connected(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        try:
            await talk(writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    backend = OpenAIBackend("m", ModelConfig(tier="standard", model="x", url=f"http://127.0.0.1:{port}/v1"))
    await backend.start()
    try:
        yield backend
    finally:
        await backend.close()
        server.close()


def ask(handler, at=None, *, expect=None, match=None, config=None, **kw):
    """One call at a server with this handler: the reply and the server, or the error expected."""

    async def go():
        async with served(handler, **(config or {})) as (backend, server):
            if expect is None:
                return await backend.generate(request(at, **kw)), server
            with pytest.raises(expect, match=match) as caught:
                await backend.generate(request(at, **kw))
            assert str(caught.value).startswith("m: ")
            return caught.value, server

    return asyncio.run(go())


def test_a_plain_answer_with_all_that_the_server_counts():
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 20,
        "prompt_tokens_details": {"cached_tokens": 64},
        "completion_tokens_details": {"reasoning_tokens": 12},
    }
    reply, server = ask(lambda *_: chat("Yes.", usage))
    assert (reply.text, reply.finish_reason, reply.simulated) == ("Yes.", "stop", False)
    assert (reply.usage.input, reply.usage.output, reply.usage.cached, reply.usage.reasoning) == (
        100,
        20,
        64,
        12,
    )
    assert server.paths == ["/v1/chat/completions"]


@pytest.mark.parametrize(
    "usage",
    [
        None,
        [],
        "many",
        {"prompt_tokens": "100"},
        {"prompt_tokens": -5, "completion_tokens": 1e300},
        {"prompt_tokens": True},
    ],
)
def test_usage_that_is_missing_or_nonsense_is_estimated(usage):
    reply, _ = ask(lambda *_: chat("x" * 41, usage), text="y" * 79)
    assert (reply.usage.input, reply.usage.output, reply.usage.cached) == (20, 11, 0)


def test_more_cached_than_sent_is_not_believed():
    details = {"prompt_tokens": 10, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 99}}
    assert ask(lambda *_: chat("x", details))[0].usage.cached == 10


def test_parameters_go_out_as_the_arm_and_the_node_say():
    at = node(temperature=0.5, max_tokens=100, stop=("END",), seed=7, effort="low")
    _, server = ask(lambda *_: chat("x"), at)
    assert server.bodies[0] == {
        "model": "gpt-x",
        "messages": [{"role": "user", "content": "Is it broken?"}],
        "temperature": 0.5,
        "max_tokens": 100,
        "stop": ["END"],
        "seed": 7,
        "reasoning_effort": "low",
    }
    _, server = ask(lambda *_: chat("x"), at, arm=Arm("m", effort="high", max_tokens=9))
    assert server.bodies[0]["max_tokens"] == 9
    assert server.bodies[0]["reasoning_effort"] == "high"


def test_the_official_client_sends_the_same_body_and_headers_that_matter(monkeypatch):
    monkeypatch.setenv("A_KEY", KEY)

    async def go():
        async with served(lambda *_: chat('{"answer": "yes"}'), key_env="A_KEY") as (backend, server):
            at = node(Choice(["yes", "no"]), max_tokens=9, seed=1, stop=("\n",))
            await backend.generate(request(at))
            ours = server.bodies[0]
            client = openai.AsyncOpenAI(base_url=backend.config.url, api_key=KEY, max_retries=0)
            await client.chat.completions.create(
                model="gpt-x",
                messages=ours["messages"],
                temperature=0.0,
                max_tokens=9,
                seed=1,
                stop=["\n"],
                response_format=ours["response_format"],
            )
            await client.close()
            assert server.bodies[1] == ours
            assert server.paths[1] == server.paths[0]
            for header in ("Authorization", "Content-Type"):
                assert server.headers[1][header] == server.headers[0][header]

    asyncio.run(go())


def test_a_choice_is_asked_for_as_an_object_and_comes_back_bare():
    reply, server = ask(lambda *_: chat('{"answer": "no"}'), node(Choice(["yes", "no"])))
    assert reply.text == "no"
    schema = server.bodies[0]["response_format"]["json_schema"]
    assert schema["strict"] is True
    assert schema["schema"]["type"] == "object"
    assert schema["schema"]["properties"]["answer"]["enum"] == ["yes", "no"]


@pytest.mark.parametrize("text", ["no", '{"answer": 3}', '["no"]', "{", ""])
def test_a_server_that_ignores_the_schema_is_taken_at_its_word(text):
    assert ask(lambda *_: chat(text), node(Choice(["yes", "no"])))[0].text == text


def test_structured_answers_carry_their_schema():
    _, server = ask(lambda *_: chat("{}"), node(Structured(Ticket)))
    sent = server.bodies[0]["response_format"]["json_schema"]
    assert sent["name"] == "Ticket"
    assert sent["schema"]["required"] == ["product", "count"]


def test_the_constant_part_is_made_once_for_each_node_and_arm():
    async def go():
        async with served(lambda *_: chat("x")) as (backend, server):
            for at in (first := node(max_tokens=1), node(max_tokens=2), first):
                await backend.generate(request(at))
            for _ in range(1100):
                backend._constant(node(), Arm("m"), False)
            assert len(backend._constants) <= 1024
            await backend.generate(request(first))
            assert [b["max_tokens"] for b in server.bodies] == [1, 2, 1, 1]

    asyncio.run(go())


def test_unicode_goes_out_and_comes_back():
    text = 'Grüße 🦊 \u2028 \\ " \x00'
    reply, server = ask(lambda *_: chat(text), text=text)
    assert reply.text == text
    assert server.bodies[0]["messages"][0]["content"] == text


def test_a_prompt_that_is_no_unicode_is_refused_before_anything_is_sent():
    _, server = ask(
        lambda *_: chat("x"), text="half \ud800", expect=BackendRefused, match="cannot be written"
    )
    assert server.bodies == []


# What servers do wrong.


def test_down():
    async def go():
        backend = OpenAIBackend("m", ModelConfig(tier="local", model="x", url="http://127.0.0.1:9/v1"))
        assert await backend.start() is None
        with pytest.raises(BackendDown, match=r"m: .*127\.0\.0\.1"):
            await backend.generate(request())
        health = await backend.health()
        assert not health.ok
        assert "cannot be reached" in health.detail
        await backend.close()
        with pytest.raises(BackendRefused, match="closed"):
            await backend.generate(request())

    asyncio.run(go())


@pytest.mark.parametrize("status", [500, 502, 504, 599])
def test_server_errors_are_down(status):
    error, _ = ask(lambda *_: web.json_response({"error": "oops"}, status=status), expect=BackendDown)
    assert "oops" in str(error)
    assert error.retryable


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 417, 422])
def test_other_client_errors_are_refused(status):
    body = {"error": {"message": "no such thing", "type": "x"}}
    error, _ = ask(
        lambda *_: web.json_response(body, status=status), expect=BackendRefused, match="no such thing"
    )
    assert not error.retryable


@pytest.mark.parametrize("status", [429, 503, 529])
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "1.5"}, 1.5),
        ({"retry-after-ms": "250", "Retry-After": "7"}, 0.25),
        ({"retry-after-ms": "soon", "Retry-After": "7"}, 7.0),
        ({"Retry-After": "-3"}, 0.0),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "inf"}, None),
        ({"Retry-After": "next week"}, None),
        ({"Retry-After": ""}, None),
        ({"Retry-After": "Mon, 99 Foo 2026 99:99:99 GMT"}, None),
        ({"Retry-After": "Wed, 01 Jan 2020 00:00:00 GMT"}, 0.0),
    ],
)
def test_busy_with_every_form_of_retry_after(status, headers, seconds):
    handler = lambda *_: web.json_response({"error": "slow down"}, status=status, headers=headers)  # noqa: E731
    error, _ = ask(handler, expect=BackendBusy, match="slow down")
    assert error.retry_after == seconds


@pytest.mark.parametrize("zone", ["GMT", "-0000", "+0200"])
def test_busy_until_a_date(zone):
    offset = timedelta(hours=2) if zone == "+0200" else timedelta()
    date = format_datetime(datetime.now(UTC) + offset + timedelta(seconds=30)).replace("+0000", zone)
    handler = lambda *_: web.Response(status=429, headers={"Retry-After": date})  # noqa: E731
    error, _ = ask(handler, expect=BackendBusy)
    assert 27 < error.retry_after <= 30


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b'{"choices": [{"message": {"con', "no valid JSON"),
        (b"<html>busy</html>", "no valid JSON"),
        (b'{"choices": [{"message": {"content": "\xff\xfe"}}]}', "no valid JSON"),
        (b'{"choices": [{"message": {"content": "\\ud800"}}]}', "no valid JSON"),
        (b"[" * 100_000, "no valid JSON"),
        (b"[]", "list"),
        (b"null", "NoneType"),
        (b"{}", "no choice"),
        (b'{"choices": []}', "no choice"),
        (b'{"choices": {}}', "no choice"),
        (b'{"choices": [null]}', "no choice"),
        (b'{"choices": [{"message": null}]}', "no choice"),
        (b'{"choices": [{"message": {"content": null}, "finish_reason": "length"}]}', "NoneType.*length"),
        (b'{"choices": [{"message": {"content": ["x"]}}]}', "list"),
        (b'{"error": {"message": "quota of the proxy"}}', "quota of the proxy"),
    ],
)
def test_bodies_that_are_not_what_the_api_promises(body, match):
    handler = lambda *_: web.Response(body=body, content_type="application/json")  # noqa: E731
    ask(handler, expect=BackendGarbled, match=match)


def test_a_model_that_declines_is_not_asked_again():
    answer = {"choices": [{"message": {"content": None, "refusal": "I will not."}, "finish_reason": "stop"}]}
    ask(lambda *_: answer, expect=BackendRefused, match="I will not")


def test_a_huge_body_is_not_read_on():
    sent = 0

    async def announced(*_):
        return web.Response(body=b" " * (9 << 20))

    ask(announced, expect=BackendGarbled, match="more than 8388608")

    async def endless(incoming, _):
        nonlocal sent
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(incoming)
        for _ in range(64):
            await response.write(b" " * (1 << 20))
            sent += 1
        return response

    ask(endless, expect=BackendGarbled, match="more than 8388608", timeout=20)
    assert sent < 20
    sent = 0
    ask(endless, expect=BackendGarbled, match="more than 8388608", timeout=20, on_delta=lambda _: None)
    assert sent < 20


def test_a_slow_server_is_given_up():
    async def slow(*_):
        await asyncio.sleep(5)

    started = time.monotonic()
    ask(slow, expect=BackendTimeout, match=r"0\.1 s", timeout=0.1)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("on_delta", [None, lambda _: None])
def test_a_server_that_trickles_for_ever_is_given_up(on_delta):
    async def trickle(incoming, _):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(incoming)
        while True:
            await response.write(b": waiting\n\n" if on_delta else b" ")
            await asyncio.sleep(0.01)

    started = time.monotonic()
    ask(trickle, expect=BackendTimeout, timeout=0.2, on_delta=on_delta)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"", BackendDown),
        (b"hello there\r\n\r\n", BackendGarbled),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", BackendGarbled),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{", BackendGarbled),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", BackendGarbled),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope", BackendGarbled),
    ],
)
def test_what_is_hardly_http(sent, error):
    async def talk(writer):
        writer.write(sent)
        await writer.drain()

    async def go():
        async with raw_server(talk) as backend:
            with pytest.raises(error):
                await backend.generate(request())

    asyncio.run(go())


def test_redirects_are_not_followed_with_the_key(monkeypatch):
    monkeypatch.setenv("A_KEY", KEY)
    handler = lambda *_: web.Response(status=307, headers={"Location": "/elsewhere"})  # noqa: E731
    _, server = ask(handler, expect=BackendRefused, match="redirects", config={"key_env": "A_KEY"})
    assert server.paths == ["/v1/chat/completions"]


def test_the_next_call_after_a_fault_works():
    faults = iter([web.Response(body=b"{"), web.Response(status=500), web.json_response(chat("fine"))])

    async def go():
        async with served(lambda *_: next(faults)) as (backend, _):
            with pytest.raises(BackendGarbled):
                await backend.generate(request())
            with pytest.raises(BackendDown):
                await backend.generate(request())
            assert (await backend.generate(request())).text == "fine"

    asyncio.run(go())


def test_closing_ends_what_is_under_way():
    async def slow(*_):
        await asyncio.sleep(5)

    async def go():
        async with served(slow) as (backend, server):
            call = asyncio.ensure_future(backend.generate(request()))
            while not server.bodies:
                await asyncio.sleep(0.01)
            await backend.close()
            with pytest.raises(BackendDown):
                await asyncio.wait_for(call, 1)

    asyncio.run(go())


# Keys.


def test_a_missing_key_is_named_and_nothing_is_sent(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)

    async def go():
        async with served(lambda *_: chat("x"), key_env="NO_SUCH_KEY") as (backend, server):
            with pytest.raises(BackendRefused, match="NO_SUCH_KEY is not set"):
                await backend.generate(request())
            health = await backend.health()
            assert not health.ok
            assert "NO_SUCH_KEY" in health.detail
            assert server.bodies == []

    asyncio.run(go())


def test_a_key_that_no_header_can_carry_is_not_shown(monkeypatch):
    monkeypatch.setenv("A_KEY", "sk-\r\nX-Evil: 1")
    error, server = ask(
        lambda *_: chat("x"), expect=BackendRefused, match="A_KEY", config={"key_env": "A_KEY"}
    )
    assert "Evil" not in str(error)
    assert server.bodies == []


@pytest.mark.parametrize("form", ["json", "text", "long"])
def test_a_server_that_repeats_the_key_is_not_repeated(monkeypatch, form):
    monkeypatch.setenv("A_KEY", KEY)
    words = f"Incorrect API key provided: {KEY}" if form != "long" else "x" * 290 + KEY + "y" * 5000

    def refuse(incoming, _):
        assert incoming.headers["Authorization"] == f"Bearer {KEY}"
        if form == "json":
            return web.json_response({"error": {"message": words}}, status=401)
        return web.Response(text=words, status=401)

    error, _ = ask(refuse, expect=BackendRefused, config={"key_env": "A_KEY"})
    assert "sk-very" not in str(error)
    assert len(str(error)) < 400


# Parameters that a model does not take.


def test_reasoning_models_are_asked_again_in_their_own_words():
    def strict(_, body):
        for name, code in (("max_tokens", "unsupported_parameter"), ("temperature", "unsupported_value")):
            if name in body:
                error = {"message": f"Unsupported: '{name}'", "param": name, "code": code}
                return web.json_response({"error": error}, status=400)
        return chat("x")

    async def go():
        async with served(strict) as (backend, server):
            at = node(max_tokens=5)
            await asyncio.gather(*(backend.generate(request(at)) for _ in range(8)))
            asked = len(server.bodies)
            await backend.generate(request(at))
            assert len(server.bodies) == asked + 1
            assert server.bodies[-1]["max_completion_tokens"] == 5
            assert "temperature" not in server.bodies[-1]

    asyncio.run(go())


def test_a_server_that_refuses_for_ever_is_not_asked_for_ever():
    error = {"message": "no", "param": "temperature", "code": "unsupported_value"}
    handler = lambda *_: web.json_response({"error": error}, status=400)  # noqa: E731
    _, server = ask(handler, expect=BackendRefused, match="no")
    assert len(server.bodies) == 3


# Streams.


def chunk(piece=None, finish=None, **more):
    delta = {} if piece is None else {"content": piece}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]} | more


def streaming(chunks, *, end=b"data: [DONE]\n\n", delay=0.0, newline=b"\n"):
    async def handler(incoming, _):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(incoming)
        for each in chunks:
            await asyncio.sleep(delay)
            data = each if isinstance(each, bytes) else b"data: " + json.dumps(each).encode()
            await response.write(data + newline + newline)
        await response.write(end)
        return response

    return handler


USAGE = {"prompt_tokens": 8, "completion_tokens": 2}
STREAM = [
    chunk(""),
    chunk("It"),
    b": keep alive",
    chunk(" works"),
    chunk(None, "stop"),
    {"choices": [], "usage": USAGE},
]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_a_stream(newline):
    pieces = []
    reply, server = ask(streaming(STREAM, delay=0.02, newline=newline), on_delta=pieces.append)
    assert pieces == ["It", " works"]
    assert (reply.text, reply.finish_reason, reply.usage.input, reply.usage.output) == (
        "It works",
        "stop",
        8,
        2,
    )
    assert 0.03 < reply.first_token_s < 1
    assert server.bodies[0]["stream"] is True
    assert server.bodies[0]["stream_options"] == {"include_usage": True}


def test_a_stream_cut_into_single_bytes():
    raw = b"".join(
        b"data: " + json.dumps(c, ensure_ascii=False).encode() + b"\n\n"
        for c in [chunk("ü🦊"), chunk("!", "stop")]
    )

    async def talk(writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for at in range(len(raw)):
            writer.write(raw[at : at + 1])
            await writer.drain()

    async def go():
        pieces = []
        async with raw_server(talk) as backend:
            assert (await backend.generate(request(on_delta=pieces.append))).text == "ü🦊!"
        assert pieces == ["ü🦊", "!"]

    asyncio.run(go())


@pytest.mark.parametrize(
    ("chunks", "end", "error", "match"),
    [
        (STREAM[:2], b"", BackendGarbled, "ended in mid-answer, after 1 pieces"),
        ([], b"", BackendGarbled, "after 0 pieces"),
        ([b"data: {"], b"", BackendGarbled, "no valid JSON"),
        ([b"data: \xff"], b"", BackendGarbled, "no valid JSON"),
        ([b"data: 3"], b"", BackendGarbled, "int"),
        ([{"choices": [{"index": 0}]}], b"", BackendGarbled, "another shape"),
        ([{"choices": [{"delta": {"content": 3}}]}], b"", BackendGarbled, "int"),
        ([chunk("It"), {"error": {"message": "out of memory"}}], b"", BackendDown, "out of memory"),
    ],
)
def test_streams_that_go_wrong(chunks, end, error, match):
    ask(streaming(chunks, end=end), expect=error, match=match, on_delta=lambda _: None)


@pytest.mark.parametrize("chunks", [STREAM[:5], STREAM[1:4]])
def test_a_stream_may_end_by_a_finish_reason_or_by_done(chunks):
    end = b"" if chunks[-1]["choices"][0]["finish_reason"] else b"data: [DONE]"
    assert ask(streaming(chunks, end=end), on_delta=lambda _: None)[0].text == "It works"


def test_a_server_that_does_not_stream_when_asked():
    pieces = []
    reply, _ = ask(lambda *_: chat("whole", USAGE), on_delta=pieces.append)
    assert (reply.text, pieces, reply.usage.input) == ("whole", ["whole"], 8)


def test_a_streamed_choice_is_shown_without_its_wrapping():
    pieces = []
    chunks = [chunk('{"ans'), chunk('wer": "yes"}', "stop")]
    reply, _ = ask(streaming(chunks), node(Choice(["yes", "no"])), on_delta=pieces.append)
    assert (reply.text, pieces) == ("yes", ["yes"])


# Prompt arrays.


def completions(order=lambda choices: choices, usage=None):
    def handler(_, body):
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        choices = [{"index": i, "text": p.upper(), "finish_reason": "stop"} for i, p in enumerate(prompts)]
        return {"choices": order(choices)} | ({"usage": usage} if usage else {})

    return handler


def batch(handler, requests, **config):
    async def go():
        async with served(handler, **{"api": "completions"} | config) as (backend, server):
            assert backend.batch_max == 32
            return await backend.generate_batch(requests), server

    return asyncio.run(go())


def test_prompt_arrays_are_matched_by_index_and_share_the_usage():
    usage = {"prompt_tokens": 31, "completion_tokens": 17, "prompt_tokens_details": {"cached_tokens": 5}}
    at = node()
    texts = ["a" * 4, "b" * 40, "c" * 80]
    replies, server = batch(completions(lambda c: c[::-1], usage), [request(at, text=t) for t in texts])
    assert [r.text for r in replies] == [t.upper() for t in texts]
    assert server.bodies[0]["prompt"] == texts
    assert server.paths == ["/v1/completions"]
    assert [r.usage.input for r in replies] == [1, 10, 20]
    assert sum(r.usage.output for r in replies) == 17
    assert sum(r.usage.cached for r in replies) == 5


def test_llamacpp_counts_only_the_first_prompt_of_an_array():
    at = node()
    usage = {"prompt_tokens": 10, "completion_tokens": 3}
    texts = ["a" * 40, "b" * 80]
    replies, server = batch(
        completions(usage=usage), [request(at, text=t) for t in texts], provider="llamacpp"
    )
    assert [r.usage.input for r in replies] == [10, 20]
    assert "stream" not in server.bodies[-1]


def test_requests_with_other_parameters_go_on_their_own():
    one, two = node(max_tokens=1), node(max_tokens=2)
    requests = [request(one, text="a"), request(two, text="b"), request(one, text="c")]
    replies, server = batch(completions(), requests)
    assert [r.text for r in replies] == ["A", "B", "C"]
    assert sorted((b["max_tokens"], b["prompt"]) for b in server.bodies) == [(1, ["a", "c"]), (2, "b")]


def test_a_choice_that_is_missing_fails_its_own_request_only():
    at = node()
    bad = lambda c: [c[0], c[2] | {"index": 7}, "x", {"index": True, "text": "T"}]  # noqa: E731
    replies, _ = batch(completions(bad), [request(at, text=t) for t in "abc"])
    assert replies[0].text == "A"
    assert [type(r) for r in replies[1:]] == [BackendGarbled, BackendGarbled]


def test_a_failing_batch_fails_each_request():
    replies, _ = batch(
        lambda *_: web.Response(status=503, headers={"Retry-After": "2"}), [request(), request()]
    )
    assert [r.retry_after for r in replies] == [2.0, 2.0]


def test_a_single_prompt_over_the_completions_api():
    async def go():
        async with served(completions(), api="completions") as (backend, _):
            messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]
            reply = await backend.generate(Request(Query(node(), "c", messages), Arm("m"), 5))
            assert reply.text == "BE BRIEF\n\nWHY?"
            picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]
            with pytest.raises(BackendRefused, match="text only"):
                await backend.generate(Request(Query(node(), "c", picture), Arm("m"), 5))

    asyncio.run(go())


# Health and slots.


def health_of(handler, **config):
    async def go():
        async with served(handler, **config) as (backend, _):
            return await backend.health()

    return asyncio.run(go())


@pytest.mark.parametrize(
    ("answer", "ok", "detail"),
    [
        ({"data": [{"id": "gpt-x"}]}, True, ""),
        ({"data": [{"id": "gpt-y"}]}, True, "did you mean 'gpt-y'"),
        ({"data": "?"}, True, ""),
        ([], True, ""),
        (404, True, ""),
        (401, False, "refuses the key"),
        (500, False, "HTTP 500"),
        (b" " * (9 << 20), False, "BackendGarbled"),
    ],
)
def test_health(answer, ok, detail):
    def handler(*_):
        if isinstance(answer, int):
            return web.Response(status=answer)
        return web.Response(body=answer) if isinstance(answer, bytes) else answer

    health = health_of(handler)
    assert (health.ok, detail in health.detail) == (ok, True), health


def test_llamacpp_tells_its_slots():
    def handler(incoming, _):
        return {"/health": {"status": "ok"}, "/props": {"total_slots": 3}}[incoming.path]

    async def go():
        async with served(handler, provider="llamacpp") as (backend, _):
            assert (await backend.health()).slots == 3
            await backend.close()
            assert await backend.start() == 3

    asyncio.run(go())


@pytest.mark.parametrize("props", [{}, [], {"total_slots": "4"}, {"total_slots": 0}, 500])
def test_slots_that_are_not_told(props):
    async def go():
        handler = lambda *_: web.Response(status=props) if isinstance(props, int) else props  # noqa: E731
        async with served(handler, provider="llamacpp") as (backend, _):
            await backend.close()
            assert await backend.start() is None

    asyncio.run(go())


@pytest.mark.parametrize(
    "url", ["127.0.0.1:80/v1", "ftp://h/v1", "http://", "http://h:99999/v1", "http://[::1/v1"]
)
def test_a_url_that_is_none(url):
    with pytest.raises(ConfigError, match=r"models\.m\.url"):
        OpenAIBackend("m", ModelConfig(tier="local", model="x", url=url))
