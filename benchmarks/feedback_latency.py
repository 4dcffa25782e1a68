"""From a score in a downstream node of one process to the changed choice in another, over a real broker.

    .venv/bin/python benchmarks/feedback_latency.py [--seconds 30] [--scores 60000]

One process runs a dataflow whose feedback node scores items as a stream brings them, 200 a second; another
holds the router. A hop ends when that router has learned the score and, asked for its choice, has
taken it into account. Both clocks are this machine's. Then the first process says as much as it
can at once (``absorbed_per_s``, the router records all of it meanwhile), and a router that starts late
reads the same topic from its beginning (``caught_up_per_s``). The broker is Apache Kafka (Java 17, Maven).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import bytewax.operators as op
from _broker import broker
from _contract import report, say
from bytewax.dataflow import Dataflow
from bytewax.testing import TestingSink, run_main

from chainwax.connectors import BadRecord, ItemsSource, Record, open_bus
from chainwax.flows.testing import TestModel
from chainwax.operators import Item
from chainwax.operators.feedback import feedback
from chainwax.router import CallRef, Choice, Feedback, LLMManager, NodeSpec, Prompt, Settings, load_settings
from chainwax.router.router import LLMRouter

RATE = 200
FLOW = "bench"
WARM = 200
"""Events at the start that are not counted: connections are made, code is loaded."""


def settings(servers: str, prefix: str, recording: Path | None) -> Settings:
    """Two models, and the bus of that broker."""
    price = {"backend": "simulated", "input_cost_per_token": 1e-5, "output_cost_per_token": 1e-5}
    free = {"backend": "simulated", "input_cost_per_token": 0.0, "output_cost_per_token": 0.0}
    return load_settings(
        run={"recording": recording, "seed": 1},
        models={"big": {"tier": "strongest", **price}, "small": {"tier": "local", **free}},
        bus={"kind": "kafka", "servers": servers, "prefix": prefix},
    )


def manager(servers: str, prefix: str, recording: Path | None = None) -> LLMManager:
    """A process's manager, as `chainwax run` makes it. Its models are never asked."""
    made = settings(servers, prefix, recording)
    models = {"big": TestModel(""), "small": TestModel("")}
    return LLMManager(made, bus=open_bus(made.bus, FLOW), backends=models)


def called(record: Record | BadRecord) -> Item:
    """An item of the stream, with the call that it owes its value to."""
    assert isinstance(record, Record)
    call = CallRef("route", f"call-{record.value}", "small")
    return Item(record.value, record.key, record.position, record.time, (call,))


def downstream(servers: str, prefix: str, seconds: int) -> None:
    """The other process: a stream of items, each scored by a feedback node."""
    count = RATE * seconds
    records = [Record(n, f"item-{n}", f"in:{n}", 1e9 + n / RATE) for n in range(count)]
    with manager(servers, prefix) as own:
        flow = Dataflow("downstream")
        read = op.input("in", flow, ItemsSource(records, speed="1x", batch_size=1))
        items = op.map("items", read, called)
        # Long stretches of good and of bad answers, so that the choice has reason to change.
        scored = feedback("check", items, lambda n: float(n % 1600 < 1200), about=["route"], manager=own)
        op.output("out", scored.oks, TestingSink([]))
        op.output("errs", scored.errs, TestingSink([]))
        run_main(flow)


def flood(servers: str, prefix: str, count: int) -> None:
    """The other process: everything at once."""
    with manager(servers, prefix) as own:
        for start in range(0, count, 500):
            now = time.time()
            own.feedback(
                [
                    Feedback("route", 1.0, f"flood-{n}", f"item-{n}", "small", source="check", time=now)
                    for n in range(start, min(start + 500, count))
                ]
            )


def begin(own: LLMManager) -> LLMRouter:
    """Begin a run; gives back the router of its one node, which knows by then what was said before."""
    own.begin_run(FLOW, nodes=[NodeSpec("route", Prompt("{q}"), Choice(["yes", "no"]), flow=FLOW)])
    return own.interfaces[FLOW, "route"].router


