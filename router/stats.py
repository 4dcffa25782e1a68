"""What a node knows of its arms: scores, costs, choices. Fixed in size, whatever the history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chainwax.router.instance import LLMInstance
from chainwax.router.recorder import wilson
from chainwax.router.types import Arm, Attempt, Tier

__all__ = ["ArmState", "NodeStats"]

_TIER_ORDER = (Tier.strongest, Tier.standard, Tier.local, Tier.custom)
_PRIOR = {
    # (right, wrong) that a tier starts with. The strongest is taken to be good at most things; of the
    # others little is claimed, and what is claimed keeps a new node from starting at the cheapest.
    Tier.strongest: (9.0, 1.0),
    Tier.standard: (2.0, 1.0),
    Tier.local: (1.0, 1.0),
    Tier.custom: (1.0, 1.0),
}
_GUESSED_TOKENS = (200.0, 64.0)
"""Tokens in and out that a cost is guessed with before a node's first answer."""


@dataclass(slots=True, eq=False)
class ArmState:
    """One arm of one node."""

    arm: Arm
    instance: LLMInstance
    index: int
    key: str
    """The arm's key."""
    asked: int = 0
    """Attempts, failed ones and shadows included."""
    used: int = 0
    """Calls that were answered with this arm."""
    invalid: int = 0
    scores: float = 0.0
    """Sum of scores."""
    scored: float = 0.0
    """Number of scores."""
    paid: float = 0.0
    """Dollars."""
    priced: int = 0
    """Attempts that answered, which ``paid`` is spread over."""
    before: tuple[float, int] = (0.0, 0)
    """What ``paid`` and ``priced`` were in a saved state: others' costs tell of this process's too."""

    def as_json(self) -> dict[str, Any]:
        """For reports."""
        low, high = wilson(self.scores, self.scored)
        return {
            "model": self.instance.name,
            "tier": self.instance.tier.value,
            "simulated": self.instance.backend.simulated,
            "asked": self.asked,
            "used": self.used,
            "invalid": self.invalid,
            "score": self.scores / self.scored if self.scored else None,
            "score_low": low if self.scored else None,
            "score_high": high if self.scored else None,
            "scores": self.scored,
            "cost_usd": self.paid - self.before[0],
            "answers": self.priced - self.before[1],
        }


class NodeStats:
    """The arms of one node, strongest tier first, with a Beta posterior for each arm's quality.

    ``right`` and ``wrong`` have one entry an arm: pseudo-counts of the score in [0, 1].
    """

    def __init__(self, instances: Sequence[LLMInstance]) -> None:
        ordered = sorted(instances, key=lambda i: _TIER_ORDER.index(i.tier))
        self.arms = [ArmState(arm, instance, 0, arm.key) for instance in ordered for arm in instance.arms]
        for index, state in enumerate(self.arms):
            state.index = index
        self.by_key = {state.key: state for state in self.arms}
        self.right: NDArray[np.float64] = np.array([_PRIOR[s.instance.tier][0] for s in self.arms])
        self.wrong: NDArray[np.float64] = np.array([_PRIOR[s.instance.tier][1] for s in self.arms])
        self.version = 0
        """Counts what was learned: whoever caches a result of the statistics compares it."""
        self.spent = 0.0
        """Dollars, all attempts of this node."""
        self.calls = 0
        """Calls that were answered."""
        self.served_scores = 0.0
        self.served_scored = 0.0
        """Sum and number of the scores that came from downstream for answers that were used."""
        self._tokens = (0, 0)
        self._answers = 0

    def asked(self, state: ArmState, attempt: Attempt, answered: bool) -> None:
        """An attempt was made."""
        state.asked += 1
        self.spent += attempt.cost_usd
        if answered:
            usage = attempt.usage
            self._answers += 1
            self._tokens = (self._tokens[0] + usage.input, self._tokens[1] + usage.output)
            state.paid += attempt.cost_usd
            state.priced += 1
            if state.priced & (state.priced - 1) == 0:  # at each doubling the mean cost may have moved
                self.version += 1

    def served(self, state: ArmState) -> None:
        """A call was answered with this arm."""
        state.used += 1
        self.calls += 1

    def learn(self, state: ArmState, score: float, weight: float = 1.0) -> None:
        """A score arrived. A negative weight takes back what was learned before."""
        self.right[state.index] = max(self.right[state.index] + weight * score, 1e-3)
        self.wrong[state.index] = max(self.wrong[state.index] + weight * (1.0 - score), 1e-3)
        state.scores += weight * score
        state.scored += weight
        self.version += 1

    def mean_cost(self, state: ArmState) -> float:
        """Dollars for a call: measured, else from the price and the tokens that this node's calls take."""
        if state.priced:
            return state.paid / state.priced
        tokens = _GUESSED_TOKENS
        if self._answers:
            tokens = (self._tokens[0] / self._answers, self._tokens[1] / self._answers)
        return state.instance.price.estimate(round(tokens[0]), round(tokens[1]))

    def by_cost(self, states: Sequence[ArmState]) -> list[ArmState]:
        """Cheapest first; at equal cost the stronger tier first."""
        return sorted(states, key=lambda s: (self.mean_cost(s), s.index))

    def state(self) -> dict[str, Any]:
        """What was learned of scores, costs and tokens, JSON-ready.

        What this process asked and spent is not in it: the recording tells it.
        """
        return {
            "version": self.version,
            "arms": {
                s.key: {
                    "quality": [float(self.right[s.index]), float(self.wrong[s.index])],
                    "scores": [s.scores, s.scored],
                    "costs": [s.paid, s.priced],
                }
                for s in self.arms
            },
            "served": [self.served_scores, self.served_scored],
            "tokens": [*self._tokens, self._answers],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Know what :meth:`state` gave; arms that are no longer there are passed over."""
        for key, known in state["arms"].items():
            arm = self.by_key.get(key)
            if arm is None:
                continue
            self.right[arm.index], self.wrong[arm.index] = known["quality"]
            arm.scores, arm.scored = known["scores"]
            arm.paid, arm.priced = known["costs"]
            arm.before = (arm.paid, arm.priced)
        self.served_scores, self.served_scored = state["served"]
        sent, made, self._answers = state["tokens"]
        self._tokens = (sent, made)
        # Whoever kept a result of the statistics may go on with it where the arms are the same ones.
        self.version = state["version"] + (state["arms"].keys() != self.by_key.keys())
