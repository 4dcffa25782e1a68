"""Models of a node's own: collect, train, prove, promote, take back.

To add a trainer, write a class with the members of :class:`~chainwax.router.custom.trainer.Trainer` and put
it into :data:`TRAINERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chainwax.router.custom.card import Card
from chainwax.router.custom.dataset import Dataset, Example, collect, dataset_of
from chainwax.router.custom.head_trainer import HeadTrainer
from chainwax.router.custom.lora.peft import PeftTrainer
from chainwax.router.custom.lora.trainer import LoraTrainer
from chainwax.router.custom.provider import ProviderTrainer
from chainwax.router.custom.redact import Redactor, redact
from chainwax.router.custom.trainer import (
    HERE,
    Limits,
    Place,
    Progress,
    Served,
    Trained,
    Trainer,
    TrainerMaker,
    may_train,
)
from chainwax.router.errors import DatasetUnfit, TrainerFailed, UnknownName

__all__ = [
    "HERE",
    "TRAINERS",
    "Card",
    "Dataset",
    "DatasetUnfit",
    "Example",
    "Limits",
    "Place",
    "Progress",
    "Redactor",
    "Served",
    "Trained",
    "Trainer",
    "TrainerFailed",
    "TrainerMaker",
    "collect",
    "dataset_of",
    "make_trainer",
    "may_train",
    "redact",
]

TRAINERS: dict[str, TrainerMaker] = {
    "head": HeadTrainer,
    "lora": LoraTrainer,
    "peft": PeftTrainer,
    "provider": ProviderTrainer,
}
"""By the name that a configuration gives as ``trainer``."""


def make_trainer(name: str, options: Mapping[str, Any] | None = None) -> Trainer:
    """A trainer with its options from the configuration.

    Raises :class:`~chainwax.router.errors.ConfigError` where there is none, or the options are wrong.
    """
    if name not in TRAINERS:
        raise UnknownName("trainer", name, TRAINERS)
    return TRAINERS[name](options or {})
