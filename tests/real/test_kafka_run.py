"""``chainwax run`` from topic to topic on a real broker: the command, its death, and the broker's."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid

import pytest
from kafka import KafkaProducer

from chainwax.connectors.kafka import KafkaSource

FLOW = """
import time
from chainwax.flows import Flow
flow = Flow("double")

def double(value):
    time.sleep(0.002)
    return {"n": value["n"], "twice": 2 * value["n"]}

flow.source("in").map("double", double).sink("out")
"""


@pytest.fixture
def place(tmp_path, broker):
    (tmp_path / "double.py").write_text(FLOW)
    name = uuid.uuid4().hex[:8]
    for kind in ("in", "out", "dead"):
        broker.topic(f"{kind}-{name}", partitions=2)
    return tmp_path, name


@pytest.fixture
def produce(broker):
    producer = KafkaProducer(bootstrap_servers=broker.servers, reconnect_backoff_max_ms=1000)

    def send(topic, values):
        for n in values:
            raw = n if isinstance(n, bytes) else json.dumps({"n": n}).encode()
            producer.send(topic, raw, key=str(n).encode())
        producer.flush(60)

    yield send
    producer.close()


def start(place, broker, *more):
    folder, name = place
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CHAINWAX_")}
    # Servers come from the environment where the URI does not name them.
    environment |= {"CHAINWAX_KAFKA_SERVERS": broker.servers, "CHAINWAX_RUN__EPOCH_SECONDS": "0.2"}
    command = [sys.executable, "-m", "chainwax.flows.cli", "run", "double.py", "--json"]
    command += ["--sink", f"out=kafka://out-{name}", "--dead-letters", f"kafka://dead-{name}", *more]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(process, seconds=60):
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def values(broker, topic):
    source = KafkaSource(topic, servers=broker.servers, to="latest", from_="earliest")
    found = []
    for part in source.list_parts():
        partition = source.build_part("read", part, None)
        try:
            while True:
                found += [record.value for record in partition.next_batch()]
        except StopIteration:
            partition.close()
    return found


def wait_for(broker, topic, number, seconds=60):
    end = time.monotonic() + seconds
    while (found := len(values(broker, topic))) < number:
        assert time.monotonic() < end, f"only {found} of {number} came"
        time.sleep(0.1)


def test_topic_to_topic_and_poison_to_a_topic_of_dead_letters(place, broker, produce):
    _, name = place
    produce(f"in-{name}", [*range(100), b"{"])
    process = start(
        place, broker, "--source", f"in=kafka://in-{name}?from=earliest&to=latest", "--workers", "2"
    )
    code, out, err = end(process)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["items"] == 101
    assert sorted(value["twice"] for value in values(broker, f"out-{name}")) == list(range(0, 200, 2))
    (letter,) = values(broker, f"dead-{name}")
    assert letter["position"].startswith(f"in-{name}:")
    assert "malformed JSON" in letter["message"]
    assert "Traceback" not in err


def test_killed_and_started_again_nothing_is_lost(place, broker, produce):
    _, name = place
    produce(f"in-{name}", range(600))
    source = ["--source", f"in=kafka://in-{name}?group=watchers-{name}&batch_size=20", "--state", "state"]
    process = start(place, broker, *source)
    wait_for(broker, f"out-{name}", 100)
    process.kill()
    end(process)
    assert len(values(broker, f"out-{name}")) < 600
    process = start(place, broker, *source)
    wait_for(broker, f"out-{name}", 600)
    while len({value["n"] for value in values(broker, f"out-{name}")}) < 600:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    code, _, err = end(process)
    assert code == 130, err
    assert "going on with run" in err
    found = [value["n"] for value in values(broker, f"out-{name}")]
    assert set(found) == set(range(600))
    # At least once: what the last epoch before the death wrote came again, and not all of it.
    assert len(found) < 900


def test_the_broker_dies_and_comes_back(place, broker, produce):
    _, name = place
    process = start(place, broker, "--source", f"in=kafka://in-{name}")
    feeding = threading.Thread(target=produce, args=(f"in-{name}", range(1500)))
    feeding.start()
    wait_for(broker, f"out-{name}", 50)
    broker.kill()
    time.sleep(1)
    broker.start()
    feeding.join(60)
    assert process.poll() is None
    produce(f"in-{name}", range(1500, 1600))
    wait_for(broker, f"out-{name}", 1600)
    process.send_signal(signal.SIGTERM)
    code, _, err = end(process)
    assert code == 143, err
    # The sink's producer is idempotent: what it sent again was written once.
    assert sorted(value["n"] for value in values(broker, f"out-{name}")) == list(range(1600))


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("kafka://in-{name}x", "has no topic 'in-{name}x': did you mean 'in-{name}'?"),
        ("kafka://in-{name}?servers=127.0.0.1:1", "Kafka at 127.0.0.1:1 cannot be reached"),
        ("kafka://in-{name}?fron=latest", "unknown option 'fron': did you mean 'from'?"),
        ("kafka://in-{name}?from=earlest", "did you mean 'earliest'?"),
    ],
)
def test_a_wrong_uri_is_said_before_anything_runs(place, broker, uri, said):
    _, name = place
    begun = time.monotonic()
    code, _, err = end(start(place, broker, "--source", "in=" + uri.format(name=name)))
    assert code == 2
    assert said.format(name=name) in err.replace("\n", " ")
    assert time.monotonic() - begun < 25
