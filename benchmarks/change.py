"""What the router does when its models change: one gets worse, cheaper, comes, or goes.

A recording of outcomes is streamed in its order through the real manager and its router, learning included;
scores come ``--feedback-delay`` items late. Each change is a run of its own, and comes at item ``--at``:

* the model that is used most, of those that are not the strongest, answers at 0.7 of its accuracy: of its
  rewards three in ten become 0;
* that model's price falls tenfold (``set_price``);
* the model that is best for its money, kept back until then, appears (``add_model``);
* the model that is used most is withdrawn while calls are in flight on it (``withdraw_model``).

``drop_left_after`` is the number of items until its share of the last 100 calls is half of what it was;
``new_used_after`` until the new model has a fifth of the last 100 calls.

``parallel_share_*`` are of the form ``parallel``: of one node that is asked all items, the shares of calls
that asked more than one model, in the 500 before the model that it uses most got worse and in the 500 after.
Two answers are taken to say the same there where they were worth the same.

    python benchmarks/change.py --recording FILE [--at N] [--target 0.95] [--feedback-delay 50]
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import random
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _contract import report, say

from chainwax.router import (
    CallResult,
    Feedback,
    Form,
    FreeText,
    LLMManager,
    ModelConfig,
    NodeSpec,
    Prompt,
    Usage,
    load_settings,
)
from chainwax.router.backends import Health, Reply, Request

TOKENS = 1000
"""Made-up tokens of a mean call of each model, so that its price is told; a call costs what was recorded."""
WINDOW = 100


class Recorded:
    """Answers with the item and what the answer was worth: answers that were worth the same are the same."""

    simulated = False
    batch_max = 1

    def __init__(
        self, name: str, rows: list[dict[str, Any]], worth: Callable[[str, int], float], price: float
    ) -> None:
        self._name, self._rows, self._worth, self._price = name, rows, worth, price
        self.wait = 0.0

    async def start(self) -> int | None:
        """As many as there are."""
        return 64

    async def generate(self, request: Request) -> Reply:
        """The recorded outcome's cost, as tokens."""
        await asyncio.sleep(self.wait)
        number = int(request.query.item_key)
        row = self._rows[number]
        return Reply(
            f"{row['id']}: {self._worth(self._name, number):.3f}",
            Usage(round(row["outcomes"][self._name]["cost_usd"] / self._price)),
        )

    async def generate_batch(self, requests: Any) -> list[Reply | Exception]:
        """Not used."""
        return [await self.generate(request) for request in requests]

    async def health(self) -> Health:
        """Well."""
        return Health(True)

    async def close(self) -> None:
        """Nothing to close."""


@dataclass
class Run:
    """What came of one stream."""

    served: list[str] = field(default_factory=list)
    """The model of each item."""
    several: list[bool] = field(default_factory=list)
    """Whether more than one was asked."""
    errors: int = 0

    def until(self, at: int, enough: Callable[[list[str]], bool]) -> int | None:
        """Items after ``at`` until the last 100 calls, all of them after it, are enough."""
        for n in range(at + WINDOW, len(self.served) + 1):
            if enough(self.served[n - WINDOW : n]):
                return n - at
        return None


class Stream:
    """A recording, its models by cost, and how it is run."""

    def __init__(self, args: argparse.Namespace) -> None:
        with gzip.open(args.recording, "rt", encoding="utf-8") as file:
            self.rows = [json.loads(line) for line in file]
        models = set.intersection(*(set(row["outcomes"]) for row in self.rows))
        self.cost = {m: sum(r["outcomes"][m]["cost_usd"] for r in self.rows) / len(self.rows) for m in models}
        self.reward = {m: sum(r["outcomes"][m]["reward"] for r in self.rows) / len(self.rows) for m in models}
        self.models = sorted(models, key=lambda m: -self.cost[m])
        self.at = len(self.rows) // 2 if args.at is None else args.at
        self.args = args
        drawn = random.Random(args.seed)
        self.spoiled = [drawn.random() < 0.3 for _ in self.rows]
        """Of each item, whether the model that gets worse is wrong there."""

    def price(self, model: str) -> float:
        """Dollars of one of its tokens."""
        return float(self.cost[model] / TOKENS)

    def config(self, model: str) -> ModelConfig:
        """Tiers are by price: the dearest is the strongest, the rest is standard, the cheapest local."""
        place = self.models.index(model)
        tier = "strongest" if place == 0 else "local" if place == len(self.models) - 1 else "standard"
        return ModelConfig(
            tier=tier,
            url="http://127.0.0.1:9/v1",
            model=model,
            input_cost_per_token=self.price(model),
            output_cost_per_token=0.0,
        )

    def run(
        self,
        models: list[str],
        change: Callable[[LLMManager, dict[str, Recorded]], None] = lambda *_: None,
        worse: str | None = None,
        form: Form = Form.adaptive,
    ) -> Run:
        """Stream it once; ``change`` is called at the item, and ``worse`` gets worse there."""

        def worth(model: str, number: int) -> float:
            if model == worse and number >= self.at and self.spoiled[number]:
                return 0.0
            return float(self.rows[number]["outcomes"][model]["reward"])

        settings = load_settings(
            None,
            run={"recording": "", "seed": self.args.seed},
            defaults={"target": self.args.target},
            models={model: self.config(model).model_dump() for model in models},
        )
        backends = {model: Recorded(model, self.rows, worth, self.price(model)) for model in self.models}
        run = Run()
        late: deque[Feedback] = deque()
        with LLMManager(settings, backends={m: backends[m] for m in models}) as manager:
            for number, row in enumerate(self.rows):
                if number == self.at:
                    change(manager, backends)
                name = "all" if form is Form.parallel else row["node"]
                node = NodeSpec(name, Prompt("{text}"), FreeText(), "change", form=form)
                result = ask(manager, node, row, number)
                if result.error is not None or result.arm is None:
                    run.errors += 1
                    run.served.append("")
                    run.several.append(False)
                    continue
                model = result.arm.model
                run.served.append(model)
                run.several.append(len({a.arm.key for a in result.attempts}) > 1)
                reward = worth(model, number)
                late.append(
                    Feedback(name, reward, result.call_id, str(number), model, context=result.context)
                )
                if len(late) > self.args.feedback_delay:
                    manager.feedback([late.popleft()])
        return run


