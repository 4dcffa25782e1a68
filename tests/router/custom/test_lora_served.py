"""An adapter in the real embedded engine: it computes what was trained, and no call is lost."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from contextlib import closing

import httpx
import numpy as np
import pytest
from tiny_llama import write_tiny

from chainwax.router import LLMManager, load_settings
from chainwax.router.answers import FreeText
from chainwax.router.backends import llamacpp, make_backend
from chainwax.router.backends._adapter import Bare
from chainwax.router.backends.base import Request
from chainwax.router.config import ModelConfig
from chainwax.router.custom.lora.adapter import write_adapter
from chainwax.router.custom.lora.base import LINEAR, read_base
from chainwax.router.custom.lora.forward import as_weights, hidden, score
from chainwax.router.prompt import Prompt
from chainwax.router.types import Arm, NodeSpec, Params, Query

BARE = Bare("Tell me of ", " now.")
ASKED = "Tell me of things now."
ALPHA, RANK = 8.0, 4


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, an adapter for it with numbers drawn by chance, and its numbers."""
    folder = tmp_path_factory.mktemp("made")
    path = write_tiny(folder / "tiny.gguf")
    base, rng = read_base(path), np.random.default_rng(0)
    pairs = {
        name: (
            (rng.normal(size=(base.layers[name].shape[0], RANK, base.layers[name].shape[2])) / 8),
            (rng.normal(size=(base.layers[name].shape[0], base.layers[name].shape[1], RANK)) / 2),
        )
        for name in LINEAR
    }
    write_adapter(folder / "adapter.gguf", pairs, alpha=ALPHA, base=path, bare=BARE)
    return base, path, folder / "adapter.gguf", pairs


def model(path, adapter=None):
    engine = {"path": path, "threads": 1, "slots": 2, "context": 512, "adapter": adapter}
    return make_backend("tiny", ModelConfig(tier="local", backend="llamacpp", engine=engine))


def request(tokens=4):
    node = NodeSpec(id="n", prompt=Prompt("{x}"), answer=FreeText(), params=Params(max_tokens=tokens))
    return Request(Query(node, "c", [{"role": "user", "content": ASKED}]), Arm("tiny"), 30.0, None)


def greedy(base, adapter, ids, count):
    """Tokens and their log-probabilities, by the training's own forward pass."""
    weights, ids, found = as_weights(base), list(ids), []
    for _ in range(count):
        states = hidden(
            weights, adapter, base.shape, np.array([ids]), np.ones((1, len(ids)), int), ALPHA / RANK
        )
        chances = score(weights, states)[0, -1]
        ids.append(int(chances.argmax()))
        found.append((ids[-1], float(chances.max())))
    return found


def test_the_engine_computes_what_was_trained_with_the_adapter_and_without(made):
    base, path, adapter, pairs = made
    ids = base.encode(BARE.turn([{"role": "user", "content": ASKED}]))

    async def go():
        tuned = model(path, adapter)
        await tuned.start()
        try:
            async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
                said = []
                for lora in ([], [{"id": 0, "scale": 1.0}]):
                    body = {"prompt": ids, "n_predict": 3, "n_probs": 1, "temperature": 0, "lora": lora}
                    answer = await client.post(
                        f"{tuned._engine.child.address}/completion", json=body | {"return_tokens": True}
                    )
                    said.append(answer.json())
                words = {"content": BARE.turn([{"role": "user", "content": ASKED}]), "parse_special": True}
                answer = await client.post(f"{tuned._engine.child.address}/tokenize", json=words)
                return said, answer.json()["tokens"]
        finally:
            await tuned.close()

    (plain, changed), tokens = asyncio.run(go())
    assert tokens == ids
    for seen, numbers in ((plain, {}), (changed, pairs)):
        wanted = greedy(base, numbers, ids, 3)
        assert seen["tokens"] == [token for token, _ in wanted]
        # The engine tells no chance of a token that is part of a letter.
        told = [(one["id"], one["logprob"]) for one in seen["completion_probabilities"]]
        assert told
        for token, chance in told:
            assert chance == pytest.approx(dict(wanted)[token], abs=0.2)
    assert plain["tokens"] != changed["tokens"]


def test_one_engine_serves_both_and_a_call_under_way_survives_the_takeover(made):
    _, path, adapter, _ = made

    async def go():
        base, tuned = model(path), model(path, adapter)
        await base.start()
        first = base._engine.child
        try:
            # The takeover falls into these.
            under_way = [asyncio.create_task(base.generate(request(300))) for _ in range(2)]
            await asyncio.sleep(0.05)
            await tuned.start()
            replies = await asyncio.gather(*under_way)
            now = await base.generate(request())
            own = await tuned.generate(request())
            assert base._engine is tuned._engine
            assert base._engine.child is not first
            assert not first.runs  # it ended with its last call
            assert [reply.usage.output for reply in replies] == [300, 300]
            assert now.text != own.text
            # The adapter is asked the item's text alone; the base the whole question.
            assert own.usage.input < now.usage.input
        finally:
            await tuned.close()
            await base.close()
        assert llamacpp._engines == {}

    asyncio.run(go())


def test_while_an_adapter_comes_no_call_is_lost_or_paid_twice(made, tmp_path):
    _, path, adapter, _ = made
    engine = {"path": str(path), "threads": 1, "slots": 2, "context": 512}
    settings = load_settings(
        run={"recording": str(tmp_path / "run.db"), "seed": 1},
        models={"small": {"tier": "local", "backend": "llamacpp", "engine": engine, "per_hour": 0.04}},
    )
    node = NodeSpec("n", Prompt("{value}"), FreeText(), flow="f", params=Params(max_tokens=150))
    own = ModelConfig(tier="custom", backend="llamacpp", engine=engine | {"adapter": adapter}, per_hour=0.01)
    results, all_there = [], threading.Event()

    def done(_, result):
        results.append(result)
        if len(results) == 24:
            all_there.set()

    with LLMManager(settings) as manager:
        manager.begin_run("f", nodes=[node])
        face = manager.register(node)
        face.query("warm up")
        first = manager.instances["small"].backend._engine.child
        face.submit([face.bind(f"{n}", item_key=f"{n}", position=f"p:{n}") for n in range(12)], done)
        manager.add_model("n-1", own, nodes=["n"])
        face.submit([face.bind(f"{n}", item_key=f"{n}", position=f"p:{n}") for n in range(12, 24)], done)
        assert all_there.wait(120)
        assert [r.error for r in results if r.error is not None] == []
        tuned = manager.instances["n-1"]
        ends = time.monotonic() + 30
        while tuned.backend._engine is None or tuned.backend._engine.child is first:
            assert time.monotonic() < ends, "the engine with the adapter did not take over"
            face.query(f"once more {ends - time.monotonic()}")
        manager.settle()
    assert not first.runs
    with closing(sqlite3.connect(tmp_path / "run.db")) as db:
        calls = db.execute("SELECT count(*) FROM calls").fetchone()[0]
        twice = (
            "SELECT call_id, arm FROM attempts WHERE error IS NULL GROUP BY call_id, arm HAVING count(*) > 1"
        )
        assert db.execute(twice).fetchall() == []
        failed = db.execute("SELECT count(*) FROM attempts WHERE error IS NOT NULL").fetchone()[0]
    assert calls >= 25
    assert failed == 0
