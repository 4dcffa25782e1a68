"""Python's cyclic collector, which looks seldom while runs go on.

It goes through all that is alive again and again, to find what refers to itself in a circle: with a flow of
many nodes that takes more than a tenth of a call. Calls make hardly any circles, and what was there when a
run began is there to its end. So while a run goes on, that is passed over (:func:`gc.freeze`), and what is
new is looked at once in so many objects.
"""

from __future__ import annotations

import gc
import threading

__all__ = ["begin", "end"]

_NEW = 20_000
"""Objects that are new between two looks; Python's own number is 700."""

_lock = threading.Lock()
_runs = 0
_before = (0, 0, 0)


def begin() -> None:
    """A run begins. A threshold that somebody set higher, or to 0 for never, stays."""
    global _runs, _before
    with _lock:
        if not _runs:
            _before = gc.get_threshold()
            first, *others = _before
            gc.set_threshold(max(first, _NEW) if first else 0, *others)
        _runs += 1
        gc.freeze()


def end() -> None:
    """A run is over; after the last one all is as it was before the first."""
    global _runs
    with _lock:
        _runs -= 1
        if not _runs:
            gc.set_threshold(*_before)
            gc.unfreeze()
