"""A provider's fine-tuning job, against a loopback server that the official client agrees with."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import openai
import pytest

from chainwax.router.answers import Choice
from chainwax.router.backends import make_backend
from chainwax.router.backends.base import Request
from chainwax.router.custom import Limits, TrainerFailed, make_trainer, may_train
from chainwax.router.custom._jobs import FineTuning
from chainwax.router.custom.dataset import Dataset, Example
from chainwax.router.custom.loopback import LoopbackProvider
from chainwax.router.custom.trainer import Trained
from chainwax.router.errors import ConfigError
from chainwax.router.prompt import Prompt
from chainwax.router.types import Arm, NodeSpec, Query, Rules

KEY = "sk-very-secret-0123456789"
BASE = "gpt-4o-mini-2024-07-18"
JOBS = "/v1/fine_tuning/jobs"


def example(n, answer=None):
    asked = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Ticket {n}: ü🦊?"})
    return Example(asked, answer or ("billing" if n % 3 else "technical"), float(n), f"c{n}")


def dataset(n=20, choices=("billing", "technical"), start=0):
    rows = [example(i) for i in range(start, start + n + 5)]
    return Dataset("support", "team", rows[:n], rows[n:], choices=choices)


class Told(list):
    def __call__(self, done, what):
        self.append((done, what))


def options(provider, **more):
    return (
        {"url": provider.url, "model": BASE, "provider": "openai", "poll_seconds": 0.01}
        | {
            "input_cost_per_token": 1e-6,
            "output_cost_per_token": 2e-6,
            "training_cost_per_token": 3e-6,
        }
        | more
    )


def fit(provider, folder, data=None, *, told=None, limits=None, **more):
    trainer = make_trainer("provider", options(provider, **more))
    return trainer.fit(data or dataset(), folder, told if told is not None else Told(), limits or Limits())


def paths(provider, method):
    return [seen.path for seen in provider.seen if seen.method == method]


def official(provider, key=KEY):
    return openai.OpenAI(base_url=provider.url, api_key=key, max_retries=0)


# -- the server, as the official client sees it --------------------------------------------------------


def test_the_official_client_uploads_trains_watches_and_asks():
    with (
        LoopbackProvider() as provider,
        openai.OpenAI(base_url=provider.url, api_key=KEY, max_retries=0) as client,
    ):
        lines = b"".join(
            json.dumps({"messages": [*e.messages, {"role": "assistant", "content": e.answer}]}).encode()
            + b"\n"
            for e in dataset().train
        )
        file = client.files.create(file=("train.jsonl", lines), purpose="fine-tune")
        assert (file.bytes, file.filename, file.purpose, file.status) == (
            len(lines), "train.jsonl", "fine-tune", "processed",
        )  # fmt: skip
        assert client.files.retrieve(file.id) == file
        assert [one.id for one in client.files.list(purpose="fine-tune")] == [file.id]
        job = client.fine_tuning.jobs.create(
            model=BASE,
            training_file=file.id,
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
            suffix="team",
            seed=4,
            metadata={"node": "team"},
        )
        assert (job.status, job.seed, job.hyperparameters.n_epochs) == ("validating_files", 4, 2)
        seen = [client.fine_tuning.jobs.retrieve(job.id).status for _ in range(5)]
        assert seen == ["queued", "running", "running", "succeeded", "succeeded"]
        job = client.fine_tuning.jobs.retrieve(job.id)
        assert job.fine_tuned_model.startswith(f"ft:{BASE}:loopback:team:")
        assert job.trained_tokens > 0
        events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
        assert [e.message for e in events][::4] == [
            "Fine-tuning job succeeded",
            "Created fine-tuning job: " + job.id,
        ]
        assert len({e.id for e in events}) == len(events) == 5
        assert [one.id for one in client.fine_tuning.jobs.list(limit=1)] == [job.id]
        asked = client.chat.completions.create(model=job.fine_tuned_model, messages=list(example(3).messages))
        assert asked.choices[0].message.content == "technical"
        with pytest.raises(openai.BadRequestError, match="already completed"):
            client.fine_tuning.jobs.cancel(job.id)
        other = client.fine_tuning.jobs.create(model=BASE, training_file=file.id)
        assert client.fine_tuning.jobs.cancel(other.id).status == "cancelled"
        assert [one.id for one in client.fine_tuning.jobs.list(limit=1)] == [other.id, job.id]
        assert client.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)
        assert other.id in [e.message.split()[-1] for e in client.fine_tuning.jobs.list_events(other.id)]


def test_the_official_client_hears_what_is_wrong():
    with (
        LoopbackProvider(key=KEY) as provider,
        official(provider) as client,
        official(provider, "sk-other") as stranger,
    ):
        with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
            stranger.files.list()
        with pytest.raises(openai.BadRequestError, match="not one of"):
            client.files.create(file=("a.jsonl", b"{}"), purpose="user_data")
        with pytest.raises(openai.BadRequestError, match="invalid training_file"):
            client.fine_tuning.jobs.create(model=BASE, training_file="file-none")
        few = client.files.create(file=("few.jsonl", b'{"messages": []}\n'), purpose="fine-tune")
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.fine_tuning.jobs.create(model="gpt-9", training_file=few.id)
        job = client.fine_tuning.jobs.create(model=BASE, training_file=few.id)
        for _ in range(4):
            job = client.fine_tuning.jobs.retrieve(job.id)
        assert (job.status, job.error.code) == ("failed", "invalid_training_file")
        assert "no example of a chat" in job.error.message


# -- our requests beside the official client's ---------------------------------------------------------


def test_our_requests_are_those_of_the_official_client(monkeypatch):
    content = b'{"messages": []}\n'
    body = {
        "model": BASE,
        "method": {
            "type": "supervised",
            "supervised": {
                "hyperparameters": {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": 0.5}
            },
        },
        "suffix": "team",
        "seed": 1,
        "metadata": {"node": "team"},
    }

    async def ours(provider):
        async with FineTuning(provider.url, KEY) as client:
            file = await client.upload("a.jsonl", content)
            other = await client.upload("b.jsonl", content)
            job = (await client.create({**body, "training_file": file, "validation_file": other}))["id"]
            await client.job(job)
            await client.events(job, set())
            await client.cancel(job)
            await client.find_job("file-none")
            await client.find_file("c.jsonl", 1)
            await client.delete_file(file)

    async def theirs(provider):
        async with openai.AsyncOpenAI(base_url=provider.url, api_key=KEY, max_retries=0) as client:
            file = await client.files.create(
                file=("a.jsonl", content, "application/jsonl"), purpose="fine-tune"
            )
            other = await client.files.create(
                file=("b.jsonl", content, "application/jsonl"), purpose="fine-tune"
            )
            job = await client.fine_tuning.jobs.create(
                **body, training_file=file.id, validation_file=other.id
            )
            await client.fine_tuning.jobs.retrieve(job.id)
            await client.fine_tuning.jobs.list_events(job.id, limit=100)
            await client.fine_tuning.jobs.cancel(job.id)
            await client.fine_tuning.jobs.list(limit=100)
            await client.files.list(purpose="fine-tune", limit=100)
            await client.files.delete(file.id)

    def asked(run):
        with LoopbackProvider() as provider:
            asyncio.run(run(provider))
            return provider.seen

    mine, official = asked(ours), asked(theirs)
    assert [(s.method, s.path) for s in mine] == [(s.method, s.path) for s in official]
    assert [s.body for s in mine] == [s.body for s in official]
    assert [sorted(s.query.split("&")) for s in mine] == [sorted(s.query.split("&")) for s in official]
    for one, other in zip(mine, official, strict=True):
        for header in ("Authorization", "Accept"):
            assert one.headers[header] == other.headers[header]
        kinds = [s.headers.get("Content-Type", "").split(";")[0] for s in (one, other)]
        assert kinds[0] == kinds[1] or not one.body  # the official one names a type where there is nothing


# -- a training ----------------------------------------------------------------------------------------


def test_a_training_from_data_to_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", KEY)
    told = Told()
    with LoopbackProvider(key=KEY) as provider:
        trainer = make_trainer("provider", options(provider, key_env="A_KEY", epochs=2, seed=5))
        trained = trainer.fit(dataset(), tmp_path, told, Limits())
        (job,) = provider.jobs.values()
        assert job.asked["method"] == {
            "type": "supervised",
            "supervised": {
                "hyperparameters": {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": "auto"}
            },
        }
        assert (job.asked["seed"], job.asked["suffix"]) == (5, "team")
        assert job.asked["metadata"] == {"flow": "support", "node": "team"}
        train, held_out = [
            s.body["file"] for s in provider.seen if s.method == "POST" and s.path == "/v1/files"
        ]
        rows = [json.loads(line) for line in train[2].splitlines()]
        assert len(rows) == 20
        assert rows[0]["messages"] == [
            *example(0).messages,
            {"role": "assistant", "content": '{"answer": "technical"}'},
        ]
        assert len(held_out[2].splitlines()) == 5
        assert provider.files == {}  # taken away again

        assert trained.model.startswith(f"ft:{BASE}:loopback:team:")
        tokens = trained.figures["trained_tokens"]
        assert tokens == job.fields["trained_tokens"] > 0
        assert trained.cost_usd == pytest.approx(3e-6 * tokens)
        assert trained.figures["train_loss"] == pytest.approx(0.1)
        assert trained.detail["job"] == job.fields["id"]
        trained.save()
        served = trainer.serve("team-1", Trained.load(tmp_path), {})
        config = served.config
        assert (config.tier, config.provider, config.model) == ("custom", "openai", trained.model)
        assert (config.input_cost_per_token, config.output_cost_per_token) == (1e-6, 2e-6)

        async def ask(n):
            backend = make_backend("team-1", config)
            await backend.start()
            node = NodeSpec("team", Prompt("{text}"), Choice(["billing", "technical"]))
            query = Query(node, "call", list(example(n).messages))
            reply = await backend.generate(Request(query, Arm("team-1"), 5.0))
            await backend.close()
            return reply

        reply = asyncio.run(ask(3))
        assert (reply.text, reply.simulated) == ("technical", True)
    done = [part for part, _ in told]
    assert done == sorted(done)
    assert done[-1] == 1.0
    words = " ".join(what for _, what in told)
    for wanted in (
        "uploading 20 examples",
        "queued",
        "running",
        "Step 10/100: training loss=0.10",
        trained.model,
    ):
        assert wanted in words
    assert KEY not in words + "".join(p.read_text() for p in tmp_path.iterdir())


def test_free_text_goes_up_as_it_is_and_nothing_is_held_back_where_so_wished(tmp_path):
    with LoopbackProvider() as provider:
        data = dataset(choices=None)
        fit(provider, tmp_path, data, validation=False, keep_files=True, suffix="A B")
        (file,) = provider.files.values()
        last = json.loads(file.content.splitlines()[0])["messages"][-1]
        assert last == {"role": "assistant", "content": "technical"}
        (job,) = provider.jobs.values()
        assert job.fields["validation_file"] is None
        assert job.asked["suffix"] == "a-b"
        assert list(provider.files) == [job.fields["training_file"]]


@pytest.mark.parametrize(
    ("statuses", "said"),
    [
        (["queued", "failed"], "failed: the training data are not fit"),
        (["queued", "cancelled"], "was cancelled at the provider"),
    ],
)
def test_a_job_that_comes_to_nothing_says_why_and_the_next_one_is_another(tmp_path, statuses, said):
    with LoopbackProvider(statuses=statuses) as provider:
        with pytest.raises(TrainerFailed, match=rf"node 'team': the job ftjob-\d+ at .* {said}"):
            fit(provider, tmp_path)
        assert provider.files == {}
        assert not (tmp_path / "job.json").exists()
        provider.statuses = ("running", "succeeded")
        assert fit(provider, tmp_path).model
        assert len(provider.jobs) == 2


def test_ten_rows_too_few_are_the_providers_word(tmp_path):
    with LoopbackProvider() as provider, pytest.raises(TrainerFailed, match="has 9 example"):
        fit(provider, tmp_path, dataset(9))


@pytest.mark.parametrize("status", ["running", "paused", None])
def test_a_job_that_never_ends_is_cancelled_and_said_so(tmp_path, status):
    with LoopbackProvider(statuses=[status]) as provider:
        begun = time.monotonic()
        with pytest.raises(TrainerFailed, match=r"has not ended within 0\.02 minutes .* and was cancelled"):
            fit(provider, tmp_path, limits=Limits(minutes=0.02))
        assert time.monotonic() - begun < 5
        (job,) = provider.jobs.values()
        assert job.fields["status"] == "cancelled"
        assert provider.files == {}


def test_a_job_that_cannot_be_cancelled_may_go_on_and_cost(tmp_path, monkeypatch):
    monkeypatch.setattr("chainwax.router.custom._jobs._TRIES", 2)
    with LoopbackProvider(statuses=["running"]) as provider:
        provider.faults["POST", f"{JOBS}/ftjob-3/cancel"] = deque([(500, {})] * 9)
        with pytest.raises(
            TrainerFailed, match=r"could not be cancelled: .*HTTP 500.* It may go on, and cost"
        ):
            fit(provider, tmp_path, limits=Limits(minutes=0.01))
        # It is still known: the next try looks at it, and pays for no other.
        provider.jobs["ftjob-3"].left.append("succeeded")
        assert fit(provider, tmp_path, limits=Limits(minutes=0.01)).detail["job"] == "ftjob-3"


def test_one_that_succeeds_while_it_is_cancelled_counts(tmp_path):
    with LoopbackProvider(statuses=["running"]) as provider:
        real = provider._become

        def become(job, status):
            real(job, "succeeded" if status == "cancelled" else status)

        provider._become = become
        assert fit(provider, tmp_path, limits=Limits(minutes=0.01)).model


# -- what goes wrong in between ------------------------------------------------------------------------


def busy(*pauses):
    return deque((429, {"Retry-After": str(pause)}) for pause in pauses)


def test_a_busy_provider_is_asked_again_when_it_says(tmp_path):
    with LoopbackProvider() as provider:
        provider.faults["POST", "/v1/files"] = busy(0.2)
        provider.faults["POST", JOBS] = deque([(503, {"retry-after-ms": "100"}), (500, {"Retry-After": "0"})])
        provider.faults["GET", f"{JOBS}/ftjob-3"] = busy(0.1)
        begun = time.monotonic()
        assert fit(provider, tmp_path).model
        assert time.monotonic() - begun >= 0.4
        assert len(provider.jobs) == 1


def test_what_was_begun_though_its_answer_was_lost_is_found_and_not_paid_twice(tmp_path):
    with LoopbackProvider() as provider:
        provider.faults["POST", "/v1/files"] = deque([None])
        provider.faults["POST", JOBS] = deque([None])
        trained = fit(provider, tmp_path, keep_files=True)
        assert trained.model
        assert len(provider.jobs) == 1
        assert len(provider.files) == 2
        assert paths(provider, "POST").count(JOBS) == 1


def test_a_provider_that_is_away_for_a_while_does_not_end_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr("chainwax.router.custom._jobs._TRIES", 1)
    told = Told()
    with LoopbackProvider() as provider:
        provider.faults["GET", f"{JOBS}/ftjob-3"] = deque([(502, {})] * 3)
        provider.faults["GET", f"{JOBS}/ftjob-3/events"] = deque([(502, {})])
        assert fit(provider, tmp_path, told=told).model
    assert sum("cannot be looked at now" in what for _, what in told) == 3


def test_retry_after_longer_than_the_time_that_is_left_is_an_error(tmp_path):
    with LoopbackProvider() as provider:
        provider.faults["POST", JOBS] = busy(3600)
        with pytest.raises(TrainerFailed, match=r"openai: POST /fine_tuning/jobs: HTTP 429: not now"):
            fit(provider, tmp_path, limits=Limits(minutes=1))
        assert provider.jobs == {}


def test_a_key_that_the_provider_repeats_is_not_repeated(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("A_KEY", KEY)
    with LoopbackProvider(key="sk-other") as provider, pytest.raises(TrainerFailed) as caught:
        fit(provider, tmp_path, key_env="A_KEY")
    assert "HTTP 401: Incorrect API key provided: ***" in str(caught.value)
    assert KEY not in caplog.text
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("value", "fault"), [(None, "is not set"), ("sk-\nx", "holds no key"), ("kü", "holds no key")]
)
def test_without_a_key_nothing_is_sent(tmp_path, monkeypatch, value, fault):
    monkeypatch.delenv("A_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("A_KEY", value)
    with LoopbackProvider() as provider:
        with pytest.raises(TrainerFailed, match=f"A_KEY {fault}"):
            fit(provider, tmp_path, key_env="A_KEY")
        assert provider.seen == []


@pytest.mark.parametrize(
    "answer", [b"", b"[]", b'{"id": 3}', b'{"id": ""}', b"\xff", b'{"data": 3}', b" " * (9 << 20)]
)
def test_answers_of_another_shape(tmp_path, answer, monkeypatch):
    monkeypatch.setattr("chainwax.router.custom._jobs._PAUSES", (0.0, 0.0))

    async def go():
        async def talk(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(answer)
            writer.write(head + answer)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        trainer = make_trainer("provider", {"url": url, "model": "m"})
        with pytest.raises(TrainerFailed, match=r"no JSON object|no list in 'data'|more than"):
            await asyncio.to_thread(trainer.fit, dataset(), tmp_path, Told(), Limits())
        server.close()

    asyncio.run(go())


def test_the_body_of_a_redirect_is_not_followed(tmp_path):
    with LoopbackProvider() as provider:
        provider.faults["GET", "/v1/files"] = deque([(307, {"Location": "http://127.0.0.1:9/v1/files"})])
        with pytest.raises(TrainerFailed, match="redirects elsewhere"):
            fit(provider, tmp_path)


# -- going on ------------------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_provider import *
class There: url = {url!r}
fit(There, Path({folder!r}), poll_seconds=0.05)
"""


