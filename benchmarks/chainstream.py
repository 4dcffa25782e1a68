"""ChainStream agents under the router, against the strongest model and random mixes at equal cost.

The agents of benchmarks/chainstream_agents/ run as they are, as one compiled flow, over seven labelled
streams (benchmarks/_streams.py). It is the product's own evaluation (:mod:`chainwax.flows.evaluate`): one run
for each model alone, one with the best model for each node in hindsight, one with the router in the form
adaptive, which begins knowing nothing, pays for what it tries, and hears of a label 50 answers of a node
later.

    python benchmarks/chainstream.py [--items 3000] [--seed 1] [--target 0.99] [--plot FILE.png]

* ``accuracy_to_strongest``: right answers of the router's run as a share of those of the strongest model's.
* ``cost_to_strongest``, ``cost_to_cheapest``: its cost over theirs, exploration included.
* ``hull_margin``: its accuracy less that of the best random mix of fixed models that costs as much.

All three models are simulated; how right they are at each node is stated below.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path

from _contract import report, say
from _streams import STREAMS, write_streams
from rich.console import Console

from chainwax.flows.evaluate import FileLabels, evaluate
from chainwax.flows.evaluate.evaluation import BEST_FIXED, CHEAPEST, MIX, ROUTER
from chainwax.flows.evaluate.plot import plot_evaluation
from chainwax.flows.evaluate.show import print_evaluation
from chainwax.flows.evaluate.variants import Stream
from chainwax.flows.load import load_flow
from chainwax.router import Settings, load_settings

AGENTS = Path(__file__).parent / "chainstream_agents"

# How right the models are: (strongest, standard, local).
EASY = (0.98, 0.98, 0.975)
"""A word or two in the text tell."""
PLAIN = (0.97, 0.97, 0.88)
"""A sentence has to be understood."""
FINE = (0.96, 0.955, 0.75)
"""Kinds have to be told apart, or something is to be written."""
HARD = (0.95, 0.83, 0.60)
"""Where a cheaper model shows."""

NODES = {
    "mail_triage-is_urgent": EASY,
    "mail_triage-team": PLAIN,
    "mail_orders-order": PLAIN,
    "urgent_digest-digest": HARD,
    "airline_sentiment-sentiment": HARD,
    "airline_sentiment-airline": EASY,
    "delay_watch-is_delay": EASY,
    "news_topics-topic": PLAIN,
    "market_moves-is_business": EASY,
    "market_moves-move": HARD,
    "spam_filter-is_clean": EASY,
    "expenses-amount": FINE,
    "paper_radar-is_learning": PLAIN,
    "paper_radar-stage": HARD,
    "paper_fields-field": PLAIN,
    "review_stars-stars": FINE,
    "complaints-is_complaint": EASY,
    "complaints-reply": HARD,
    "plans-is_plan": PLAIN,
    "plans-place": EASY,
    "moods-mood": FINE,
}
# Dollars for a million tokens, in and out: about what three generations of models cost.
MODELS = {
    "large": ("strongest", 2.5, 10.0),
    "medium": ("standard", 0.15, 0.6),
    "small": ("local", 0.02, 0.04),
}


def settings_for(labels: Path, target: float, seed: int) -> Settings:
    """The three simulated models, whose mistakes fall on the same items more often than by chance."""
    return load_settings(
        run={"seed": seed, "max_in_flight": 32},
        defaults={"form": "adaptive", "target": target},
        models={
            name: {
                "tier": tier,
                "backend": "simulated",
                "limit": 32,
                "input_cost_per_token": price_in / 1e6,
                "output_cost_per_token": price_out / 1e6,
                "simulation": {
                    "truth": labels,
                    "latency": 0.0,
                    "correlation": 0.7,
                    "seed": seed,
                    "accuracy": {node: stated[at] for node, stated in NODES.items()},
                },
            }
            for at, (name, (tier, price_in, price_out)) in enumerate(MODELS.items())
        },
    )


def main() -> None:
    """Run all routings and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--items", type=int, default=3000, help="of each stream")
    parser.add_argument("--seed", type=int, default=1, help="of the streams, the models and the router")
    parser.add_argument("--target", type=float, default=0.99)
    parser.add_argument("--late", type=int, default=50, help="answers of a node until a label is heard of")
    parser.add_argument("--plot", type=Path, default=None)
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # an answer that is no number is the agent's dead letter, and scored
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chainwax-chainstream-") as folder:
        files, labels = write_streams(Path(folder), args.items, args.seed)
        stream = Stream(
            load=lambda: load_flow(str(AGENTS), sources=files),
            settings=settings_for(labels, args.target, args.seed),
            sources={name: str(file) for name, file in files.items()},
            recording=Path(folder) / "evaluation.db",
            labels=FileLabels(labels),
            late=args.late,
        )
        found = evaluate(stream, Console(stderr=True, width=120))
    print_evaluation(found, Console(stderr=True, width=140))
    if args.plot is not None:
        plot_evaluation(found, args.plot)
    router, cheapest, best, mix = (found.row(name) for name in (ROUTER, CHEAPEST, BEST_FIXED, MIX))
    say(f"{time.monotonic() - begun:.0f} s")
    report(
        "chainstream",
        simulated=list(found.simulated),
        accuracy_to_strongest=router.to_strongest.value,
        accuracy_to_strongest_low=router.to_strongest.low,
        accuracy_to_strongest_high=router.to_strongest.high,
        cost_to_strongest=router.cost_to_strongest.value,
        cost_to_cheapest=router.cost_usd / cheapest.cost_usd,
        hull_margin=found.margin.value,
        hull_margin_low=found.margin.low,
        hull_margin_high=found.margin.high,
        accuracy=router.accuracy.value,
        mix_accuracy=mix.accuracy.value,
        best_fixed_to_strongest=best.to_strongest.value,
        best_fixed_cost_to_strongest=best.cost_to_strongest.value,
        agents=len(list(AGENTS.glob("*.py"))),
        streams=len(STREAMS),
        items_of_each=args.items,
        nodes=len(found.nodes),
        calls=router.calls,
        scored=router.scored,
        target=args.target,
        late=args.late,
        seed=args.seed,
        seconds=time.monotonic() - begun,
    )


if __name__ == "__main__":
    main()
