"""Several processes that run one flow: real processes and signals, a server that counts what is paid."""

import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing

import bytewax.operators as op
import pytest
from aiohttp import web
from bytewax.dataflow import Dataflow
from bytewax.operators import StatefulBatchLogic
from bytewax.outputs import DynamicSink, StatelessSinkPartition
from bytewax.testing import TestingSource, cluster_main

from chainwax.flows.merged import merged
from chainwax.flows.state import RunState
from chainwax.flows.testing import TestModel
from chainwax.operators._shards import shards_for, to_shards
from chainwax.operators.item import Item
from chainwax.router import Choice, Form, FreeText, LLMManager, NodeSpec, Prompt, load_settings
from chainwax.router.recorder import wilson
from chainwax.router.share import Share

FLOW = """
from chainwax.flows import Flow
flow = Flow("support")
tickets = flow.source("tickets")
team = tickets.choose("team", "Which team?\\n\\n{text}", ["billing", "technical"])
team.query("draft", "Answer {text}").sink("drafts")
"""


class Model:
    """A loopback model server in a thread, which counts what it is asked."""

    def __init__(self):
        self.latency = 0.03
        self.hang_after = None
        self.asked = Counter()
        self.answered = 0
        self.in_flight = self.most = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def _serve(self):
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)

        async def start():
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.port = site._server.sockets[0].getsockname()[1]
            self._ready.set()

        self._loop.run_until_complete(start())
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        for task in (left := asyncio.all_tasks(self._loop)):
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.close()

    async def _answer(self, request):
        prompt = (await request.json())["messages"][-1]["content"]
        self.asked[prompt] += 1
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            if self.hang_after is not None and self.asked.total() > self.hang_after:
                await asyncio.sleep(60)
            await asyncio.sleep(self.latency)
        finally:
            self.in_flight -= 1
        self.answered += 1
        text = "billing" if prompt.startswith("Which") else "Dear customer"
        return web.json_response(
            {
                "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 10, "completion_tokens": 2},
            }
        )

    def wait_for(self, number, seconds=30):
        end = time.monotonic() + seconds
        while self.answered < number:
            assert time.monotonic() < end, f"only {self.answered} of {number} answers"
            time.sleep(0.005)

    def close(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)


@pytest.fixture
def model():
    server = Model()
    yield server
    server.close()


@pytest.fixture
def place(tmp_path, model):
    """A folder with a flow, 90 items and a configuration."""
    (tmp_path / "support.py").write_text(FLOW)
    items(tmp_path, 90)
    (tmp_path / "chainwax.toml").write_text(
        f"""
[run]
epoch_seconds = 0.2
max_in_flight = 8
[models.only]
tier = "standard"
url = "http://127.0.0.1:{model.port}/v1"
model = "test"
limit = 16
retries = 0
input_cost_per_token = 1e-6
output_cost_per_token = 1e-6
"""
    )
    return tmp_path


def items(place, count):
    with (place / "in.jsonl").open("w") as file:
        for n in range(count):
            file.write(json.dumps({"id": f"t{n}", "text": f"ticket {n}"}) + "\n")


