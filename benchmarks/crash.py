"""Killed with -9 again and again: what is lost, what is paid for twice, what a consumer sees twice.

    .venv/bin/python benchmarks/crash.py [--items 20000] [--kills 25] [--seed N]

``chainwax run --processes 3`` reads a topic, asks an LLM node and then another, and writes a topic in
transactions. At moments that are drawn over the whole run one of the three processes is killed with -9; the
topic that is read has one partition, so that one of the three is the source's. The broker is Apache Kafka
(Java 17, Maven). The models are a loopback server that takes 5 to 50 ms, answers always the same, and
writes down when it was asked what: each request is taken to be paid for.

* ``lost``: items that are neither in the topic nor among the dead letters.
* ``duplicates_read_committed``: records beyond the first of an item, as a consumer with
  ``isolation_level=read_committed`` sees them at the end.
* ``paid_twice``: requests that came after the response to the same call was seen in the recording, which is
  looked at five times a second and before the flow can have been started again.
* ``resent``: all other requests beyond the first of a call: its response was not in the recording yet.
* ``resent_bound``: what was in flight at the kills. At each, once the killed process is gone: the calls that
  the server was asked by then, in any process, less those whose response is in the recording.
* ``items_per_s`` is over everything, the kills and all that begins again with them included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from contextlib import closing
from pathlib import Path
from typing import Any

from _broker import broker
from _contract import report, say
from _loopback import listening
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

FLOW = """
from chainwax.flows import Flow
flow = Flow("crash")
tickets = flow.source("tickets")
team = tickets.choose("team", "Which team?\\n\\n{text}", ["billing", "technical"])
team.query("draft", "Answer for {team}: {text}").sink("drafts")
"""
PROCESSES = 3
NODES = 2
SECONDS = 540
"""After so long it is given up."""


class Paid:
    """What the server was asked, and when."""

    def __init__(self) -> None:
        self.asked: defaultdict[str, list[float]] = defaultdict(list)
        self._chance = random.Random(1)

    def heard(self, body: bytes) -> float:
        """A request; how long it takes."""
        self.asked[json.loads(body)["messages"][-1]["content"]].append(time.monotonic())
        return self._chance.uniform(0.005, 0.05)


class Recorded:
    """The calls whose response is in the recording, by prompt, and when each was seen to be there."""

    def __init__(self, path: Path) -> None:
        self.seen: dict[str, float] = {}
        self._path = path
        self._row = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_again, daemon=True)
        self._thread.start()

    def look(self) -> set[str]:
        """All that are there now."""
        with self._lock:
            if self._path.exists():
                sql = "SELECT rowid, messages FROM calls WHERE status = 'ok' AND rowid > ? ORDER BY rowid"
                with closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True, timeout=30)) as db:
                    try:
                        rows = db.execute(sql, (self._row,)).fetchall()
                    except sqlite3.OperationalError:  # its tables are not made yet
                        rows = []
                now = time.monotonic()
                for self._row, messages in rows:
                    self.seen.setdefault(json.loads(messages)[-1]["content"], now)
            return set(self.seen)

    def _look_again(self) -> None:
        while not self._over.wait(0.2):
            self.look()

    def close(self) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join()


def prepare(folder: Path, url: str, servers: str, items: int) -> None:
    """The flow, its configuration, and the topic that it reads."""
    (folder / "crash.py").write_text(FLOW)
    (folder / "chainwax.toml").write_text(
        f"""
[run]
epoch_seconds = 1
max_in_flight = 32
[models.loopback]
tier = "standard"
url = "{url}"
model = "loopback"
limit = 48
retries = 0
input_cost_per_token = 1e-6
output_cost_per_token = 1e-6
"""
    )
    producer = KafkaProducer(bootstrap_servers=servers, linger_ms=50)
    for n in range(items):
        producer.send("tickets", json.dumps({"n": n, "text": f"ticket {n}"}).encode(), key=b"%d" % n)
    producer.flush(60)
    producer.close()


def start(folder: Path, servers: str) -> subprocess.Popen[bytes]:
    """The flow, as a person starts it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CHAINWAX_")}
    command = [sys.executable, "-m", "chainwax.flows.cli", "run", "crash.py", "--json"]
    command += ["--source", "tickets=kafka://tickets?from=earliest&to=latest&batch_size=100"]
    command += ["--sink", "drafts=kafka://drafts?transactional_id=bench", "--state", "state"]
    command += ["--dead-letters", "kafka://dead?transactional_id=bench", "--processes", str(PROCESSES)]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment | {"CHAINWAX_KAFKA_SERVERS": servers},
        stdout=subprocess.PIPE,
        stderr=sys.stderr,
    )


