"""What sources and sinks raise, noted as it is raised.

In one of several processes Bytewax loses it. And what ``close`` raises while Bytewax clears up after another
error ends the process at once, before anyone is told of either.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from bytewax.inputs import Source
from bytewax.outputs import Sink

__all__ = ["watch"]

_BUILDERS = ("build", "build_part")
_METHODS = ("next_batch", "next_awake", "write_batch", "snapshot")


def watch(
    what: Source[Any] | Sink[Any],
    note: Callable[[Exception], None],
    note_close: Callable[[Exception], None],
) -> None:
    """Have ``note`` called with what the parts of a source or a sink raise.

    What their ``close`` raises goes to ``note_close``, and nowhere else.
    """

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

    def closing(close: Callable[[], None]) -> Callable[[], None]:
        def closed() -> None:
            try:
                close()
            except Exception as error:
                note_close(error)

        return closed

    def watched(part: Any) -> Any:
        for name in _METHODS:
            _replace(part, name, noting)
        _replace(part, "close", closing)
        return part

    for name in _BUILDERS:
        _replace(what, name, lambda method: noting(method, watched))


def _replace(what: Any, name: str, make: Callable[[Any], Any]) -> None:
    method = getattr(what, name, None)
    if method is not None:
        # On the object, so that it stays of its class; one with slots stays unwatched.
        with suppress(AttributeError):
            setattr(what, name, make(method))