def start(place, *more, processes=3, sink="out/drafts.jsonl", state="state"):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CHAINWAX_")}
    command = [sys.executable, "-m", "chainwax.flows.cli", "run", "support.py"]
    command += ["--source", "tickets=in.jsonl?batch_size=4", "--sink", f"drafts={sink}"]
    command += ["--processes", str(processes), *(["--state", state] if state else []), *more]
    return subprocess.Popen(
        command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def end(process, seconds=60):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def children(process):
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        return [int(pid) for pid in file.read().split()]


def drafts(place):
    file = place / "out" / "drafts.jsonl"
    return [json.loads(line)["id"] for line in file.read_text().splitlines()] if file.exists() else []


def recorded(place, sql):
    with closing(sqlite3.connect(place / "chainwax.db")) as db:
        return db.execute(sql).fetchall()


def answered(place):
    """The prompts whose answers are durable."""
    return {
        json.loads(messages)[-1]["content"]
        for (messages,) in recorded(place, "SELECT messages FROM calls WHERE status = 'ok'")
    }


def all_of(count):
    return sorted(f"t{n}" for n in range(count))


def test_a_run_to_the_end_is_one_run_with_one_report(place, model):
    code, out, err = end(start(place, "--json", "--run-id", "mine"))
    assert code == 0, err
    assert len(out.splitlines()) == 1
    result = json.loads(out)
    assert (result["run"], result["status"], result["items"]) == ("mine", "finished", 90)
    assert (result["calls"], result["errors"]) == (180, 0)
    assert result["cost_usd"] == pytest.approx(180 * 12e-6)
    assert sorted(drafts(place)) == all_of(90)
    assert set(model.asked.values()) == {1}
    # Together they keep to the limit, and no process of 6, 5 and 5 slots did it alone.
    assert 6 < model.most <= 16
    assert "flow support finished: 90 items, 180 calls" in err
    assert "worker" not in err
    assert recorded(place, "SELECT run, status FROM runs") == [("mine", "finished")]
    ((snapshot,),) = recorded(place, "SELECT value FROM meta WHERE key = 'snapshot:mine'")
    snapshot = json.loads(snapshot)
    assert snapshot["interfaces"]["team"]["uptime"]["finished"] == 90
    assert snapshot["models"]["only"]["uptime"]["attempts"] == 180
    assert snapshot["models"]["only"]["limit"] == 16


def test_kill_9_of_any_process_loses_nothing_and_pays_nothing_twice(place, model):
    items(place, 400)
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    process = start(place, "--json")
    known, held = {}, 0
    for kills in (1, 2):
        model.wait_for(kills * 200 + chance.randrange(100))
        victim = chance.choice(children(process))
        known |= {prompt: model.asked[prompt] for prompt in answered(place)}
        os.kill(victim, signal.SIGKILL)
        while victim in children(process):
            time.sleep(0.005)
        # What can be asked again: all that was asked by any process and is not durable now. An answer that
        # came is not durable until the recording has written it, so it is more than the 6 slots of a process;
        # both nodes of one, 8 each, hold 16 at most. The others wait for theirs before they end.
        durable = answered(place)
        time.sleep(0.02)  # what was sent last is on its way to the server
        held += len(model.asked.keys() - durable)
    code, out, err = end(process)
    assert code == 0, (seed, err)
    result = json.loads(out)
    assert (result["status"], result["items"], result["calls"]) == ("finished", 400, 800), seed
    assert sorted(drafts(place)) == all_of(400), seed
    assert err.count("was killed (SIGKILL): all 3 are started again from the last epoch") == 2, err
    assert "panicked" not in err
    assert len(known) > 100
    # Not one answer that was durable at a kill was asked for again.
    assert known == {prompt: model.asked[prompt] for prompt in known}, seed
    assert model.asked.total() - 800 <= min(held, 2 * 2 * 8), seed
    assert result["cost_usd"] == pytest.approx(800 * 12e-6)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_drains_all_and_another_number_of_processes_goes_on(place, model, number, code):
    items(place, 400)
    process = start(place, "--run-id", "mine")
    model.wait_for(20)
    process.send_signal(number)
    stopped, out, err = end(process)
    assert stopped == code, err
    assert err.count("stopping: what is under way is finished first") == 1
    assert "the same command goes on where it stopped (--state state)" in err
    assert "flow support stopped" in out
    before = drafts(place)
    assert 0 < len(before) < 400
    # All that was read was finished.
    assert model.asked.total() == model.answered == 2 * len(before)
    assert recorded(place, "SELECT status FROM runs") == [("stopped",)]
    bound = json.loads((place / "state" / "run.json").read_text())["bound"]
    with closing(RunState(place / "state", bound, run_id=None)) as state:
        assert state.epoch() > 0
    code, out, err = end(start(place, "--json", processes=1 if number == signal.SIGINT else 2))
    assert code == 0, err
    assert "going on with run mine" in err
    assert sorted(drafts(place)) == all_of(400)
    assert set(model.asked.values()) == {1}
    result = json.loads(out)
    assert (result["items"], result["calls"]) == (400, 800)


def test_what_one_process_began_several_go_on_with(place, model):
    process = start(place, processes=1)
    model.wait_for(20)
    process.kill()
    end(process)
    known = answered(place)
    code, _, err = end(start(place))
    assert code == 0, err
    assert sorted(drafts(place)) == all_of(90)
    assert {model.asked[prompt] for prompt in known} == {1}


def test_a_second_signal_stops_all_at_once(place, model):
    model.hang_after = 30
    process = start(place)
    model.wait_for(30)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, _, err = end(process)
    assert code == 130
    assert time.monotonic() - begun < 5
    assert err.count("stopped at once; all answers are in the recording") == 1
    known = answered(place)
    assert len(known) == 30
    model.hang_after = None
    code, _, err = end(start(place))
    assert code == 0, err
    assert sorted(drafts(place)) == all_of(90)
    assert {model.asked[prompt] for prompt in known} == {1}


def test_the_others_end_with_the_one_that_watches_and_the_state_stays_locked_until_then(place, model):
    process = start(place)
    model.wait_for(20)
    left = children(process)
    assert len(left) == 3
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in left):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.communicate()
    code, _, err = end(start(place))
    assert code == 0, err
    assert sorted(drafts(place)) == all_of(90)


