"""Counterfactuals: how a failed item would have ended, had the strongest answered one of its calls.

Where the end result of an item is scored below one half, the call on its way that is most doubtful is asked
of the strongest. What depends on that answer, up to the same score, is run again: functions that only
compute, and the models whose prompts are others now, each by the arm that answered before. What the score
would have been goes to the calls as feedback (:mod:`chainwax.router.credit` says how much of it to which).
Nobody is served with any of it. A node spends no more on it than its share (``counterfactual``) of what its
calls cost.

The process that asked a call remembers it for a while; where the score comes later, nothing is asked again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from chainwax.router.bounded import make_room
from chainwax.router.errors import PromptFieldMissing
from chainwax.router.types import NO_QUALITY, CallRef, CallResult, Feedback, FeedbackKind, Mode, Query, Steps

if TYPE_CHECKING:
    from chainwax.router.interface import LLMInterface
    from chainwax.router.manager import LLMManager

__all__ = ["Counterfactuals"]

_FAILED = 0.5
"""An end score below this is a failure."""
_REMEMBERED = 2000
"""Calls whose end scores are waited for."""


class Counterfactuals:
    """All of one process. On the router's loop."""

    def __init__(self, manager: LLMManager) -> None:
        self.flows: set[str] = set()
        """Flows of which some node wants them."""
        self._manager = manager
        self._calls: dict[str, tuple[Query, CallResult]] = {}

    def answered(self, query: Query, result: CallResult) -> None:
        """A call has its answer."""
        if query.node.flow not in self.flows or result.arm is None or query.stream is not None:
            return
        make_room(self._calls, _REMEMBERED)
        self._calls[query.call_id] = (query, result)

    def heard(self, end: Feedback) -> None:
        """The end result of an item was scored. Asks again where that is worth it and may be paid."""
        if not self.flows or not end.path or end.score >= _FAILED or end.kind in NO_QUALITY:
            return
        there = [(doubt, ref) for ref in end.path if (doubt := self._doubt(end, ref)) is not None]
        if there:
            _, ref = max(there, key=lambda one: one[0])
            query, result = self._calls.pop(ref.call_id)  # a failure that is told of twice is looked at once
            face = self._manager.interface_of(ref.node)
            assert face is not None
            face.router.start(self._look(face, query, result, end))

    def _doubt(self, end: Feedback, ref: CallRef) -> float | None:
        """How probably a call was wrong; None where it cannot be asked again."""
        face = self._manager.interface_of(ref.node)
        if ref.call_id not in self._calls or face is None or end.source not in face.node.again:
            return None
        right = face.router.expected(ref.arm, ref.context)
        if right is None or face.router.in_place_of(ref.arm) is None:
            return None
        return 1.0 - right

    async def _look(self, face: LLMInterface, query: Query, result: CallResult, end: Feedback) -> None:
        router = face.router
        strongest = router.in_place_of(result.ref.arm)
        if strongest is None:  # it was there when the work was begun
            return
        asked = await router.ask_again(query, strongest.key, result.attempts)
        router.spare -= asked.cost_usd
        if asked.error is not None:
            return
        steps = face.node.again[end.source](query.value, asked.value)
        score, cost = await self._follow(steps, query, end.path)
        router.spare -= cost
        if score is None:
            return
        instead = CallRef(query.node.id, query.call_id, strongest.key, query.context)
        told = Feedback(
            query.node.id,
            score,
            query.call_id,
            query.item_key,
            result.ref.arm,
            FeedbackKind.counterfactual.value,
            end.source,
            FeedbackKind.counterfactual,
            self._manager.clock.time(),
            context=query.context,
            weight=1.0 - end.score,  # so much of it failed
            path=(*end.path, instead),
        )
        self._manager.feedback((told,))

    async def _follow(
        self, steps: Steps, query: Query, path: Sequence[CallRef]
    ) -> tuple[float | None, float]:
        """The item's way to its score, and the dollars that it cost."""
        answer: Any = None
        cost = 0.0
        while True:
            # The flow's own functions run off the loop.
            node, value = await asyncio.to_thread(_next, steps, answer)
            if node is None:
                return value, cost
            asked = await self._asked(node, value, query, path)
            cost += 0.0 if asked is None else asked.cost_usd
            if asked is None or asked.error is not None:
                return None, cost
            answer = asked.value

    async def _asked(self, node: str, value: Any, query: Query, path: Sequence[CallRef]) -> CallResult | None:
        """The answer of a node further down: the one from before, where its question has not changed."""
        face = self._manager.interfaces.get((query.node.flow, node))
        if face is None or face.node.mode is Mode.observe:
            return None
        try:
            again = face.bind(value, item_key=query.item_key, position=f"{query.position}~")
        except PromptFieldMissing:
            return None
        before = [known for ref in path if ref.node == node and (known := self._calls.get(ref.call_id))]
        for earlier, result in before:
            if list(earlier.messages) == list(again.messages):
                return CallResult(earlier.call_id, node, result.value)
        arm = before[0][1].ref.arm if before else face.router.policy.choice()
        return None if arm is None else await face.router.ask_again(again, arm)


def _next(steps: Steps, answer: Any) -> tuple[str | None, Any]:
    """The next node to ask, with the value there; None with the score at the end."""
    try:
        return steps.send(answer)
    except StopIteration as end:
        return None, end.value