@pytest.mark.parametrize("when", ["job", "file", "validation"])
def test_a_process_that_is_killed_goes_on_with_the_job_that_is_there(tmp_path, when):
    with LoopbackProvider(statuses=["running"]) as provider:
        code = CHILD.format(tests=str(Path(__file__).parent), url=provider.url, folder=str(tmp_path))
        child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
        note = tmp_path / "job.json"
        wanted = {
            "job": lambda: note.exists() and '"ftjob' in note.read_text(),
            "file": lambda: len(provider.files) >= 1,
            "validation": lambda: len(provider.files) >= 2,
        }[when]
        until = time.monotonic() + 30
        while not wanted():
            assert child.poll() is None, child.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.001)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stderr.close()
        begun = list(provider.jobs)
        for job in provider.jobs.values():
            job.left.extend(["running", "succeeded"])
        provider.statuses = ("running", "succeeded")
        trained = fit(provider, tmp_path)
        assert trained.model
        assert len(provider.jobs) == 1
        if begun:
            assert trained.detail["job"] == begun[0]
        uploads = paths(provider, "POST").count("/v1/files")
        assert uploads == 2


def test_a_training_that_was_done_is_not_done_again(tmp_path):
    with LoopbackProvider() as provider:
        first = fit(provider, tmp_path)
        assert fit(provider, tmp_path).model == first.model
        assert len(provider.jobs) == 1
        # Without the folder the provider's own list tells, as long as the files are there.
        other, third = tmp_path / "other", tmp_path / "third"
        other.mkdir()
        third.mkdir()
        second = fit(provider, other, keep_files=True)
        assert fit(provider, third, keep_files=True).model == second.model
        assert len(provider.jobs) == 2


