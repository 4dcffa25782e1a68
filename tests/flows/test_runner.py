"""Runs of the command in a process of its own: signals, death, resume, exactly once, failures."""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing

import pytest
from aiohttp import web

from chainwax.connectors import InProcessBus
from chainwax.flows.state import RunState
from chainwax.router import ConfigError, Feedback, LLMManager, load_settings

FLOW = """
from chainwax.flows import Flow
flow = Flow("support")
tickets = flow.source("tickets")
team = tickets.choose("team", "Which team?\\n\\n{text}", ["billing", "technical"])
team.query("draft", "Answer {text}").sink("drafts")
"""


COMMAND = [sys.executable, "-m", "chainwax.flows.cli", "run", "support.py"]


class Model:
    """A loopback model server in a thread, which counts what it is asked."""

    def __init__(self):
        self.latency = 0.05
        self.hang_after = None
        self.asked = Counter()
        self.answered = 0
        self.port = None
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
            task.cancel()  # answers that still hang
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.close()

    async def _answer(self, request):
        prompt = (await request.json())["messages"][-1]["content"]
        self.asked[prompt] += 1
        if self.hang_after is not None and self.asked.total() > self.hang_after:
            await asyncio.sleep(60)
        await asyncio.sleep(self.latency)
        self.answered += 1
        text = "billing" if prompt.startswith("Which") else "Dear customer"
        return web.json_response(
            {
                "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 10, "completion_tokens": 2},
            }
        )

    def wait_for(self, number, seconds=20):
        end = time.monotonic() + seconds
        while self.answered < number:
            assert time.monotonic() < end, f"only {self.answered} of {number} answers"
            time.sleep(0.01)

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
    """A folder with a flow, 60 items and a configuration."""
    (tmp_path / "support.py").write_text(FLOW)
    with (tmp_path / "in.jsonl").open("w") as file:
        for n in range(60):
            file.write(json.dumps({"id": f"t{n}", "text": f"ticket {n}"}) + "\n")
    (tmp_path / "chainwax.toml").write_text(
        f"""
[run]
epoch_seconds = 0.2
max_in_flight = 8
[models.only]
tier = "standard"
url = "http://127.0.0.1:{model.port}/v1"
model = "test"
limit = 8
retries = 0
"""
    )
    return tmp_path


def start(place, *more):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CHAINWAX_")}
    return subprocess.Popen(
        [*COMMAND, "--source", "tickets=in.jsonl?batch_size=4", "--sink", "drafts=out/drafts.jsonl", *more],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"RUST_BACKTRACE": "1"},
    )


def end(process, seconds=30):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def drafts(place):
    file = place / "out" / "drafts.jsonl"
    return [json.loads(line)["id"] for line in file.read_text().splitlines()] if file.exists() else []


def recorded(place, sql):
    with closing(sqlite3.connect(place / "chainwax.db")) as db:
        return db.execute(sql).fetchall()


