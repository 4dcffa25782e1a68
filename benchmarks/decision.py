"""What a choice costs, and what learning one score costs: the router's own time, without a model.

    python benchmarks/decision.py [--calls 20000]

Each call is a new prompt of 500 characters, from which the router's own features are made; nothing is cached
from one prompt to the next. At 2, 8 and 64 models and 1, 100 and 10,000 nodes a choice (``LLMRouter``'s plan,
features included) and the learning of one score, which comes 50 calls later, are timed one by one; each is
in a process of its own.

* ``choose_us``, ``learn_us``: the median in µs at 8 models and 1 node; ``choose_us_64`` at 64 models.
* ``choose_us_10000``, ``learn_us_10000``: at 8 models and 10,000 nodes.
* ``rss_mb``: resident memory with 10,000 nodes × 8 models, all of which have been used.
* ``all``: each of the nine, by ``MODELSxNODES``.
* ``peers``: LiteLLM Router's pick of a deployment and ParetoBandit's choice and update in the same run, at
  the same numbers of models. ParetoBandit is given its features ready made: its own come from an embedding
  model, whose time is not counted.

No model is asked.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _contract import report, say
from _peers import run_peer

MODELS = (2, 8, 64)
NODES = (1, 100, 10_000)
DELAY = 50


def prompts(seed: int, calls: int) -> Iterator[str]:
    """Texts of 500 characters, each another one."""
    rng = random.Random(seed)
    letters = "bcdfghklmnprstvwaaeeiioou"
    words = ["".join(rng.choices(letters, k=rng.randrange(2, 11))) for _ in range(4000)]
    for number in range(calls):
        text = f"Ticket {number}: which team? "
        while len(text) < 500:
            text += rng.choice(words) + " "
        yield text[:500]


PROMPTS = f"""
import random
from collections.abc import Iterator
{inspect.getsource(prompts)}"""

LITELLM = (
    PROMPTS
    + """
import asyncio, json, statistics, sys, time
import litellm
litellm.suppress_debug_info = True
from litellm import Router
calls = int(sys.argv[1])
async def main(models):
    entry = {"api_base": "http://127.0.0.1:9/v1", "api_key": "none"}
    router = Router(model_list=[
        {"model_name": "team", "litellm_params": {"model": f"openai/m{n}", **entry}} for n in range(models)
    ])
    took = []
    for text in prompts(models, calls):
        messages = [{"role": "user", "content": text}]
        begun = time.perf_counter_ns()
        await router.async_get_available_deployment(model="team", request_kwargs={}, messages=messages)
        took.append(time.perf_counter_ns() - begun)
    return statistics.median(took) / 1000
print(json.dumps({n: asyncio.run(main(n)) for n in (2, 8, 64)}))
"""
)

PARETO = """
import json, random, statistics, sys, time
import numpy as np
from pareto_bandit import BanditRouter
from pareto_bandit.feature_service import FeatureService
calls = int(sys.argv[1])
out = {}
for models in (2, 8, 64):
    rng = np.random.default_rng(models)
    registry = {
        f"m{n}": {"input_cost_per_m": 0.1 * (n + 1), "output_cost_per_m": 0.4 * (n + 1)}
        for n in range(models)
    }
    features = FeatureService.for_precomputed(dimension=25)
    router = BanditRouter.create(model_registry=registry, priors="none", feature_service=features)
    chose, learned, late = [], [], []
    for _ in range(calls):
        x = rng.standard_normal(25)
        begun = time.perf_counter_ns()
        _, log = router.route(x)
        chose.append(time.perf_counter_ns() - begun)
        late.append(log.request_id)
        if len(late) > 50:
            begun = time.perf_counter_ns()
            router.process_feedback(late.pop(0), reward=float(rng.random() < 0.8))
            learned.append(time.perf_counter_ns() - begun)
    out[models] = [statistics.median(chose) / 1000, statistics.median(learned) / 1000]