def test_another_training_in_the_same_folder_is_refused(tmp_path):
    with LoopbackProvider() as provider:
        fit(provider, tmp_path)
        with pytest.raises(
            TrainerFailed, match=r"job\.json: the job 'ftjob-3' was begun with other data or options"
        ):
            fit(provider, tmp_path, dataset(start=100))
        with pytest.raises(TrainerFailed, match="was begun with other data or options"):
            fit(provider, tmp_path, epochs=9)
        assert len(provider.jobs) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"job": "x"}', '{"about": 1, "begun": 1, "more": 2}'])
def test_a_damaged_note_of_a_job_is_no_reason_to_pay_again(tmp_path, content):
    (tmp_path / "job.json").write_text(content)
    with LoopbackProvider() as provider, pytest.raises(TrainerFailed, match=r"job\.json: cannot be read"):
        fit(provider, tmp_path)
    assert paths(provider, "POST") == []


def test_a_job_that_its_provider_forgot_is_no_reason_to_pay_again(tmp_path):
    with LoopbackProvider() as provider:
        fit(provider, tmp_path)
        provider.jobs.clear()
        with pytest.raises(
            TrainerFailed, match=r"cannot be looked at .*No such Fine-tuning job.* remove .*job\.json"
        ):
            fit(provider, tmp_path)


