"""The trainer ``head``: a classifier for a node with choices, on this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from chainwax.router.config import ModelConfig
from chainwax.router.custom.dataset import Dataset
from chainwax.router.custom.head import Doubt, Head, needs_sklearn
from chainwax.router.custom.trainer import HERE, Limits, Progress, Served, Trained
from chainwax.router.errors import ConfigError, TrainerFailed, UnknownName
from chainwax.router.types import Tier

__all__ = ["HeadTrainer"]

_STRENGTHS = (4.0, 16.0)
_LATER = 0.25
"""Share of the data, the newest, on which strength and temperature are set."""
_OPTIONS = ("most",)


class HeadTrainer:
    """Fits a :class:`~chainwax.router.custom.head.Head`. Options: ``most``, the newest examples to fit on."""

    name = "head"
    place = HERE

    def __init__(self, options: Mapping[str, Any]) -> None:
        for key in options:
            if key not in _OPTIONS:
                raise UnknownName("option of the trainer 'head':", key, _OPTIONS)
        self._most = options.get("most", 20_000)
        if not isinstance(self._most, int) or self._most < 10:
            raise ConfigError(f"trainers.head.most is {self._most!r}: a whole number from 10 is wanted")
        needs_sklearn()

    def fit(self, dataset: Dataset, folder: Path, progress: Progress, limits: Limits) -> Trained:
        """Fit it. Raises :class:`TrainerFailed` where the node has no choices, or uses one alone."""
        begun = time.monotonic()
        choices = dataset.choices
        if choices is None:
            raise TrainerFailed(f"node '{dataset.node}' has no choices: a head cannot be its model")
        examples = list(dataset.train)[-self._most :]
        cut = len(examples) - max(1, int(len(examples) * _LATER))
        earlier, later = examples[:cut], examples[cut:]
        if len({e.answer for e in earlier}) < 2:
            raise TrainerFailed(
                f"node '{dataset.node}': its {len(earlier)} earlier questions have one answer"
            )
        number = {choice: n for n, choice in enumerate(choices)}
        right = np.array([number[e.answer] for e in later])
        best: tuple[float, float, Head] | None = None
        for done, strength in enumerate(_STRENGTHS):
            progress(done / 3, f"fitting with strength {strength:g}")
            head = Head.fit(
                choices,
                [e.text for e in earlier],
                [e.answer for e in earlier],
                strength,
                start=None if best is None else best[2],
            )
            loss = head.calibrate(head.scores(head.texts.rows([e.text for e in later])), right)
            if best is None or loss < best[0]:
                best = (loss, strength, head)
        assert best is not None
        loss, strength, head = best
        chances = head.chances(head.scores(head.texts.rows([e.text for e in later])))
        doubt = Doubt()
        for example, row, wanted in zip(later, chances, right.tolist(), strict=True):
            top = int(row.argmax())
            for other in {number[said] for said in example.said.values() if said in number} - {top}:
                if wanted in (top, other):
                    doubt.learn(float(row[top]), float(row[other]), right=wanted == top)
        progress(0.67, "fitting on all")
        final = Head.fit(
            choices, [e.text for e in examples], [e.answer for e in examples], strength, start=head
        )
        final.sharpness, final.doubt = head.sharpness, doubt
        final.save(folder)
        accuracy = float((chances.argmax(axis=1) == right).mean())
        figures = {"accuracy": accuracy, "log_loss": loss, "seconds": time.monotonic() - begun}
        return Trained(self.name, folder, figures=figures, detail={"strength": strength})

    def serve(self, name: str, trained: Trained, models: Mapping[str, ModelConfig]) -> Served:
        """In this process, by the backend ``head``."""
        return Served(ModelConfig(tier=Tier.custom, backend="head", artefact=trained.folder, retries=0))
