"""Models of a node's own: collect, train, prove, promote, take back.

To add a trainer, write a class with the members of :class:`~chainwax.router.custom.trainer.Trainer` and put
it into :data:`TRAINERS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from chainwax.router.config import NodeConfig, Settings
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
from chainwax.router.errors import ConfigError, DatasetUnfit, TrainerFailed, UnknownName
from chainwax.router.types import NodeSpec

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
    "trainer_of",
    "trainer_problems",
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


def trainer_of(settings: Settings, node: NodeSpec) -> str | None:
    """Who makes a node's models; None where nobody says it and the node has no choices."""
    own = settings.nodes.get(node.id, NodeConfig())
    return own.trainer or settings.defaults.trainer or ("head" if node.answer.choices else None)


def trainer_problems(settings: Settings, nodes: Iterable[NodeSpec]) -> Iterator[str]:
    """What is wrong with the trainers that a configuration names, before any of them is wanted."""
    wanted = list(settings.trainers)
    for node in nodes:
        own = settings.nodes.get(node.id, NodeConfig())
        name = trainer_of(settings, node)
        if own.trainer is not None and own.trainer not in TRAINERS:
            yield f"nodes.{node.id}.trainer: {UnknownName('trainer', own.trainer, TRAINERS)}"
        elif name is not None and (own.custom or settings.defaults.custom) == "auto":
            wanted.append(name)
        elif name is None and own.custom == "auto":
            yield (
                f"nodes.{node.id}.trainer: the node has no choices: say which trainer makes its model "
                f"({', '.join(TRAINERS)})"
            )
    for name in dict.fromkeys(wanted):
        try:
            make_trainer(name, settings.trainers.get(name))
        except ConfigError as error:
            yield str(error)