def test_a_run_to_the_end(place, model):
    model.latency = 0.0
    code, out, err = end(start(place, "--json"))
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert (result["status"], result["items"], result["calls"], result["errors"]) == ("finished", 60, 120, 0)
    assert sorted(drafts(place)) == sorted(f"t{n}" for n in range(60))
    assert "flow support finished: 60 items, 120 calls" in err
    assert recorded(place, "SELECT status FROM runs") == [("finished",)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_drains_and_the_same_command_goes_on(place, model, number, code):
    process = start(place, "--state", "state")
    model.wait_for(12)
    process.send_signal(number)
    stopped, out, err = end(process)
    assert stopped == code, err
    assert "stopping: what is under way is finished first" in err
    assert "the same command goes on where it stopped (--state state)" in err
    assert "flow support stopped" in out
    before = drafts(place)
    # All that was read was finished, and not all was read.
    assert 0 < len(before) < 60
    assert sum(model.asked.values()) == model.answered == 2 * len(before)
    assert recorded(place, "SELECT status FROM runs") == [("stopped",)]
    model.latency = 0.0
    code, out, err = end(start(place, "--state", "state", "--json"))
    assert code == 0, err
    assert "going on with run" in err
    assert sorted(drafts(place)) == sorted(f"t{n}" for n in range(60))
    assert set(model.asked.values()) == {1}
    # The report is about the whole run, not its last part.
    result = json.loads(out.splitlines()[-1])
    assert (result["items"], result["calls"]) == (60, 120)
    code, out, err = end(start(place, "--state", "state"))
    assert code == 2
    assert "is finished: add --fresh" in err
    code, out, err = end(start(place, "--state", "state", "--fresh"))
    assert code == 0, err
    assert len(drafts(place)) == 60
    assert len(recorded(place, "SELECT run FROM runs")) == 2


def test_a_second_signal_stops_at_once_and_loses_nothing_that_was_recorded(place, model):
    model.hang_after = 20
    process = start(place, "--state", "state")
    model.wait_for(20)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, _, err = end(process)
    assert code == 130
    assert time.monotonic() - begun < 3
    assert "stopped at once; all answers are in the recording" in err
    assert recorded(place, "SELECT count(*) FROM calls WHERE status = 'ok'") == [(20,)]
    known = {json.loads(m)[-1]["content"] for (m,) in recorded(place, "SELECT messages FROM calls")}
    model.hang_after = None
    model.latency = 0.0
    code, _, err = end(start(place, "--state", "state"))
    assert code == 0, err
    assert sorted(drafts(place)) == sorted(f"t{n}" for n in range(60))
    assert {model.asked[prompt] for prompt in known} == {1}


def test_kill_9_loses_no_output_and_pays_nothing_twice(place, model):
    process = start(place, "--state", "state")
    model.wait_for(40)
    process.kill()
    end(process)
    known = {
        json.loads(m)[-1]["content"]
        for (m,) in recorded(place, "SELECT messages FROM calls WHERE status = 'ok'")
    }
    assert len(known) >= 20
    model.latency = 0.0
    code, out, err = end(start(place, "--state", "state", "--json"))
    assert code == 0, err
    assert sorted(drafts(place)) == sorted(f"t{n}" for n in range(60))
    assert {model.asked[prompt] for prompt in known} == {1}
    # What was in flight when it died was asked again, and nothing else.
    assert sum(model.asked.values()) - 120 <= 16
    assert json.loads(out.splitlines()[-1])["calls"] == 120


def test_without_state_a_stopped_run_says_how_to_keep_it(place, model):
    process = start(place)
    model.wait_for(6)
    process.send_signal(signal.SIGINT)
    code, _, err = end(process)
    assert code == 130
    assert "with --state DIR" in err


def test_a_state_in_use_and_one_bound_to_something_else(place, model):
    model.latency = 0.7  # it must not be finished before the others have started
    process = start(place, "--state", "state")
    model.wait_for(4)
    code, _, err = end(start(place, "--state", "state"))
    assert code == 2
    assert "another run is using it now" in err
    process.send_signal(signal.SIGINT)
    end(process)
    code, _, err = end(start(place, "--state", "state", "--run-id", "another"))
    assert code == 2
    assert "leave it out to go on" in err
    (place / "in2.jsonl").write_text("")
    command = [
        *COMMAND,
        "--state",
        "state",
        "--source",
        "tickets=in2.jsonl",
        "--sink",
        "drafts=out/drafts.jsonl",
    ]
    found = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=30)
    assert found.returncode == 2
    assert "has sources tickets=in.jsonl?batch_size=4, not tickets=in2.jsonl" in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_a_sink_that_cannot_be_written_fails_in_one_line_without_a_panic(place, model):
    model.latency = 0.0
    (place / "full.jsonl").symlink_to("/dev/full")
    command = [*COMMAND, "--source", "tickets=in.jsonl", "--sink", "drafts=full.jsonl", "--workers", "2"]
    for more in ([], ["--debug"]):
        found = subprocess.run([*command, *more], cwd=place, capture_output=True, text=True, timeout=30)
        assert found.returncode == 1
        assert "flow support failed" in found.stdout
        last = found.stderr.splitlines()[-1]
        assert last == "flow 'support' failed: full.jsonl cannot be written: No space left on device"
        assert ("Traceback" in found.stderr) == bool(more)
        assert more or "panicked" not in found.stderr
        assert more or len(found.stderr.splitlines()) == 1
    assert recorded(place, "SELECT DISTINCT status FROM runs") == [("failed",)]


def test_state_that_cannot_be_saved_names_the_reason(place, model):
    model.latency = 0.0
    code = FLOW.replace('flow.source("tickets")', "flow.source(\"tickets\").stateful_map('s', keep)")
    code = code.replace("flow = ", "def keep(state, value):\n    return (lambda: 0), value\nflow = ", 1)
    (place / "support.py").write_text(code)
    code, _, err = end(start(place, "--state", "state"))
    assert code == 1
    assert "pickle" in err.splitlines()[-1]
    assert "has to be picklable" in err.splitlines()[-1]


def test_a_recording_that_cannot_be_written_fails_after_the_outputs_are_complete(place, model):
    model.latency = 0.0
    # A disk that is full: the process may write no file beyond 200 KiB.
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "from chainwax.flows.cli import main; main()"
    )
    with (place / "in.jsonl").open("w") as file:
        for n in range(60):
            file.write(json.dumps({"id": f"t{n}", "text": f"ticket {n} " + "x" * 4000}) + "\n")
    command = [sys.executable, "-c", script, "run", "support.py"]
    command += ["--source", "tickets=in.jsonl?batch_size=4", "--sink", "drafts=-"]
    found = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=90)
    assert found.returncode == 1, found.stderr
    assert len(found.stdout.splitlines()) == 60
    assert "rows are missing in the recording" in found.stderr.splitlines()[-1]
    assert "cannot be written" in found.stderr


def test_dead_letters_do_not_fail_a_run_and_go_where_they_are_sent(place, model):
    model.latency = 0.0
    with (place / "in.jsonl").open("a") as file:
        file.write('{"id": "bad"}\nnot json\n')
    code, out, err = end(start(place, "--dead-letters", "letters.jsonl", "--json"))
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["errors"] == 2
    letters = [json.loads(line) for line in (place / "letters.jsonl").read_text().splitlines()]
    assert {letter["error"] for letter in letters} == {"BadRecord", "PromptFieldMissing"}
    assert "2 dead letters, all in" in err
    assert len(drafts(place)) == 60