def run_child(*arguments: object) -> subprocess.Popen[bytes]:
    """This program as another process."""
    return subprocess.Popen([sys.executable, __file__, "--child", *map(str, arguments)], stdout=sys.stderr)


def hops(servers: str, folder: Path, seconds: int) -> tuple[list[float], int]:
    """Seconds of each hop, and how often the choice changed."""
    took: list[float] = []
    choices: list[str] = []
    with manager(servers, "latency", folder / "latency.db") as own:
        router = begin(own)

        def told(some: Sequence[Feedback]) -> None:
            # The loop takes its turns in order: by then it has learned them.
            own.loop.call_soon_threadsafe(learned, some)

        def learned(some: Sequence[Feedback]) -> None:
            choices.append(router.policy.choice() or "none")
            now = time.time()
            took.extend(now - one.time for one in some)

        listen(own, told)
        child = run_child("downstream", servers, "latency", seconds)
        if child.wait(seconds + 120):
            sys.exit("the downstream process failed")
        wait_for(took, RATE * seconds)
    changes = sum(a != b for a, b in itertools.pairwise(choices))
    return took[WARM:], changes


def listen(own: LLMManager, told: Callable[[Sequence[Feedback]], None]) -> None:
    """Hear what comes on a manager's bus."""
    assert own._bus is not None
    own._bus.subscribe(told)


def wait_for(seen: Sequence[float], count: int) -> None:
    """Wait until so many are seen."""
    end = time.monotonic() + 60
    while len(seen) < count:
        if time.monotonic() > end:
            sys.exit(f"{len(seen)} of {count} scores came")
        time.sleep(0.01)


def absorbed(servers: str, folder: Path, count: int) -> tuple[float, float]:
    """Scores a second that one router takes in, live and when it catches up."""
    came: list[float] = []
    with manager(servers, "flood", folder / "flood.db") as own:
        router = begin(own)

        def told(some: Sequence[Feedback]) -> None:
            own.loop.call_soon_threadsafe(learned, len(some))

        def learned(count: int) -> None:
            came.extend([time.monotonic()] * count)

        listen(own, told)
        child = run_child("flood", servers, "flood", count)
        wait_for(came, count)
        child.wait(60)
        if router.stats.by_key["small"].scored != count:
            sys.exit(f"{router.stats.by_key['small'].scored} of {count} scores were learned")
    # The first batches come while the other process still starts up.
    start = count // 10
    live = (count - start) / (came[-1] - came[start])
    with manager(servers, "flood") as late:
        begun = time.monotonic()
        router = begin(late)
        seconds = time.monotonic() - begun
        if router.stats.by_key["small"].scored != count:
            sys.exit("a late router has not caught up")
    return live, count / seconds


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=30, help=f"of {RATE} scores each")
    parser.add_argument("--scores", type=int, default=60_000, help="of the flood")
    arguments = parser.parse_args()
    with broker() as kafka, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        took, changes = hops(kafka.servers, folder, arguments.seconds)
        percentiles = statistics.quantiles(took, n=100)
        say(f"{len(took)} hops: p50 {percentiles[49] * 1e3:.1f} ms, p99 {percentiles[98] * 1e3:.1f} ms")
        live, late = absorbed(kafka.servers, folder, arguments.scores)
        say(f"absorbed {live:.0f}/s live, {late:.0f}/s catching up")
    report(
        "feedback_latency",
        simulated=[],
        p50_ms=percentiles[49] * 1e3,
        p99_ms=percentiles[98] * 1e3,
        max_ms=max(took) * 1e3,
        events=len(took),
        events_per_s=RATE,
        choice_changes=changes,
        absorbed_per_s=live,
        caught_up_per_s=late,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        what, servers, prefix, number = sys.argv[2:]
        (downstream if what == "downstream" else flood)(servers, prefix, int(number))
    else:
        main()
