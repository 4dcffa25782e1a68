"""What sources and sinks raise, noted as it is raised: in one of several processes Bytewax loses it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from bytewax.inputs import Source
from bytewax.outputs import Sink

__all__ = ["watch"]

_BUILDERS = ("build", "build_part")
_METHODS = ("next_batch", "next_awake", "write_batch", "snapshot", "close")


def watch(what: Source[Any] | Sink[Any], note: Callable[[Exception], None]) -> None:
    """Have ``note`` called with what the parts of a source or a sink raise."""

    def noting(method: Callable[..., Any], then: Callable[[Any], Any] = lambda made: made) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            try:
                return then(method(*args, **kwargs))
            except StopIteration:
                raise
            except Exception as error:
                note(error)
                raise

        return noted

    def watched(part: Any) -> Any:
        for name in _METHODS:
            _replace(part, name, noting)
        return part

    for name in _BUILDERS:
        _replace(what, name, lambda method: noting(method, watched))


def _replace(what: Any, name: str, make: Callable[[Any], Any]) -> None:
    method = getattr(what, name, None)
    if method is not None:
        # On the object, so that it stays of its class; one with slots stays unwatched.
        with suppress(AttributeError):
            setattr(what, name, make(method))
