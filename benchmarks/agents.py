"""What a ChainStream agent costs without a model, against the same written in plain Bytewax.

    python benchmarks/agents.py [--items 200000] [--rounds 5]

* ``rate_ratio``: items for a second of CPU through an agent of three listeners, from a file of JSON lines to
  a file of JSON lines, to those of three Bytewax operators between Bytewax's own file source and sink. Both
  in the same run, in turn; the median of the rounds.
* ``rss_mb``: resident memory at its peak, in MiB, with 20 agents on one stream of 100,000 items.
* ``query_s``: seconds from start to end for 80 items through a listener that asks a model, which is
  simulated: it takes 50 ms, and 16 at once, so that 0.25 s is the least. The order of the output is checked.
  The median of the rounds.

The first two ask no model.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _contract import report, say

LISTENERS = """
import chainstream as cs

class Three(cs.agent.Agent):
    def __init__(self, agent_id="three"):
        super().__init__(agent_id)
        self.source = cs.get_stream(self, "readings")
        self.out = cs.create_stream(self, "alarms")

    def start(self):
        def celsius(reading):
            return {"id": reading["id"], "c": (reading["f"] - 32) / 1.8}
        def warm(reading):
            if reading["c"] > 10:
                return reading
        def alarm(reading):
            self.out.add_item({"id": reading["id"], "alarm": round(reading["c"])})
        self.source.for_each(celsius).for_each(warm).for_each(alarm)
"""

ONE = """
import chainstream as cs

class Agent{number}(cs.agent.Agent):
    def __init__(self):
        super().__init__("agent_{number}")
        self.source = cs.get_stream(self, "readings")
        self.out = cs.create_stream(self, "out_{number}")
        self.kept = cs.context.Buffer(maxlen=10)

    def start(self):
        def keep(reading):
            self.kept.append(reading["f"])
            if reading["id"] % 1000 == {number}:
                self.out.add_item({{"mean": sum(self.kept.get_all()) / len(self.kept)}})
        self.source.for_each(keep)
"""


ASKING = """
import chainstream as cs

class Asking(cs.agent.Agent):
    def __init__(self):
        super().__init__("asking")
        self.source = cs.get_stream(self, "readings")
        self.out = cs.create_stream(self, "answers")
        self.llm = cs.llm.get_model("Text")

    def start(self):
        def ask(reading):
            return {"id": reading["id"], "said": self.llm.query(cs.llm.make_prompt(str(reading["f"])))}
        self.source.for_each(ask, to_stream=self.out)
"""


def write_readings(path: Path, items: int) -> None:
    """The stream."""
    with path.open("w", encoding="utf-8") as file:
        for n in range(items):
            file.write(json.dumps({"id": n, "f": n * 7 % 100, "text": "a reading of the sensor on the roof"}))
            file.write("\n")


def run_agents(place: Path, readings: Path, out: Path, sinks: list[str]) -> float:
    """Seconds of CPU that the agents of a place take for a file."""
    from bytewax.testing import run_main

    from chainwax.connectors import open_sink, open_source
    from chainwax.flows.load import load_flow
    from chainwax.router import LLMManager, load_settings

    flow = load_flow(str(place), sources=["readings"], sinks=sinks)
    with LLMManager(load_settings(run={"recording": None})) as manager:
        dataflow = flow.compile(
            {"readings": open_source(str(readings), name="readings")},
            {name: open_sink(str(out / f"{name}.jsonl"), name=name) for name in sinks},
            manager=manager,
        )
        begun = time.process_time()
        run_main(dataflow)
        return time.process_time() - begun


def run_plain(readings: Path, out: Path) -> float:
    """The same in Bytewax's own operators."""
    import bytewax.operators as op
    from bytewax.connectors.files import FileSink, FileSource
    from bytewax.dataflow import Dataflow
    from bytewax.testing import run_main

    flow = Dataflow("plain")
    read = op.map("parse", op.input("readings", flow, FileSource(readings, batch_size=100)), json.loads)
    celsius = op.map("celsius", read, lambda x: {"id": x["id"], "c": (x["f"] - 32) / 1.8})
    warm = op.filter("warm", celsius, lambda x: x["c"] > 10)
    alarm = op.map("alarm", warm, lambda x: {"id": x["id"], "alarm": round(x["c"])})
    op.output("alarms", op.map("dump", alarm, lambda x: ("alarms", json.dumps(x))), FileSink(out))
    begun = time.process_time()
    run_main(flow)
    return time.process_time() - begun


def run_asking() -> float:
    """Seconds that 80 questions of one listener take."""
    from chainwax.flows import run_agent
    from chainwax.flows.testing import TestModel

    arrivals = [("readings", {"id": n, "f": n * 7 % 100}, 0.0) for n in range(80)]
    begun = time.perf_counter()
    found = run_agent(ASKING, arrivals, TestModel("ok", latency=0.05, slots=16))
    took = time.perf_counter() - begun
    if [one["id"] for one in found.outputs["answers"]] != list(range(80)):
        sys.exit("agents: the answers are not in the order of the questions")
    return took


def in_child(*args: str) -> float:
    """A figure of a run in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *args], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"agents: {args[0]} failed with {done.returncode}")
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, folder = args.child[0], Path(args.child[1])
        if what == "three":
            print(run_agents(folder / "three.py", folder / "readings.jsonl", folder, ["alarms"]))
        elif what == "plain":
            print(run_plain(folder / "readings.jsonl", folder / "plain.jsonl"))
        elif what == "asking":
            print(run_asking())
        else:
            run_agents(folder / "many", folder / "many.jsonl", folder, [f"out_{n}" for n in range(20)])
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_readings(folder / "readings.jsonl", args.items)
        write_readings(folder / "many.jsonl", 100_000)
        (folder / "three.py").write_text(LISTENERS)
        (folder / "many").mkdir()
        for number in range(20):
            (folder / "many" / f"agent_{number}.py").write_text(ONE.format(number=number))
        ratios, rates = [], []
        for number in range(args.rounds):
            ours, plain = in_child("--child", "three", name), in_child("--child", "plain", name)
            ratios.append(plain / ours)
            rates.append(args.items / ours)
            say(f"round {number + 1}: agent {args.items / ours:,.0f}/s, plain {args.items / plain:,.0f}/s")
        lines = (folder / "alarms.jsonl").read_text().splitlines()
        if [json.loads(one) for one in lines] != [
            json.loads(one) for one in (folder / "plain.jsonl").read_text().splitlines()
        ]:
            sys.exit("agents: the agent and plain Bytewax gave different outputs")
        rss = in_child("--child", "many", name)
        asking = [in_child("--child", "asking", name) for _ in range(args.rounds)]
        say(f"80 questions: {', '.join(f'{took:.3f} s' for took in asking)}")
    report(
        "agents",
        simulated=["the model of query_s"],
        rate_ratio=statistics.median(ratios),
        items_per_cpu_s=statistics.median(rates),
        rss_mb=rss,
        query_s=statistics.median(asking),
        items=args.items,
        rounds=args.rounds,
    )


if __name__ == "__main__":
    main()
