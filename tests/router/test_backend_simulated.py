"""The simulated tier: accuracy as stated, over real HTTP, and always marked."""

import asyncio
import json
import math
import statistics
import time
from contextlib import asynccontextmanager

import openai
import pytest
from pydantic import BaseModel, Field

from chainwax.router.answers import Choice, FreeText, Structured
from chainwax.router.backends import make_backend
from chainwax.router.backends._simulation import NOT_KNOWN, SimulatedModel, load_truth, minimal_instance
from chainwax.router.backends.base import Reply, Request
from chainwax.router.backends.simserver import SimulationServer
from chainwax.router.config import ModelConfig, Simulation
from chainwax.router.errors import BackendRefused, BackendTimeout, ConfigError
from chainwax.router.prompt import Prompt
from chainwax.router.types import Arm, NodeSpec, Query

TEAMS = ["billing", "technical", "shipping", "other"]
ITEMS = 4000


class Fault(BaseModel):
    product: str
    order: str = ""


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    path = tmp_path_factory.mktemp("truth") / "truth.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(ITEMS):
            answers = {
                "team": TEAMS[i % 4],
                "fields": {"product": f"P{i % 50}", "order": f"Ü-{i}"},
                "draft": f"Dear customer {i}",
                "count": i % 7,
            }
            file.write(json.dumps({"id": f"t-{i}", "text": "ignored", "answers": answers}) + "\n\n")
    return path


def model(name="sim", **simulation):
    return SimulatedModel(name, Simulation(**simulation))


def config(truth=None, **simulation):
    simulation = {"truth": truth, "latency": 0.0} | simulation
    return ModelConfig(tier="strongest", backend="simulated", simulation=simulation)


def node(answer=None, name="team"):
    return NodeSpec(id=name, prompt=Prompt("{text}"), answer=answer or Choice(TEAMS))


def request(at, item="t-1", timeout=5.0, on_delta=None, text="which?"):
    return Request(
        Query(at, "call", [{"role": "user", "content": text}], item_key=item), Arm("sim"), timeout, on_delta
    )


@asynccontextmanager
async def started(*configs, names=None):
    backends = [
        make_backend(name, c) for name, c in zip(names or ["sim", "sim2", "sim3"], configs, strict=False)
    ]
    try:
        for backend in backends:
            await backend.start()
        yield backends
    finally:
        for backend in backends:
            await backend.close()


# The pure part.


def right_share(simulated, name, count=ITEMS):
    return sum(simulated.is_right(name, f"t-{i}") for i in range(count)) / count


