"""The card of a trained model: what it was made of, what it is worth, what it costs. A file beside it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chainwax.router.custom.dataset import Dataset
from chainwax.router.custom.trainer import Trained
from chainwax.router.errors import TrainerFailed

__all__ = ["CARD", "Card", "file_hashes"]

CARD = "card.json"
_OWN = {CARD, "trained.json", "job.json", "work.json", "failed.json", "training.log"}
"""Files beside an artefact that are not part of it."""


@dataclass(slots=True)
class Card:
    """What is known of one trained model."""

    name: str
    """The model's name in the router: unique for each training."""
    flow: str
    node: str
    trainer: str
    made: float
    """Time of day."""
    parent: str | None = None
    """The custom model that served the node when this one was made."""
    data: dict[str, Any] = field(default_factory=dict)
    """``since`` and ``until`` (times of day), ``train`` and ``held_out`` (counts), ``hash``, ``notes``."""
    figures: dict[str, Any] = field(default_factory=dict)
    """What was measured, by step: ``training``, ``held_out``, ``shadow``."""
    price: dict[str, Any] = field(default_factory=dict)
    """``training_usd``, and what a call costs."""
    files: dict[str, str] = field(default_factory=dict)
    """Hashes of the artefact's files by their path in the folder."""
    simulated: bool = False
    """Whether right answers of simulated models are among its data, or it is simulated itself."""

    @classmethod
    def of(cls, name: str, dataset: Dataset, trained: Trained, *, parent: str | None, now: float) -> Card:
        """The card of a model that was just trained."""
        return cls(
            name,
            dataset.flow,
            dataset.node,
            trained.trainer,
            now,
            parent,
            data={
                "since": dataset.since,
                "until": dataset.until,
                "train": len(dataset.train),
                "held_out": len(dataset.held_out),
                "hash": dataset.hash,
                "prompt_version": dataset.prompt_version,
                "notes": asdict(dataset.notes),
            },
            figures={"training": dict(trained.figures)} if trained.figures else {},
            price={"training_usd": trained.cost_usd},
            files=file_hashes(trained.folder),
            simulated=dataset.notes.simulated > 0,
        )

    def write(self, folder: Path) -> None:
        """Write the card, whole or not at all."""
        part = folder / f"{CARD}.part"
        part.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(part, folder / CARD)

    @classmethod
    def read(cls, folder: Path) -> Card:
        """Read a card. Raises :class:`TrainerFailed` where there is none, or it is none."""
        file = folder / CARD
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise TrainerFailed(f"{file}: cannot be read: {error}") from None

    def verify(self, folder: Path) -> None:
        """Raise :class:`TrainerFailed` where a file of the artefact is missing or is not what it was."""
        now = file_hashes(folder)
        for name, wanted in self.files.items():
            if name not in now:
                raise TrainerFailed(f"model '{self.name}': {folder / name} is missing")
            if now[name] != wanted:
                raise TrainerFailed(f"model '{self.name}': {folder / name} is not the file that was proved")


def file_hashes(folder: Path) -> dict[str, str]:
    """Hashes of all files of an artefact, by their path in its folder; its data are not part of it."""
    hashes: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in _OWN and not name.startswith("data/"):
            with path.open("rb") as file:
                hashes[name] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return hashes
