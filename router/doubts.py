"""What is odd about the scores of a node: they never come, they are all 0, or one call gets too many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chainwax.router.bounded import make_room
from chainwax.router.types import Decision, identity

__all__ = ["Doubts"]

UNSCORED = 200
"""Calls after which a node is said to get no scores."""
ZEROS = 200
"""Scores of 0 in a row after which they are taken to say nothing."""
MOST = 16
"""Scores that one call's answer may get from different sources and by different metrics."""
_REMEMBERED = 20_000
"""Calls whose scores are counted."""


class Doubts:
    """Counts what comes. A decision is given back where it is time to tell people of something."""

    def __init__(self, node: str) -> None:
        self._node = node
        self.ignored = 0
        """Scores that did not count, for their call had so many."""
        self._zeros = 0
        self._told_unscored = False
        self._counts: dict[int, int] = {}
        """By the identity of a call and its arm: texts of many calls at many nodes would fill the memory."""

    @property
    def all_zero(self) -> bool:
        """Whether all scores of late were 0: no model is good enough then, and none is worse than another."""
        return self._zeros >= ZEROS

    def takes(self, call_id: str, arm: str) -> tuple[bool, Decision | None]:
        """Whether one more score of a call's answer counts."""
        key = identity(call_id, arm)
        count = self._counts.pop(key, 0) + 1
        if count == 1:
            make_room(self._counts, _REMEMBERED)
        self._counts[key] = count
        if count <= MOST:
            return True, None
        self.ignored += 1
        if self.ignored > 1:
            return False, None
        return False, Decision("scores_ignored", self._node, {"call": call_id, "scores": MOST})

    def scored(self, score: float) -> Decision | None:
        """A used answer was scored."""
        before = self.all_zero
        self._zeros = 0 if score > 0.0 else self._zeros + 1
        if before == self.all_zero:
            return None
        return Decision(
            "scores_all_zero" if self.all_zero else "scores_differ", self._node, {"scores": ZEROS}
        )

    def answered(self, calls: int, scores: float) -> Decision | None:
        """The node has answered ``calls``, and got so many ``scores``."""
        if calls < UNSCORED or scores or self._told_unscored:
            return None
        self._told_unscored = True
        return Decision("no_scores", self._node, {"calls": calls})

    def state(self) -> dict[str, Any]:
        """All of it, JSON-ready."""
        return {
            "ignored": self.ignored,
            "zeros": self._zeros,
            "told_unscored": self._told_unscored,
            "counts": list(self._counts.items()),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Know what :meth:`state` gave."""
        self.ignored, self._zeros = state["ignored"], state["zeros"]
        self._told_unscored, self._counts = state["told_unscored"], dict(state["counts"])
