"""Pressure: whether the LLM steps of a dataflow have more than they can ask now.

Bytewax does not push back on work off the worker. A source that looks here before it reads keeps the
worker free for everybody, where a step that has to wait at its bound would stop all others too.
"""

from __future__ import annotations

import threading

__all__ = ["Lane", "Pressure"]


class Lane:
    """What the shards of one LLM step share on one worker thread."""

    __slots__ = ("answered", "backlog", "limit", "submitted")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.backlog = 0
        """Items that wait to be submitted. This and ``submitted`` are written by the worker alone …"""
        self.submitted = 0
        self.answered = 0
        """… and this by the router's side alone: no lock is needed."""

    def room(self) -> int:
        """How many calls may be submitted now."""
        return self.limit - (self.submitted - self.answered)


class Pressure:
    """The lanes of the LLM steps of one dataflow in this process."""

    def __init__(self) -> None:
        self._lanes: list[Lane] = []
        self._lock = threading.Lock()

    def add(self, lane: Lane) -> None:
        """Take a lane into account."""
        with self._lock:
            self._lanes = [*self._lanes, lane]

    def high(self) -> bool:
        """Whether some step has items that it cannot submit yet. From any thread."""
        return any(lane.backlog for lane in self._lanes)
