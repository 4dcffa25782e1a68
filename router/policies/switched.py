"""``switched``: ask a cheap model, look at its answer, and ask a dearer one where that pays.

The arms up to the strongest, cheapest first, are a chain. An online logistic regression that they share
guesses from the prompt alone what an arm's answer will be scored; another from prompt and answer what the
answer at hand will be. What asking a dearer arm will cost is guessed too: a model that was asked already
tells how long the answer will be. An answer is served where that is worth more than going on:

    price · guess  ≥  price · (guess for the strongest) − cost of asking it

``price`` is what one point of quality is worth in dollars. Where the node's ``worth`` does not state it, it
rises while the expected scores of what is served fall short of ``target`` times the strongest's, and falls
while they are above (dual ascent), so that it settles where the target is kept at the least cost.
Guesses are drawn from their posteriors (Thompson 1933), so that what is not known is tried. An arm whose
answers have lately not saved what they cost is left out, but for a small share of the calls.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chainwax.router.bounded import make_room
from chainwax.router.learning.answers import (
    ANSWER,
    PROMPT,
    Standard,
    answer_features,
    prompt_features,
    prompt_text,
)
from chainwax.router.learning.costs import CostGuess
from chainwax.router.learning.logistic import Logistic, logit, sigmoid
from chainwax.router.learning.packed import generator, pack, resume, unpack
from chainwax.router.policies.base import Plan
from chainwax.router.stats import ArmState, NodeStats
from chainwax.router.types import Attempt, Feedback, NodeSpec, Query, Tier

__all__ = ["Switched"]

_QUALITY = {Tier.strongest: 0.9, Tier.standard: 0.67, Tier.local: 0.5, Tier.custom: 0.5}
"""What an arm's answers are guessed to be worth before the first score."""
_TRIED = 0.02
"""Least share of the calls at which another arm is asked first than the one that is best to ask first."""
_LOOKS = 3
"""Answers of each arm that are looked at in any case."""
_UNKNOWN = (0.5, 10.0)
"""That share where nothing is known of an arm's answers, and after how many it has halved."""
_CHARGE = 0.1
"""What trying a dearer arm may cost, as a share of what the call costs without."""
_LEAST = 0.005
"""What tries may lose where the target leaves nothing, as a share of the strongest's quality."""
_DRAWN = 0.5
"""How far a draw strays from the guess, in deviations of the posterior."""
_STEP = (0.1, 0.01)
"""How quickly the price of quality moves, at first (then as one over the root of the calls) and at last."""
_KEPT = 128
"""Answers of each arm that are remembered, to reckon what asking it is worth at today's price of quality."""
_REMEMBERED = 10_000
"""Calls whose scores are waited for."""
_NOTHING: NDArray[np.float64] = np.zeros(len(ANSWER))


@dataclass(slots=True)
class _Asked:
    """One call: what was seen of it, until its score comes."""

    text: str
    prompt: NDArray[np.float64]
    chain: Sequence[ArmState]
    """The arms that were there, cheapest first, the strongest last; none where it was answered before."""
    seen: NDArray[np.float64]
    """Features of the prompt and of the answer that was seen last."""
    answers: dict[str, tuple[NDArray[np.float64], float]] = field(default_factory=dict)
    """By arm: features of prompt and answer, and the score that was guessed."""
    said: str | None = None
    """The answer before."""
    cost: float = 0.0
    served: str = ""
    expected: float = 0.0
    """Of the served answer's score."""
    best: float = 1.0
    """Expected score of the strongest's."""
    total: float = 0.0
    scores: int = 0


class _Lately:
    """What the last answers of an arm told: how they changed the guesses of score and of the cost to come."""

    def __init__(self) -> None:
        self.shifts: NDArray[np.float64] = np.zeros(_KEPT)
        """Of the score: numbers in [−1, 1]."""
        self.ratios: NDArray[np.float64] = np.ones(_KEPT)
        """Of the strongest's cost: after over before."""
        self.n = 0

    def add(self, shift: float, ratio: float) -> None:
        self.shifts[self.n % _KEPT] = shift
        self.ratios[self.n % _KEPT] = ratio
        self.n += 1

    def saved(self, short: float, price: float, cost: float, onward: float) -> tuple[float, float]:
        """Dollars that an answer is expected to save, and how often it is served, where it is worth more.

        ``short`` is what it is expected to fall short of the strongest's score, by the prompt alone, ``cost``
        the strongest's, and ``onward`` what going on saves.
        """
        n = max(1, min(self.n, _KEPT))  # without any, an answer is taken to tell nothing
        serving = cost * self.ratios[:n] - price * (short - self.shifts[:n])
        return float(np.maximum(serving, onward).mean()), float((serving > onward).mean())

    def state(self) -> list[Any]:
        """All of it, JSON-ready."""
        return [pack(self.shifts), pack(self.ratios), self.n]

    def restore(self, state: list[Any]) -> None:
        """Know what :meth:`state` gave."""
        self.shifts, self.ratios, self.n = unpack(state[0]), unpack(state[1]), state[2]


