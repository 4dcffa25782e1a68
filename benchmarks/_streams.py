"""Labelled streams for the agents of benchmarks/chainstream_agents/: made of phrases, the same for a seed.

What an item says is drawn first and written down in words; the right answer of each question of each agent
follows from what was drawn.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["STREAMS", "write_streams"]

Labelled = tuple[dict[str, Any], dict[str, Any]]
"""An item and the right answers about it, by node."""

_NAMES = ["Ada", "Bela", "Chen", "Dora", "Emil", "Fatou", "Goran", "Hana", "Igor", "Jun", "Kofi", "Lena"]
_PRODUCTS = ["lamp", "kettle", "radio", "keyboard", "charger", "mouse", "scale", "vacuum"]
_AIRLINES = ["Aurora", "Borealis", "Cirrus", "Delfin", "Eider"]
_PLACES = ["the harbour", "the old station", "Café Nord", "the library", "the park"]
_YES = {True: "y", False: "n"}


def _mail(rng: random.Random, id: str) -> Labelled:
    team = rng.choice(("billing", "technical", "sales"))
    urgent = rng.random() < 0.4
    order = f"NW-{rng.randrange(10000, 99999)}" if rng.random() < 0.7 else ""
    product, name = rng.choice(_PRODUCTS), rng.choice(_NAMES)
    about = {
        "billing": f"I was charged twice for the {product}.",
        "technical": f"the {product} has stopped working since Monday.",
        "sales": f"does the {product} come in another colour?",
    }[team]
    hurry = "I need to hear from you today." if urgent else "There is no hurry at all."
    number = f" The order is {order}." if order else ""
    text = f"Hello, {about}{number} {hurry} Regards, {name} ({id})"
    return {"id": id, "text": text}, {
        "mail_triage-is_urgent": _YES[urgent],
        "mail_triage-team": team,
        "mail_orders-order": {"order": order},
        "urgent_digest-digest": f"The last of them is {name}'s, about a {product}.",
    }


def _tweet(rng: random.Random, id: str) -> Labelled:
    mood = rng.choices(("positive", "neutral", "negative"), (3, 3, 4))[0]
    late = rng.random() < 0.3
    airline = rng.choice(_AIRLINES)
    said = {
        "positive": "what a lovely crew, thank you",
        "neutral": f"boarding at gate {rng.randrange(1, 60)}",
        "negative": "never again, nobody answers",
    }[mood]
    delay = f" We leave {rng.randrange(40, 300)} minutes late." if late else ""
    return {"id": id, "text": f"@{airline} {said}.{delay} #{id}"}, {
        "airline_sentiment-sentiment": mood,
        "airline_sentiment-airline": airline,
        "delay_watch-is_delay": _YES[late],
    }


def _news(rng: random.Random, id: str) -> Labelled:
    topic = rng.choice(("politics", "sport", "business", "science"))
    move = rng.choice(("up", "down", "neither"))
    place, number = rng.choice(("Lisbon", "Oslo", "Quito", "Hanoi")), rng.randrange(2, 90)
    told = {
        "politics": f"Parliament in {place} votes on {number} amendments",
        "sport": f"{place} wins after {number} minutes of extra time",
        "business": f"Traders in {place} see copper go {move}, after {number} days"
        if move != "neither"
        else f"Traders in {place} see copper unmoved for {number} days",
        "science": f"A team in {place} counts {number} new species of moss",
    }[topic]
    return {"id": id, "text": f"{told}. ({id})"}, {
        "news_topics-topic": topic,
        "market_moves-is_business": _YES[topic == "business"],
        "market_moves-move": move if topic == "business" else "neither",
    }


def _message(rng: random.Random, id: str) -> Labelled:
    spam = rng.random() < 0.25
    paid = rng.randrange(3, 400) if rng.random() < 0.5 else 0
    name = rng.choice(_NAMES)
    if spam:
        text, paid = f"WIN {rng.randrange(100, 9000)} now!!! Reply WIN {id}", 0
    elif paid:
        text = f"Hi, it is {name}. I paid {paid} dollars for us yesterday, see slip {id}."
    else:
        text = f"Hi, it is {name}. Running late, start without me. ({id})"
    return {"id": id, "text": text}, {"spam_filter-is_clean": _YES[spam], "expenses-amount": str(paid)}


def _paper(rng: random.Random, id: str) -> Labelled:
    field = rng.choice(("computing", "biology", "physics"))
    learning = rng.random() < 0.4
    stage = rng.choice(("theory", "method", "data", "survey"))
    thing = {"computing": "schedulers", "biology": "moss genomes", "physics": "thin films"}[field]
    how = "with a trained network" if learning else "by hand-made rules"
    what = {
        "theory": f"We prove a bound for {thing}",
        "method": f"We present a way to sort {thing}",
        "data": f"We release {rng.randrange(10, 900)} thousand records of {thing}",
        "survey": f"We review {rng.randrange(50, 400)} works on {thing}",
    }[stage]
    return {"id": id, "title": f"On {thing} {how}", "text": f"{what} {how}. [{id}]"}, {
        "paper_radar-is_learning": _YES[learning],
        "paper_radar-stage": stage,
        "paper_fields-field": field,
    }


def _review(rng: random.Random, id: str) -> Labelled:
    stars = rng.randrange(1, 6)
    complaint = stars <= 2
    product = rng.choice(_PRODUCTS)
    told = ("broke on the first day", "is weak", "is all right", "is good", "is the best I ever had")[
        stars - 1
    ]
    return {"id": id, "text": f"The {product} {told}, after {rng.randrange(2, 300)} days. ({id})"}, {
        "review_stars-stars": str(stars),
        "complaints-is_complaint": _YES[complaint],
        "complaints-reply": f"We are sorry about your {product} and will write to you today.",
    }


def _line(rng: random.Random, id: str) -> Labelled:
    plan = rng.random() < 0.4
    mood = rng.choice(("happy", "sad", "angry"))
    place, speaker = rng.choice(_PLACES), rng.choice(_NAMES)
    felt = {"happy": "What a day!", "sad": "I did not sleep.", "angry": "They did it again!"}[mood]
    asked = f"Shall we meet at {place} at {rng.randrange(1, 12)}?" if plan else f"I walked past {place}."
    return {"id": id, "speaker": speaker, "text": f"{felt} {asked} <{id}>"}, {
        "plans-is_plan": _YES[plan],
        "plans-place": place,
        "moods-mood": mood,
    }


STREAMS: dict[str, Callable[[random.Random, str], Labelled]] = {
    "mails": _mail,
    "tweets": _tweet,
    "news": _news,
    "sms": _message,
    "papers": _paper,
    "reviews": _review,
    "talk": _line,
}


def write_streams(folder: Path, items: int, seed: int) -> tuple[dict[str, Path], Path]:
    """Write each stream as JSON lines, and all right answers as one file of ``id`` and ``answers``."""
    files: dict[str, Path] = {}
    labels = folder / "labels.jsonl"
    with labels.open("w", encoding="utf-8") as right:
        for name, make in STREAMS.items():
            files[name] = folder / f"{name}.jsonl"
            with files[name].open("w", encoding="utf-8") as file:
                for item, answers in _made(make, name, items, seed):
                    file.write(json.dumps(item, ensure_ascii=False) + "\n")
                    right.write(json.dumps({"id": item["id"], "answers": answers}, ensure_ascii=False) + "\n")
    return files, labels


def _made(
    make: Callable[[random.Random, str], Labelled], name: str, items: int, seed: int
) -> Iterator[Labelled]:
    rng = random.Random(f"{seed}/{name}")
    for number in range(items):
        yield make(rng, f"{name}-{number:05d}")
