"""A node with choices gets a model of its own within the stream: what that is worth, and what it costs.

One ``choose`` node over a recording of labelled texts. Its strongest and its standard model are
*simulated* at the accuracy and price that were recorded of gpt-4-turbo and gemini-1.5-flash-8b. Errors of
real models fall on hard items: hardness is one minus the out-of-fold probability of the right label under
a TF-IDF logistic regression. With ``c`` the error correlation, ``r`` the rank of an item's hardness in
[0, 1] and ``u`` uniform, a model of accuracy ``a`` errs where ``c·r + (1−c)·u`` lies above its own
a-quantile, so that the error sets are nested; a wrong answer is that classifier's most probable wrong
label. Nothing of it is visible to the router.

The label comes as feedback 200 items late. The node's own model (the trainer ``head``) is made from the
recording of this very run, proved, promoted and used within it, by the router itself; all that is asked
is paid for. Items come at ``--rate`` a second, for training takes time.

    python benchmarks/headlines.py --recording FILE [--error-correlation 1.0] [--target 0.8] [--rate 12]
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from _contract import report, say
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

from chainwax.router import Choice, Feedback, FeedbackKind, LLMManager, NodeSpec, Prompt, Usage, load_settings
from chainwax.router.backends import Health, Reply, Request

LATE = 200
"""Items after which a label is known."""
MODELS = {"strong": ("strongest", 0.8558, 0.003331), "cheap": ("standard", 0.8422, 0.00000868)}
"""Tier, accuracy, dollars an item."""


class Simulated:
    """Answers what was laid down for each text."""

    simulated = True
    batch_max = 1

    def __init__(self, answers: dict[str, str]) -> None:
        self._answers = answers

    async def start(self) -> int | None:
        """As many as there are."""
        return 64

    async def generate(self, request: Request) -> Reply:
        """What was laid down."""
        text = str(request.query.messages[-1]["content"])
        return Reply(self._answers[text], Usage(tokens(text), 1), simulated=True)

    async def generate_batch(self, requests: Any) -> list[Reply | Exception]:
        """Not used."""
        return [await self.generate(request) for request in requests]

    async def health(self) -> Health:
        """Well."""
        return Health(True)

    async def close(self) -> None:
        """Nothing to close."""


def tokens(text: str) -> int:
    """Characters / 4, at least 1."""
    return max(1, round(len(text) / 4))


def simulate(texts: list[str], labels: list[str], correlation: float) -> dict[str, list[str]]:
    """The answers of each model to each text."""
    names = sorted(set(labels))
    right = np.array([names.index(label) for label in labels])
    n = len(texts)
    pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    chances: NDArray[np.float64] = cross_val_predict(pipeline, texts, right, cv=folds, method="predict_proba")
    hardness = 1 - chances[np.arange(n), right]
    rank = np.argsort(np.argsort(hardness, kind="stable")) / max(n - 1, 1)
    wrong = chances.copy()
    wrong[np.arange(n), right] = -1
    uniform = np.random.default_rng(0).random(n)
    height = correlation * rank + (1 - correlation) * uniform
    answers = {}
    for model, (_, accuracy, _) in MODELS.items():
        errs = height > np.quantile(height, accuracy)
        answers[model] = [names[i] for i in np.where(errs, wrong.argmax(axis=1), right)]
    return answers


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Stream the recording once."""
    rows = []
    with gzip.open(args.recording, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row["label"] is not None:
                rows.append(row)
    rows = rows[: args.items]
    texts, labels = [row["prompt"] for row in rows], [row["label"] for row in rows]
    say(f"{len(rows)} items; simulated answers are laid down at correlation {args.error_correlation}")
    answers = simulate(texts, labels, args.error_correlation)
    total = sum(map(tokens, texts))
    models = {
        name: {
            "tier": tier,
            "url": "http://127.0.0.1:9/v1",
            "model": "-",
            "input_cost_per_token": dollars * len(texts) / total,
            "output_cost_per_token": 0.0,
        }
        for name, (tier, _, dollars) in MODELS.items()
    }
    settings = load_settings(
        None,
        run={"recording": str(folder / "run.db"), "seed": args.seed},
        defaults={"custom": "auto", "target": args.target},
        models=models,
        custom={"folder": str(folder / "models"), "again_after": 0.1, "held_out": 0.05},
    )
    # The same text may be there twice: it is answered the same.
    backends = {name: Simulated(dict(zip(texts, said, strict=True))) for name, said in answers.items()}
    spec = NodeSpec("headline", Prompt("{text}"), Choice(sorted(set(labels))), "headlines", "choose")
    right: list[bool] = []
    asked: list[str] = []
    late: deque[Feedback] = deque()
    promoted: list[int] = []
    with LLMManager(settings, backends=backends) as manager:
        announce = manager.announce

        def heard(decision: Any) -> None:
            if decision.kind.startswith("custom_"):
                detail = {k: v for k, v in decision.detail.items() if k != "history"}
                say(f"item {len(right)}: {decision.kind} {json.dumps(detail, default=str)}")
                if decision.kind == "custom_promoted":
                    promoted.append(len(right))
            announce(decision)

        manager.announce = heard  # type: ignore[method-assign]
        manager.begin_run("headlines", nodes=[spec])
        face = manager.register(spec)
        begun = time.monotonic()
        for number, (text, label) in enumerate(zip(texts, labels, strict=True)):
            time.sleep(max(0.0, begun + number / args.rate - time.monotonic()))
            if len(late) >= LATE:
                manager.feedback([late.popleft()])
            got: list[Any] = []
            ready = threading.Event()

            def done(_: Any, result: Any, got: list[Any] = got, ready: threading.Event = ready) -> None:
                got.append(result)
                ready.set()

            face.submit([face.bind({"text": text}, item_key=str(number), position=f"r:{number}")], done)
            ready.wait(30)
            result = got[0]
            if result.error is not None:
                raise result.error
            right.append(result.value == label)
            asked.append(result.arm.model)
            late.append(
                Feedback(
                    "headline", float(right[-1]), result.call_id, str(number), result.arm.key,
                    kind=FeedbackKind.label, source="labels", correction=label,
                )
            )  # fmt: skip
            if number % 500 == 499:
                say(f"item {number + 1}: {np.mean(right):.4f} right, {np.mean(right[-500:]):.4f} lately")
        manager.settle()
        spent = face.router.stats.spent
    return {
        "items": len(right),
        "accuracy": float(np.mean(right)),
        "accuracy_second_half": float(np.mean(right[len(right) // 2 :])),
        "cost_usd_per_item": spent / len(right),
        "promoted_at": promoted[0] if promoted else None,
        **({} if promoted else {"promoted_at_why": "no model was proved within the stream"}),
        "promotions": len(promoted),
        "own_model_share": own_share(asked),
        "own_model_share_second_half": own_share(asked[len(asked) // 2 :]),
        "strongest_share": asked.count("strong") / len(asked),
    }


def own_share(asked: list[str]) -> float:
    """The share of the node's own models."""
    return sum(model not in MODELS for model in asked) / len(asked)


def main() -> None:
    """Run it and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recording", type=Path, required=True, help="gzipped JSON lines with labels")
    parser.add_argument("--error-correlation", type=float, default=1.0)
    parser.add_argument("--target", type=float, default=0.8, help="share of the strongest's quality")
    parser.add_argument("--rate", type=float, default=12.0, help="items a second")
    parser.add_argument("--items", type=int, default=None, help="the first so many")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = run(args, Path(folder))
    report(
        "headlines",
        simulated=list(MODELS),
        error_correlation=args.error_correlation,
        target=args.target,
        rate=args.rate,
        **figures,
    )


if __name__ == "__main__":
    main()
