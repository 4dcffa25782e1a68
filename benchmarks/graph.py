"""A large graph over a long run: whether a call gets dearer, and whether memory grows.

    python benchmarks/graph.py [--items 30000]

A compiled flow of 200 LLM nodes in 20 groups of ten: each item goes to one group, through its ten nodes in
turn, and their answers are scored; 30,000 items are 300,000 calls. Router, queues, HTTP, feedback and the
recording are those of any run. The three models are simulated, by a server in a process of its own.

* ``cpu_growth``: this process's CPU for a call in the last tenth of the calls to one in the first;
  ``cpu_growth_after_start`` is to the second tenth, for in the first all is done for the first time.
* ``machine_growth``: the same of a piece of work that is always the same, done beside it in another process
  twice a second: how much slower the machine itself became between the two.
* ``rss_growth_mb``: growth of resident memory from the end of the first tenth to the highest after it.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from _contract import report, say

from chainwax.router import LLMManager, load_settings

GROUPS, NODES = 20, 10
CHOICES = ["billing", "technical", "other"]
MODELS = {
    "strong": ("strongest", 1e-5, 0.95),
    "standard": ("standard", 1e-6, 0.9),
    "small": ("local", 1e-7, 0.7),
}
WORDS = ["invoice", "parcel", "lamp", "refund", "password", "delivery", "contract", "garden", "train"]


def node_name(group: int, number: int) -> str:
    """The id of a node."""
    return f"g{group:02}_{number}"


def make_items(folder: Path, items: int) -> None:
    """The items, and the right answers that the simulated models draw on."""
    rng = random.Random(1)
    with (folder / "items.jsonl").open("w") as out, (folder / "truth.jsonl").open("w") as truth:
        for at in range(items):
            group = rng.randrange(GROUPS)
            right = {node_name(group, n): rng.choice(CHOICES) for n in range(NODES)}
            text = " ".join(rng.choices(WORDS, k=rng.randrange(10, 60)))
            # What an item carries differs from item to item, as the words of a real stream do.
            item = {"id": f"t{at}", "group": group, "text": f"{text} no. {at}", "right": right}
            out.write(json.dumps(item) + "\n")
            truth.write(json.dumps({"id": f"t{at}", "answers": right}) + "\n")


def models(**simulation: Any) -> dict[str, Any]:
    """The configuration's models."""
    return {
        name: {
            "tier": tier,
            "backend": "simulated",
            "limit": 64,
            "input_cost_per_token": price,
            "output_cost_per_token": 4 * price,
            "simulation": {"accuracy": accuracy, "latency": 0.0, **simulation},
        }
        for name, (tier, price, accuracy) in MODELS.items()
    }


@contextmanager
def simulating(folder: Path) -> Iterator[str]:
    """The base URL of the simulated models' server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lines = []
    for name, model in models(truth="truth.jsonl").items():
        simulation = model.pop("simulation")
        for section, keys in ((f"models.{name}", model), (f"models.{name}.simulation", simulation)):
            lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    (folder / "models.toml").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "chainwax.flows.cli", "simulate"]
    server = subprocess.Popen(
        [*command, "--config", str(folder / "models.toml"), "--serve", str(port)], stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(300):
            if server.poll() is not None:
                sys.exit(f"graph: the simulated models' server ended with {server.returncode}")
            try:
                urllib.request.urlopen(f"{url}/models", timeout=5).close()
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait(10)


def of_group(group: int) -> Callable[[dict[str, Any]], bool]:
    """Whether an item goes to a group."""
    return lambda item: bool(item["group"] == group)


def scored(names: list[str]) -> Callable[[dict[str, Any]], dict[str, bool]]:
    """Of each of a group's nodes, whether its answer was right."""
    return lambda item: {name: item[name] == item["right"][name] for name in names}