@pytest.mark.parametrize("correlation", [0.0, 0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("accuracy", [0.0, 0.3, 0.9, 0.97, 1.0])
def test_accuracy_is_what_is_stated(accuracy, correlation):
    share = right_share(model(accuracy=accuracy, correlation=correlation), "team")
    tolerance = 4 * math.sqrt(accuracy * (1 - accuracy) / ITEMS)
    assert share == pytest.approx(accuracy, abs=tolerance + 1e-12)


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_the_rank_is_uniform(correlation):
    simulated = model(correlation=correlation)
    ranks = sorted(simulated._rank("n", str(i)) for i in range(ITEMS))
    # Kolmogorov-Smirnov at one in a million.
    assert max(abs(rank - i / ITEMS) for i, rank in enumerate(ranks)) < 2.7 / math.sqrt(ITEMS)
    assert ranks[0] >= 0
    assert ranks[-1] < 1


def test_errors_of_models_fall_together_as_far_as_is_stated():
    def both_wrong(c):
        strong, weak = model("a", accuracy=0.9, correlation=c), model("b", accuracy=0.7, correlation=c)
        pairs = [(strong.is_right("n", str(i)), weak.is_right("n", str(i))) for i in range(ITEMS)]
        return sum(not s and not w for s, w in pairs) / ITEMS, sum(not s and w for s, w in pairs) / ITEMS

    independent, middle, nested = both_wrong(0.0), both_wrong(0.5), both_wrong(1.0)
    assert independent[0] == pytest.approx(0.03, abs=0.012)
    assert independent[0] + 0.01 < middle[0] < nested[0]
    assert nested[0] == pytest.approx(0.1, abs=0.02)
    assert nested[1] == 0  # the weaker one is never right where the stronger one is wrong


def test_the_ranks_correlate_by_the_formula():
    def correlation(c):
        a, b = model("a", correlation=c), model("b", correlation=c)
        return statistics.correlation(
            [a._rank("n", str(i)) for i in range(ITEMS)], [b._rank("n", str(i)) for i in range(ITEMS)]
        )

    assert correlation(0.0) == pytest.approx(0, abs=0.07)
    assert correlation(0.5) == pytest.approx(0.5, abs=0.07)
    assert correlation(0.8) == pytest.approx(0.64 / 0.68, abs=0.05)


def test_answers_depend_on_seed_model_node_and_item_and_on_nothing_else(truth):
    def answers(name="sim", seed=0, at="team"):
        simulated = model(name, accuracy=0.5, truth=truth, seed=seed)
        return [simulated.answer(at, f"t-{i}", TEAMS if at == "team" else None) for i in range(200)]

    assert answers() == answers()
    assert answers() != answers(seed=1)
    assert answers() != answers(name="other")
    assert answers(at="draft") != answers()


def test_accuracy_by_node_with_a_default():
    simulated = model(accuracy={"team": 1.0, "default": 0.0})
    assert right_share(simulated, "team", 50) == 1
    assert right_share(simulated, "draft", 50) == 0
    with pytest.raises(ConfigError, match=r"models\.sim\.simulation\.accuracy has neither 'x' nor 'default'"):
        model(accuracy={"team": 0.5}).accuracy("x")


def test_wrong_answers_are_plausible(truth):
    never = model(accuracy=0.0, truth=truth)
    picked = [never.answer("team", f"t-{i}", TEAMS) for i in range(400)]
    assert all(p in TEAMS and p != TEAMS[i % 4] for i, p in enumerate(picked))
    assert set(picked) == set(TEAMS)
    for i in range(100):
        fields = json.loads(never.answer("fields", f"t-{i}", None, Fault.model_json_schema()))
        assert set(fields) == {"product", "order"}
        assert fields["order"] != f"Ü-{i}"
        draft = never.answer("draft", f"t-{i}")
        assert draft.startswith("Dear customer")
        assert draft != f"Dear customer {i}"


def test_right_answers_come_as_a_model_would_write_them(truth):
    always = model(accuracy=1.0, truth=truth)
    assert always.answer("team", "t-2", TEAMS) == "shipping"
    assert always.answer("team", "t-2", [t.upper() for t in TEAMS]) == "SHIPPING"
    assert always.answer("fields", "t-3") == '{"product": "P3", "order": "Ü-3"}'
    assert always.answer("draft", "t-3") == "Dear customer 3"
    assert always.answer("count", "t-8") == "1"


def test_where_the_truth_is_not_known():
    simulated = model()
    assert simulated.answer("team", "t-1", TEAMS) == simulated.answer("team", "t-1", TEAMS)
    assert {simulated.answer("team", f"t-{i}", TEAMS) for i in range(50)} == set(TEAMS)
    assert simulated.answer("draft", "t-1") == NOT_KNOWN
    assert Fault.model_validate_json(simulated.answer("fields", "t-1", None, Fault.model_json_schema()))


def test_a_truth_that_is_no_choice_is_not_answered(truth):
    assert model(accuracy=1.0, truth=truth).answer("team", "t-1", ["x", "y"]) in ("x", "y")


class Tree(BaseModel):
    children: list["Tree"] = Field(min_length=0)
    parent: "Tree | None"
    size: int = Field(gt=3, le=9)
    share: float = Field(lt=-1)
    code: str = Field(min_length=2)
    pair: list[int] = Field(min_length=2)
    flag: bool


def test_minimal_instances_fit_their_schema():
    schema = Tree.model_json_schema()
    Tree.model_validate(minimal_instance(schema))
    Fault.model_validate(minimal_instance(Fault.model_json_schema()))
    endless = {
        "$defs": {"A": {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "required": ["a"]}}
    }
    assert minimal_instance(endless | {"$ref": "#/$defs/A"})["a"]["a"]
    assert minimal_instance({"type": "array", "minItems": 10**9, "items": {}}) == [None] * 100


def test_latency_is_log_normal_around_the_stated_median():
    simulated = model(latency=0.2, latency_spread=0.5)
    logs = [math.log(simulated.latency()) for _ in range(2000)]
    assert statistics.median(logs) == pytest.approx(math.log(0.2), abs=0.06)
    assert statistics.stdev(logs) == pytest.approx(0.5, abs=0.05)
    assert model(latency=0.2, latency_spread=0).latency() == 0.2
    assert model(latency=0).latency() == 0


# The file of right answers.


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b"{", "no valid JSON"),
        (b"\xff\xfe{}", "no valid JSON"),
        (b"[" * 100_000, "no valid JSON"),
        (b"[]", "'id'"),
        (b'{"answers": {}}', "'id'"),
        (b'{"id": null, "answers": {}}', "'id'"),
        (b'{"id": "b"}', "'answers'"),
        (b'{"id": "b", "answers": ["x"]}', "'answers'"),
        (b'{"id": "a", "answers": {}}', "earlier line"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, match):
    path = tmp_path / "truth.jsonl"
    path.write_bytes(b'{"id": "a", "answers": {}}\n\n' + line + b"\n")
    with pytest.raises(ConfigError, match=match) as caught:
        make_backend("sim", config(path))
    assert f"{path}:3" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.jsonl: No such file"):
        make_backend("sim", config(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match="Is a directory"):
        make_backend("sim", config(tmp_path))


def test_the_file_is_read_once_and_again_when_it_changes(tmp_path, truth):
    assert load_truth(truth) is load_truth(truth)
    path = tmp_path / "truth.jsonl"
    path.write_text('{"id": 1, "answers": {"n": "x"}}')
    assert load_truth(path).of("n", "1") == "x"
    path.write_text('{"id": 1, "answers": {"n": "longer"}}')
    assert load_truth(path).of("n", "1") == "longer"


# Over HTTP.


def test_every_reply_is_marked_and_right_as_often_as_stated(truth):
    async def go():
        async with started(config(truth, accuracy=0.8)) as (backend,):
            assert backend.simulated
            at = node()
            replies = await asyncio.gather(*(backend.generate(request(at, f"t-{i}")) for i in range(400)))
            again = await asyncio.gather(*(backend.generate(request(at, f"t-{i}")) for i in range(400)))
        assert all(r.simulated for r in replies)
        assert [r.text for r in replies] == [r.text for r in again]
        share = sum(r.text == TEAMS[i % 4] for i, r in enumerate(replies)) / 400
        assert share == pytest.approx(0.8, abs=0.08)
        return replies

    replies = asyncio.run(go())
    assert replies[0].usage.input == 2  # "which?" in characters by four
    assert replies[0].finish_reason == "stop"


def test_structured_and_free_answers_over_http(truth):
    async def go():
        async with started(config(truth, accuracy=1.0)) as (backend,):
            form = Structured(Fault)
            reply = await backend.generate(request(node(form, "fields"), "t-7"))
            assert form.parse(reply.text) == Fault(product="P7", order="Ü-7")
            reply = await backend.generate(request(node(FreeText(), "draft"), "t-7"))
            assert reply.text == "Dear customer 7"
            pieces = []
            reply = await backend.generate(request(node(FreeText(), "draft"), "t-7", on_delta=pieces.append))
            assert len(pieces) > 1
            assert "".join(pieces) == reply.text == "Dear customer 7"
            assert reply.simulated
            assert reply.usage.output == 4

    asyncio.run(go())


def test_batches_over_http(truth):
    settings = config(truth, accuracy=1.0).model_copy(update={"api": "completions"})

    async def go():
        async with started(settings) as (backend,):
            at = node()
            replies = await backend.generate_batch([request(at, f"t-{i}") for i in range(9)])
            assert all(isinstance(r, Reply) and r.simulated for r in replies)
            assert [r.text for r in replies] == [TEAMS[i % 4] for i in range(9)]

    asyncio.run(go())


def test_models_share_one_server_and_leave_it(truth):
    async def go():
        settings = config(truth, accuracy=1.0), config(truth, accuracy=0.0), config(truth, accuracy=0.0)
        async with started(*settings, names=["a", "b", "a"]) as backends:
            server = SimulationServer.shared()
            assert set(server._models) == {"a", "b", "a#2"}
            texts = [(await b.generate(request(node(), "t-1"))).text for b in backends]
            assert texts[0] == "technical"
            assert "technical" not in texts[1:]
            for backend in backends:
                assert (await backend.health()).ok
        assert server._models == {}
        with pytest.raises(OSError, match=r"(?i)connect"):
            await asyncio.open_connection(*server.url.removeprefix("http://").removesuffix("/v1").split(":"))
        with pytest.raises(BackendRefused, match="not started"):
            await backends[0].generate(request(node()))
        assert not (await backends[0].health()).ok

    asyncio.run(go())


def test_backends_can_start_at_once_and_again(truth):
    async def go():
        backends = [make_backend(f"m{i}", config(truth, accuracy=1.0)) for i in range(5)]
        for _ in range(2):
            await asyncio.gather(*(b.start() for b in backends))
            assert len({b._inner.config.url for b in backends}) == 1
            replies = await asyncio.gather(*(b.generate(request(node(), "t-1")) for b in backends))
            assert {r.text for r in replies} == {"technical"}
            await asyncio.gather(*(b.close() for b in backends))

    asyncio.run(go())


def test_a_slow_simulated_model_times_out_and_closes_at_once(truth):
    async def go():
        async with started(config(truth, latency=30.0)) as (backend,):
            with pytest.raises(BackendTimeout):
                await backend.generate(request(node(), timeout=0.1))
            started_at = time.monotonic()
        assert time.monotonic() - started_at < 2

    asyncio.run(go())


def test_a_node_without_a_stated_accuracy_is_refused(truth):
    async def go():
        async with started(config(truth, accuracy={"draft": 0.5})) as (backend,):
            with pytest.raises(BackendRefused, match="neither 'team' nor 'default'"):
                await backend.generate(request(node()))

    asyncio.run(go())


@pytest.fixture
def client_at():
    @asynccontextmanager
    async def make(backend):
        async with openai.AsyncOpenAI(
            base_url=backend._inner.config.url, api_key="-", max_retries=0
        ) as client:
            yield client

    return make


def test_the_official_client_understands_the_server(truth, client_at):
    messages = [{"role": "user", "content": "which?"}]
    metadata = {"node": "draft", "item": "t-9"}

    async def go():
        async with started(config(truth, accuracy=1.0)) as (backend,), client_at(backend) as client:
            assert [m.id async for m in client.models.list()] == ["sim"]
            answer = await client.chat.completions.create(model="sim", messages=messages, metadata=metadata)
            assert answer.choices[0].message.content == "Dear customer 9"
            assert answer.model_extra["simulated"] is True
            assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
            parsed = await client.chat.completions.parse(
                model="sim", messages=messages, metadata=metadata | {"node": "fields"}, response_format=Fault
            )
            assert parsed.choices[0].message.parsed == Fault(product="P9", order="Ü-9")
            text, usage = "", None
            stream = await client.chat.completions.create(
                model="sim",
                messages=messages,
                metadata=metadata,
                stream=True,
                stream_options={"include_usage": True},
            )
            async for chunk in stream:
                assert chunk.model_extra["simulated"] is True
                text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
                usage = chunk.usage or usage
            assert text == "Dear customer 9"
            assert usage.completion_tokens == 4
            several = await client.completions.create(
                model="sim",
                prompt=["a", "b"],
                extra_body={"metadata": {"node": "draft", "item": ["t-1", "t-2"]}},
            )
            assert [c.text for c in several.choices] == ["Dear customer 1", "Dear customer 2"]
            bare = await client.chat.completions.create(model="sim", messages=messages)
            assert bare.choices[0].message.content == NOT_KNOWN

    asyncio.run(go())


def test_requests_that_are_none_are_refused_in_the_api_s_own_form(truth, client_at):
    async def go():
        async with started(config(truth)) as (backend,), client_at(backend) as client:
            with pytest.raises(openai.BadRequestError, match="did you mean 'sim'"):
                await client.chat.completions.create(model="sym", messages=[{"role": "user", "content": "x"}])
            for path, body in (
                ("/chat/completions", {"model": "sim"}),
                ("/chat/completions", {"model": "sim", "messages": []}),
                ("/completions", {"model": "sim", "prompt": 3}),
                ("/completions", {"model": "sim", "prompt": "x", "stream": True}),
                ("/completions", {"model": "sim", "prompt": ["x"], "metadata": {"item": ["a", "b"]}}),
            ):
                with pytest.raises(openai.BadRequestError):
                    await client.post(path, body=body, cast_to=object)
            odd = {
                "model": "sim",
                "messages": ["x", {"content": None}],
                "metadata": [],
                "response_format": "x",
            }
            await client.post("/chat/completions", body=odd, cast_to=object)
            async with backend._inner._session.post(backend._inner._url, data=b"\xff") as response:
                assert response.status == 400

    asyncio.run(go())
