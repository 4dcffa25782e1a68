"""Work in the background: a run beside a live one that leaves room for it, and that may cost so much.

Processes have queues of their own, so a low priority in one says nothing in another. What keeps a background
run out of the way of a live one is how many requests it has in flight:

* never more than its share of a model's limit;
* none at a model for which a live run's calls wait, or whose limit they use up: a live run says so every two
  seconds in the recording that both write;
* half as many when the server answers 429, or takes twice as long as it did at its quickest; one more each
  second while all is well (additive increase, multiplicative decrease: Chiu and Jain 1989).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chainwax.router.errors import RecordingError
from chainwax.router.recording.reader import RecordingReader

if TYPE_CHECKING:
    from chainwax.router.instance import LLMInstance
    from chainwax.router.manager import LLMManager

__all__ = ["Background"]

log = logging.getLogger("chainwax")

_TICK_S = 1.0
_FRESH_S = 10.0
"""A live run says how it is every two seconds: one that has not for so long is taken to be gone."""
_SLOW = 2.0
"""Times as long as at its quickest: a median answer then tells of a server that is busy with others."""
_ENOUGH = 20
"""Answers of the last minute that a median is taken of."""


@dataclass(slots=True)
class _Room:
    """What is known of one model."""

    cap: int
    """The most that may be in flight."""
    given: int = 1
    refused: int = 0
    """How often it answered 429 so far."""
    quickest: float = field(default=float("inf"))
    """The lowest median of a minute, in seconds."""


class Background:
    """Makes the run of a manager, which has begun, a background one, until :meth:`end`.

    ``budget`` is in dollars, for the run with all its earlier starts, which paid ``spent``. When the next
    call could pass it, nothing more is asked, and ``on_spent`` is called once, on the router's loop: what is
    in flight then costs what it costs, and is counted in beforehand at the mean of the calls before.
    """

    def __init__(
        self,
        manager: LLMManager,
        *,
        budget: float | None = None,
        spent: float = 0.0,
        on_spent: Callable[[], None] = lambda: None,
    ) -> None:
        self.budget = budget
        self.exhausted = False
        """Whether a call was held because the budget was spent."""
        self._manager = manager
        self._before = spent
        self._on_spent = on_spent
        self._rooms: dict[str, _Room] = {}
        self._sent = 0
        """Requests that the budget was asked for."""
        self._told_failure = False
        self._task = manager.run(self._begin())

    @property
    def spent(self) -> float:
        """Dollars that the run has cost, its earlier starts included."""
        return self._before + sum(i.router.stats.spent for i in self._manager.interfaces.values())

    def end(self) -> None:
        """The run ends: what it has asked may be finished, at its share of the limits. From any thread."""
        self._manager.loop.call_soon_threadsafe(self._end)

    # -- on the router's loop -------------------------------------------------------------------

    async def _begin(self) -> asyncio.Task[None]:
        for instance in self._manager.instances.values():
            self._room(instance)
        if self.budget is not None:
            for interface in self._manager.interfaces.values():
                interface.router.gate.allows = self._affordable
        return asyncio.get_running_loop().create_task(self._tick())

    def _room(self, instance: LLMInstance) -> _Room:
        """What it may take of a model, which may have come while it runs."""
        room = self._rooms.get(instance.name)
        if room is None:
            room = self._rooms[instance.name] = _Room(instance.queue.limit)
            instance.queue.resize(1)
        return room

    def _end(self) -> None:
        self._task.cancel()
        for instance in self._manager.instances.values():
            instance.queue.resize(self._room(instance).cap)

    def _affordable(self) -> bool:
        """Whether one more request is within the budget; counts it where it is."""
        if self.exhausted:
            return False
        assert self.budget is not None
        stats = [interface.router.stats for interface in self._manager.interfaces.values()]
        answered = sum(state.asked for one in stats for state in one.by_key.values())
        paid = sum(one.spent for one in stats)
        mean = paid / answered if answered else 0.0
        spent = self._before + paid
        if spent < self.budget and spent + (self._sent - answered + 1) * mean <= self.budget:
            self._sent += 1
            return True
        self.exhausted = True
        for interface in self._manager.interfaces.values():
            interface.router.gate.end()
        self._on_spent()
        return False

    async def _tick(self) -> None:
        while True:
            busy = await asyncio.to_thread(self._live)
            for name, instance in list(self._manager.instances.items()):
                self._give_room(instance, self._room(instance), busy.get(name, False))
            await asyncio.sleep(_TICK_S)

    def _give_room(self, instance: LLMInstance, room: _Room, busy: bool) -> None:
        if instance.queue.limit != room.given:
            room.cap = instance.queue.limit  # the server has told its slots since
        said = instance.recorder.snapshot()
        refused = said["uptime"]["errors_by_class"].get("BackendBusy", 0)
        median = said["minute"]["latency_s"]["p50"]
        slow = False
        if median is not None and said["minute"]["attempts"] >= _ENOUGH:
            slow = median > _SLOW * room.quickest
            room.quickest = min(room.quickest, median)
        if busy:
            room.given = 0
        elif refused > room.refused or slow:
            room.given = max(1, room.given // 2)
        else:
            room.given = min(room.cap, room.given + 1)
        room.refused = refused
        instance.queue.resize(room.given)

    # -- on a thread ----------------------------------------------------------------------------

    def _live(self) -> dict[str, bool]:
        """Of each model that a live run asks, whether that leaves room."""
        recording = self._manager.recording
        busy: dict[str, bool] = {}
        if not isinstance(recording, RecordingReader):
            return busy
        try:
            said = [recording.snapshot_of(run) for run in recording.running() if run != self._manager.run_id]
        except RecordingError as error:
            if not self._told_failure:
                self._told_failure = True
                log.warning("the live run cannot be seen: %s", error)
            return busy
        now = self._manager.clock.time()
        for one in said:
            if one and not one.get("background") and now - one["time"] < _FRESH_S:
                for name, model in one["models"].items():
                    busy[name] = busy.get(name, False) or _full(model)
        return busy


def _full(model: Mapping[str, Any]) -> bool:
    return bool(model["waiting"] or model["in_flight"] >= model["limit"])
