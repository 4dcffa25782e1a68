"""The router's way to models: one small protocol, and the servers that it is known to fit.

To add a backend, write a class with the methods of :class:`~chainwax.router.backends.base.Backend`
and put it into :data:`BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable

from chainwax.router.backends.base import Backend, Health, Reply, Request
from chainwax.router.backends.head import HeadBackend
from chainwax.router.backends.llamacpp import LlamaCppBackend
from chainwax.router.backends.openai import OpenAIBackend
from chainwax.router.backends.simulated import SimulatedBackend
from chainwax.router.config import ModelConfig
from chainwax.router.errors import UnknownName

__all__ = ["BACKENDS", "Backend", "Health", "Reply", "Request", "make_backend"]

BACKENDS: dict[str, Callable[[str, ModelConfig], Backend]] = {
    "openai": OpenAIBackend,
    "llamacpp": LlamaCppBackend,
    "simulated": SimulatedBackend,
    "head": HeadBackend,
}
"""By the name that a configuration gives as ``backend``."""


def make_backend(name: str, config: ModelConfig) -> Backend:
    """The backend of one configured model, not yet started.

    Raises :class:`~chainwax.router.errors.ConfigError` where the configuration cannot work.
    """
    if config.backend not in BACKENDS:
        raise UnknownName("backend", config.backend, BACKENDS)
    return BACKENDS[config.backend](name, config)