class _Link:
    """What is known of one arm in the chain, beside its scores."""

    def __init__(self) -> None:
        self.standard = Standard(len(ANSWER))
        self.costs = CostGuess(1 + len(PROMPT) + len(ANSWER))
        self.first = _Lately()
        self.after = _Lately()
        """Where a cheaper arm was asked before."""

    def state(self) -> dict[str, Any]:
        """All of it, JSON-ready."""
        return {
            "standard": self.standard.state(),
            "costs": self.costs.state(),
            "first": self.first.state(),
            "after": self.after.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Know what :meth:`state` gave."""
        self.standard.restore(state["standard"])
        self.costs.restore(state["costs"])
        self.first.restore(state["first"])
        self.after.restore(state["after"])


class Switched:
    """The cheap model's answer where it will do, else the next one's."""

    def __init__(self, node: NodeSpec, stats: NodeStats, seed: int | None = None) -> None:
        self.node = node
        self._stats = stats
        self._random = random.Random(seed)
        self._links: dict[str, _Link] = {}
        self._standard = Standard(len(PROMPT))
        self._by_prompt = Logistic(1 + len(PROMPT))
        """Of answers that were not scored it learns the guesses, so that it knows of those not served too."""
        self._by_answer = Logistic(1 + len(PROMPT) + len(ANSWER))
        # In costs of the strongest. At first an answer is served where what it may lose is what the target
        # leaves.
        self._price = 1.0 / max((1.0 - node.target) * _QUALITY[Tier.strongest], 0.005)
        self._calls: dict[str, _Asked] = {}
        self._plans = 0

    def plan(self, query: Query, arms: Sequence[ArmState]) -> Plan:
        """The chain from the arm that is best to ask first, then the rest for the case that those fail."""
        cheapest_first = self._stats.by_cost(arms)
        chain = cheapest_first[: cheapest_first.index(arms[0]) + 1]
        if len(chain) == 1:
            return Plan((arms[0], *(s for s in cheapest_first if s is not arms[0])))
        text = prompt_text(query.messages)
        prompt = np.concatenate(([1.0], self._standard.take(prompt_features(text))))
        asked = _Asked(text, prompt, chain, np.concatenate((prompt, _NOTHING)))
        for state in chain:
            self._link(state)
        asked.best = self._by_prompt.guess(arms[0].key, prompt)
        make_room(self._calls, _REMEMBERED)
        self._calls[query.call_id] = asked
        first, chance = self._first(asked)
        if first == len(chain) - 1:
            self._serve(asked, arms[0], asked.best)
        ordered = [*chain[first:], *cheapest_first[len(chain) :], *chain[:first]]
        return Plan(ordered, chance, watched=True)

    def choice(self) -> str | None:
        """The arm that answered most."""
        used = max(self._stats.arms, key=lambda s: s.used)
        return used.key if used.used else None

    def escalate(
        self, query: Query, plan: Plan, state: ArmState, attempt: Attempt, value: Any
    ) -> ArmState | None:
        """The next arm that is worth asking, where going on is worth more than the answer."""
        asked = self._calls.get(query.call_id)
        if asked is None or state not in asked.chain:
            return None
        link, strongest = self._link(state), asked.chain[-1]
        link.costs.learn(asked.seen, attempt.cost_usd, self._stats.mean_cost(state))
        if state is strongest:
            return None
        before = self._cost(strongest, asked)
        asked.seen = self._features(asked, link, attempt)
        cost = self._cost(strongest, asked)
        mean, deviation = self._by_answer.predict(state.key, asked.seen)
        guess = sigmoid(mean)
        lately = link.first if asked.said is None else link.after
        usual = self._by_prompt.guess(state.key, asked.prompt)
        lately.add(guess - usual, cost / before if before > 0.0 else 1.0)
        asked.answers[state.key] = asked.seen, guess
        self._by_prompt.learn(state.key, asked.prompt, guess)
        asked.said = attempt.text
        asked.cost += attempt.cost_usd
        price = self._priced(strongest)
        further, onward = self._onward(asked, asked.chain.index(state), price)
        # Serving saves the strongest's cost, and loses what the answer falls short of it.
        worth = asked.best - (cost - onward) / price
        stay = self._chance(mean, deviation, worth, asked.cost, cost)
        if guess < worth:
            # Serving it would be a try: all that tries lose together is what the target leaves.
            slack = max(1.0 - self.node.target, _LEAST) * asked.best
            stay = min(stay, slack / max(asked.best - guess, slack))
        if self._random.random() < stay:
            attempt.propensity = plan.propensity * stay
            self._serve(asked, state, guess)
            return None
        plan.propensity *= 1.0 - stay
        if further == len(asked.chain) - 1:
            self._serve(asked, strongest, asked.best)
        return asked.chain[further]

    def learn(self, feedback: Feedback, earlier: float | None) -> None:
        """Move the guesses for the arm that was served, and what is known of their bias."""
        asked = self._calls.get(feedback.call_id)
        state = self._stats.by_key.get(feedback.arm)
        if asked is None or state is None or state.key not in self._links:
            return
        key = state.key
        before = asked.total / asked.scores if asked.scores else None
        if earlier is None or before is None:
            asked.total += feedback.learned
            asked.scores += 1
        else:
            asked.total += feedback.learned - earlier
        after = asked.total / asked.scores
        # How hard the node is shows in the scores of answers, too, that nobody looked at.
        seen, guess = asked.answers.get(key, (np.concatenate((asked.prompt, _NOTHING)), None))
        weight = feedback.weight
        if before is not None:
            self._by_answer.revise(key, seen, weight * (after - before))
            self._by_prompt.revise(key, asked.prompt, weight * (after - before))
        else:
            self._by_answer.learn(key, seen, after, weight)
            if guess is None:
                self._by_prompt.learn(key, asked.prompt, after, weight)
            else:
                self._by_prompt.revise(key, asked.prompt, weight * (after - guess))
        if before is None and asked.served == key:
            # What was expected has moved the price already; the score puts it right.
            self._move((asked.expected - after) / max(asked.best, 0.05))

    # -- saved state ----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that :meth:`restore` needs, JSON-ready. Calls that are not answered yet are not in it."""
        calls = {call: asked for call, asked in self._calls.items() if asked.served}
        size = len(PROMPT) + 1
        prompts = [asked.prompt for asked in calls.values()]
        return {
            "price": self._price,
            "plans": self._plans,
            "standard": self._standard.state(),
            "by_prompt": self._by_prompt.state(),
            "by_answer": self._by_answer.state(),
            "links": {key: link.state() for key, link in self._links.items()},
            "prompts": pack(np.array(prompts).reshape(len(prompts), size)),
            "calls": [
                [
                    call,
                    asked.served,
                    asked.expected,
                    asked.best,
                    asked.total,
                    asked.scores,
                    {key: [pack(features), guess] for key, (features, guess) in asked.answers.items()},
                ]
                for call, asked in calls.items()
            ],
            "random": generator(self._random),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Know what :meth:`state` gave; arms that are no longer there are passed over."""
        self._price, self._plans = state["price"], state["plans"]
        self._standard.restore(state["standard"])
        self._by_prompt.restore(state["by_prompt"])
        self._by_answer.restore(state["by_answer"])
        for key, known in state["links"].items():
            if key in self._stats.by_key:
                self._link(self._stats.by_key[key]).restore(known)
        self._calls = {}
        for prompt, (call, served, expected, best, total, scores, answers) in zip(
            unpack(state["prompts"]), state["calls"], strict=True
        ):
            seen = {key: (unpack(packed), guess) for key, (packed, guess) in answers.items()}
            self._calls[call] = _Asked(
                "", prompt, (), _NOTHING, seen, None, 0.0, served, expected, best, total, scores
            )
        if "random" in state:
            resume(self._random, state["random"])

    # -- inside ---------------------------------------------------------------------------------

    def _link(self, state: ArmState) -> _Link:
        link = self._links.get(state.key)
        if link is None:
            link = self._links[state.key] = _Link()
            for model in (self._by_prompt, self._by_answer):
                model.add(state.key, _QUALITY[state.instance.tier])
        return link

    def _cost(self, state: ArmState, asked: _Asked) -> float:
        """Dollars that asking an arm now is expected to take."""
        return self._link(state).costs.guess(asked.seen, self._stats.mean_cost(state))

    def _features(self, asked: _Asked, link: _Link, attempt: Attempt) -> NDArray[np.float64]:
        most = self.node.params.max_tokens
        raw = answer_features(
            asked.text,
            attempt.text or "",
            logprob=attempt.logprob,
            before=asked.said,
            cut=most is not None and attempt.usage.output >= most,
        )
        return np.concatenate((asked.prompt, link.standard.take(raw)))

    def _saved(
        self, asked: _Asked, index: int, price: float, lately: _Lately, onward: float
    ) -> tuple[float, float]:
        """Dollars that asking an arm is expected to save against the strongest alone, and their deviation."""
        state = asked.chain[index]
        guess = self._by_prompt.guess(state.key, asked.prompt)
        saved, served = lately.saved(asked.best - guess, price, self._cost(asked.chain[-1], asked), onward)
        doubt = self._by_answer.doubt(state.key) * guess * (1.0 - guess)
        return saved - self._cost(state, asked), price * served * doubt

    def _onward(self, asked: _Asked, here: int, price: float) -> tuple[int, float]:
        """Whom to ask after ``chain[here]``, and the dollars that this saves against the strongest alone."""
        best, saves = len(asked.chain) - 1, 0.0
        for index in range(best - 1, here, -1):
            lately = self._link(asked.chain[index]).after
            saved, _ = self._saved(asked, index, price, lately, saves)
            if saved > saves:
                best, saves = index, saved
        return best, saves

    def _first(self, asked: _Asked) -> tuple[int, float]:
        """Whom to ask first, and the chance of that choice."""
        chain, last = asked.chain, len(asked.chain) - 1
        self._plans += 1
        price = self._priced(chain[-1])
        for index, state in enumerate(chain[:-1]):
            if self._link(state).first.n < _LOOKS:
                return index, 1.0
        values = [(0.0, 0.0)] * (last + 1)
        best = last
        for index in range(last - 1, -1, -1):
            onward = max(values[best][0], 0.0)
            values[index] = self._saved(asked, index, price, self._link(chain[index]).first, onward)
            if values[index][0] > values[best][0]:
                best = index
        chances = [self._tried(asked, index, best, values) / last for index in range(last + 1)]
        chances[best] = 0.0
        chances[best] = 1.0 - sum(chances)
        drawn = self._random.choices(range(last + 1), chances)[0]
        return drawn, chances[drawn]

    def _tried(self, asked: _Asked, index: int, best: int, values: Sequence[tuple[float, float]]) -> float:
        """The chance that asking ``chain[index]`` first deserves, were it the only one beside the best."""
        state, strongest = asked.chain[index], len(asked.chain) - 1
        n = self._by_prompt.counts[state.key] if index == strongest else self._link(state).first.n
        share, half = _UNKNOWN
        tried = max(_TRIED, share * half / (half + n))
        if index > best:
            dearer = max(self._cost(state, asked), 1e-12)
            tried = min(tried, _CHARGE * self._cost(asked.chain[best], asked) / dearer)
        if index == strongest:
            return tried
        gap = values[best][0] - values[index][0]
        deviation = math.hypot(values[best][1], values[index][1])
        return max(tried, 0.5 * math.erfc(gap / (math.sqrt(2.0) * max(deviation, 1e-12))))

    def _priced(self, strongest: ArmState) -> float:
        """Dollars for a point of quality; never 0."""
        if self.node.worth is not None:
            return self.node.worth
        return self._price * max(self._stats.mean_cost(strongest), 1e-9)

    def _chance(self, mean: float, deviation: float, worth: float, paid: float, cost: float) -> float:
        """The probability of serving: that the score's odds, as far as is known, are above ``worth``."""
        bar = logit(worth)
        if worth <= 0.0:
            stay = 1.0
        elif worth >= 1.0:
            stay = 0.0
        else:
            stay = 0.5 * math.erfc((bar - mean) / (_DRAWN * deviation * math.sqrt(2.0) + 1e-12))
        least = min(_TRIED, 1.0 - self.node.target) / 2.0
        most = 1.0 - min(_TRIED, _CHARGE * paid / cost if cost > 0 else 1.0)
        return min(max(stay, least), most)

    def _serve(self, asked: _Asked, state: ArmState, expected: float) -> None:
        """An answer is served: where it is expected to fall short of the target, quality gets dearer."""
        asked.served, asked.expected = state.key, expected
        self._move((self.node.target * asked.best - expected) / max(asked.best, 0.05))

    def _move(self, by: float) -> None:
        """Make quality dearer, where the answers fall short ``by`` that share of the strongest's quality."""
        # Where the target leaves little, little is much.
        by *= max(_STEP[0] / math.sqrt(1.0 + self._plans / 10), _STEP[1]) / (1.05 - self.node.target)
        self._price = min(max(self._price * math.exp(by), 1e-4), 1000.0)
