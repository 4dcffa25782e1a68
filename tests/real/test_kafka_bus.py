"""The feedback bus over a real broker: every router hears everything, whatever becomes of the broker."""

import json
import random
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from chainwax.connectors import open_bus
from chainwax.flows.testing import TestModel
from chainwax.router import (
    Choice,
    Feedback,
    Form,
    LLMManager,
    NodeSpec,
    Prompt,
    load_settings,
)
from chainwax.router.recording import RecordingReader
from chainwax.router.types import Decision

FLOW = "triage"
NODES = ("route", "answer")
LETTERS = ("feedback", "calls", "decisions", "dead-letters")


def wait_for(what, seconds=20.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to pass in time"
        time.sleep(0.005)


class Cluster:
    """Managers on the bus of one broker, under topics of their own, and a plain producer."""

    def __init__(self, broker, stack, folder):
        self.broker = broker
        self.prefix = f"t{uuid.uuid4().hex[:8]}"
        self._stack = stack
        self._folder = folder
        self._producer = None

    def settings(self, recording=None, **bus):
        bus = {"kind": "kafka", "servers": self.broker.servers, "prefix": self.prefix, **bus}
        return load_settings(
            run={"recording": recording, "seed": 1},
            models={
                "big": {
                    "tier": "strongest",
                    "backend": "simulated",
                    "input_cost_per_token": 1e-4,
                    "output_cost_per_token": 1e-4,
                },
                "small": {
                    "tier": "local",
                    "backend": "simulated",
                    "input_cost_per_token": 0.0,
                    "output_cost_per_token": 0.0,
                },
            },
            bus=bus,
        )

    def unbegun(self):
        """A manager with its nodes, whose run has not begun."""
        settings = self.settings()
        models = {"big": TestModel("yes"), "small": TestModel("yes")}
        manager = LLMManager(settings, bus=open_bus(settings.bus, FLOW), backends=models)
        self._stack.callback(manager.close)
        for node in NODES:
            manager.register(NodeSpec(node, Prompt("{q}"), Choice(["yes", "no"]), flow=FLOW))
        return manager

    def manager(self, flow=FLOW, run=None, recording=None, form=Form.adaptive, **bus):
        settings = self.settings(recording, **bus)
        models = {"big": TestModel("yes"), "small": TestModel("yes")}
        manager = LLMManager(settings, bus=open_bus(settings.bus, flow), backends=models)
        self._stack.callback(manager.close)
        nodes = [NodeSpec(n, Prompt("{q}"), Choice(["yes", "no"]), flow=flow, form=form) for n in NODES]
        manager.begin_run(flow, run, nodes=nodes)
        return manager

    def publisher(self, flow=FLOW):
        bus = open_bus(self.settings().bus, flow)
        self._stack.callback(bus.close)
        return bus

    def send(self, *messages, topic="feedback"):
        """Write records as a program would that knows nothing of chainwax."""
        if self._producer is None:
            self._producer = KafkaProducer(bootstrap_servers=self.broker.servers)
            self._stack.callback(self._producer.close)
        for message in messages:
            raw = message if isinstance(message, bytes) else json.dumps({"version": 1, **message}).encode()
            self._producer.send(f"{self.prefix}.{topic}", raw)
        self._producer.flush()

    def read(self, topic):
        consumer = KafkaConsumer(bootstrap_servers=self.broker.servers, enable_auto_commit=False)
        name = f"{self.prefix}.{topic}"
        parts = [TopicPartition(name, n) for n in sorted(consumer.partitions_for_topic(name))]
        consumer.assign(parts)
        consumer.seek_to_beginning()
        ends, found = consumer.end_offsets(parts), []
        while any(consumer.position(part) < end for part, end in ends.items()):
            for batch in consumer.poll(200).values():
                found += batch
        consumer.close()
        return found


@pytest.fixture
def cluster(broker, tmp_path):
    with ExitStack() as stack:
        yield Cluster(broker, stack, tmp_path)


def router(manager, node="route", flow=FLOW):
    return manager.interfaces[flow, node].router


def knows(manager, flow=FLOW):
    """All that the routers of a manager have learned, to the last bit."""
    return {
        node: (
            router(manager, node, flow).stats.right.tobytes(),
            router(manager, node, flow).stats.wrong.tobytes(),
            [(s.scores, s.scored) for s in router(manager, node, flow).stats.arms],
        )
        for node in NODES
    }


def scored(manager, node="route", flow=FLOW):
    return sum(state.scored for state in router(manager, node, flow).stats.arms)


def bus(manager, name):
    manager.run(_nothing())
    return manager.snapshot()["bus"][name]


async def _nothing():
    pass


def score(n=0, value=1.0, arm="small", node="route", **more):
    return Feedback(node, value, f"call-{n}", f"item-{n}", arm, source="check", time=time.time(), **more)


def ask(manager, key, node="route"):
    """Ask once; gives back (call id, arm)."""
    done = threading.Event()
    seen = []

    def take(query, result):
        seen.append((query.call_id, result.arm.key))
        done.set()

    interface = manager.interfaces[FLOW, node]
    interface.submit([interface.bind({"q": key}, item_key=key, position=key)], take)
    assert done.wait(20)
    return seen[0]


# -- everybody hears everything ---------------------------------------------------------------------


def test_what_one_process_says_all_routers_learn_once(cluster):
    one, other = cluster.manager(), cluster.manager()
    one.feedback([score(n, 0.3) for n in range(10)])
    other.feedback([score(n + 10, 0.9) for n in range(5)])
    wait_for(lambda: scored(one) == scored(other) == 15)
    one.settle()
    assert knows(one) == knows(other)
    assert bus(one, "passed_on") == bus(other, "passed_on") == 15


def test_a_downstream_program_changes_the_choice_of_another_process(cluster):
    manager, program = cluster.manager(), cluster.publisher()
    assert router(manager).snapshot()["choice"] == "big"
    program.publish([score(n, 1.0, "small") for n in range(600)])
    wait_for(lambda: router(manager).snapshot()["choice"] == "small")


def test_feedback_by_call_id_alone_and_by_item_key_from_a_foreign_program(cluster):
    one, other = cluster.manager(), cluster.manager()
    call_id, arm = ask(one, "ticket-7")
    wait_for(lambda: cluster.read("calls"))
    cluster.send({"call_id": call_id, "score": 0.25, "source": "crm"})
    wait_for(lambda: scored(one) == scored(other) == 1)
    cluster.send({"node": "route", "item_key": "ticket-7", "score": 0.75, "source": "crm"})
    wait_for(lambda: bus(one, "revised") == bus(other, "revised") == 1)
    for manager in (one, other):
        state = router(manager).stats.by_key[arm]
        assert (state.scores, state.scored) == (0.75, 1)


def test_feedback_that_comes_before_its_call_waits_for_it(cluster):
    manager = cluster.manager()
    cluster.send({"call_id": "later", "score": 0.5})
    wait_for(lambda: bus(manager, "waiting_for_call") == 1)
    line = {"call_id": "later", "node": "route", "arm": "small"}
    cluster.send({"flow": FLOW, "run": "r", "calls": [line]}, topic="calls")
    wait_for(lambda: scored(manager) == 1)
    assert bus(manager, "waited") == 1
    assert bus(manager, "unknown_call") == 0


def test_late_duplicate_out_of_order_revised_unknown_and_hostile_feedback_is_counted(cluster):
    manager = cluster.manager()
    now = time.time()
    about = {"node": "route", "arm": "small", "call_id": "c", "source": "s"}
    cluster.send({**about, "score": 0.5, "time": now})
    cluster.send({**about, "score": 0.5, "time": now})
    cluster.send({**about, "score": 0.1, "time": now - 1})
    cluster.send({**about, "score": 0.75, "time": now + 0.001})
    cluster.send({**about, "call_id": "d", "score": 0.0, "time": now - 3600})
    cluster.send({"call_id": "nobody", "score": 0.5})
    cluster.send(
        b"",
        b"\xff\xfe",
        b'{"version": 1, "score": 7, "call_id": "c"}',
        b'{"version": 99, "score": 1, "call_id": "c"}',
        b'{"version": 1, "call_id": "c", "score": 1, "correction": ' + b"[" * 9000 + b"]" * 9000 + b"}",
        b'{"version": 1, "call_id": "c", "score": 1, "correction": "' + b"x" * 700_000 + b'"}',
    )
    cluster.send({**about, "call_id": "last", "score": 1.0})
    wait_for(lambda: bus(manager, "unknown_call") == 1)
    got = manager.snapshot()["bus"]
    wanted = {"duplicate": 1, "out_of_order": 1, "revised": 1, "late": 1, "malformed": 4, "huge": 1}
    assert {name: got[name] for name in wanted} == wanted
    assert got["unknown_version"] == 1
    state = router(manager).stats.by_key["small"]
    assert (state.scores, state.scored) == (1.75, 3)
    wait_for(lambda: len(cluster.read("dead-letters")) == 7)
    letters = [json.loads(record.value) for record in cluster.read("dead-letters")]
    assert sorted(one["reason"] for one in letters) == [
        "huge",
        *["malformed"] * 4,
        "unknown_call",
        "unknown_version",
    ]
    assert all(len(one["value"]) <= 1000 and one["version"] == 1 for one in letters)
    assert {one["place"].rpartition(":")[0] for one in letters} == {f"{cluster.prefix}.feedback:0"}


def test_what_nobody_could_read_while_nobody_listened_becomes_one_letter(cluster):
    cluster.manager().close()
    cluster.send(b"{", b'{"version": 2}')
    for _ in range(3):
        late = cluster.manager()
        late.feedback([score()])
        late.settle()
        assert bus(late, "malformed") == bus(late, "unknown_version") == 1
        wait_for(lambda: len(cluster.read("dead-letters")) == 2)
        late.close()
    assert sorted(json.loads(r.value)["reason"] for r in cluster.read("dead-letters")) == [
        "malformed",
        "unknown_version",
    ]


def test_decisions_are_announced(cluster):
    manager = cluster.manager()
    manager.announce(Decision("budget_reached", "route", {"budget_usd": 1.5}))
    manager.settle()
    (record,) = cluster.read("decisions")
    found = json.loads(record.value)
    assert found["time"] > 0
    assert {name: found[name] for name in ("version", "flow", "kind", "node", "detail")} == {
        "version": 1,
        "flow": FLOW,
        "kind": "budget_reached",
        "node": "route",
        "detail": {"budget_usd": 1.5},
    }


# -- who comes late ---------------------------------------------------------------------------------


def test_a_router_that_starts_late_reaches_the_same_state(cluster):
    early, program = cluster.manager(), cluster.publisher()
    draw = random.Random(7)
    calls = [ask(early, f"ticket-{n}", draw.choice(NODES)) for n in range(30)]
    wait_for(lambda: bus(early, "to_write") == 0)
    said = []
    for n in range(1500):
        node, arm = draw.choice(NODES), draw.choice(("big", "small"))
        said.append(score(draw.randrange(900), draw.random(), arm, node))
        if n % 50 == 0:
            cluster.send({"call_id": draw.choice(calls)[0], "score": draw.random(), "source": f"p{n}"})
        if n % 100 == 99:
            program.publish(said)
            said = []
    assert program.flush(20)
    early.settle()
    late = cluster.manager()
    assert knows(late) == knows(early)
    assert scored(late) > 100
    # From here on both hear the same.
    program.publish([score(n, draw.random()) for n in range(200)])
    program.flush(20)
    early.settle()
    late.settle()
    wait_for(lambda: knows(late) == knows(early))
    again = cluster.manager()
    assert knows(again) == knows(early)


def test_several_partitions_are_read_in_the_order_of_their_time(cluster):
    cluster.broker.topic(f"{cluster.prefix}.feedback", partitions=3, message_timestamp_type="LogAppendTime")
    early, program = cluster.manager(), cluster.publisher()
    for _ in range(20):  # revisions of one call stay on one partition
        program.publish([score(n, random.random()) for n in range(30)])
    program.flush(20)
    early.settle()
    late = cluster.manager()
    for mine, others in zip(knows(late).values(), knows(early).values(), strict=True):
        assert np.allclose(np.frombuffer(mine[0]), np.frombuffer(others[0]), rtol=1e-12)
    assert scored(late) == scored(early) == 30


def test_the_recordings_own_fold_is_not_added_to_the_topics(cluster, tmp_path):
    first = cluster.manager(recording=tmp_path / "run.db", run="one")
    first.feedback([score(n, 0.5) for n in range(20)])
    first.settle()
    before = knows(first)
    first.close()
    second = cluster.manager(recording=tmp_path / "run.db", run="two")
    assert knows(second) == before


def test_a_call_that_only_the_recording_remembers(cluster, tmp_path):
    first = cluster.manager(recording=tmp_path / "run.db", run="one")
    call_id, arm = ask(first, "ticket-1")
    first.close()
    with cluster.broker.admin() as admin:
        admin.delete_topics([f"{cluster.prefix}.calls"])
    second = cluster.manager(recording=tmp_path / "run.db", run="two")
    cluster.send({"call_id": call_id, "score": 0.5})
    wait_for(lambda: router(second).stats.by_key[arm].scored == 1)


# -- who is none of our business --------------------------------------------------------------------


def test_two_flows_on_the_same_topics_do_not_disturb_each_other(cluster):
    ours, theirs = cluster.manager(), cluster.manager(flow="other")
    call_id, _ = ask(ours, "ticket-1")
    wait_for(lambda: cluster.read("calls"))
    ours.feedback([score(n) for n in range(10)])
    cluster.send({"call_id": call_id, "score": 0.5})
    wait_for(lambda: scored(ours) == 11)
    wait_for(lambda: bus(theirs, "other_flow") == 11)
    assert scored(theirs, flow="other") == 0
    assert bus(theirs, "unknown_call") == 0


def test_two_prefixes_on_one_broker_do_not_hear_each_other(cluster):
    ours, theirs = cluster.manager(), cluster.manager(prefix=f"{cluster.prefix}-2")
    ours.feedback([score()])
    wait_for(lambda: scored(ours) == 1)
    assert bus(theirs, "received") == 0


# -- what becomes of topics and brokers --------------------------------------------------------------


def test_topics_that_are_not_there_are_made(cluster):
    cluster.manager()
    with cluster.broker.admin() as admin:
        found = {t["name"]: t for t in admin.describe_topics([f"{cluster.prefix}.{n}" for n in LETTERS[:2]])}
    assert all(topic["error_code"] == 0 for topic in found.values())


def test_a_feedback_topic_that_is_deleted_while_running_is_made_anew(cluster):
    manager, program = cluster.manager(), cluster.publisher()
    program.publish([score(n) for n in range(10)])
    wait_for(lambda: scored(manager) == 10)
    with cluster.broker.admin() as admin:
        admin.delete_topics([f"{cluster.prefix}.feedback"])
    program.publish([score(n) for n in range(10, 30)])
    wait_for(lambda: scored(manager) == 30, 60)
    program.publish([score(n) for n in range(30, 40)])
    wait_for(lambda: scored(manager) == 40)


def test_a_broker_that_is_killed_while_feedback_is_published_loses_nothing(cluster, monkeypatch):
    monkeypatch.setattr("chainwax.connectors.kafka_bus._CLOSE_S", 0.5)
    manager, program, doomed = cluster.manager(), cluster.publisher(), cluster.publisher()
    doomed.publish([score(100_000)])
    assert doomed.flush(20)
    published = 0
    over = threading.Event()

    def publish():
        nonlocal published
        while not over.is_set():
            program.publish([score(published, 0.5)])
            published += 1
            over.wait(0.005)

    thread = threading.Thread(target=publish)
    thread.start()
    wait_for(lambda: scored(manager) > 50)
    cluster.broker.kill()
    for n in range(20):  # the run goes on meanwhile
        ask(manager, f"while it is away {n}")
    doomed.publish([score(100_000 + n) for n in range(1, 8)])
    doomed.close()  # what ends now cannot wait for the broker
    assert doomed.snapshot()["lost"] == 7
    cluster.broker.start()
    time.sleep(0.5)
    over.set()
    thread.join()
    assert program.flush(60)
    wait_for(lambda: scored(manager) == published + 1, 60)
    monkeypatch.setattr("chainwax.connectors.kafka_bus._CLOSE_S", 10.0)
    assert bus(manager, "lost") == 0
    assert program.snapshot()["lost"] == 0
    late = cluster.manager()
    assert knows(late) == knows(manager)


# -- from the command line -----------------------------------------------------------------------------


FLOW_FILE = """
from chainwax.flows import Flow

flow = Flow("tickets")
asked = flow.source("in").choose("team", "Which team? {text}", ["billing", "other"])
asked.feedback("check", lambda item: float(item["team"] == "billing")).sink("out")
"""

CONFIG = """
[models.big]
tier = "strongest"
backend = "simulated"
input_cost_per_token = 1e-5
output_cost_per_token = 1e-5
simulation = {{ latency = 0.0 }}

[run]
recording = "{recording}"

[bus]
kind = "kafka"
prefix = "{prefix}"
"""


def test_chainwax_run_on_two_machines_shares_what_was_learned(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("CHAINWAX_KAFKA_SERVERS", cluster.broker.servers)
    (tmp_path / "flow.py").write_text(FLOW_FILE)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"id": n, "text": "x"}) + "\n" for n in range(20)))
    scores = []
    for n in (1, 2):
        recording = tmp_path / f"machine-{n}.db"
        config = tmp_path / f"machine-{n}.toml"
        config.write_text(CONFIG.format(recording=recording, prefix=cluster.prefix))
        command = [sys.executable, "-m", "chainwax.flows.cli", "run", "flow.py", "--config", str(config)]
        command += ["--source", "in=in.jsonl", "--sink", f"out=out-{n}.jsonl", "--run-id", f"run-{n}"]
        subprocess.run(command, check=True, cwd=tmp_path, timeout=60)
        reader = RecordingReader(recording)
        snapshot = reader.snapshot_of(f"run-{n}")
        reader.close()
        assert snapshot["bus"]["lost"] == snapshot["bus"]["to_write"] == 0
        scores.append(snapshot["interfaces"]["team"]["router"]["scores"])
    assert scores == [20, 40]


