"""Recorded outcomes as a stream: what real models made of real items, served by the product's own router.

A recording is gzipped (or plain) JSON lines, one an item, in stream order::

    {"id": "a-1", "node": "sort", "prompt": "…",
     "outcomes": {"big": {"reward": 1.0, "cost_usd": 0.001, "input_tokens": 40, "output_tokens": 1,
                          "response": null}}}

``reward`` is in [0, 1]; tokens and ``response`` may be null. Each model becomes an instance with a backend
in memory, each node an interface with its own router. A policy sees the responses that it asked for and the
rewards of the answers that were used, late, and everything that it asks is paid.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import random
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chainwax.router import Feedback, FreeText, LLMManager, NodeSpec, Prompt, Query, Usage, load_settings
from chainwax.router.backends import Health, Reply, Request
from chainwax.router.config import Settings
from chainwax.router.prices import Price

_GUESSED = 4
"""Characters a token, where the tokens of a prompt are not recorded."""


@dataclass(slots=True)
class Outcome:
    """What one model made of one item."""

    reward: float
    cost: float
    """Dollars."""
    tokens: tuple[int, int] | None
    """In and out."""
    response: str


@dataclass(slots=True)
class RecordedItem:
    """One item of the stream."""

    id: str
    node: str
    prompt: str
    outcomes: dict[str, Outcome]


@dataclass
class Recorded:
    """A recording: items whose reward and cost is known of every model."""

    name: str
    items: list[RecordedItem]
    left_out: int = 0
    """Items of which some model's reward or cost is not known."""
    models: list[str] = field(default_factory=list)
    """Dearest first: the order of the tiers."""
    prices: dict[str, float] = field(default_factory=dict)
    """Mean dollars a call: the price list that the router is told."""
    simulated: bool = False

    def __post_init__(self) -> None:
        names = list(self.items[0].outcomes)
        self.prices = {
            name: sum(item.outcomes[name].cost for item in self.items) / len(self.items) for name in names
        }
        self.models = sorted(names, key=lambda name: (-self.prices[name], name))

    @property
    def nodes(self) -> dict[str, int]:
        """Items of each node."""
        counts: dict[str, int] = {}
        for item in self.items:
            counts[item.node] = counts.get(item.node, 0) + 1
        return counts

    def flat(self) -> Recorded:
        """The same, where each call of a model costs the mean of that model's."""
        flat = [
            replace(item, outcomes={m: replace(o, cost=self.prices[m]) for m, o in item.outcomes.items()})
            for item in self.items
        ]
        return replace(self, items=flat)

    def in_order(self, seed: int) -> list[RecordedItem]:
        """Seed 0 is the recording's own order; the others shuffle it."""
        items = list(self.items)
        if seed:
            random.Random(seed).shuffle(items)
        return items


def read_recording(path: Path, only: Sequence[str] = ()) -> Recorded:
    """Read a file, with the models ``only``, or with all. Leaves with a message where it is none."""
    rows: list[dict[str, Any]] = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open() as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict) or not isinstance(row.get("outcomes"), dict):
                        sys.exit(f"{path}:{number}: needs an object with 'outcomes'")
                    rows.append(row)
    except (OSError, EOFError, ValueError) as error:
        sys.exit(f"{path}: {error}")
    names = list(only) or list(dict.fromkeys(name for row in rows for name in row["outcomes"]))
    items, left_out = [], 0
    for number, row in enumerate(rows):
        outcomes = {
            name: _outcome(row["outcomes"].get(name) or {}, f"{row.get('id', number)}/{name}")
            for name in names
        }
        known = {name: outcome for name, outcome in outcomes.items() if outcome is not None}
        if len(known) < len(names) or not names:
            left_out += 1
            continue
        items.append(
            RecordedItem(
                str(row.get("id", number)), str(row.get("node", "node")), str(row.get("prompt", "")), known
            )
        )
    if not items:
        sys.exit(f"{path}: no item has a reward and a cost of every model ({', '.join(names) or 'none'})")
    return Recorded(path.name.partition(".")[0], items, left_out)