def test_a_model_that_is_down_makes_dead_letters_and_ends(place, model):
    text = (place / "chainwax.toml").read_text()
    (place / "chainwax.toml").write_text(text.replace(str(model.port), "9"))
    code, out, err = end(start(place, "--json"))
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert (result["errors"], result["calls"], result["status"]) == (60, 0, "finished")
    assert result["first_error"]["error"] == "BackendDown"


def test_two_workers_give_the_same_outputs(place, model):
    model.latency = 0.0
    code, _, err = end(start(place, "--workers", "2", "--state", "state"))
    assert code == 0, err
    assert sorted(drafts(place)) == sorted(f"t{n}" for n in range(60))


def test_a_broken_state_file_is_named(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    bound = {"flow": "x"}
    for content in ("{", "[]", '{"run": 3}', "\x00"):
        (folder / "run.json").write_text(content)
        with pytest.raises(ConfigError, match=r"run\.json"):
            RunState(folder, bound, run_id=None)
    state = RunState(folder, bound, run_id=None, fresh=True)
    state.begin("one")
    state.close()
    # Nobody else's files are ever removed.
    (folder / "recovery" / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="no recovery store's"):
        RunState(folder, bound, run_id=None, fresh=True)
    assert (folder / "recovery" / "mine.txt").read_text() == "precious"


def test_panics_are_kept_off_stderr_and_nothing_else_is(tmp_path):
    script = """
import os, sys
from chainwax.flows.panics import without_panics
before = sys.stderr
with without_panics():
    print("python", file=sys.stderr)
    print("an old handle", file=before, flush=True)
    os.write(2, b"raw\\nthread '<unnamed>' panicked at src/operators.rs:198:33:\\nBox<dyn Any>\\n")
    os.write(2, b"s:292:17) panicked at /x/bytes_exchange.rs:55:48:\\nMergeQueue poisoned.: \\n")
    os.write(2, b"stack backtrace:\\n   0: std::panicking\\n         at /x.rs:1\\nnote: Some\\n\\n")
    os.write(2, b"raw again\\nlast")
print(" after", file=sys.stderr)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert found.returncode == 0
    assert sorted(found.stderr.split("\n")) == [
        "",
        "an old handle",
        "last after",
        "python",
        "raw",
        "raw again",
    ]


CLOSING = """
from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition
from chainwax.connectors import SINKS, Kind
from chainwax.flows import Flow

flow = Flow("closing")
flow.source("in").sink("out")


class Part(StatefulSinkPartition):
    def __init__(self, path):
        self.path = path

    def write_batch(self, values):
        if self.path == "both":
            raise OSError("cannot write")

    def snapshot(self):
        pass

    def close(self):
        raise OSError("cannot close")


class Sink(FixedPartitionedSink):
    def __init__(self, path):
        self.path = path

    def list_parts(self):
        return ["a", "b"]

    def part_fn(self, key):
        return len(key)

    def build_part(self, step_id, for_part, resume_state):
        return Part(self.path)


SINKS["closing"] = Kind(Sink)
"""


@pytest.mark.parametrize(
    ("path", "said", "more"),
    [
        ("close", "cannot close", ()),
        ("both", "cannot write", ()),
        ("close", "cannot close", ("--processes", "2", "--state", "state")),
    ],
)
def test_a_sink_whose_close_raises_fails_the_run_and_does_not_abort_it(tmp_path, path, said, more):
    (tmp_path / "closing.py").write_text(CLOSING)
    (tmp_path / "in.jsonl").write_text('{"id": "a"}\n{"id": "bb"}\n')
    command = [sys.executable, "-m", "chainwax.flows.cli", "run", "closing.py", *more]
    command += ["--source", "in=in.jsonl", "--sink", f"out=closing:{path}"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1, process.stderr
    assert f"OSError: {said}" in process.stderr
    assert "panic" not in process.stderr
    assert "Traceback" not in process.stderr


def test_feedback_that_the_bus_delivers_last_is_still_learned_and_recorded(tmp_path):
    class LateBus(InProcessBus):
        """Delivers when it is closed, while the router's loop is busy."""

        def close(self):
            manager.loop.call_soon_threadsafe(time.sleep, 0.1)
            self.publish([Feedback("team", 1.0, "a-call", arm="only", metric="m", source="s")])
            super().close()

    model = {"tier": "local", "backend": "simulated", "per_hour": 1}
    settings = load_settings(run={"recording": tmp_path / "run.db"}, models={"only": model})
    manager = LLMManager(settings, bus=LateBus())
    manager.begin_run("flow")
    manager.get_model("text", node="team")
    manager.close()
    assert manager.snapshot()["interfaces"]["team"]["router"]["scores"] == 1
    with closing(sqlite3.connect(tmp_path / "run.db")) as db:
        assert db.execute("SELECT count(*) FROM feedback").fetchall() == [(1,)]