# -- options and places --------------------------------------------------------------------------------

REMOTE = {"url": "https://api.openai.com/v1", "model": BASE, "provider": "openai"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "training_cost_per_token: what a trained token costs is in no price list"),
        ({"provider": "", "training_cost_per_token": 1e-6}, "provider: say whose machines"),
        (
            {"model": "gpt-99", "training_cost_per_token": 1e-6},
            r"trainers\.provider\.input_cost_per_token: the price",
        ),
        ({"epoch": 3}, "unknown key 'trainers.provider.epoch': did you mean 'epochs'"),
        ({"epochs": 0}, r"trainers\.provider\.epochs"),
        ({"training_cost_per_token": -1}, r"trainers\.provider\.training_cost_per_token: .*greater"),
        ({"model": None}, r"trainers\.provider\.model: .*string"),
    ],
)
def test_options_that_cannot_be_served_are_refused_before_anything_is_paid(more, said):
    with pytest.raises(ConfigError, match=said):
        make_trainer("provider", {**REMOTE, **more})


def test_a_key_in_the_wrong_place_is_not_shown():
    with pytest.raises(ConfigError) as caught:
        make_trainer("provider", {**REMOTE, "key_env": ["sk-secret"], "headers": "sk-secret"})
    assert "sk-secret" not in str(caught.value)