def ask(manager: LLMManager, node: NodeSpec, row: dict[str, Any], number: int) -> CallResult:
    """One item, to its end."""
    face = manager.register(node)
    got: list[CallResult] = []
    ready = threading.Event()

    def done(_: Any, result: CallResult) -> None:
        got.append(result)
        ready.set()

    face.submit([face.bind({"text": row["prompt"]}, item_key=str(number), position=str(number))], done)
    ready.wait(60)
    return got[0]


def withdrawn(stream: Stream, model: str) -> int:
    """Errors of calls of which some are in flight, and some waiting, when their model is withdrawn."""
    errors = 0
    pending: list[tuple[list[CallResult], threading.Event]] = []

    def change(manager: LLMManager, backends: dict[str, Recorded]) -> None:
        for backend in backends.values():
            backend.wait = 0.05
        nodes = {row["node"] for row in stream.rows}
        for name in sorted(nodes):
            face = manager.register(NodeSpec(name, Prompt("{text}"), FreeText(), "change"))
            own = [i for i, row in enumerate(stream.rows) if row["node"] == name][:200]
            got: list[CallResult] = []
            ready = threading.Event()

            def done(
                _: Any,
                result: CallResult,
                got: list[CallResult] = got,
                ready: threading.Event = ready,
                wanted: int = len(own),
            ) -> None:
                got.append(result)
                if len(got) == wanted:
                    ready.set()

            rows = stream.rows
            queries = [
                face.bind({"text": rows[i]["prompt"]}, item_key=str(i), position=f"burst:{i}") for i in own
            ]
            face.submit(queries, done)
            pending.append((got, ready))
        manager.withdraw_model(model)
        for backend in backends.values():
            backend.wait = 0.0

    run = stream.run(stream.models, change)
    for got, ready in pending:
        ready.wait(60)
        errors += sum(result.error is not None for result in got)
    late_use = run.served[stream.at :].count(model)
    say(f"withdrawn '{model}': {errors + run.errors} errors, used {late_use} times after")
    return errors + run.errors


def main() -> None:
    """Run the changes one by one and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recording", type=Path, required=True)
    parser.add_argument("--at", type=int, default=None, help="the item of the change; half of them")
    parser.add_argument("--target", type=float, default=0.95)
    parser.add_argument("--feedback-delay", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    stream = Stream(parser.parse_args())
    at = stream.at
    figures: dict[str, Any] = {}
    say(f"{len(stream.rows)} items; the change comes at {at}")
    plain = stream.run(stream.models)
    used = Counter(plain.served[max(at - WINDOW * 3, 0) : at])
    others = [model for model, _ in used.most_common() if model != stream.models[0]]
    model = others[0] if others else stream.models[-1]
    share = used[model] / used.total()
    say(f"before it: {dict(used)}")
    worse = stream.run(stream.models, worse=model)
    left = worse.until(at, lambda last: last.count(model) / WINDOW <= share / 2)
    figures["drop_left_after"] = left
    if left is None:
        figures["drop_left_after_why"] = f"'{model}' kept more than half of its share of {share:.2f}"

    def cheaper(manager: LLMManager, _: Any) -> None:
        manager.set_price(model, input_cost_per_token=stream.price(model) / 10)

    cheap = stream.run(stream.models, cheaper)
    tail = slice(at, len(stream.rows))
    figures["cheaper_share_before"] = plain.served[tail].count(model) / len(plain.served[tail])
    figures["cheaper_share_after"] = cheap.served[tail].count(model) / len(cheap.served[tail])
    # Of those that may come, the one that gives most above the cheapest for its price.
    new = max(
        stream.models[1:], key=lambda m: stream.reward[m] / (stream.cost[m] + stream.cost[stream.models[0]])
    )

    def comes(manager: LLMManager, backends: dict[str, Recorded]) -> None:
        manager.add_model(new, stream.config(new), backends[new])

    later = stream.run([m for m in stream.models if m != new], comes)
    came = later.until(at, lambda last: last.count(new) >= WINDOW / 5)
    figures["new_used_after"] = came
    if came is None:
        figures["new_used_after_why"] = f"'{new}' never had a fifth of the last {WINDOW} calls"
    settled = stream.run(stream.models, form=Form.parallel)
    mainly = Counter(settled.served[max(at - WINDOW * 3, 0) : at]).most_common(1)[0][0]
    shaken = stream.run(stream.models, worse=mainly, form=Form.parallel)
    stable, after = settled.several[max(at - 500, 0) : at], shaken.several[at : at + 500]
    say(f"in parallel: '{mainly}' is used most, and gets worse")
    report(
        "change",
        simulated=[],
        items=len(stream.rows),
        at=at,
        target=stream.args.target,
        **figures,
        withdrawn_errors=withdrawn(stream, used.most_common(1)[0][0]),
        parallel_share_stable=sum(stable) / max(len(stable), 1),
        parallel_share_after_change=sum(after) / max(len(after), 1),
    )


if __name__ == "__main__":
    main()
