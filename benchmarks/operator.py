"""How much an LLM operator costs: efficiency in flight, CPU for each item, memory over a long run.

    python benchmarks/operator.py [--items 100000]

* ``efficiency_64``, ``efficiency_256``: items a second through source, operator, router, queue, HTTP and
  recording against a loopback server that answers after 50 ms, as a share of the ideal (in flight / 50 ms).
* ``cpu_ms_per_item``: this process's CPU for an item against a server that answers at once, 64 in flight.
* ``litellm_cpu_ms_per_item``: LiteLLM Router's in the same run, same server, same concurrency, in an
  environment of its own under ``build/peers``. ``cpu_ratio`` is ours to theirs.
* ``rss_growth_mb``: growth of resident memory from item 10,000 to the end.

The server's answers are constant; no model is simulated. The adaptive router has two models to choose
from, and feedback for every item, as a real flow has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _contract import report, say
from _loopback import loopback
from _peers import run_peer


def run_flow(url: str, items: int, in_flight: int, *, choice: bool) -> dict[str, float]:
    """Run the flow in a process of its own, so that nothing of one run is in the next's figures."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__, "--child", url, str(items), str(in_flight), folder, str(int(choice))],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
    if done.returncode:
        sys.exit(f"operator: the flow failed with {done.returncode}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def child(url: str, items: int, in_flight: int, folder: str, choice: bool) -> None:
    """The flow itself: a source, one LLM node, feedback, a sink."""
    import bytewax.operators as op
    from bytewax.dataflow import Dataflow
    from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition
    from bytewax.outputs import DynamicSink, StatelessSinkPartition
    from bytewax.testing import run_main

    import chainwax.operators as lop
    from chainwax.connectors import InProcessBus
    from chainwax.router import LLMManager, load_settings

    begun: list[tuple[float, float]] = []
    rss: list[tuple[int, float]] = []
    counted = 0
    warm = min(2000, items // 5)

    class Part(StatefulSourcePartition[lop.Item, int]):
        def __init__(self) -> None:
            self.at = 0

        def next_batch(self) -> list[lop.Item]:
            if self.at >= items:
                raise StopIteration
            batch = [
                lop.Item({"text": f"ticket number {n}: the invoice is wrong"}, position=f"bench:{n}")
                for n in range(self.at, min(self.at + 32, items))
            ]
            self.at += len(batch)
            return batch

        def snapshot(self) -> int:
            return self.at

    class Source(FixedPartitionedSource[lop.Item, int]):
        def list_parts(self) -> list[str]:
            return ["bench"]

        def build_part(self, step_id: str, for_part: str, resume_state: int | None) -> Part:
            return Part()

    def failed(batch: list[object]) -> None:
        raise RuntimeError(f"the benchmark's server failed: {batch[0]}")

    def count(batch: list[object]) -> None:
        nonlocal counted
        before = counted
        counted += len(batch)
        if not begun and counted >= warm:
            begun.append((time.monotonic(), time.process_time()))
            begun.append((counted, 0.0))
        if counted // 10_000 > before // 10_000:
            rss.append((counted, _rss_mb()))

    class Out(StatelessSinkPartition[object]):
        def __init__(self, write: Callable[[list[object]], None]) -> None:
            self.write = write

        def write_batch(self, batch: list[object]) -> None:
            self.write(batch)

    class Sink(DynamicSink[object]):
        def __init__(self, write: Callable[[list[object]], None]) -> None:
            self.write = write

        def build(self, step_id: str, worker_index: int, worker_count: int) -> Out:
            return Out(self.write)

    model = {"backend": "openai", "url": url, "model": "loopback", "limit": in_flight, "tier": "strongest"}
    models = {"strong": {**model, "input_cost_per_token": 1e-5, "output_cost_per_token": 1e-5}}
    if choice:
        models["small"] = {
            **model,
            "tier": "local",
            "input_cost_per_token": 1e-7,
            "output_cost_per_token": 1e-7,
        }
    # With one model its limit bounds what is in flight, and the operator holds more, so that a call is
    # always ready for a free slot. With a choice the operator itself is the bound.
    held = in_flight if choice else 2 * in_flight
    settings = load_settings(run={"recording": f"{folder}/bench.db", "max_in_flight": held}, models=models)
    with LLMManager(settings, bus=InProcessBus()) as manager:
        manager.begin_run("bench")
        flow = Dataflow("bench")
        source = op.input("source", flow, Source())
        answered = lop.choose(
            "team", source, "Which team should answer?\n\n{text}", ["billing", "technical", "other"],
            flow="bench", manager=manager,
        )  # fmt: skip
        scored = lop.feedback("score", answered.oks, lambda item: 1.0, about=["team"], manager=manager)
        op.output("out", scored.oks, Sink(count))
        op.output("errs", answered.errs, Sink(failed))
        run_main(flow, epoch_interval=None)
        wall, cpu = time.monotonic() - begun[0][0], time.process_time() - begun[0][1]
    if counted != items:
        sys.exit(f"{counted} of {items} items came out")
    measured = items - begun[1][0]
    print(
        json.dumps(
            {
                "rate": measured / wall,
                "cpu_ms": 1000 * cpu / measured,
                "rss_growth_mb": max((mb for _, mb in rss), default=0.0) - (rss[0][1] if rss else 0.0),
            }
        )
    )


def _rss_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


LITELLM = """
import asyncio, json, sys, time
import litellm
litellm.suppress_debug_info = True
from litellm import Router
url, items, in_flight = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
entry = {"model": "openai/loopback", "api_base": url, "api_key": "none"}
# Two deployments to pick from, as ours has two arms.
router = Router(model_list=[{"model_name": "team", "litellm_params": dict(entry)} for _ in range(2)])
async def main():
    turns = iter(range(items))
    async def work():
        for n in turns:
            text = f"Which team should answer?\\n\\nticket number {n}: the invoice is wrong"
            messages = [{"role": "user", "content": text}]
            await router.acompletion(model="team", messages=messages, temperature=0.0)
    warm = iter(range(50))
    for n in warm:
        await router.acompletion(model="team", messages=[{"role": "user", "content": "warm up"}])
    begun = time.process_time()
    await asyncio.gather(*(work() for _ in range(in_flight)))
    print(json.dumps({"cpu_ms": 1000 * (time.process_time() - begun) / items}))
asyncio.run(main())
"""


def run_litellm(url: str, items: int) -> tuple[float | None, str]:
    """LiteLLM Router's CPU for a request, or why it was not measured."""
    figures, why = run_peer("litellm", "litellm", LITELLM, [url, str(items), "64"])
    return None if figures is None else float(figures["cpu_ms"]), why


def main() -> None:
    """Run all and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=100_000, help="items of the long run")
    arguments = parser.parse_args()
    efficiency = {}
    with loopback(0.05) as url:
        for in_flight, items in ((64, 20_000), (256, 50_000)):
            rate = run_flow(url, items, in_flight, choice=False)["rate"]
            efficiency[in_flight] = rate / (in_flight / 0.05)
            say(
                f"{in_flight} in flight × 50 ms: {rate:.0f} items/s, {efficiency[in_flight]:.1%} of the ideal"
            )
    with loopback(0.0) as url:
        # Ours and theirs in turn, so that a slow moment of the machine meets both.
        ours, theirs, why = [], [], ""
        for _ in range(3):
            ours.append(run_flow(url, 20_000, 64, choice=True)["cpu_ms"])
            peer, why = run_litellm(url, 1_000)
            if peer is not None:
                theirs.append(peer)
            say(f"CPU an item: ours {ours[-1]:.3f} ms, LiteLLM Router {peer} ms")
        long = run_flow(url, arguments.items, 64, choice=True)
        say(
            f"{arguments.items} items: memory grew by {long['rss_growth_mb']:.1f} MB, "
            f"{long['cpu_ms']:.3f} ms an item"
        )
    cpu = statistics.median(ours)
    peer = statistics.median(theirs) if theirs else None
    missing = {} if peer else {"litellm_cpu_ms_per_item_why": why, "cpu_ratio_why": why}
    report(
        "operator",
        simulated=[],
        efficiency_64=efficiency[64],
        efficiency_256=efficiency[256],
        cpu_ms_per_item=cpu,
        litellm_cpu_ms_per_item=peer,
        cpu_ratio=cpu / peer if peer else None,
        rss_growth_mb=long["rss_growth_mb"],
        items_per_s=long["rate"],
        items=arguments.items,
        **missing,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6] == "1")
    else:
        main()
