"""What one of several processes may take of what is there for all of them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ALL", "Share"]


@dataclass(frozen=True, slots=True)
class Share:
    """The part of one process: limits and budgets hold for all processes of a run together."""

    index: int = 0
    """Which process, from 0."""
    of: int = 1
    """How many there are."""
    fraction: float = 1.0
    """What of its part it takes: less than 1 leaves room for others."""

    def slots(self, total: int) -> int:
        """This process's part of a whole number; the first ones take what is left over.

        At least 1, for a process without a slot would never answer.

        >>> [Share(n, 3).slots(16) for n in range(3)], [Share(n, 3).slots(2) for n in range(3)]
        ([6, 5, 5], [1, 1, 1])
        """
        part = total // self.of + (self.index < total % self.of)
        return max(1, int(part * self.fraction))

    def amount(self, total: float) -> float:
        """This process's part of an amount.

        >>> Share(1, 4).amount(10.0)
        2.5
        """
        return total / self.of


ALL = Share()
"""The part of a process that is alone: everything."""
