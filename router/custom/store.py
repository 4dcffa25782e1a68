"""Where a node's models are kept, and which of them serves: files that a restart finds again."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chainwax.router.custom.card import Card
from chainwax.router.errors import TrainerFailed

__all__ = ["Models", "Standing"]

_STATE = "models.json"


@dataclass(slots=True)
class Standing:
    """How the models of a node stand."""

    serving: str | None = None
    """The model that was promoted."""
    candidate: str | None = None
    """The model that is being proved."""
    count: int = 0
    """Models made so far; the next one's number is one more."""
    trained_on: int = 0
    """Questions with a right answer when one was made, or tried to be, last."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """What happened, oldest first: ``time``, ``what``, ``model`` and why."""


class Models:
    """The folder of one node's models. Several processes may look at it; one at a time should write."""

    def __init__(self, root: Path, flow: str, node: str) -> None:
        self.node = node
        self.folder = root / _safe(flow) / _safe(node)
        self._seen: tuple[int, int] | None = None

    def path(self, model: str) -> Path:
        """The folder of one model."""
        return self.folder / model

    def next_name(self, standing: Standing) -> str:
        """A name that no model of the node has had."""
        return f"{_safe(self.node)}-{standing.count + 1}"

    def read(self) -> Standing:
        """How they stand. Raises :class:`TrainerFailed` where the file is damaged."""
        file = self.folder / _STATE
        try:
            self._seen = self._stamp()
            return Standing(**json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return Standing()
        except (OSError, ValueError, TypeError) as error:
            raise TrainerFailed(f"{file}: cannot be read: {error}") from None

    def write(self, standing: Standing) -> None:
        """Keep how they stand, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{_STATE}.part"
        part.write_text(json.dumps(asdict(standing), indent=1), encoding="utf-8")
        os.replace(part, self.folder / _STATE)
        self._seen = self._stamp()

    def changed(self) -> bool:
        """Whether somebody else has written since this was last read or written."""
        return self._stamp() != self._seen

    def cards(self) -> list[Card]:
        """The cards of all models that are kept, oldest first."""
        found = [Card.read(file.parent) for file in self.folder.glob("*/card.json")]
        return sorted(found, key=lambda card: card.made)

    def tidy(self, standing: Standing, keep: int) -> None:
        """Remove the files of old models; those that serve, are proved or could come back stay."""
        stays = {standing.serving, standing.candidate}
        cards = self.cards()
        stays |= {card.parent for card in cards if card.name in stays}
        for card in [c for c in cards if c.name not in stays][:-keep]:
            shutil.rmtree(self.path(card.name), ignore_errors=True)

    def _stamp(self) -> tuple[int, int] | None:
        try:
            found = (self.folder / _STATE).stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino


def _safe(name: str) -> str:
    """A file's name for any text: the text itself where it is one."""
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:60] or "_"
    return safe if safe == name else f"{safe}-{zlib.crc32(name.encode()):08x}"