def child(url: str, folder: Path, items: int) -> None:
    """The flow itself, in a process of its own."""
    from bytewax.outputs import DynamicSink, StatelessSinkPartition
    from bytewax.testing import run_main

    from chainwax.connectors import InProcessBus, open_source
    from chainwax.flows import Flow

    counted, letters = 0, 0

    class Counting(StatelessSinkPartition[Any]):
        def write_batch(self, batch: list[Any]) -> None:
            nonlocal counted
            counted += len(batch)

    class Out(DynamicSink[Any]):
        def build(self, step_id: str, worker_index: int, worker_count: int) -> Counting:
            return Counting()

    class Refused(StatelessSinkPartition[Any]):
        def write_batch(self, batch: list[Any]) -> None:
            nonlocal letters
            letters += len(batch)

    class Letters(DynamicSink[Any]):
        def build(self, step_id: str, worker_index: int, worker_count: int) -> Refused:
            return Refused()

    flow = Flow("graph")
    source = flow.source("items", fields=["id", "group", "text", "right"])
    sinks: dict[str, Any] = {}
    for group in range(GROUPS):
        stream = source.filter(f"group{group}", of_group(group))
        for n in range(NODES):
            stream = stream.choose(node_name(group, n), f"Question {n}: which team?\n\n{{text}}", CHOICES)
        names = [node_name(group, n) for n in range(NODES)]
        stream = stream.feedback(f"scored{group}", scored(names), about=names)
        stream.sink(f"out{group}")
        sinks[f"out{group}"] = Out()
    run = {"recording": str(folder / "graph.db"), "seed": 1, "max_in_flight": 16}
    with LLMManager(load_settings(run=run, models=models(url=url)), bus=InProcessBus()) as manager:
        manager.begin_run(flow.id, nodes=flow.specs().values())
        items_source = open_source(str(folder / "items.jsonl"), name="items")
        dataflow = flow.compile({"items": items_source}, sinks, dead_letters=Letters(), manager=manager)
        watch = Watch(manager)
        run_main(dataflow)
        watch.stop()
    if counted != items or letters:
        sys.exit(f"{counted} of {items} items came out, {letters} went to the dead letters")
    print(json.dumps(watch.marks))


class Watch:
    """Notes calls answered, CPU seconds and resident MiB of this process, from a thread of its own."""

    def __init__(self, manager: LLMManager) -> None:
        self._manager = manager
        self._over = threading.Event()
        self.marks: list[tuple[int, float, float, float]] = []
        self._note()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Note once more, and end."""
        self._over.set()
        self._thread.join()
        self._note()

    def _run(self) -> None:
        while not self._over.wait(0.1):
            self._note()

    def _note(self) -> None:
        calls = sum(i.router.stats.calls for i in self._manager.interfaces.values())
        self.marks.append((calls, time.process_time(), rss_mb(), time.monotonic()))


class Yardstick:
    """Does the same piece of work again and again, in a thread, and notes when, and what CPU it took."""

    def __init__(self) -> None:
        self._work = {f"key {n}": [n, f"text no. {n}" * 4] for n in range(2000)}
        self._over = threading.Event()
        self._took: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Work no more."""
        self._over.set()
        self._thread.join()

    def growth(self, first: tuple[float, float], last: tuple[float, float]) -> float | None:
        """CPU of the work within one time over that in another, medians; None where there was none."""
        low, high = ([cpu for at, cpu in self._took if t0 <= at < t1] for t0, t1 in (first, last))
        return float(np.median(high) / np.median(low)) if low and high else None

    def _run(self) -> None:
        while not self._over.wait(0.5):
            begun = time.thread_time()
            json.loads(json.dumps(self._work))
            self._took.append((time.monotonic(), time.thread_time() - begun))


def rss_mb() -> float:
    """Resident memory of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


def main() -> None:
    """Run it and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=30_000, help="a multiple of 10")
    items = parser.parse_args().items // 10 * 10
    if items < 10:
        parser.error("--items: at least 10")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_items(folder, items)
        with simulating(folder) as url:
            begun, yardstick = time.monotonic(), Yardstick()
            done = subprocess.run(
                [sys.executable, __file__, "--child", url, name, str(items)],
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            seconds = time.monotonic() - begun
            yardstick.stop()
    if done.returncode:
        sys.exit(f"graph: the flow failed with {done.returncode}")
    calls, cpu, rss, at = np.array(json.loads(done.stdout.splitlines()[-1])).T
    tenths = np.linspace(0, calls[-1], 11)
    ms = 1000 * np.diff(np.interp(tenths, calls, cpu)) / (calls[-1] / 10)
    ends = [float(x) for x in np.interp(tenths, calls, at)]
    machine = yardstick.growth((ends[0], ends[1]), (ends[9], ends[10]))
    after_first = rss[calls >= tenths[1]]
    say("CPU a call by tenth, ms: " + " ".join(f"{x:.3f}" for x in ms))
    say("resident memory by tenth, MB: " + " ".join(f"{x:.0f}" for x in np.interp(tenths, calls, rss)))
    report(
        "graph",
        simulated=list(MODELS),
        nodes=GROUPS * NODES,
        groups=GROUPS,
        items=items,
        calls=int(calls[-1]),
        cpu_growth=float(ms[-1] / ms[0]),
        cpu_growth_after_start=float(ms[-1] / ms[1]),
        machine_growth=machine,
        **({} if machine is not None else {"machine_growth_why": "the run was too short"}),
        cpu_ms_per_call=float(ms.mean()),
        rss_growth_mb=float(after_first.max() - after_first[0]),
        rss_mb=float(rss.max()),
        seconds=seconds,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
