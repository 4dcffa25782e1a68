"""The feedback bus as the router sees it; the rooms to its left bring the wires."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from chainwax.router.types import Decision, Feedback

__all__ = ["FeedbackBus", "Learn"]

Learn = Callable[[Sequence[Feedback]], None]
"""Takes feedback into account; may be called from any thread, and returns at once."""


class FeedbackBus(Protocol):
    """Carries feedback from downstream nodes to every router that listens."""

    def publish(self, feedback: Sequence[Feedback]) -> None:
        """Send feedback on. Called from any thread."""
        ...

    def announce(self, decision: Decision) -> None:
        """Tell the world of a decision of the router."""
        ...

    def subscribe(self, learn: Learn) -> None:
        """Have ``learn`` called with all feedback from now on."""
        ...

    def close(self) -> None:
        """Deliver what is under way and stop."""
        ...