# -- from another language --------------------------------------------------------------------------


def java():
    """The program that the guide shows."""
    page = Path(__file__).parents[2] / "docs" / "feedback-over-kafka.md"
    return page.read_text(encoding="utf-8").partition("```java\n")[2].partition("```")[0]


def test_thirty_lines_of_java_reach_the_router(cluster, tmp_path):
    assert 0 < len(java().strip().splitlines()) <= 30
    manager = cluster.manager()
    call_id, arm = ask(manager, "ticket-1")
    program = tmp_path / "SendFeedback.java"
    program.write_text(java())
    command = ["java", "-Xmx64m", "-cp", cluster.broker._classpath, str(program)]
    arguments = [cluster.broker.servers, f"{cluster.prefix}.feedback", call_id, "0.25"]
    subprocess.run([*command, *arguments], check=True, capture_output=True, timeout=60)
    wait_for(lambda: scored(manager) == 1)
    assert router(manager).stats.by_key[arm].scores == 0.25


def test_a_saved_state_and_the_tail_are_the_same_as_having_heard_all(cluster, tmp_path):
    throughout = cluster.manager()
    first = cluster.manager(recording=tmp_path / "first.db")
    chance = random.Random(3)
    calls = [{"call_id": f"c{n}", "node": "route", "arm": chance.choice(["big", "small"])} for n in range(60)]

    def score(n, **more):
        return {"call_id": f"c{n}", "score": chance.random(), "metric": "m", "source": "s", **more}

    cluster.send({"flow": FLOW, "run": "r", "calls": calls}, topic="calls")
    cluster.send(*(score(chance.randrange(60)) for _ in range(200)))
    wait_for(lambda: bus(first, "received") == bus(throughout, "received") == 200)
    middle = json.loads(json.dumps(first.save_state()))
    cluster.send(*(score(n) for n in range(5)))
    wait_for(lambda: bus(first, "received") == 205)
    first.close()
    # While it is away: new calls, scores that revise old ones, one whose call comes only then.
    more = [{"call_id": f"c{n}", "node": "answer", "arm": "big"} for n in range(60, 80)]
    cluster.send({"flow": FLOW, "run": "r", "calls": more}, topic="calls")
    cluster.send(*(score(n) for n in range(20, 80)), score(3), b"{")
    wait_for(lambda: bus(throughout, "received") == 266)
    late = cluster.manager(recording=tmp_path / "first.db")
    assert knows(late) == knows(throughout)
    # It read the tail alone.
    assert bus(late, "received") == 61
    # From any moment, and by a process without a recording.
    other = cluster.unbegun()
    assert other.load_state(middle)
    other.begin_run(FLOW)
    assert knows(other) == knows(throughout)
    assert bus(other, "received") == 66
    assert not cluster.unbegun().load_state({**middle, "version": 99})
    # What comes then is taken the same way.
    cluster.send(score(3), score(70))
    wait_for(lambda: bus(late, "received") == 63 and bus(throughout, "received") == 268)
    assert knows(late) == knows(throughout)


def test_a_state_of_another_topic_is_not_taken_up(cluster, tmp_path):
    first = cluster.manager(recording=tmp_path / "first.db")
    cluster.send({"node": "route", "arm": "small", "score": 1.0})
    wait_for(lambda: bus(first, "received") == 1)
    first.close()
    cluster.prefix += "x"
    late = cluster.manager(recording=tmp_path / "first.db")
    assert scored(late) == 0
    with closing(sqlite3.connect(tmp_path / "first.db")) as db:
        db.execute("UPDATE meta SET value = '[7]' WHERE key LIKE 'state:%'")
        db.commit()
    assert scored(cluster.manager(recording=tmp_path / "first.db")) == 0
