"""The process's own manager, for operators and programs that are given none."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Sequence
from pathlib import Path

from chainwax.router.config import load_settings
from chainwax.router.interface import LLMInterface
from chainwax.router.manager import LLMManager

__all__ = ["default_manager", "get_model"]

_default: LLMManager | None = None
_default_lock = threading.Lock()


def default_manager(path: str | Path | None = None) -> LLMManager:
    """The process's manager, made from ``chainwax.toml`` when it is first asked for."""
    global _default
    with _default_lock:
        if _default is None or _default._closed:
            _default = LLMManager(load_settings(path))
            atexit.register(_default.close)  # nobody else knows when it is no longer wanted
        return _default


def get_model(model_type: str | Sequence[str] = "text", *, node: str = "") -> LLMInterface:
    """An interface for a model type, from the process's manager.

    >>> get_model("vision")  # doctest: +SKIP
    """
    return default_manager().get_model(model_type, node=node)
