"""What processes on several machines share, over a real Redis: limits, budgets, answers, and its absence."""

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import closing, contextmanager

import pytest

pytest.importorskip("redis", reason="the extra 'redis' is not installed")

from chainwax.connectors import open_redis
from chainwax.connectors.redis import RedisServers, RedisStore
from chainwax.flows.testing import TestModel
from chainwax.router import ConfigError, FreeText, LLMManager, NodeSpec, Prompt, load_settings
from chainwax.router.config import RedisConfig
from chainwax.router.errors import RecordingError
from chainwax.router.share import Away
from chainwax.router.types import Arm, Attempt, CallResult, Query


class Redis:
    """A redis-server on loopback, with its data in a folder."""

    def __init__(self, folder):
        self._folder = folder
        self._process = None
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.start()

    def config(self, **more):
        return RedisConfig(url=f"redis://127.0.0.1:{self.port}/0", **more)

    def start(self):
        command = [
            "redis-server",
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(self._folder),
        ]
        command += ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        client = RedisServers(self.config()).client()
        end = time.monotonic() + 20
        while True:
            try:
                assert client.ping()
                break
            except Exception:
                assert time.monotonic() < end
                time.sleep(0.02)
        client.close()

    def pause(self):
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self):
        self._process.send_signal(signal.SIGCONT)

    def kill(self):
        self._process.kill()
        self._process.wait()


@pytest.fixture
def redis(tmp_path):
    if shutil.which("redis-server") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("needs redis-server: make system")
    folder = tmp_path / "redis"
    folder.mkdir()
    server = Redis(folder)
    yield server
    server.go_on()
    server.kill()


NODE = NodeSpec("node", Prompt("{text}"), FreeText(), flow="flow")


@contextmanager
def machine(redis, folder, model, *, run="run", budget=None, close=True, **config):
    """One machine's manager, with a recording of its own."""
    options = {"tier": "local", "backend": "simulated", "input_cost_per_token": 0.01}
    settings = load_settings(
        run={"recording": folder / "run.db"},
        models={"only": {**options, "output_cost_per_token": 0.0, **config}},
        nodes={} if budget is None else {"node": {"budget": budget}},
        redis=redis.config(patience_seconds=3.0, timeout=0.5).model_dump(),
    )
    lender, store = open_redis(settings.redis)
    manager = LLMManager(settings, backends={"only": model}, lender=lender, store=store)
    manager.begin_run("flow", run, resume=True, nodes=[NODE])
    try:
        yield manager
    finally:
        if close:
            manager.close()


def submit(manager, texts):
    interface = manager.register(NODE)
    results = []
    queries = [interface.bind({"text": text}, item_key=text, position=text) for text in texts]
    interface.submit(queries, lambda query, result: results.append(result))
    return results


def wait_for(what, seconds=20):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("limit", [1, 5])
def test_slots_hold_for_two_machines_and_both_get_some(redis, tmp_path, limit):
    model = TestModel(latency=0.01)  # one for both: it sees all that is in flight
    with (
        machine(redis, tmp_path / "a", model, limit=limit) as a,
        machine(redis, tmp_path / "b", model, limit=limit) as b,
    ):
        of_a, of_b = submit(a, [f"a{n}" for n in range(150)]), submit(b, [f"b{n}" for n in range(150)])
        wait_for(lambda: len(of_a) + len(of_b) >= (150 if limit > 1 else 250), 40)
        assert of_a
        assert of_b
        wait_for(lambda: len(of_a) + len(of_b) == 300)
    assert model.most_at_once == limit