def test_what_fails_each_time_is_given_up_and_the_cause_is_told(place, model):
    model.latency = 0.0
    settings = place / "chainwax.toml"
    settings.write_text(settings.read_text().replace("epoch_seconds = 0.2", "epoch_seconds = 2"))
    (place / "full.jsonl").symlink_to("/dev/full")
    code, _, err = end(start(place, "--json", sink="full.jsonl"))
    assert code == 1
    assert err.count("failed: all 3 are started again from the last epoch") >= 4
    assert "full.jsonl cannot be written: No space left on device" in err
    last = err.splitlines()[-1]
    assert last.startswith("given up: 5 times in a row a process died before the run got on")
    assert last.endswith("the same command goes on where it stopped (--state state)")
    assert "Bytewax gave up" not in err
    assert "panicked" not in err
    assert "Traceback" not in err
    # What a start answered, the next one did not ask again.
    assert set(model.asked.values()) == {1}
    assert recorded(place, "SELECT status FROM runs") == [("failed",)]


def test_mistakes_are_told_before_anything_begins(place, model):
    code, _, err = end(start(place, state=None))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--processes needs --state DIR" in err
    text = (place / "chainwax.toml").read_text()
    (place / "chainwax.toml").write_text(text.replace("[run]", '[run]\nrecording = ""'))
    code, _, err = end(start(place))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--processes needs a recording" in err
    (place / "chainwax.toml").write_text(text.replace("limit = 16", "limit = 2"))
    code, _, err = end(start(place))
    assert code == 0
    assert err.count("model 'only': its limit is 2, but each of 3 processes asks one at a time") == 1
    assert model.most <= 3


def test_a_sink_on_stdout_holds_items_alone(place, model):
    model.latency = 0.0
    process = start(place, sink="-")
    code, out, err = end(process)
    assert code == 0, err
    assert sorted(json.loads(line)["id"] for line in out.splitlines()) == all_of(90)
    assert "flow support finished" in err


# -- its parts ------------------------------------------------------------------------------------


class _Logic(StatefulBatchLogic):
    def on_batch(self, values):
        return values, False

    def snapshot(self):
        return None


class _Workers(DynamicSink):
    """Says which worker each key came to."""

    def __init__(self, found):
        self.found = found

    def build(self, step_id, worker_index, worker_count):
        found = self.found

        class Part(StatelessSinkPartition):
            def write_batch(self, pairs):
                for key, _ in pairs:
                    found[key] = worker_index

        return Part()


