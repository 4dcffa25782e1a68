"""Changes while running over a real broker: every process takes them up, those of later too."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid

import pytest
from kafka import KafkaProducer
from kafka.admin import ConfigResource

from chainwax.connectors import open_bus
from chainwax.connectors.bus import kafka_of
from chainwax.connectors.bus_reader import records_of
from chainwax.connectors.control_topic import read_topic, write_topic
from chainwax.flows.testing import TestModel
from chainwax.router import ConfigError, Form, FreeText, LLMManager, NodeSpec, Prompt, load_settings
from chainwax.router.control import Change, in_force
from chainwax.router.errors import RecordingError
from chainwax.router.recording import RecordingReader

CONFIG = """
[run]
epoch_seconds = 0.2
recording = "{recording}"
[bus]
kind = "kafka"
servers = "{servers}"
prefix = "{prefix}"
[models.big]
tier = "strongest"
backend = "simulated"
input_cost_per_token = 1e-6
output_cost_per_token = 1e-6
limit = 4
simulation = {{latency = 0.02, latency_spread = 0, truth = "truth.jsonl"}}
[models.small]
tier = "local"
backend = "simulated"
input_cost_per_token = 1e-7
output_cost_per_token = 1e-7
limit = 4
simulation = {{latency = 0.02, latency_spread = 0, truth = "truth.jsonl"}}
"""

FLOW = """
from chainwax.flows import Flow
flow = Flow("support")
tickets = flow.source("tickets")
tickets.choose("team", "Which team? {text}", ["billing", "other"], form="direct").sink("out")
"""

CHAINWAX = [sys.executable, "-m", "chainwax.flows.cli"]


def wait_for(what, seconds=40.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to pass in time"
        time.sleep(0.05)


def environment():
    return {key: value for key, value in os.environ.items() if not key.startswith("CHAINWAX_")}


@pytest.fixture
def place(tmp_path, broker):
    """A folder with a flow, and two configurations: two machines with recordings of their own."""
    prefix = f"t{uuid.uuid4().hex[:8]}"
    (tmp_path / "support.py").write_text(FLOW)
    for name in ("one", "two"):
        text = CONFIG.format(recording=f"{name}.db", servers=broker.servers, prefix=prefix)
        (tmp_path / f"{name}.toml").write_text(text)
    with (tmp_path / "truth.jsonl").open("w") as truth:
        for n in range(20_000):
            truth.write(json.dumps({"id": f"t{n}", "text": f"{n}", "answers": {"team": "billing"}}) + "\n")
    return tmp_path, prefix


def answered(folder, name):
    """The arms of the calls that a process has written out, oldest first."""
    if not (folder / f"{name}.db").exists():
        return []
    try:
        reader = RecordingReader(folder / f"{name}.db")
    except RecordingError:  # the file is there, its tables are not yet
        return []
    try:
        return [arm for (arm,) in reader._all("SELECT arm FROM calls ORDER BY rowid", ())]
    finally:
        reader.close()


def control(folder, *args, config="one", code=0):
    command = [*CHAINWAX, "control", *args, "--config", f"{config}.toml"]
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_two_processes_take_changes_up_and_a_third_finds_them(place, broker):
    folder, _ = place
    running = []

    def start(name):
        command = [*CHAINWAX, "run", "support.py", "--config", f"{name}.toml", "--run-id", name]
        command += [
            "--source",
            "tickets=truth.jsonl",
            "--sink",
            f"out={name}.jsonl",
            "--state",
            f"{name}-state",
        ]
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    try:
        both = [start("one"), start("two")]
        wait_for(lambda: all(len(answered(folder, name)) > 20 for name in ("one", "two")))
        assert set(answered(folder, "one")) == {"big"}

        said = control(folder, "support", "--node", "team", "pin", "small")
        assert "flow support, node team: pin small" in said
        wait_for(lambda: all(answered(folder, name)[-1:] == ["small"] for name in ("one", "two")))

        control(folder, "support", "pause", config="two")
        time.sleep(1.0)  # what was asked is answered by then, on a machine that is not too busy
        counts = [len(answered(folder, name)) for name in ("one", "two")]
        time.sleep(1.0)
        assert [len(answered(folder, name)) for name in ("one", "two")] == counts
        assert all(process.poll() is None for process in both)

        control(folder, "support", "resume")
        wait_for(
            lambda: all(len(answered(folder, n)) > c for n, c in zip(("one", "two"), counts, strict=True))
        )
        control(folder, "support", "pause")
        shown = control(folder, "support", config="two")
        assert "node team: pin small" in shown
        assert "all nodes: paused" in shown
        time.sleep(1.0)

        # Ctrl-C ends what is paused; the next start is paused too, and says so.
        for process in both:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
            assert process.returncode == 130, err
            assert "node 'team': paused, as an operator said" in err
        count = len(answered(folder, "one"))
        again = start("one")
        time.sleep(3.0)
        assert again.poll() is None
        assert len(answered(folder, "one")) == count
        control(folder, "support", "resume", "unpin")
        wait_for(lambda: answered(folder, "one")[-1] == "big")
        again.send_signal(signal.SIGINT)
        _, err = again.communicate(timeout=30)
        assert "node 'team': pin small, as an operator said before" in err
        assert "node 'team': paused, as an operator said before" in err
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.communicate()
    names = ("tem", "target=0.5"), ("team", "target=5")
    assert "did you mean 'team'?" in control(folder, "support", "--node", *names[0], code=2)
    assert "at most 1" in control(folder, "support", "--node", *names[1], code=2)
    assert "Traceback" not in err


class Hearing:
    """A manager on the topics of a prefix."""

    def __init__(self, broker, prefix):
        bus = {"kind": "kafka", "servers": broker.servers, "prefix": prefix}
        price = {"input_cost_per_token": 1e-4, "output_cost_per_token": 1e-4, "backend": "simulated"}
        self.settings = load_settings(
            run={"recording": None, "seed": 1}, models={"big": {"tier": "strongest", **price}}, bus=bus
        )
        opened = open_bus(self.settings.bus, "triage")
        self.manager = LLMManager(self.settings, bus=opened, backends={"big": TestModel("yes")})
        node = NodeSpec("route", Prompt("{q}"), FreeText(), flow="triage", form=Form.direct)
        self.manager.begin_run("triage", nodes=[node])

    @property
    def target(self):
        return self.manager.interfaces["triage", "route"].node.target

    def count(self, name):
        return self.manager.snapshot()["bus"][name]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.manager.close()


def test_hostile_changes_are_counted_and_become_dead_letters(broker):
    prefix = f"t{uuid.uuid4().hex[:8]}"
    good = {"version": 1, "flow": "triage", "node": "", "set": "target", "value": 0.9}
    with Hearing(broker, prefix) as hearing:
        producer = KafkaProducer(bootstrap_servers=broker.servers)
        for message in (
            b"\xff\x00",
            json.dumps(good | {"version": 2}).encode(),
            json.dumps(good | {"value": 1.5}).encode(),
            json.dumps(good | {"flow": "other", "value": 0.1}).encode(),
            b" " * 300_000,
            None,
            json.dumps(good | {"node": "rout"}).encode(),
            json.dumps(good).encode(),
        ):
            producer.send(f"{prefix}.control", message, key=b"k")
        producer.flush(30)
        producer.close()
        wait_for(lambda: hearing.target == 0.9)
        counts = {
            name: hearing.count(name) for name in ("malformed", "unknown_version", "huge", "other_flow")
        }
        assert counts == {"malformed": 3, "unknown_version": 1, "huge": 1, "other_flow": 1}
        assert hearing.count("controls") == 2
    servers, topics = kafka_of(hearing.settings.bus)
    letters = [json.loads(record.value) for record in records_of(servers, topics.dead_letters)]
    assert sorted(letter["reason"] for letter in letters) == ["huge", *["malformed"] * 3, "unknown_version"]
    told = [json.loads(record.value) for record in records_of(servers, topics.decisions)]
    assert [(one["kind"], one["node"]) for one in told] == [("control_refused", "rout"), ("control", "route")]
    assert "did you mean 'route'?" in told[0]["detail"]["why"]


def test_who_comes_later_applies_what_is_in_force_in_order(broker):
    prefix = f"t{uuid.uuid4().hex[:8]}"
    with Hearing(broker, prefix) as first:
        config = first.settings.bus
        write_topic(config, [Change("triage", "target", 0.5, "route"), Change("triage", "target", 0.6)])
        write_topic(config, [Change("triage", "target", 0.7), Change("triage", "budget", 3.0)])
        wait_for(lambda: first.target == 0.7)
        with Hearing(broker, prefix) as second:
            wait_for(lambda: second.target == 0.7)
        found = in_force(read_topic(config, "triage"))
        assert [(change.setting, change.value) for change in found] == [("target", 0.7), ("budget", 3.0)]
        assert all(change.time > 1e9 for change in found)
        with first.manager._shared._servers.admin() as admin:
            described = admin.describe_configs([ConfigResource("TOPIC", f"{prefix}.control")])
        assert "'compact'" in str(described)


def test_a_broker_that_is_not_there_is_said(broker):
    config = load_settings(bus={"kind": "kafka", "servers": "127.0.0.1:1"}).bus
    with pytest.raises(ConfigError, match="cannot be reached"):
        write_topic(config, [Change("triage", "target", 0.5)])


AGENT = """
import chainstream as cs
class Sorter(cs.agent.Agent):
    def __init__(self):
        super().__init__("sorter")
        self.tickets = cs.get_stream(self, "tickets")
        self.out = cs.create_stream(self, "out")
        self.llm = cs.llm.get_model("Text")
        self.count = 0
    def start(self):
        def team(ticket):
            said = self.llm.query(cs.llm.make_prompt("Which team?", ticket["text"]))
            self.count += 1
            return {"id": ticket["id"], "n": self.count, "team": said}
        self.tickets.for_each(team, to_stream=self.out)
"""


def test_an_agent_is_stopped_and_started_over_the_topic(place, broker):
    folder, _ = place
    (folder / "sorter.py").write_text(AGENT)
    command = [*CHAINWAX, "run", "sorter.py", "--config", "one.toml", "--state", "state"]
    command += ["--source", "tickets=truth.jsonl", "--sink", "out=out.jsonl"]
    run = subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def tell(what):
        # Another machine's configuration: it shares the broker with the run, and no file.
        told = [*CHAINWAX, "agents", what, "sorter.py", "sorter", "--config", "two.toml"]
        subprocess.run(told, cwd=folder, env=environment(), check=True, capture_output=True, timeout=60)

    try:
        wait_for(lambda: len(answered(folder, "one")) > 20)
        tell("stop")
        time.sleep(1)
        before = len(answered(folder, "one"))
        assert before < 20_000
        tell("start")
        # Unless the file has gone past it meanwhile, it goes on, and counts on from where it was.
        wait_for(lambda: run.poll() is not None or len(answered(folder, "one")) > before + 20)
    finally:
        run.send_signal(signal.SIGINT)
        run.wait(60)
    numbers = [json.loads(line)["n"] for line in (folder / "out.jsonl").read_text().splitlines()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) < 20_000