def test_minutes_and_budgets_hold_for_two_machines(redis, tmp_path):
    models = [TestModel(), TestModel()]
    with (
        machine(redis, tmp_path / "a", models[0], requests_per_minute=100, budget=0.045) as a,
        machine(redis, tmp_path / "b", models[1], requests_per_minute=100, budget=0.045) as b,
    ):
        done = [submit(a, "ab"), submit(b, "cd")]
        wait_for(lambda: sum(map(len, done)) == 4)
        wait_for(lambda: a.snapshot()["interfaces"]["node"]["router"]["spent_usd"] == pytest.approx(0.02))
        more = [submit(a, "e")]
        wait_for(lambda: more[0])
        spent = sum(len(model.prompts) for model in models)
        assert spent == 5
        time.sleep(1.2)  # each hears of the others twice a second
        last = [submit(a, "fgh"), submit(b, "ijk")]
        wait_for(lambda: sum(map(len, last)) == 6)
        assert {type(r.error).__name__ for some in last for r in some} == {"BudgetSpent"}
    # The run goes on: on another machine, with a recording that knows of nothing.
    with machine(redis, tmp_path / "c", models[0], requests_per_minute=100, budget=0.045) as c:
        results = submit(c, "xyz")
        wait_for(lambda: len(results) == 3)
        assert {type(r.error).__name__ for r in results} == {"BudgetSpent"}
    assert sum(len(model.prompts) for model in models) == 5


def test_requests_of_a_minute_hold_for_two_machines(redis, tmp_path):
    models = [TestModel(), TestModel()]
    with (
        machine(redis, tmp_path / "a", models[0], requests_per_minute=100, close=False) as a,
        machine(redis, tmp_path / "b", models[1], requests_per_minute=100, close=False) as b,
    ):
        begun = time.monotonic()
        submit(a, [f"a{n}" for n in range(50)]), submit(b, [f"b{n}" for n in range(50)])
        wait_for(lambda: sum(len(model.prompts) for model in models) >= 10)
        time.sleep(1.0)
        asked, seconds = sum(len(model.prompts) for model in models), time.monotonic() - begun
        # Ten at once, then 91 a minute, for both together.
        assert 10 <= asked <= 10 + 91 / 60 * seconds + 1
        assert all(model.prompts for model in models)
        a.close(drain=False)
        b.close(drain=False)


def test_what_one_machine_was_answered_another_does_not_ask_again(redis, tmp_path):
    first, second = TestModel(lambda text: text + "!\ud800"), TestModel("other")
    texts = [f"t{n}" for n in range(600)]
    with machine(redis, tmp_path / "a", first) as a:
        results = submit(a, texts)
        wait_for(lambda: len(results) == 600)
    redis.kill()  # it is as durable as it is set to be
    redis.start()
    with machine(redis, tmp_path / "b", second) as b:
        results = submit(b, [*texts, "new"])
        wait_for(lambda: len(results) == 601)
        assert second.prompts == ["new"]
        values = Counter(r.value for r in results)
        assert values["t7!\ud800"] == 1
        assert sum(r.cost_usd for r in results) == pytest.approx(0.01)
    # Another run asks anew.
    with machine(redis, tmp_path / "b", second, run="second") as b:
        results = submit(b, ["t1"])
        wait_for(lambda: results)
    assert second.prompts == ["new", "t1"]
    client = RedisServers(redis.config()).client()
    keys = client.keys("chainwax:*")
    assert len(keys) > 600
    # Nothing stays for ever.
    assert all(client.ttl(key) > 0 for key in keys)
    client.close()


def find(store, *calls):
    async def find():
        try:
            return await store.find(calls)
        except Away:
            return {}
        finally:
            await store.leave()

    return asyncio.run(find())


def test_a_paid_attempt_of_an_unfinished_call_is_found_too(redis):
    query = Query(NODE, "call", [{"role": "user", "content": "hi"}])
    store = RedisStore(RedisServers(redis.config()))
    store.open_run("run")
    store.attempt(query, Attempt("call", 1, Arm("small"), text="no json", invalid=True, cost_usd=0.5))
    durable = threading.Event()
    store.attempt(query, Attempt("call", 2, Arm("big"), text=None, error="BackendDown: gone"))
    failed = CallResult("failed", "node", error=ValueError("no"))
    store.result(Query(NODE, "failed", []), failed, durable.set)
    assert durable.wait(10)
    found = find(store, "call", "failed", "unknown")
    assert set(found) == {"call", "failed"}
    assert found["call"].status == "unfinished"
    (attempt,) = found["call"].attempts
    assert (attempt.text, attempt.arm.key, attempt.cost_usd, attempt.reused) == (
        "no json",
        "small",
        0.0,
        True,
    )
    assert (found["failed"].status, found["failed"].message) == ("error", "no")
    store.close()


