"""What a node knows of its arms: scores, costs, choices. Fixed in size, whatever the history."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chainwax.router.instance import LLMInstance
from chainwax.router.learning.context import NOTHING
from chainwax.router.learning.knowledge import Knowledge
from chainwax.router.prices import Price
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
_LEFT = 4.0
"""Scores that an arm's quality counts as after it has changed."""
_GUESSED_TOKENS = (200.0, 64.0)
"""Tokens in and out that a cost is guessed with before a node's first answer."""


@dataclass(slots=True, eq=False)
class ArmState:
    """One arm of one node."""

    arm: Arm
    instance: LLMInstance
    index: int
    """Its place in the arrays of the statistics, for ever."""
    key: str
    """The arm's key."""
    place: int = 0
    """Its column in what the flow's nodes know together."""
    rank: int = 0
    """Its place among those that may be asked, strongest tier first; changes when models come and go."""
    here: bool = True
    """Whether it may be asked; not when its model was withdrawn."""
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
    """Dollars, at today's price."""
    repriced: float = 0.0
    """How much of ``paid`` was never paid, but came by a change of price."""
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
            "cost_usd": self.paid - self.repriced - self.before[0],
            "answers": self.priced - self.before[1],
        }


class NodeStats:
    """The arms of one node, strongest tier first, with a Beta posterior for each arm's quality.

    ``right`` and ``wrong`` have one entry an arm: pseudo-counts of the score in [0, 1]. Arms may come and go;
    one that has gone keeps its place there, and ``arms`` is another list then. What is learned here goes
    into the ``knowledge`` that all nodes of the flow share, too.
    """

    def __init__(
        self, instances: Sequence[LLMInstance], node: str = "", knowledge: Knowledge | None = None
    ) -> None:
        self.node = node
        self.knowledge = Knowledge() if knowledge is None else knowledge
        self._costs: NDArray[np.float64] = np.zeros(0)
        self._tokens = (0, 0)
        self._answers = 0
        self.arms: list[ArmState] = []
        """Those that may be asked."""
        self.places: NDArray[np.intp] = np.zeros(0, dtype=np.intp)
        """Their columns."""
        self.by_key: dict[str, ArmState] = {}
        """Those that were withdrawn too: their scores still come."""
        self.right: NDArray[np.float64] = np.zeros(0)
        self.wrong: NDArray[np.float64] = np.zeros(0)
        self.version = 0
        """Counts what was learned: whoever caches a result of the statistics compares it."""
        for instance in sorted(instances, key=lambda i: _TIER_ORDER.index(i.tier)):
            self.add(instance)
        self.version = 0
        self.spent = 0.0
        """Dollars, all attempts of this node."""
        self.calls = 0
        """Calls that were answered."""
        self.served_scores = 0.0
        self.served_scored = 0.0
        """Sum and number of the scores that came from downstream for answers that were used."""

    def add(self, instance: LLMInstance) -> None:
        """A model may be asked from now on. What was known of its arms, had it been there before, counts."""
        right, wrong = _PRIOR[instance.tier]
        for arm in instance.arms:
            known = self.by_key.get(arm.key)
            if known is None:
                place = self.knowledge.add(arm.key, instance.tier)
                self.by_key[arm.key] = ArmState(arm, instance, len(self.by_key), arm.key, place)
                self.right = np.append(self.right, right)
                self.wrong = np.append(self.wrong, wrong)
            else:
                known.arm, known.instance, known.here = arm, instance, True
        self._arrange()

    def withdraw(self, model: str) -> None:
        """A model may not be asked any more."""
        for state in self.arms:
            state.here = state.here and state.instance.name != model
        self._arrange()

    def reprice(self, instance: LLMInstance, before: Price) -> float:
        """The price of a model has changed: what its calls cost by now is reckoned at the new one.

        Gives back how many times as dear a call of this node is; 1.0 where it was free.
        """
        tokens = self._mean_tokens()
        old, new = before.estimate(*tokens), instance.price.estimate(*tokens)
        for state in self.by_key.values():
            if state.instance is instance and state.priced:
                paid = state.paid * new / old if old > 0 else state.priced * new
                state.repriced += paid - state.paid
                state.paid = paid
        self._costs = np.zeros(0)
        self.version += 1
        return new / old if old > 0 else 1.0

    def _arrange(self) -> None:
        here = [state for state in self.by_key.values() if state.here]
        self.arms = sorted(here, key=lambda s: (_TIER_ORDER.index(s.instance.tier), s.index))
        self.places = np.array([state.place for state in self.arms], dtype=np.intp)
        for rank, state in enumerate(self.arms):
            state.rank = rank
        self._costs = np.zeros(0)
        self.version += 1

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
            self.knowledge.cost(self.node, state.place, attempt.cost_usd)
            if state.priced & (state.priced - 1) == 0:  # at each doubling the mean cost may have moved
                self.version += 1
            if self._answers & (self._answers - 1) == 0:
                self._costs = np.zeros(0)
            elif state.place < len(self._costs):
                self._costs[state.place] = self._guess_cost(state)

    def served(self, state: ArmState) -> None:
        """A call was answered with this arm."""
        state.used += 1
        self.calls += 1

    def quality(self, state: ArmState) -> float:
        """The score that an answer of an arm is expected to get, whatever the prompt."""
        right = float(self.right[state.index])
        return right / (right + float(self.wrong[state.index]))

    def learn(
        self, state: ArmState, score: float, weight: float = 1.0, words: NDArray[np.intp] = NOTHING
    ) -> float:
        """A score arrived, of a call whose context ``words`` are; gives back what was expected."""
        self.count(state, score, weight)
        return self.knowledge.learn(self.node, state.place, words, score, weight)

    def count(self, state: ArmState, score: float, weight: float) -> None:
        """Add a score up; a share of a path's score may be above 1. A negative weight takes back what was
        added before.
        """
        self.right[state.index] = max(self.right[state.index] + weight * score, 1e-3)
        self.wrong[state.index] = max(self.wrong[state.index] + weight * (1.0 - score), 1e-3)
        state.scores += weight * score
        state.scored += weight
        self.version += 1

    def forget(self, state: ArmState) -> None:
        """An arm is no longer what it was: what was learned of it here counts for little from now on."""
        right, wrong = self.right[state.index], self.wrong[state.index]
        scale = min(1.0, _LEFT / (right + wrong))
        self.right[state.index], self.wrong[state.index] = right * scale, wrong * scale
        self.knowledge.forget(self.node, state.place)
        self.version += 1

    def know(self, state: ArmState, right: float, n: int) -> None:
        """An arm was proved before it served: ``n`` answers, ``right`` of them right."""
        self.right[state.index] += right
        self.wrong[state.index] += n - right
        for number in range(n):  # as many right ones, evenly among the wrong
            score = math.floor((number + 1) * right / n) - math.floor(number * right / n)
            self.knowledge.learn(self.node, state.place, NOTHING, float(score))
        self.version += 1

    def costs(self) -> NDArray[np.float64]:
        """Dollars of an arm's next answer here, by its column; not to be changed."""
        if not len(self._costs):
            self._costs = np.zeros(len(self.knowledge.arms) + 1)
            for state in self.arms:
                self._costs[state.place] = self._guess_cost(state)
        return self._costs

    def _guess_cost(self, state: ArmState) -> float:
        sent, made = self._mean_tokens()
        listed = state.instance.price.estimate(round(sent), round(made))
        return self.knowledge.guess_cost(self.node, state.place, state.paid, state.priced, listed)

    def mean_cost(self, state: ArmState) -> float:
        """Dollars for a call: measured, else from the price and the tokens that this node's calls take."""
        if state.priced:
            return state.paid / state.priced
        tokens = self._mean_tokens()
        return state.instance.price.estimate(round(tokens[0]), round(tokens[1]))

    def _mean_tokens(self) -> tuple[float, float]:
        """Tokens in and out that this node's calls take."""
        if not self._answers:
            return _GUESSED_TOKENS
        return self._tokens[0] / self._answers, self._tokens[1] / self._answers

    def by_cost(self, states: Sequence[ArmState]) -> list[ArmState]:
        """Cheapest first; at equal cost the stronger tier first."""
        return sorted(states, key=lambda s: (self.mean_cost(s), s.rank))

    def state(self) -> dict[str, Any]:
        """What was learned of scores, costs and tokens, JSON-ready.

        What this process asked and spent is not in it: the recording tells it.
        """
        costs = self.costs()
        return {
            "version": self.version,
            "arms": {
                s.key: {
                    "quality": [float(self.right[s.index]), float(self.wrong[s.index])],
                    "scores": [s.scores, s.scored],
                    "costs": [s.paid, s.priced, float(costs[s.place])],
                }
                for s in self.arms
            },
            "served": [self.served_scores, self.served_scored],
            "tokens": [*self._tokens, self._answers],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Know what :meth:`state` gave; arms that are no longer there are passed over."""
        guesses: list[tuple[int, float]] = []
        for key, known in state["arms"].items():
            arm = self.by_key.get(key)
            if arm is None:
                continue
            self.right[arm.index], self.wrong[arm.index] = known["quality"]
            arm.scores, arm.scored = known["scores"]
            arm.paid, arm.priced, guess = known["costs"]
            guesses.append((arm.place, guess))
            arm.before = (arm.paid, arm.priced)
        self.served_scores, self.served_scored = state["served"]
        sent, made, self._answers = state["tokens"]
        self._tokens = (sent, made)
        self._costs = np.zeros(0)
        costs = self.costs()
        for place, guess in guesses:
            costs[place] = guess
        # Whoever kept a result of the statistics may go on with it where the arms are the same ones.
        self.version = state["version"] + (state["arms"].keys() != self.by_key.keys())