@pytest.mark.parametrize("workers", [2, 3, 4, 6, 8])
def test_every_worker_gets_as_many_shards(workers):
    found = {}
    flow = Dataflow("shards")
    items = op.input("in", flow, TestingSource([Item(n, f"key {n}") for n in range(1000)]))
    keyed = to_shards("shard", items, shards_for(workers))
    op.output("out", op.stateful_batch("logic", keyed, lambda state: _Logic()), _Workers(found))
    cluster_main(flow, [], 0, worker_count_per_proc=workers)
    counts = Counter(found.values())
    assert set(counts.values()) == {shards_for(workers) // workers}, counts


def test_limits_and_budgets_hold_for_all_processes_together():
    settings = load_settings(
        run={"recording": None, "seed": 7},
        nodes={"dear": {"budget": 3.0}},
        models={
            "told": {"tier": "standard", "backend": "simulated", "per_hour": 1, "limit": 7},
            "untold": {"tier": "standard", "backend": "simulated", "per_hour": 1},
            "own": {"tier": "local", "backend": "llamacpp"},
        },
    )
    told, untold, budgets, draws = 0, 0, 0.0, set()
    for index in range(3):
        with LLMManager(settings, share=Share(index, 3)) as manager:
            told += manager.instances["told"].queue.limit
            untold += manager.instances["untold"].queue.limit
            # Each has an engine of its own.
            assert manager.instances["own"].queue.limit == 16
            node = manager.register(NodeSpec("dear", Prompt("{x}"), FreeText()))
            budgets += node.node.budget
            draws.add(node.router._random.random())
    assert (told, untold, budgets) == (7, 16, 3.0)
    assert len(draws) == 3


def asked(manager, node, texts):
    """Submit all; their results, as they come."""
    interface = manager.register(node)
    results = []
    queries = [interface.bind({"text": text}, item_key=text, position=text) for text in texts]
    interface.submit(queries, lambda query, result: results.append(result))
    return results


def test_what_is_on_its_way_is_waited_for_and_no_more_is_sent(tmp_path):
    model = TestModel(latency=0.2)
    settings = load_settings(
        run={"recording": tmp_path / "run.db"},
        models={"only": {"tier": "local", "backend": "simulated", "per_hour": 1, "limit": 2}},
    )
    manager = LLMManager(settings, backends={"only": model})
    manager.begin_run("flow")
    results = asked(manager, NodeSpec("node", Prompt("{text}"), FreeText()), "abcdef")
    while len(model.prompts) < 2:
        time.sleep(0.005)
    manager.close(status="failed", drain="sent")
    assert len(model.prompts) == 2
    assert sorted(type(result.error).__name__ for result in results) == ["Cancelled"] * 4 + ["NoneType"] * 2
    with closing(sqlite3.connect(tmp_path / "run.db")) as db:
        assert db.execute("SELECT count(*), min(status) FROM calls").fetchone() == (2, "ok")


def test_what_was_paid_for_a_call_that_is_cancelled_is_not_paid_again(tmp_path):
    first, second = TestModel("b"), TestModel("a", latency=0.5)
    settings = load_settings(
        run={"recording": tmp_path / "run.db"},
        models={
            "small": {"tier": "local", "backend": "simulated", "per_hour": 0},
            "big": {
                "tier": "strongest",
                "backend": "simulated",
                "input_cost_per_token": 1e-6,
                "output_cost_per_token": 1e-6,
            },
        },
    )
    node = NodeSpec("node", Prompt("{text}"), Choice(["a", "b"]), form=Form.parallel)
    for drain in (False, True):
        manager = LLMManager(settings, backends={"small": first, "big": second})
        manager.begin_run("flow", "run")
        results = asked(manager, node, ["x"])
        while len(second.prompts) < 1 + drain or not first.prompts:
            time.sleep(0.005)
        time.sleep(0.05)
        manager.close(drain=drain)
        assert len(results) == 1
    # The answer that was there already was not bought again; the one that never came was.
    assert (results[0].value, len(first.prompts), len(second.prompts)) == ("a", 1, 2)


def test_snapshots_are_added_up():
    def of(calls, choice):
        return {
            "run": "r",
            "time": 1.0,
            "models": {"m": {"tier": "local", "limit": 2, "uptime": {"seconds": 9.0, "attempts": calls}}},
            "interfaces": {
                "n": {
                    "flow": "f",
                    "uptime": {"seconds": 9.0, "finished": calls, "choices": {choice: calls, "b": 1}},
                    "router": {
                        "calls": calls,
                        "choice": choice,
                        "budget_usd": None,
                        "quality": 1.0 if choice == "c" else 0.0,
                        "scores": calls,
                        "arms": {"a": {"used": calls, "tier": "local"}},
                    },
                }
            },
        }

    together = merged([of(1, "a"), of(5, "c"), of(2, "a")])
    node = together["interfaces"]["n"]
    assert together["models"]["m"] == {
        "tier": "local",
        "limit": 6,
        "uptime": {"seconds": 9.0, "attempts": 8},
    }
    assert node["uptime"] == {"seconds": 9.0, "finished": 8, "choices": {"c": 5, "b": 3, "a": 3}}
    low, high = wilson(5, 8)
    assert node["router"] == {
        "calls": 8,
        "choice": "c",
        "budget_usd": None,
        "quality": 5 / 8,
        "quality_low": low,
        "quality_high": high,
        "scores": 8,
        "arms": {"a": {"used": 8, "tier": "local"}},
    }
    # Over a bus that all share, each knows all scores already.
    shared = [one | {"bus": {"received": 5, "written": 2}} for one in (of(1, "a"), of(5, "c"))]
    together = merged(shared)
    assert together["interfaces"]["n"]["router"]["scores"] == 5
    assert together["bus"] == {"received": 5, "written": 4}
