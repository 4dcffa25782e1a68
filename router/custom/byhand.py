"""What a person says of a node's models; a process that runs takes it up within a second."""

from __future__ import annotations

from typing import Any

from chainwax.router.custom.card import Card
from chainwax.router.custom.store import Models
from chainwax.router.errors import ConfigError, UnknownName
from chainwax.router.types import Decision

__all__ = ["promote", "roll_back"]


def promote(models: Models, name: str | None, bar: float, now: float) -> Decision:
    """Have a model of the node serve; without a name the one that is being proved, else the newest.

    ``bar`` is what the lower bound of its accuracy has to reach.

    Raises :class:`ConfigError` where there is none, it serves already, or it is not proved, and
    :class:`TrainerFailed` where its files are not what was proved.
    """
    standing, cards = models.read(), {card.name: card for card in models.cards()}
    if not cards:
        raise ConfigError(f"node '{models.node}' has no model of its own: 'chainwax models train' makes one")
    name = name or standing.candidate or next(reversed(cards))
    if name not in cards:
        raise UnknownName(f"model of the node '{models.node}':", name, cards)
    if name == standing.serving:
        raise ConfigError(f"'{name}' serves already")
    card = cards[name]
    card.verify(models.path(name))
    shown = [f for step in ("held_out", "shadow") if (f := card.figures.get(step))]
    low = max((float(f["low"]) for f in shown), default=0.0)
    if low < bar:
        raise ConfigError(
            f"'{name}' is not proved: the lower bound of its accuracy is {low:.4f}, and {bar:.4f} is wanted"
        )
    # What is there again keeps the parent that it had: else two would be each other's.
    if card.parent != standing.serving and not _descends(cards, standing.serving, name):
        card.parent = standing.serving
        card.write(models.path(name))
    before, standing.serving = standing.serving, name
    if standing.candidate == name:
        standing.candidate = None
    detail: dict[str, Any] = {"parent": before, "low": low, "bar": bar, "by": "hand"}
    standing.history.append({"time": now, "what": "custom_promoted", "model": name, **detail})
    models.write(standing)
    return Decision("custom_promoted", models.node, {"model": name, **detail}, now)


def roll_back(models: Models, why: str, now: float) -> Decision:
    """Take back the model that serves; its parent serves again where there is one.

    Raises :class:`ConfigError` where none serves.
    """
    standing = models.read()
    name = standing.serving
    if name is None:
        raise ConfigError(f"no model of its own serves the node '{models.node}'")
    parent = Card.read(models.path(name)).parent
    if parent is not None:
        Card.read(models.path(parent)).verify(models.path(parent))
    standing.serving = parent
    detail: dict[str, Any] = {"parent": parent, "why": why, "by": "hand"}
    standing.history.append({"time": now, "what": "custom_taken_back", "model": name, **detail})
    models.write(standing)
    return Decision("custom_taken_back", models.node, {"model": name, **detail}, now)


def _descends(cards: dict[str, Card], model: str | None, from_: str) -> bool:
    seen: set[str] = set()
    while model is not None and model in cards and model not in seen:
        seen.add(model)
        model = cards[model].parent
        if model == from_:
            return True
    return False