def test_hostile_content_of_redis_is_passed_over(redis):
    client = RedisServers(redis.config()).client()
    client.rpush("chainwax:run:a", "{", '{"call_id": 3}', "[]")
    client.set("chainwax:lent", '{"pools": 7}')
    client.set("chainwax:run:c", "a string")
    store = RedisStore(RedisServers(redis.config()))
    store.open_run("run")
    assert find(store, "a", "b") == {}
    client.close()
    store.close()


def test_redis_that_is_away_stops_a_run_that_can_go_on(redis, tmp_path, caplog):
    model = TestModel(latency=0.01)
    with machine(redis, tmp_path / "a", model, limit=4, close=False) as a:
        results = submit(a, "abc")
        wait_for(lambda: len(results) == 3)
        redis.pause()  # it does not answer, and does not refuse
        wait_for(lambda: any("nothing new is asked until it is back" in m for m in caplog.messages))
        waiting = submit(a, "de")
        redis.go_on()
        wait_for(lambda: len(waiting) == 2)
        assert not any(r.error for r in waiting)
        redis.kill()
        lost = submit(a, "fg")
        wait_for(lambda: len(lost) == 2)
        assert [type(r.error).__name__ for r in lost] == ["Cancelled"] * 2
        assert len(model.prompts) == 5
        begun = time.monotonic()
        with pytest.raises(RecordingError, match=r"Redis at 127.0.0.1:\d+ does not answer: .* away for 3 s"):
            a.close()
        assert time.monotonic() - begun < 15
    redis.start()


def test_answers_that_redis_does_not_take_are_in_the_recording_and_are_told(redis, caplog):
    store = RedisStore(RedisServers(redis.config(timeout=0.5)))
    store.open_run("run")
    redis.kill()
    durable = threading.Event()
    query = Query(NODE, "call", [])
    result = CallResult("call", "node", "x", "x", arm=Arm("only"))
    store.result(query, result, durable.set)
    assert durable.wait(10)  # a result never hangs on Redis
    assert any("they are in this machine's recording" in m for m in caplog.messages)
    redis.start()

    wait_for(lambda: find(store, "call"))
    redis.kill()
    store.result(query, result, lambda: None)
    with pytest.raises(RecordingError, match="1 answers are missing in Redis at"):
        store.close()
    redis.start()


def test_mistakes_name_the_place_and_no_password(redis, monkeypatch):
    with pytest.raises(ConfigError, match=r"redis\.url: a password does not stand in the URL") as told:
        load_settings(redis={"url": "redis://:secret@127.0.0.1"})
    assert "secret" not in str(told.value)
    with pytest.raises(ConfigError, match="environment variable NOT_SET is not set"):
        open_redis(redis.config(password_env="NOT_SET"))
    client = RedisServers(redis.config()).client()
    client.config_set("requirepass", "open")
    client.close()
    monkeypatch.setenv("SET", "sesame")
    _, store = open_redis(redis.config(password_env="SET"))
    with pytest.raises(ConfigError, match=f"Redis at 127.0.0.1:{redis.port}.*password") as told:
        store.open_run("run")
    assert "sesame" not in str(told.value)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    _, store = open_redis(RedisConfig(url=f"redis://127.0.0.1:{port}"))
    with pytest.raises(ConfigError, match=f"Redis at 127.0.0.1:{port} cannot be used"):
        store.open_run("run")


# -- chainwax run -i -a -----------------------------------------------------------------------------

