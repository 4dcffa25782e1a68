"""From the messages of the bus's topics to feedback that a router learns; Kafka is not in here.

It knows what is about which call, and what was said before.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from chainwax.connectors.wire import CallsMessage, FeedbackMessage
from chainwax.router.feedback import LookUp
from chainwax.router.types import CallRef, Feedback, identity

__all__ = ["Known", "Ledger", "Parked"]


class Known(NamedTuple):
    """What a call is known to be."""

    flow: str
    node: str
    arm: str


class _What(NamedTuple):
    """What was said, so that the same again is known as such."""

    score: float
    weight: float
    path: int
    """Stands for the calls of the path; 0 where there is none."""


@dataclass(slots=True)
class Parked:
    """A score whose call nobody has announced yet."""

    message: FeedbackMessage
    place: str
    """``topic:partition:offset``."""
    at: float
    """When it reached the topic."""
    size: int
    until: float


class Ledger:
    """Remembers calls and scores, and counts what becomes of each message. For one thread.

    Everything in it is bounded: ``calls`` answered last, ``scores`` said last, ``parked`` scores that wait at
    most ``patience`` seconds for their call. What two ledgers make of the same messages in the same order is
    the same.
    """

    def __init__(
        self,
        flow: str,
        *,
        look_up: LookUp | None = None,
        calls: int = 100_000,
        scores: int = 200_000,
        parked: int = 10_000,
        parked_bytes: int = 32 * 1024 * 1024,
        patience: float = 5.0,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.look_up = look_up
        self._flow = flow
        self._most_calls = calls
        self._most_scores = scores
        self._most_parked = parked
        self._most_bytes = parked_bytes
        self._patience = patience
        self._calls: OrderedDict[str, tuple[Known, str]] = OrderedDict()  # with the call's context
        self._items: OrderedDict[int, str] = OrderedDict()
        self._kinds: dict[Known, Known] = {}
        self._scores: OrderedDict[int, tuple[float, _What]] = OrderedDict()
        self._parked: OrderedDict[Hashable, list[Parked]] = OrderedDict()
        self._parked_count = 0
        self._parked_bytes = 0

    def calls(self, message: CallsMessage) -> list[Feedback]:
        """Take in answered calls; what waited for them is given back, in the order in which it was said."""
        out: list[Feedback] = []
        for line in message.calls:
            known = Known(message.flow, line.node, line.arm)
            # Calls are many and arms are few: one object stands for all calls of an arm.
            if len(self._kinds) > 10_000:
                self._kinds.clear()
            known = self._kinds.setdefault(known, known)
            _put(self._calls, line.call_id, (known, line.context), self._most_calls)
            ours = message.flow == self._flow
            if ours and line.item_key:
                _put(self._items, identity(line.node, line.item_key), line.call_id, self._most_calls)
            if self._parked:
                waited = self._unpark(line.call_id)
                if ours and line.item_key:
                    waited += self._unpark((line.node, line.item_key))
                for one in waited:
                    out += self._about(one.message, one.at, line.call_id, known, line.context)
        return out

    def feedback(
        self, message: FeedbackMessage, *, at: float, place: str, size: int, now: float
    ) -> list[Feedback]:
        """Take in a score that reached the topic ``at`` that time; gives back what is to be learned of it."""
        counts = self.counts
        counts["received"] += 1
        if message.flow and message.flow != self._flow:
            counts["other_flow"] += 1
            return []
        if message.time is not None and at - message.time > 60.0:
            counts["late"] += 1
        call_id = message.call_id
        if call_id:
            if message.node and message.arm:
                return self._about(message, at, call_id, Known(self._flow, message.node, message.arm))
            call = self._calls.get(call_id)
            if call is not None:
                return self._about(message, at, call_id, *call)
        elif message.item_key:
            found = self._items.get(identity(message.node, message.item_key))
            call = self._calls.get(found) if found else None
            if found and call is not None:
                return self._about(message, at, found, *call)
        else:
            return self._about(message, at, "", Known(self._flow, message.node, message.arm))
        self._park(Parked(message, place, at, size, now + self._patience))
        return []

    def overdue(self, now: float, *, all_of_it: bool = False) -> tuple[list[Feedback], list[Parked]]:
        """What has waited for its call long enough: what the recording knows of, and what nobody knows."""
        out: list[Feedback] = []
        unknown: list[Parked] = []
        while self._parked:
            key = next(iter(self._parked))
            first = self._parked[key][0]
            crowded = self._parked_count > self._most_parked or self._parked_bytes > self._most_bytes
            if not (all_of_it or crowded or first.until <= now):
                break
            message = first.message
            found = None
            if self.look_up is not None:
                found = self.look_up(message.call_id, message.node, message.item_key)
            for one in self._unpark(key):
                if found is not None:
                    known = Known(self._flow, found.node, found.arm)
                    out += self._about(one.message, one.at, found.call_id, known, found.context)
                else:
                    self.counts["unknown_call"] += 1
                    unknown.append(one)
        return out, unknown

    def state(self) -> dict[str, Any]:
        """All that it remembers, JSON-ready, so that another makes the same of what comes next."""
        kinds = {known: n for n, known in enumerate(dict.fromkeys(k for k, _ in self._calls.values()))}
        return {
            "kinds": list(kinds),
            "calls": [(call_id, kinds[known], context) for call_id, (known, context) in self._calls.items()],
            "items": list(self._items.items()),
            "scores": [(which, at, *what) for which, (at, what) in self._scores.items()],
            "parked": [
                (one.message.model_dump(mode="json"), one.place, one.at, one.size, one.until)
                for waiting in self._parked.values()
                for one in waiting
            ],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what :meth:`state` gave."""
        kinds = [Known(*kind) for kind in state["kinds"]]
        self._calls = OrderedDict((call_id, (kinds[n], context)) for call_id, n, context in state["calls"])
        self._items = OrderedDict((which, call_id) for which, call_id in state["items"])
        self._scores = OrderedDict((which, (at, _What(*what))) for which, at, *what in state["scores"])
        for message, *rest in state["parked"]:
            self._park(Parked(FeedbackMessage.model_validate(message), *rest))

    @property
    def waiting(self) -> int:
        """Scores that wait for their call now."""
        return self._parked_count

    def _park(self, one: Parked) -> None:
        message = one.message
        key: Hashable = message.call_id or (message.node, message.item_key)
        self.counts["waited"] += 1
        self._parked.setdefault(key, []).append(one)
        self._parked_count += 1
        self._parked_bytes += one.size

    def _unpark(self, key: Hashable) -> list[Parked]:
        waited = self._parked.pop(key, [])
        self._parked_count -= len(waited)
        self._parked_bytes -= sum(one.size for one in waited)
        return waited

    def _about(
        self, message: FeedbackMessage, at: float, call_id: str, known: Known, context: str = ""
    ) -> list[Feedback]:
        counts = self.counts
        if known.flow != self._flow:
            counts["other_flow"] += 1
            return []
        arm = message.arm or known.arm
        # A clock that is ahead must not make a score unrevisable.
        said = at if message.time is None else min(message.time, at)
        if call_id:
            through = identity(*(ref.call_id for ref in message.path)) if message.path else 0
            what = _What(message.score, message.weight, through)
            which = identity(call_id, known.node, arm, message.metric, message.source)
            before = self._scores.get(which)
            if before is not None:
                if said < before[0]:
                    counts["out_of_order"] += 1
                    return []
                if what == before[1]:
                    counts["duplicate"] += 1
                    _put(self._scores, which, (said, what), self._most_scores)
                    return []
                counts["revised"] += 1
            _put(self._scores, which, (said, what), self._most_scores)
        counts["passed_on"] += 1
        return [
            Feedback(
                known.node,
                message.score,
                call_id,
                message.item_key,
                arm,
                message.metric,
                message.source,
                message.kind,
                said,
                message.correction,
                message.context or context,
                message.weight,
                tuple(CallRef(ref.node, ref.call_id, ref.arm, ref.context) for ref in message.path),
            )
        ]


def _put(where: OrderedDict, key: Hashable, value: object, most: int) -> None:  # type: ignore[type-arg]
    where[key] = value
    where.move_to_end(key)
    if len(where) > most:
        where.popitem(last=False)
