"""The same stream through 1 and through 4 processes: how much faster it is, and what learning costs.

    .venv/bin/python benchmarks/cluster.py [--items 20000] [--repeats 2]

Each run is `chainwax run` with `--processes`, 16 calls in flight in each process and no other limit, against
a loopback server that answers after 100 ms. One node chooses among three models: a dear one and a cheap one
that are always right, and a still cheaper one that is always wrong. The router has to find that out: a
feedback node scores each item, and the scores reach all processes. Each run begins with an empty recording.

* ``cluster_cost_ratio``: dollars of all calls with 4 processes, learning included, to those with 1; the mean
  of the repeats, whose seeds differ. ``learning_calls`` are those that other models than the cheap one got.
* ``speedup``: items a second between the first request and the last answer, 4 processes to 1.

The prices and the answers are made up: no model is asked, and none is simulated.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from _contract import report, say
from _loopback import loopback

FLOW = """
from chainwax.flows import Flow

flow = Flow("bench")
team = flow.source("tickets").choose("team", "Which team?\\n\\n{text}", ["billing", "technical"])
team.feedback("right", lambda value: float(value["team"] == "billing"), about=["team"]).sink("out")
"""
CONFIG = """
[run]
max_in_flight = 16
record_items = false
content_keys = false
seed = {seed}

[models.dear]
tier = "strongest"
url = "{url}"
model = "loopback"
limit = 1000
input_cost_per_token = 1e-5
output_cost_per_token = 1e-5

[models.wrong]
tier = "local"
url = "{url}"
model = "loopback-wrong"
limit = 1000
input_cost_per_token = 1e-7
output_cost_per_token = 1e-7

[models.cheap]
tier = "standard"
url = "{url}"
model = "loopback"
limit = 1000
input_cost_per_token = 1e-6
output_cost_per_token = 1e-6
"""


@dataclass
class Run:
    """What one run came to."""

    cost_usd: float
    items_per_s: float
    learning: int


def run(url: str, items: int, processes: int, seed: int) -> Run:
    """One run, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="chainwax-cluster-") as name:
        folder = Path(name)
        (folder / "bench.py").write_text(FLOW)
        (folder / "chainwax.toml").write_text(CONFIG.format(url=url, seed=seed))
        with (folder / "in.jsonl").open("w") as file:
            for n in range(items):
                file.write(json.dumps({"id": f"t{n}", "text": f"ticket {n}: the invoice is wrong"}) + "\n")
        command = [
            sys.executable,
            "-m",
            "chainwax.flows.cli",
            "run",
            "bench.py",
            "--json",
            "--state",
            "state",
        ]
        command += ["--source", "tickets=in.jsonl?batch_size=16", "--sink", "out=out.jsonl"]
        command += ["--processes", str(processes)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("CHAINWAX_")}
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"cluster: chainwax run ended with {done.returncode}")
        result = json.loads(done.stdout.splitlines()[-1])
        with closing(sqlite3.connect(folder / "chainwax.db")) as db:
            ((first, last),) = db.execute("SELECT min(started), max(started + latency_s) FROM attempts")
            ((learning,),) = db.execute("SELECT count(*) FROM attempts WHERE arm <> 'cheap'")
        with (folder / "out.jsonl").open() as file:
            came = sum(1 for _ in file)
    if not result["calls"] == came == items:
        sys.exit(f"cluster: {items} items, {result['calls']} calls, {came} outputs")
    return Run(result["cost_usd"], items / (last - first), learning)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    runs: dict[int, list[Run]] = {1: [], 4: []}
    with loopback(0.1) as url:
        for seed in range(arguments.repeats):
            for processes, done in runs.items():
                one = run(url, arguments.items, processes, seed)
                done.append(one)
                say(
                    f"{processes} processes: ${one.cost_usd:.5f}, {one.items_per_s:.0f} items/s, "
                    f"{one.learning} calls to learn"
                )
    cost = {n: statistics.fmean(one.cost_usd for one in done) for n, done in runs.items()}
    rate = {n: statistics.median(one.items_per_s for one in done) for n, done in runs.items()}
    learning = {n: statistics.fmean(one.learning for one in done) for n, done in runs.items()}
    report(
        "cluster",
        simulated=[],
        cluster_cost_ratio=cost[4] / cost[1],
        speedup=rate[4] / rate[1],
        items_per_s_1=rate[1],
        items_per_s_4=rate[4],
        cost_usd_1=cost[1],
        cost_usd_4=cost[4],
        learning_calls_1=learning[1],
        learning_calls_4=learning[4],
        items=arguments.items,
        repeats=arguments.repeats,
    )


if __name__ == "__main__":
    main()