def test_the_price_of_a_tuned_model_is_known_from_the_list():
    trainer = make_trainer("provider", {**REMOTE, "training_cost_per_token": 3e-6})
    trained = Trained("provider", Path(), f"ft:{BASE}:me:team:x", detail={"url": REMOTE["url"]})
    from chainwax.router.prices import Prices

    price = Prices.of("m", trainer.serve("m", trained, {}).config)
    assert (price.source, price.input > 0) == ("genai-prices", True)


def test_a_model_of_another_provider_is_not_asked_here():
    trainer = make_trainer("provider", {**REMOTE, "training_cost_per_token": 0})
    with pytest.raises(TrainerFailed, match="was trained at http://127"):
        trainer.serve("m", Trained("provider", Path(), "ft:x", detail={"url": "http://127.0.0.1:1/v1"}), {})
    with pytest.raises(TrainerFailed, match="has no name"):
        trainer.serve("m", Trained("provider", Path(), detail={"url": REMOTE["url"]}), {})


@pytest.mark.parametrize(
    ("rules", "allowed"),
    [
        (Rules(), True),
        (Rules(deny=("provider:openai",)), False),
        (Rules(deny=("region:eu",)), False),
        (Rules(deny=("custom",)), False),
        (Rules(allow=("local",)), False),
        (Rules(allow=("tier:local", "provider:openai")), True),
        (Rules(allow=("provider:other",)), False),
        (Rules(allow=("local",), deny=("provider:openai",)), False),
    ],
)
def test_who_may_be_trained_at_a_provider(rules, allowed):
    trainer = make_trainer("provider", {**REMOTE, "region": "eu", "training_cost_per_token": 0})
    assert may_train(rules, "team-1", trainer.place) is allowed
