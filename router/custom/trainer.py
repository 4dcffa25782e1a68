"""What a trainer is: from a node's dataset to a model that the router can ask.

To add a trainer: write a class with these members, and name it in :data:`chainwax.router.custom.TRAINERS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from chainwax.router.backends.base import Backend
from chainwax.router.config import ModelConfig
from chainwax.router.custom.dataset import Dataset
from chainwax.router.errors import TrainerFailed
from chainwax.router.rules import allowed
from chainwax.router.types import Rules, Tier

__all__ = ["HERE", "Limits", "Place", "Progress", "Served", "Trained", "Trainer", "TrainerMaker", "may_train"]

Progress = Callable[[float, str], None]
"""Told now and then how far it is, in [0, 1], and what it does. May be called from any thread."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a trainer takes the texts that it learns from."""

    provider: str = ""
    """Whose machines they are, as ``allow`` and ``deny`` name it; empty for this machine."""
    region: str = ""

    def __str__(self) -> str:
        return "this machine" if not self.provider else f"provider:{self.provider}"


HERE = Place()
"""The texts do not leave this machine."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a training may take. Whoever runs it holds it to them; a trainer should keep them by itself."""

    minutes: float = 30.0
    memory_mb: int = 4096
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of a training."""

    trainer: str
    """The trainer's name."""
    folder: Path
    """Where its files are."""
    model: str = ""
    """What its server calls it, where there is one: a provider's ``ft:…``, an adapter's name."""
    cost_usd: float = 0.0
    """What the training cost."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What the trainer measured: losses, steps, seconds. What the model is worth is measured by others."""
    detail: Mapping[str, Any] = field(default_factory=dict)
    """What :meth:`Trainer.serve` has to know, JSON-ready: the base, the job, the format."""

    def save(self) -> None:
        """Write ``trained.json`` into its folder."""
        about = {
            "trainer": self.trainer,
            "model": self.model,
            "cost_usd": self.cost_usd,
            "figures": dict(self.figures),
            "detail": dict(self.detail),
        }
        (self.folder / "trained.json").write_text(json.dumps(about, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Trained:
        """Read what :meth:`save` wrote. Raises :class:`TrainerFailed` where that cannot be read."""
        file = folder / "trained.json"
        try:
            return cls(folder=folder, **json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise TrainerFailed(f"{file}: cannot be read: {error}") from None


@dataclass(frozen=True, slots=True)
class Served:
    """How a trained model is asked."""

    config: ModelConfig
    """Its tier is ``custom``; price, provider and region count as for any model."""
    backend: Backend | None = None
    """None takes the one that the configuration names."""


class Trainer(Protocol):
    """Makes a model from a dataset."""

    name: str
    """As :data:`~chainwax.router.custom.TRAINERS` and the configuration know it."""
    place: Place
    """Where the texts go while it trains."""

    def fit(self, dataset: Dataset, folder: Path, progress: Progress, limits: Limits) -> Trained:
        """Train on ``dataset.train`` and leave all files in ``folder``.

        ``dataset.held_out`` is what the model will be judged by; it may only be used to stop early.
        Runs in a process of its own, at low priority, and may block. ``folder`` is there; what an earlier try
        that was cut off left in it (a job's id, a checkpoint) may be taken up again.

        Raises :class:`TrainerFailed` with the reason.
        """
        ...

    def serve(self, name: str, trained: Trained, models: Mapping[str, ModelConfig]) -> Served:
        """How a trained model is asked from now on, under ``name``; ``models`` are those configured.

        Called in the process that serves, quick; also after a restart. Raises :class:`TrainerFailed` where
        what was trained cannot be served any more (its base is another one, a file is missing).
        """
        ...


class TrainerMaker(Protocol):
    """A trainer's constructor, importable by name; ``options`` are its section of the configuration.

    Raises :class:`~chainwax.router.errors.ConfigError` where they are wrong.
    """

    def __call__(self, options: Mapping[str, Any]) -> Trainer:
        """The trainer with these options."""
        ...


def may_train(rules: Rules, name: str, place: Place) -> bool:
    """Whether a node's rules let a model ``name`` of its own be trained at a place: as if it was asked there.

    Who may not ask custom models gets none, and no text goes to a provider or region that is not allowed.
    """
    config = ModelConfig(tier=Tier.custom, backend="head", provider=place.provider, region=place.region)
    return allowed(rules, name, config)
