"""What processes share: limits, minutes, budgets and answers; the rooms to its left bring the wires."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from chainwax.router.clock import SYSTEM_CLOCK, Clock
from chainwax.router.errors import ChainwaxError
from chainwax.router.hub import Ask, Hub, Lent
from chainwax.router.recording import RecordedCall
from chainwax.router.types import Attempt, CallResult, Query

__all__ = ["ALL", "Away", "Lender", "OwnHub", "Reply", "Report", "ResponseStore", "Share"]


class Away(ChainwaxError):
    """What the processes share cannot be reached now."""


@dataclass(frozen=True, slots=True)
class Share:
    """The fixed part of one process, where nobody lends."""

    index: int = 0
    """Which process, from 0."""
    of: int = 1
    """How many there are."""
    fraction: float = 1.0
    """What of its part it takes: less than 1 leaves room for others."""

    def slots(self, total: int) -> int:
        """This process's part of a whole number; the first ones take what is left over.

        >>> [Share(n, 3).slots(16) for n in range(3)], [Share(n, 3).slots(2) for n in range(3)]
        ([6, 5, 5], [1, 1, 0])
        """
        part = total // self.of + (self.index < total % self.of)
        return part if self.fraction == 1.0 else max(1, int(part * self.fraction))

    def amount(self, total: float) -> float:
        """This process's part of an amount.

        >>> Share(1, 4).amount(10.0)
        2.5
        """
        return total / self.of


ALL = Share()
"""The part of a process that is alone: everything."""


@dataclass(slots=True)
class Report:
    """What one process tells."""

    process: str
    """Another one for each start of a process."""
    run: str
    asks: dict[str, Ask] = field(default_factory=dict)
    """By model."""
    spent: dict[str, float] = field(default_factory=dict)
    """Dollars since it began, by node: of those that have a budget."""


@dataclass(slots=True)
class Reply:
    """What it is told."""

    lent: dict[str, Lent]
    spent: Mapping[str, float]
    """Dollars of all processes in the whole run, by node."""
    processes: int = 1


class Lender(Protocol):
    """Lends what all processes share. Used on the router's loop."""

    lends_slots: bool
    """Whether slots are lent, or minutes alone."""

    async def exchange(self, report: Report) -> Reply:
        """Tell and hear. Raises :class:`Away` within a few seconds where that cannot be."""
        ...

    async def close(self) -> None:
        """Give back all that was lent."""
        ...


class ResponseStore(Protocol):
    """Answers of a run that every process can find, on whatever machine. From any thread, but ``find``."""

    async def find(self, call_ids: Sequence[str]) -> dict[str, RecordedCall]:
        """What is there of these calls. On the router's loop. Raises :class:`Away`."""
        ...

    async def leave(self) -> None:
        """Nothing more is looked for. On the router's loop."""
        ...

    def attempt(self, query: Query, attempt: Attempt) -> None:
        """Keep an attempt that does not end its call."""
        ...

    def result(self, query: Query, result: CallResult, on_durable: Callable[[], None]) -> None:
        """Keep the end of a call. ``on_durable`` is called once it is kept, or is clear that it must wait."""
        ...

    def open_run(self, run_id: str) -> None:
        """All that follows belongs to this run. Raises :class:`ConfigError` where nothing can be reached."""
        ...

    def close(self) -> None:
        """Write what is left. Raises :class:`~chainwax.router.errors.RecordingError` where that cannot be."""
        ...


class OwnHub:
    """A process that lends itself what it may ask each minute; slots are its own."""

    lends_slots = False

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._hub = Hub()
        self._clock = clock

    async def exchange(self, report: Report) -> Reply:
        """Answers at once."""
        now = self._clock.monotonic() + 1.0  # a virtual clock may begin at 0
        return Reply(self._hub.exchange(report.process, report.asks, now), report.spent)

    async def close(self) -> None:
        """Nothing is lent."""
