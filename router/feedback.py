"""The feedback bus as the router sees it; the rooms to its left bring the wires."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from chainwax.router.control import Change
from chainwax.router.types import CallRef, CallResult, Decision, Feedback, Query

__all__ = ["FeedbackBus", "Learn", "LookUp", "RelayedBus", "SharedBus", "Told"]

Learn = Callable[[Sequence[Feedback]], None]
"""Takes feedback into account; may be called from any thread, and returns at once."""

LookUp = Callable[[str, str, str], CallRef | None]
"""From (call id, node, item key), of which the first or the others may be empty, to the call."""


Told = Callable[[Sequence[Change], bool], None]
"""Takes up what operators changed, and whether it was said just now; from any thread, and returns at once."""


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


@runtime_checkable
class RelayedBus(FeedbackBus, Protocol):
    """A bus that several processes with one recording share, and that remembers nothing."""

    def recall_to(self, recall: Learn) -> None:
        """Have ``recall`` called with what the others said, and record."""
        ...


@runtime_checkable
class SharedBus(FeedbackBus, Protocol):
    """A bus that many processes share and that remembers: what it holds is what routers know."""

    def called(self, run: str, query: Query, result: CallResult) -> None:
        """Tell the other processes of an answered call, so that feedback may name it by its id alone."""
        ...

    def look_up_with(self, look_up: LookUp) -> None:
        """Ask this of calls that the bus does not know; it may be called from any thread."""
        ...

    def control_with(self, told: Told) -> None:
        """Have ``told`` called with what operators change while the flow runs, and changed before."""
        ...

    def catch_up(self, recall: Learn) -> None:
        """Have ``recall`` called with all that was said before now; only then are the subscribers served.

        Raises :class:`~chainwax.router.errors.ConfigError` where that cannot be read.
        """
        ...

    def stand(self, take: Callable[[Mapping[str, Any]], None]) -> None:
        """Have ``take`` called with where it stands, JSON-ready: after all that was handed over."""
        ...

    def go_on_from(self, where: Mapping[str, Any]) -> bool:
        """Stand there again, before :meth:`catch_up`; False where that is not of the same topic."""
        ...

    def flush(self, timeout: float) -> bool:
        """Wait until all that was published has come back; False where it has not in ``timeout`` seconds."""
        ...

    def snapshot(self) -> dict[str, Any]:
        """What came and what became of it, JSON-ready."""
        ...