print(json.dumps(out))
"""


def child(models: int, nodes: int, calls: int) -> None:
    """One number of models and nodes; prints medians in µs and resident memory."""
    from chainwax.router import Feedback, FreeText, LLMManager, NodeSpec, Prompt, Query, load_settings
    from chainwax.router.learning.answers import prompt_text
    from chainwax.router.learning.context import read

    def model(n: int) -> dict[str, Any]:
        tier = "strongest" if n == 0 else "local" if n == models - 1 else "standard"
        price = 1e-5 / 1.5**n
        return {
            "tier": tier,
            "url": "http://127.0.0.1:9/v1",
            "model": "-",
            "input_cost_per_token": price,
            "output_cost_per_token": price,
        }

    settings = load_settings(
        run={"recording": "", "seed": 1}, models={f"m{n}": model(n) for n in range(models)}
    )
    rng = random.Random(models * nodes)
    chose, learned = [], []
    with LLMManager(settings) as manager:
        interfaces = [
            manager.register(NodeSpec(f"node{n}", Prompt("{value}"), FreeText())) for n in range(nodes)
        ]
        late: deque[Feedback] = deque()
        # Every node is used before anything is timed, so that all that it keeps is there.
        for number, text in enumerate(prompts(models, nodes + calls)):
            interface = interfaces[number if number < nodes else rng.randrange(nodes)]
            query = Query(interface.node, str(number), [{"role": "user", "content": text}])
            # What ``LLMRouter.answer`` does before it asks: read the prompt, then plan.
            begun = time.perf_counter_ns()
            query.context = read(prompt_text(query.messages))
            plan = interface.router._plan(query)
            took = time.perf_counter_ns() - begun
            if number >= nodes:
                chose.append(took)
            score = float(rng.random() < 0.8)
            arm, context = plan.arms[0].key, query.context
            late.append(Feedback(interface.node.id, score, call_id=query.call_id, arm=arm, context=context))
            if len(late) > DELAY:
                feedback = late.popleft()
                about = manager.interfaces["flow", feedback.node].router
                begun = time.perf_counter_ns()
                about.learn(feedback)
                if number >= nodes:
                    learned.append(time.perf_counter_ns() - begun)
        rss = _rss_mb()
    figures = [statistics.median(chose) / 1000, statistics.median(learned) / 1000, rss]
    print(json.dumps(figures))


def _rss_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


def main() -> None:
    """Run all and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=20_000)
    calls = parser.parse_args().calls
    ours: dict[tuple[int, int], list[float]] = {}
    for models in MODELS:
        for nodes in NODES:
            done = subprocess.run(
                [sys.executable, __file__, "--child", str(models), str(nodes), str(calls)],
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            if done.returncode:
                sys.exit(f"decision: {models} models and {nodes} nodes failed with {done.returncode}")
            ours[models, nodes] = json.loads(done.stdout.splitlines()[-1])
            chose, learned, rss = ours[models, nodes]
            say(
                f"{models} models, {nodes} nodes: choose {chose:.1f} µs, learn {learned:.1f} µs, {rss:.0f} MB"
            )
    peers: dict[str, Any] = {}
    litellm, why = run_peer("litellm", "litellm", LITELLM, [str(min(calls, 2000))])
    peers["litellm"] = {"why": why} if litellm is None else {"choose_us": litellm}
    pareto, why = run_peer("paretobandit", "paretobandit", PARETO, [str(min(calls, 2000))])
    peers["paretobandit"] = (
        {"why": why}
        if pareto is None
        else {
            "choose_us": {n: figures[0] for n, figures in pareto.items()},
            "learn_us": {n: figures[1] for n, figures in pareto.items()},
        }
    )
    say(f"peers: {peers}")
    report(
        "decision",
        simulated=[],
        calls=calls,
        choose_us=ours[8, 1][0],
        learn_us=ours[8, 1][1],
        choose_us_2=ours[2, 1][0],
        choose_us_64=ours[64, 1][0],
        choose_us_10000=ours[8, 10_000][0],
        learn_us_10000=ours[8, 10_000][1],
        rss_mb=ours[8, 10_000][2],
        all={
            f"{models}x{nodes}": {"choose_us": figures[0], "learn_us": figures[1], "rss_mb": figures[2]}
            for (models, nodes), figures in ours.items()
        },
        peers=peers,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
