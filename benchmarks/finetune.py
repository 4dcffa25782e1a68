"""A node that writes gets an adapter of the embedded model within the stream: what it is worth and takes.

The node ``fields`` is the demo's: it reads the tickets and writes the product and the order number that they
are about, as JSON. Its strongest model is *simulated*; the embedded model, SmolLM2-135M, is real. People
correct each answer, and the trainer ``lora`` makes the node's own model from the recording of this very run:
the router itself has it trained, proves it and promotes it. Both are asked the same tickets: the base with
instructions and examples, the tuned one with the bare ticket.

A quarter of the phrases that tickets are made of is kept from the stream. Tickets held out in time come after
all others and are made of the stream's phrases; unseen ones of the kept phrases alone. An answer matches
where both fields are right.

    python benchmarks/finetune.py [--items 450] [--asked 60] [--steps 40] [--threads 2] [--seed 1]
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _contract import report, say
from pydantic import BaseModel

from chainwax.flows.demo import make_tickets as demo
from chainwax.router import (
    Feedback,
    FeedbackKind,
    LLMManager,
    NodeSpec,
    Prompt,
    Structured,
    Usage,
    load_settings,
)
from chainwax.router.backends import Health, Reply, Request
from chainwax.router.custom.card import Card
from chainwax.router.custom.lifecycle import Lifecycle
from chainwax.router.custom.proof import answer_of, judged
from chainwax.router.types import Params, Query

ACCURACY = 0.98
"""Of the simulated strongest model."""
TARGET = 0.9
AT_ONCE = 4
KEPT = 4
"""Each phrase whose place in its list leaves 1 when divided by this is kept from the stream."""
SYSTEM = """\
You read the mail of Northlight, a shop for electronics. Copy the name of the product and the number of the
order from the customer's message, and write them as JSON with the keys product and order.
product: the product's name alone, one word, as in Kestrel, Tarn, Moss, Pico, Orbit, Nomad, Slate, Vesper,
Quill, Bolt, Breeze or Wren, whatever the language of the message.
order: the number of the order that the message is about, NW- and five digits; empty where there is none.
Where two are named, it is the one that the customer means, not the one that is closed or fine.
Write the JSON alone."""
EXAMPLES = """\
Vesper|NW-10001|My Vesper lamp flickers since Monday. Order NW-10001. Please advise.
Bolt|NW-20442|I was billed twice for the Bolt watch, ref. NW-20442. Please call me today!
Moss||hi, does the Moss keyboard come in black? thanks a lot
Quill|NW-30125|Wo bleibt mein Quill-Reader? Bestellung NW-30125. Er sollte gestern kommen.
Wren|NW-51210|La souris Wren est cassée, et il me la faut demain. Commande NW-51210.
Pico|NW-61173|No encuentro la factura por la cámara Pico, pedido NW-61173. Un saludo
Tarn|NW-72918|The parcel with the Tarn speaker is late. Not NW-71001, I mean NW-72918.
Nomad||Haben Sie das Nomad-Ladegerät bis Samstag wieder da? Wir fahren weg.
Orbit|NW-83304|Le routeur Orbit redémarre sans cesse. La commande NW-80021 était bien, il s'agit de NW-83304.
Breeze||¿Hay descuento para la aspiradora Breeze si compro dos? Gracias
Kestrel|NW-94420|You promised me a new Kestrel monitor (order NW-94420). I am still waiting.
Slate||Quelle est la différence entre la tablette Slate et celle de l'an dernier ?"""


class Fields(BaseModel):
    """What a technician looks for first."""

    product: str
    order: str


Ticket = tuple[str, Fields]


