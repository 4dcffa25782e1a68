"""The fixed set of model types that a node may ask for.

``vision`` is a text model that also takes images; ``speech`` is no single model but a pipeline of
:data:`SPEECH_STAGES`. Order and case do not matter: ``Image + Text`` is ``text+image``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from chainwax.router.errors import UnknownModelType

__all__ = ["MODEL_TYPES", "SPEECH_STAGES", "parse_model_type"]

MODEL_TYPES = (
    "text",
    "text+image",
    "text+audio",
    "text+image+audio",
    "embedding",
    "transcription",
    "synthesis",
    "speech",
)

SPEECH_STAGES = ("transcription", "text", "synthesis")
"""Each stage of ``speech`` has a router, tiers and prices of its own."""

_SYNONYMS = {"vision": "text+image", "image": "text+image", "audio": "text+audio"}
_ORDER = ("text", "image", "audio")


def parse_model_type(name: str | Sequence[str]) -> str:
    """The canonical name of a model type.

    Raises :class:`UnknownModelType`, which names the nearest one.
    """
    text = name if isinstance(name, str) else "+".join(name)
    parts = [p for p in re.split(r"[\s+,_/&|-]+", text.strip().lower()) if p]
    joined = "+".join(parts)
    if joined in MODEL_TYPES:
        return joined
    if joined in _SYNONYMS:
        return _SYNONYMS[joined]
    wanted = {p for part in parts for p in _SYNONYMS.get(part, part).split("+")}
    if parts and wanted <= set(_ORDER):
        return "+".join(p for p in _ORDER if p in wanted | {"text"})
    raise UnknownModelType("model type", text, [*MODEL_TYPES, "vision"])