def children(process: subprocess.Popen[bytes]) -> list[int]:
    """The processes of the run, in their order."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def kill_all_along(
    process: subprocess.Popen[bytes], paid: Paid, recorded: Recorded, plan: list[int], chance: random.Random
) -> tuple[int, int]:
    """Kill when so many calls were asked for; gives back the kills and what was in flight at them."""
    kills = in_flight = 0
    victims: Counter[int] = Counter()
    for asked in plan:
        while len(paid.asked) < asked and process.poll() is None:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.3))
        while len(alive := children(process) if process.poll() is None else []) < PROCESSES:
            if process.poll() is not None:
                say(f"the run has ended after {kills} of {len(plan)} kills")
                return kills, in_flight
            time.sleep(0.01)
        victim = chance.randrange(PROCESSES)
        os.kill(alive[victim], signal.SIGKILL)
        while alive[victim] in children(process):
            time.sleep(0.002)
        time.sleep(0.02)  # what it had sent is on its way through the loopback
        known = recorded.look()
        held = len(paid.asked.copy().keys() - known)
        kills += 1
        in_flight += held
        victims[victim] += 1
        say(f"kill {kills}: process {victim + 1}, {held} in flight, {len(paid.asked)} calls so far")
    say(f"killed: {', '.join(f'process {n + 1} {count} times' for n, count in sorted(victims.items()))}")
    return kills, in_flight


def values(servers: str, topic: str) -> list[Any]:
    """What a consumer sees that reads what is committed."""
    consumer = KafkaConsumer(
        bootstrap_servers=servers, enable_auto_commit=False, isolation_level="read_committed"
    )
    parts = [TopicPartition(topic, n) for n in consumer.partitions_for_topic(topic) or ()]
    consumer.assign(parts)
    consumer.seek_to_beginning()
    ends, found = consumer.end_offsets(parts), []
    while any(consumer.position(part) < end for part, end in ends.items()):
        for records in consumer.poll(200).values():
            found += [json.loads(record.value) for record in records]
    consumer.close()
    return found


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    items: int = arguments.items
    say(f"seed {arguments.seed}")
    chance = random.Random(arguments.seed)
    # Not among the last calls, where the run could be over before the signal comes.
    plan = sorted(chance.randrange(1, int(NODES * items * 0.97)) for _ in range(arguments.kills))
    paid = Paid()
    with (
        broker() as kafka,
        listening(paid.heard) as url,
        tempfile.TemporaryDirectory(prefix="chainwax-crash-") as name,
    ):
        folder = Path(name)
        for topic, partitions in (("tickets", 1), ("drafts", 6), ("dead", 1)):
            kafka.topic(topic, partitions=partitions)
        prepare(folder, url, kafka.servers, items)
        recorded = Recorded(folder / "chainwax.db")
        begun = time.monotonic()
        process = start(folder, kafka.servers)
        watchdog = threading.Timer(SECONDS, process.kill)
        watchdog.start()
        kills, bound = kill_all_along(process, paid, recorded, plan, chance)
        out, _ = process.communicate()
        watchdog.cancel()
        seconds = time.monotonic() - begun
        recorded.close()
        if process.returncode:
            sys.exit(f"crash: the run ended with {process.returncode} after {seconds:.0f} s")
        said = json.loads(out.splitlines()[-1])
        drafts = Counter(value["n"] for value in values(kafka.servers, "drafts"))
        letters = {letter["item"]["n"] for letter in values(kafka.servers, "dead")}
    twice = resent = 0
    for prompt, times in paid.asked.items():
        durable = recorded.seen.get(prompt, float("inf"))
        late = sum(when > durable for when in times[1:])
        twice += late
        resent += len(times) - 1 - late
    report(
        "crash",
        simulated=["loopback"],
        seed=arguments.seed,
        items=items,
        kills=kills,
        lost=items - len(drafts.keys() | letters),
        duplicates_read_committed=drafts.total() - len(drafts),
        paid_twice=twice,
        resent=resent,
        resent_bound=bound,
        dead_letters=len(letters),
        requests=sum(map(len, paid.asked.values())),
        calls=said["calls"],
        seconds=seconds,
        items_per_s=items / seconds,
    )


if __name__ == "__main__":
    main()