def _outcome(row: Mapping[str, Any], which: str) -> Outcome | None:
    reward, cost = row.get("reward"), row.get("cost_usd")
    for number in (reward, cost):
        if not isinstance(number, int | float) or not math.isfinite(number) or number < 0:
            return None
    assert reward is not None
    assert cost is not None
    if reward > 1:
        return None
    sent, made, response = row.get("input_tokens"), row.get("output_tokens"), row.get("response")
    if not isinstance(response, str):
        # Nothing can be read off it, and two models never agree.
        response = "answer " + blake2b(which.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    tokens = (sent, made) if isinstance(sent, int) and isinstance(made, int) else None
    return Outcome(float(reward), float(cost), tokens, response)


def synthetic(items: int = 1500, seed: int = 7) -> Recorded:
    """The project's own small recording: three made-up models at four nodes that differ in how hard they are.

    A word of the prompt says how hard the item is, and an answer that is not sure of itself is mostly wrong,
    so that there is something to be learned.
    """
    rng = random.Random(seed)
    models = {"large": (2.5e-6, 1e-5, 0.9), "medium": (4e-7, 1.6e-6, 0.6), "small": (5e-8, 2e-7, 0.3)}
    ease = {"language": 0.6, "team": 0.3, "mood": 0.1, "fields": -0.1}
    words = ["invoice", "parcel", "lamp", "refund", "password", "delivery", "contract", "colour", "battery"]
    made = []
    for number in range(items):
        node = rng.choice(list(ease))
        hard = rng.random() < 0.4
        text = " ".join(rng.choices(words, k=rng.randrange(8, 60)))
        prompt = f"{node}: {text} {'although nevertheless' if hard else 'please'}"
        outcomes = {}
        luck = rng.random()
        for model, (sent_price, made_price, skill) in models.items():
            chance = min(max(skill + ease[node] - (0.25 if hard else 0.0) + 0.2, 0.02), 0.98)
            right = 0.6 * luck + 0.4 * rng.random() < chance
            sure = rng.random() < (0.9 if right else 0.25)
            response = f"{rng.choice(words)} {rng.choice(words)}" + ("" if sure else ", but perhaps not")
            sent, out = len(prompt) // _GUESSED, 20 + 5 * len(response.split())
            cost = sent * sent_price + out * made_price
            outcomes[model] = Outcome(float(right), cost, (sent, out), response)
        made.append(RecordedItem(f"synthetic-{number:05}", node, prompt, outcomes))
    return Recorded("synthetic", made, simulated=True)


@dataclass(slots=True)
class _Charged(Usage):
    dollars: float = 0.0
    """What the answer cost, as it is recorded."""


class _Backend:
    """One model of the recording."""

    simulated = False
    batch_max = 1

    def __init__(self, model: str) -> None:
        self.model = model
        self.ledger = Ledger([], [])

    async def start(self) -> int | None:
        return None

    async def generate(self, request: Request) -> Reply:
        at = int(request.query.position)
        outcome = self.ledger.items[at].outcomes[self.model]
        self.ledger.paid[at] += outcome.cost
        self.ledger.asked[self.model][at] = True
        sent, made = outcome.tokens or (len(self.ledger.items[at].prompt) // _GUESSED + 1, 1)
        return Reply(outcome.response, _Charged(sent, made, dollars=outcome.cost))

    async def generate_batch(self, requests: Sequence[Request]) -> list[Reply | Exception]:
        return [await self.generate(request) for request in requests]

    async def health(self) -> Health:
        return Health(True)

    async def close(self) -> None:
        pass


class Ledger:
    """What was asked, paid and gained at each item, shape (items,) each."""

    def __init__(self, items: Sequence[RecordedItem], models: Sequence[str]) -> None:
        self.items = items
        self.paid: NDArray[np.float64] = np.zeros(len(items))
        """Dollars."""
        self.gained: NDArray[np.float64] = np.zeros(len(items))
        """The reward of the answer that was used; 0 without one."""
        self.asked = {model: np.zeros(len(items), dtype=bool) for model in models}
        self.used: list[str] = [""] * len(items)
        """The model whose answer was used."""


def settings_for(
    recorded: Recorded, seed: int, defaults: Mapping[str, Any], nodes: Mapping[str, Any] = {}
) -> Settings:
    """A configuration with the recording's models: the dearest is the strongest tier, the cheapest local."""
    last = len(recorded.models) - 1
    tiers = ["strongest", *["standard"] * (last - 1), "local"]
    models = {
        name: {
            "tier": tiers[index],
            "url": "http://127.0.0.1:9/v1",
            "model": "recorded",
            "limit": 64,
            "input_cost_per_token": 0.0,
            "output_cost_per_token": 0.0,
        }
        for index, name in enumerate(recorded.models)
    }
    return load_settings(
        run={"recording": "", "seed": seed}, models=models, defaults=dict(defaults), nodes=dict(nodes)
    )


def _price(recorded: Recorded, model: str) -> Price:
    """What is recorded is charged; beforehand the mean price is told, of a token where tokens are known."""
    outcomes = [item.outcomes[model] for item in recorded.items]
    tokens = sum(sum(o.tokens) for o in outcomes if o.tokens is not None)
    known = tokens > 0 and all(o.tokens is not None for o in outcomes)
    each = sum(o.cost for o in outcomes) / (tokens if known else len(outcomes))

    def dollars(usage: Usage) -> float:
        if isinstance(usage, _Charged):
            return usage.dollars
        return each * (usage.input + usage.output) if known else each

    return Price(tiered=dollars, source="recording")


def stream(
    recorded: Recorded,
    settings: Settings,
    *,
    seed: int = 0,
    delay: int = 50,
    share: float = 1.0,
    warm: Recorded | None = None,
) -> Ledger:
    """Serve a recording once, in the order of ``seed``, and learn meanwhile.

    The score of an item comes before the item ``delay`` + 1 later is asked, for a ``share`` of the items
    that depends on the seed alone. ``warm`` is served before, and is not in the ledger.
    """
    backends = {model: _Backend(model) for model in recorded.models}
    with LLMManager(settings, backends=backends) as manager:
        for model, instance in manager.instances.items():
            instance.price = _price(recorded, model)
        for stage in [recorded] if warm is None else [warm, recorded]:
            ledger = Ledger(stage.in_order(seed), recorded.models)
            for backend in backends.values():
                backend.ledger = ledger
            named = "warm" if stage is warm else "item"
            manager.run(_serve(manager, ledger, named, random.Random(f"{named}/{seed}"), delay, share))
    return ledger


async def _serve(
    manager: LLMManager, ledger: Ledger, named: str, rng: random.Random, delay: int, share: float
) -> None:
    late: deque[tuple[int, Feedback]] = deque()
    for at, item in enumerate(ledger.items):
        due = []
        while late and late[0][0] < at:
            due.append(late.popleft()[1])
        if due:
            manager.feedback(due)
            await asyncio.sleep(0)  # it is taken up by the loop before this goes on
        interface = manager.register(NodeSpec(item.node, Prompt("{value}"), FreeText()))
        messages = [{"role": "user", "content": item.prompt}]
        query = Query(interface.node, f"{named}-{at}", messages, item.id, str(at))
        result = await interface.router.answer(query)
        await interface.router.finish()  # what is asked in the shadow belongs to its item
        known = rng.random() < share
        if result.arm is None:
            continue
        outcome = item.outcomes[result.arm.model]
        ledger.gained[at] = outcome.reward
        ledger.used[at] = result.arm.model
        if known:
            late.append(
                (
                    at + delay,
                    Feedback(
                        item.node,
                        outcome.reward,
                        call_id=query.call_id,
                        item_key=item.id,
                        arm=result.arm.key,
                        source="recording",
                        context=result.context,
                    ),
                )
            )
    manager.feedback([feedback for _, feedback in late])
    await asyncio.sleep(0)