class Stronger:
    """Answers what is right so often, else with another product."""

    simulated = True
    batch_max = 1

    def __init__(self, right: dict[str, Fields]) -> None:
        self._right = right

    async def start(self) -> int | None:
        """As many as there are."""
        return 64

    async def generate(self, request: Request) -> Reply:
        """The same for the same ticket."""
        text = str(request.query.messages[-1]["content"])
        fields, draw = self._right[text], random.Random(text)
        if draw.random() >= ACCURACY:
            others = [name for name in demo.PRODUCTS if name != fields.product]
            fields = fields.model_copy(update={"product": draw.choice(others)})
        said = fields.model_dump_json()
        read = sum(len(str(m["content"])) for m in request.query.messages)
        return Reply(said, Usage(read // 4, len(said) // 4), simulated=True)

    async def generate_batch(self, requests: Any) -> list[Reply | Exception]:
        """Not used."""
        return [await self.generate(request) for request in requests]

    async def health(self) -> Health:
        """Well."""
        return Health(True)

    async def close(self) -> None:
        """Nothing to close."""


def tickets(seed: int, *, kept: bool) -> Iterator[Ticket]:
    """The demo's tickets without end, all different; of the kept phrases alone, or of all others alone."""
    speech, faults = dict(demo.SPEECH), dict(demo.FAULTS)
    own = {language: _some(said, kept) for language, said in speech.items()}
    own_faults = {product: _part(said, kept) for product, said in faults.items()}
    rng, seen = random.Random(seed), set()
    while True:
        language = rng.choices(list(demo.SHARES), list(demo.SHARES.values()))[0]
        demo.SPEECH.update(own)
        demo.FAULTS.update(own_faults)
        try:
            ticket: Any = demo.make_ticket(language, rng)
        finally:
            demo.SPEECH.update(speech)
            demo.FAULTS.update(faults)
        text, right = ticket["text"], ticket["answers"]
        if text not in seen and 10 <= len(text.split()) <= 60:
            seen.add(text)
            yield text, Fields(**right["fields"])


def _some(said: demo.Speech, kept: bool) -> demo.Speech:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(said):
        value = getattr(said, field.name)
        if field.name != "draft":
            changes[field.name] = (
                {key: _part(phrases, kept) for key, phrases in value.items()}
                if isinstance(value, dict)
                else _part(value, kept)
            )
    return dataclasses.replace(said, **changes)


def _part(phrases: Sequence[Any], kept: bool) -> list[Any]:
    """One part of a list; a phrase that is alone in its list is in both, for tickets cannot be without."""
    part = [phrase for place, phrase in enumerate(phrases) if (place % KEPT == 1) == kept]
    return part or list(phrases)


def p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided exact test of paired answers (McNemar 1947): those where one of the two is right."""
    better = sum(b > a for a, b in zip(first, second, strict=True))
    differ = better + sum(b < a for a, b in zip(first, second, strict=True))
    tail = sum(math.comb(differ, k) for k in range(max(better, differ - better), differ + 1))
    return float(min(1.0, 2 * tail / 2**differ))


class Run:
    """The stream, and the questions put to both models beside it."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args = args
        self._stream = tickets(args.seed, kept=False)
        unseen = tickets(args.seed + 1, kept=True)
        self._unseen = [next(unseen) for _ in range(args.asked)]
        # Drawn before, asked after: nothing of it is in the stream.
        learned = [next(self._stream) for _ in range(args.items + args.most)]
        self._held_out = [next(self._stream) for _ in range(args.asked)]
        self._learned = iter(learned)
        self._right = dict(learned + self._held_out + self._unseen)
        self._spec = NodeSpec(
            "fields",
            Prompt("{text}", system=SYSTEM, examples=_examples()),
            Structured(Fields),
            "support",
            "extract",
            params=Params(max_tokens=64, temperature=0.0),
        )
        self._settings = load_settings(
            None,
            run={"recording": str(folder / "run.db"), "seed": args.seed},
            nodes={"fields": {"custom": "auto", "trainer": "lora", "target": TARGET}},
            models={
                "strong": {
                    "tier": "strongest",
                    "url": "http://127.0.0.1:9/v1",
                    "model": "-",
                    "input_cost_per_token": 2e-6,
                    "output_cost_per_token": 8e-6,
                },
                "small": {
                    "tier": "local",
                    "backend": "llamacpp",
                    "per_hour": 0.04,
                    "engine": {"threads": 1, "slots": 2, "context": 2048},
                },
            },
            custom={
                "folder": str(folder / "models"),
                "least": args.items,
                "held_out": 0.1,
                "minutes": args.minutes,
                "threads": args.threads,
            },
            trainers={"lora": {"steps": args.steps}},
        )
        self._folder = folder
        self._heard: dict[str, dict[str, Any]] = {}
        self._ended = threading.Event()
        self._asked = 0

    def figures(self) -> dict[str, Any]:
        """Stream, train, prove, promote; then ask both."""
        with LLMManager(self._settings, backends={"strong": Stronger(self._right)}) as manager:
            self._manager = manager
            self._listen()
            manager.begin_run("support", nodes=[self._spec])
            self._face = manager.register(self._spec)
            while self._asked < self._args.items:
                self._feed(min(20, self._args.items - self._asked))
            say(f"{self._args.items} tickets answered and corrected; the training begins")
            base = [self._ask("small", part) for part in (self._held_out, self._unseen)]
            said, own = "", self._lifecycle.nodes["fields"]
            while not self._ended.wait(1.0):
                progress = own.progress
                if progress is not None and progress[1] != said:
                    said = progress[1]
                    say(said)
                if "custom_trained" in self._heard and not self._feed(10):
                    break
            if "custom_promoted" not in self._heard:
                why = "; ".join(f"{kind}: {detail.get('why', '')}" for kind, detail in self._heard.items())
                return {"promoted": 0, **_unmeasured(f"no model was promoted ({why})")}
            name = self._heard["custom_promoted"]["model"]
            before = self._served.get(name, 0)
            some = self._feed(50)
            share = (self._served.get(name, 0) - before) / max(some, 1)
            tuned = [self._ask(name, part) for part in (self._held_out, self._unseen)]
            card = next(c for c in self._cards() if c.name == name)
        training = card.figures["training"]
        return {
            "promoted": 1,
            "base_match": base[0].match,
            "base_match_unseen": base[1].match,
            "tuned_match": tuned[0].match,
            "tuned_match_unseen": tuned[1].match,
            "p_value": p_value(base[0].right, tuned[0].right),
            "p_value_unseen": p_value(base[1].right, tuned[1].right),
            "train_cpu_min": training["cpu_minutes"],
            "train_wall_min": training["minutes"],
            "train_memory_mb": training["memory_mb"],
            "train_steps": training["steps"],
            "train_examples": training["examples"],
            "prompt_tokens_base": base[0].tokens,
            "prompt_tokens_tuned": tuned[0].tokens,
            "prompt_token_ratio": tuned[0].tokens / base[0].tokens,
            "seconds_base": base[0].seconds,
            "seconds_tuned": tuned[0].seconds,
            "own_model_share": share,
        }

    @property
    def _lifecycle(self) -> Lifecycle:
        assert self._manager.custom is not None  # the configuration has a [custom]
        return self._manager.custom

    def _cards(self) -> list[Card]:
        return self._lifecycle.nodes["fields"].models.cards()

    def _listen(self) -> None:
        announce = self._manager.announce

        def heard(decision: Any) -> None:
            if decision.kind.startswith("custom_"):
                say(f"{decision.kind} {json.dumps(decision.detail, default=str)}")
                self._heard[decision.kind] = decision.detail
                if decision.kind != "custom_trained":
                    self._ended.set()
            announce(decision)

        self._manager.announce = heard  # type: ignore[method-assign]
        self._served: dict[str, int] = {}

    def _feed(self, count: int) -> int:
        """Put so many tickets through the router, and correct what it answered; how many there were."""
        some = [ticket for ticket, _ in zip(self._learned, range(count), strict=False)]
        queries = []
        for text, _ in some:
            self._asked += 1
            key = f"t-{self._asked}"
            queries.append(self._face.bind({"text": text}, item_key=key, position=f"t:{self._asked}"))
        results: list[Any] = []
        ready = threading.Event()

        def done(_: Any, result: Any) -> None:
            results.append(result)
            if len(results) == len(some):
                ready.set()

        if not some:
            return 0
        self._face.submit(queries, done)
        if not ready.wait(300):
            raise TimeoutError("the tickets are not answered")
        self._manager.run(self._lifecycle.settled())
        wanted = {query.call_id: right for query, (_, right) in zip(queries, some, strict=True)}
        told = []
        for result in results:
            if result.error is not None:
                raise result.error
            self._served[result.arm.model] = self._served.get(result.arm.model, 0) + 1
            right = wanted[result.call_id]
            told.append(
                Feedback(
                    "fields", float(result.value == right), result.call_id, arm=result.arm.key,
                    kind=FeedbackKind.label, source="desk", correction=right.model_dump(),
                )
            )  # fmt: skip
        self._manager.feedback(told)
        self._manager.settle()
        return len(some)

    def _ask(self, model: str, some: Sequence[Ticket]) -> Answers:
        """Ask one model about tickets, beside the stream."""
        instance, answers = self._manager.instances[model], Answers()
        form = self._spec.answer

        async def ask() -> None:
            gate = asyncio.Semaphore(AT_ONCE)

            async def one(number: int, text: str, right: Fields) -> None:
                query = Query(self._spec, f"asked:{model}:{number}", self._spec.prompt.render({"text": text}))
                async with gate:
                    attempt, value, _ = await answer_of(instance, query, {})
                answers.right[number] = 0.0 if value is None else judged(form, value, right)
                answers.read.append(attempt.usage.input)
                answers.took.append(attempt.latency_s)

            answers.right = [0.0] * len(some)
            await asyncio.gather(*(one(n, text, right) for n, (text, right) in enumerate(some)))

        begun = time.monotonic()
        self._manager.run(ask())
        say(f"{model}: {answers.match:.3f} of {len(some)} right in {time.monotonic() - begun:.0f} s")
        return answers


@dataclasses.dataclass
class Answers:
    """What one model made of some tickets."""

    right: list[float] = dataclasses.field(default_factory=list)
    read: list[int] = dataclasses.field(default_factory=list)
    took: list[float] = dataclasses.field(default_factory=list)

    @property
    def match(self) -> float:
        """Share of answers that are right in all fields."""
        return statistics.fmean(self.right)

    @property
    def tokens(self) -> float:
        """Mean tokens of a prompt."""
        return statistics.fmean(self.read)

    @property
    def seconds(self) -> float:
        """Median seconds of a call."""
        return statistics.median(self.took)


def _examples() -> list[tuple[str, str]]:
    rows = (line.split("|") for line in EXAMPLES.splitlines())
    return [(text, Fields(product=product, order=order).model_dump_json()) for product, order, text in rows]


MEASURED = (
    "base_match", "base_match_unseen", "tuned_match", "tuned_match_unseen", "p_value", "p_value_unseen",
    "train_cpu_min", "train_wall_min", "prompt_token_ratio",
)  # fmt: skip


def _unmeasured(why: str) -> dict[str, Any]:
    return dict.fromkeys(MEASURED) | {f"{key}_why": why for key in MEASURED}


def main() -> None:
    """Run it and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--items", type=int, default=450, help="tickets before the training")
    parser.add_argument(
        "--most", type=int, default=600, help="tickets after it, at most, to prove the model on"
    )
    parser.add_argument(
        "--asked", type=int, default=60, help="tickets that both models are asked, of each kind"
    )
    parser.add_argument("--steps", type=int, default=40, help="of the training, at most")
    parser.add_argument("--minutes", type=float, default=20.0, help="that the training may take")
    parser.add_argument("--threads", type=int, default=2, help="of the training")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures = Run(args, Path(folder)).figures()
    report(
        "finetune",
        simulated=["strong"],
        items=args.items,
        asked=args.asked,
        target=TARGET,
        wall_min=(time.monotonic() - begun) / 60,
        **figures,
    )


if __name__ == "__main__":
    main()
