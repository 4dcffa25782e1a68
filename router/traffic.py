"""Traffic: which arms would answer in time now.

A model is taken to need as long as 95 % of its last minute's answers took at most, and a new call to wait
for those that stand in the queue before it. An arm that is left out comes back by itself: its queue empties,
and a minute without answers forgets that it was slow.
"""

from __future__ import annotations

from collections.abc import Sequence

from chainwax.router.instance import LLMInstance
from chainwax.router.stats import ArmState

__all__ = ["in_time"]

_SLOW_AFTER = 20
"""Answers of an arm after which its measured latency counts."""
_PATIENCE = 10.0
"""Seconds that a call may have to wait for its turn where its node states no latency."""


def in_time(arms: Sequence[ArmState], latency: float | None) -> Sequence[ArmState]:
    """The arms that would answer within ``latency`` seconds; all where none would.

    Without a latency those at which a call would not wait long for its turn.
    """
    if latency is None and not any(state.instance.queue.waiting for state in arms):
        return arms
    most = latency or _PATIENCE
    slow = [state for state in arms if _takes(state, latency) > most]
    # The same list where all are, as mostly: whoever keeps something about it finds it again.
    return [state for state in arms if state not in slow] or arms if slow else arms


def _takes(state: ArmState, latency: float | None) -> float:
    wait = _wait(state.instance)
    if latency is None or state.asked < _SLOW_AFTER:
        return wait
    return wait + (state.instance.recorder.latency_p95() or 0.0)


def _wait(instance: LLMInstance) -> float:
    """Seconds that a new call would stand in the queue."""
    waiting = len(instance.queue)
    if not waiting:
        return 0.0
    rounds = waiting // max(instance.queue.limit, 1) + 1
    return rounds * (instance.recorder.latency_p95() or 0.0)