FLOW = """
from chainwax.flows import Flow
flow = Flow("support")
flow.source("tickets").query("draft", "Answer {text}").sink("drafts")
"""
SERVER = """
import asyncio, json, sys
from collections import Counter
from aiohttp import web
asked = Counter()
async def answer(request):
    asked[(await request.json())["messages"][-1]["content"]] += 1
    await asyncio.sleep(0.03)
    return web.json_response({"choices": [{"message": {"content": "Dear"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 2}})
app = web.Application()
app.router.add_post("/v1/chat/completions", answer)
async def counts(request):
    return web.json_response(asked)
app.router.add_get("/asked", counts)
async def main():
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", int(sys.argv[1]))
    await site.start()
    await asyncio.sleep(3600)
asyncio.run(main())
"""


@pytest.fixture
def server(tmp_path):
    """A model server that counts what it is asked."""
    (tmp_path / "server.py").write_text(SERVER)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(tmp_path / "server.py"), str(port)])
    wait_for(lambda: asked(port) is not None)
    yield port
    process.kill()
    process.wait()


def asked(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/asked", timeout=5) as answer:
            return json.load(answer)
    except OSError:
        return None


def free_ports(count):
    """Ports that no connection gets by itself: they have to be free for as long as the machines run."""
    found = []
    while len(found) < count:
        port = random.randrange(20_000, 30_000)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        found.append(port)
    return found


def wait_until_asked(server, processes, number=40, seconds=60):
    end = time.monotonic() + seconds
    while sum(asked(server).values()) <= number:
        over = [process.poll() for process in processes]
        if any(code is not None for code in over) or time.monotonic() > end:
            for process in processes:
                process.kill()
            raise AssertionError((over, asked(server), [process.communicate() for process in processes]))
        time.sleep(0.02)


class Machines:
    """Two machines, as far as two folders on one can be."""

    def __init__(self, folder, redis, port, count=2):
        self.folder = folder
        self.redis = redis
        (folder / "support.py").write_text(FLOW)
        with (folder / "in.jsonl").open("w") as file:
            for n in range(200):
                file.write(json.dumps({"id": f"t{n}", "text": f"ticket {n}"}) + "\n")
        self.addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(count))
        for n in range(count):
            (folder / f"m{n}").mkdir()
            (folder / f"m{n}" / "chainwax.toml").write_text(
                f"""
[run]
epoch_seconds = 0.2
max_in_flight = 8
[redis]
url = "redis://127.0.0.1:{redis.port}/0"
[models.only]
tier = "standard"
url = "http://127.0.0.1:{port}/v1"
model = "test"
limit = 4
retries = 0
per_hour = 1
"""
            )

    def stop(self, processes):
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            _, err = process.communicate(timeout=60)
            assert process.returncode == 143, err

    def start(self, n, *more, addresses=None):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("CHAINWAX_", "BYTEWAX_"))}
        # What Bytewax itself reads works too.
        environment["BYTEWAX_ADDRESSES"] = (addresses or self.addresses).replace(",", ";")
        command = [sys.executable, "-m", "chainwax.flows.cli", "run", "../support.py", "-i", str(n)]
        command += ["--source", f"tickets={self.folder}/in.jsonl?batch_size=4", "--run-id", "one"]
        command += ["--sink", f"drafts={self.folder}/out.jsonl", "--state", "state", "--json", *more]
        return subprocess.Popen(
            command,
            cwd=self.folder / f"m{n}",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def outputs(self):
        file = self.folder / "out.jsonl"
        return [json.loads(line)["id"] for line in file.read_text().splitlines()] if file.exists() else []

    def durable(self):
        """The prompts that are in Redis or in a recording with their answers."""
        found = set()
        for n in range(2):
            path = self.folder / f"m{n}" / "chainwax.db"
            with closing(sqlite3.connect(path)) as db:
                rows = db.execute("SELECT messages FROM calls WHERE status = 'ok'").fetchall()
            found |= {json.loads(row[0])[-1]["content"] for row in rows}
        return found


ALL = sorted(f"t{n}" for n in range(200))


def finished(processes, seconds=90):
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        time.sleep(0.1)
    hang = [process.poll() is None for process in processes]
    for process in processes:
        process.kill()
    ends = [process.communicate() for process in processes]
    assert not any(hang), (hang, [err for _, err in ends])
    for process, (_, err) in zip(processes, ends, strict=True):
        assert process.returncode == 0, err
    return ends


def test_processes_of_two_machines_survive_the_death_of_one_and_ask_nothing_twice(redis, tmp_path, server):
    machines = Machines(tmp_path, redis, server)
    processes = [machines.start(n) for n in range(2)]
    wait_until_asked(server, processes)
    # Each has its own part of the state.
    assert [len(list((tmp_path / f"m{n}/state/recovery").glob("part-*.sqlite3"))) for n in (0, 1)] == [1, 1]
    with open(f"/proc/{processes[1].pid}/task/{processes[1].pid}/children") as file:
        (member,) = map(int, file.read().split())
    known = {prompt: asked(server)[prompt] for prompt in machines.durable()}
    os.kill(member, signal.SIGKILL)
    ends = finished(processes)
    assert sorted(machines.outputs()) == ALL
    assert {prompt: asked(server)[prompt] for prompt in known} == known
    # At most what the dead one held in flight was asked again.
    assert sum(asked(server).values()) <= 200 + 8
    assert "process 2 of 2 was killed (SIGKILL): it is started again from the last epoch" in ends[1][1]
    assert sum(json.loads(out.splitlines()[-1])["calls"] for out, _ in ends) >= 200


def test_one_machine_goes_on_with_what_two_began(redis, tmp_path, server):
    machines = Machines(tmp_path, redis, server)
    processes = [machines.start(n) for n in range(2)]
    wait_until_asked(server, processes)
    machines.stop(processes)
    before = asked(server)
    assert 0 < len(before) < 200
    for part in (tmp_path / "m1/state/recovery").glob("part-*"):
        shutil.copy(part, tmp_path / "m0/state/recovery")
    first = machines.addresses.split(",")[0]
    ((_, err),) = finished([machines.start(0, addresses=first)])
    assert "going on with run one" in err
    assert sorted(machines.outputs()) == ALL
    assert set(asked(server).values()) == {1}


def test_a_machine_joins_a_run_that_another_began(redis, tmp_path, server):
    machines = Machines(tmp_path, redis, server)
    first = machines.start(0, addresses=machines.addresses.split(",")[0])
    wait_until_asked(server, [first])
    machines.stop([first])
    assert 0 < len(asked(server)) < 200
    state = tmp_path / "m1" / "state"
    (state / "recovery").mkdir(parents=True)
    known = json.loads((tmp_path / "m0/state/run.json").read_text())
    known["bound"]["recording"] = str(tmp_path / "m1" / "chainwax.db")
    (state / "run.json").write_text(json.dumps(known))
    finished([machines.start(n) for n in range(2)])
    assert sorted(machines.outputs()) == ALL
    assert set(asked(server).values()) == {1}


def test_a_run_that_redis_left_stops_and_goes_on_when_it_is_back(redis, tmp_path, server):
    machines = Machines(tmp_path, redis, server)
    file = tmp_path / "m0" / "chainwax.toml"
    file.write_text(file.read_text().replace("[redis]", "[redis]\npatience_seconds = 2\ntimeout = 0.5"))
    alone = machines.addresses.split(",")[0]
    process = machines.start(0, addresses=alone)
    wait_until_asked(server, [process])
    redis.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "nothing new is asked until it is back" in err
    assert "away for 2 s" in err
    assert "Traceback" not in err
    assert 0 < len(asked(server)) < 200
    redis.start()
    finished([machines.start(0, addresses=alone)])
    assert sorted(machines.outputs()) == ALL
    assert set(asked(server).values()) == {1}
