"""What the nodes of a flow know together: which scores to expect of which arm, and what its calls cost.

The expected score of an arm's answer is a logistic regression whose terms shrink towards what is common
(partial pooling): a level for all; one for the arm, which the tiers' order is the prior of; one for the node;
one for the arm at the node; and the prompt's words, each with a weight for all arms (how hard the words make
it) and one for the arm. The belief is Gaussian and is moved by one Newton step for each score (AdPredictor's
online learning, Graepel et al. 2010, with the logistic's curvature in place of the probit's), so that a score
costs the same however much was learned before. Levels and arms are correlated in it
(:mod:`chainwax.router.learning.pooled`), words are not.

What all arms have in common is learned from the scores of every arm. Where one model's answers go wrong the
others' probably do too, and what a dearer one is worth there is known before it is asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chainwax.router.credit import information
from chainwax.router.learning import kernel
from chainwax.router.learning.context import PLACES
from chainwax.router.learning.logistic import sigmoid
from chainwax.router.learning.packed import pack, unpack
from chainwax.router.learning.pooled import Pooled
from chainwax.router.learning.price import Price
from chainwax.router.learning.probation import Probation
from chainwax.router.types import Tier

__all__ = ["Knowledge", "NodeKnowledge"]

_LEVEL = (1.7, 1.0)
"""Mean and variance of the log-odds of a score, before the first."""
_TIERS = {
    Tier.strongest: (0.0, 0.02),
    Tier.standard: (-0.05, 0.1),
    Tier.local: (-0.6, 0.6),
    Tier.custom: (-0.8, 0.4),
}
"""Mean and variance of an arm's own log-odds. A standard model is taken to be nearly as good as the
strongest, and of the others little is claimed."""
_NODE = 0.8
"""Variance of a node's level."""
_AT_NODE = {Tier.strongest: 0.1, Tier.standard: 0.3, Tier.local: 0.6, Tier.custom: 0.6}
"""Variance of what sets an arm apart at a node: small models have strong and weak sides."""
_WORD, _WORD_ARM = 0.5, 0.1
"""Variances of the sum of the words' weights: what they have in common, and for each arm at least."""
_UNLIKE, _MOST_UNLIKE = 1.0, 0.2
"""For each arm it is this over the number of nodes where that is more, and at most the second. Models have
strong and weak sides: where each task has a node, :data:`_AT_NODE` tells of them, and where few nodes are
asked for all of them, it is the prompts that do. Not more, for words that stand in every prompt would then be
blamed for what a node's own term is to learn.
"""
_CHANGED = 1.0
"""Variance of an arm at a node that has changed."""
_CURVE = 0.04
"""Least curvature of a score: an expectation that is all but certain must still be able to be wrong."""
_LEAST_SCATTER = 0.1
"""No score tells more than ten that are right or wrong."""
_KNOWN = 50
"""Answers of an arm after which it is known whether it is worth more of them."""
_PSEUDO = 3.0
"""Answers that the common cost of an arm counts as at a node."""


class NodeKnowledge:
    """One node's own terms: its level and the arms' differences there."""

    __slots__ = ("answers", "factor", "graded", "terms", "wide")

    def __init__(self) -> None:
        self.terms = Pooled((0.0, _NODE))
        self.factor = 0.0
        """Sum over its answers of what they cost, in mean costs of their arms."""
        self.answers = 0
        self.graded = self.wide = 0.0
        """Sums over its scores s of s·(1 − s), and of the same of what was expected."""


class Knowledge:
    """The terms of all nodes of a flow. Arms are numbered as they come; column 0 is what they share."""

    def __init__(self) -> None:
        self.arms: dict[str, int] = {}
        """By key: the arm's column."""
        self.terms = Pooled(_LEVEL)
        self.words: NDArray[np.float64] = np.zeros((PLACES, 2, 1))
        """Means and variances of the words' weights, shape (PLACES, 2, arms + 1)."""
        self.words[:, 1] = _WORD
        self.graded = self.wide = 0.0
        """As of a node, of all of them."""
        self.nodes: dict[str, NodeKnowledge] = {}
        self.probation = Probation()
        self.late: dict[int, int] = {}
        """Columns of arms that came after the first answers, with the answers until they are known."""
        self._tiers: list[Tier] = []
        """By column, from 1."""
        self._strongest = 0
        """Column of the first arm of the strongest tier; 0 where there is none."""
        self._prices: dict[str, Price] = {}
        self.paid: NDArray[np.float64] = np.zeros(1)
        """Dollars by column, at today's prices."""
        self.priced: NDArray[np.float64] = np.zeros(1)
        """Answers that they were paid for."""

    def add(self, key: str, tier: Tier) -> int:
        """The column of an arm; a new one begins with its tier's prior."""
        place = self.arms.get(key)
        if place is None:
            place = self.arms[key] = len(self.arms) + 1
            if tier is Tier.strongest and not self._strongest:
                self._strongest = place
            self._tiers.append(tier)
            # An arm of a node's own was proved before it came.
            if self.priced.any() and tier is not Tier.custom:
                self.late[place] = _KNOWN
            mean, var = _TIERS[tier]
            self.terms.add(mean, var)
            self.words = np.pad(self.words, ((0, 0), (0, 0), (0, 1)))
            self.words[:, 1, place] = self._word_arm if self.wide else _WORD_ARM
            self.paid, self.priced = np.append(self.paid, 0.0), np.append(self.priced, 0.0)
        return place

    def node(self, node: str) -> NodeKnowledge:
        """A node's own terms, for all arms that are there."""
        known = self.nodes.get(node)
        if known is None:
            known = self.nodes[node] = NodeKnowledge()
        have = len(known.terms) - 1
        if have < len(self._tiers):
            for tier in self._tiers[have:]:
                known.terms.add(0.0, _AT_NODE[tier])
        return known

    @property
    def _word_arm(self) -> float:
        """Prior variance of the words' weights for each arm, by the nodes known so far."""
        return min(max(_UNLIKE / max(len(self.nodes), 1), _WORD_ARM), _MOST_UNLIKE)

    @property
    def on_probation(self) -> bool:
        """Whether too few scores of arms other than the strongest have come yet."""
        return self._strongest > 0 and not self.probation.over

    def price(self, wish: str) -> Price:
        """The price of quality of all nodes that want the same; ``wish`` says what."""
        price = self._prices.get(wish)
        if price is None:
            price = self._prices[wish] = Price()
        return price

    def scores(self, node: str, words: NDArray[np.intp]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The score to expect of each arm, shape (arms + 1,), and the variance of its log-odds' own part.

        ``words`` are the numbers of a context. Column 0 stands for no arm.
        """
        terms, own = self.terms, self.node(node).terms
        out = np.empty((2, len(terms)))
        kernel.expect(
            out,
            words,
            self.words,
            *(terms.mean, terms.own, terms.keeps, terms.level),
            *(own.mean, own.own, own.keeps, own.level),
        )
        return out[0], out[1]

    def expected(self, node: str, place: int, words: NDArray[np.intp]) -> float:
        """The score to expect of one arm's answer."""
        return float(self.scores(node, words)[0][place])

    def learn(
        self,
        node: str,
        place: int,
        words: NDArray[np.intp],
        score: float,
        weight: float = 1.0,
        others: float = 1.0,
    ) -> float:
        """Take in a score in [0, 1], which counts as ``weight`` scores; gives back what was expected.

        Of a path's score it is the call's own part: that score over what the ``others`` were expected to get.
        """
        known = self.node(node)
        if not self.wide:  # the first score: by now the flow's nodes are known
            self.words[:, 1, 1:] = self._word_arm
        own = known.terms
        odds = sum(terms.mean.item(column) for terms in (self.terms, own) for column in (0, place))
        common, here = self.terms.variance_of(place), own.variance_of(place)
        count = len(words)
        said = 0.0
        if count:
            weights, said = kernel.said(self.words, words, self.words.shape[2], place)
            odds += weights / math.sqrt(count)
            said /= count
        guess = sigmoid(odds)
        weight /= self._scatter(known, score, guess, others)
        if self.on_probation and place != self._strongest:
            # A share of a path's score leaves open the rest of what the call was worth.
            seen = min(weight, 1.0)
            worth = seen * score + (1.0 - seen) * guess
            self.probation.heard(worth, self.expected(node, self._strongest, words))
        curve = weight * max(guess * (1.0 - guess), _CURVE)
        doubt = 1.0 + curve * (common + here + said)
        move = weight * (score - guess) / doubt
        self.terms.learn(place, move, curve / (doubt - curve * common))
        own.learn(place, move, curve / (doubt - curve * here))
        if count:
            by, shrink = move / math.sqrt(count), curve / (doubt * count)
            kernel.move(self.words, words, self.words.shape[2], place, by, shrink)
        return guess

    def _scatter(self, own: NodeKnowledge, score: float, guess: float, others: float) -> float:
        """The variance of scores like this one, as a share of what it is where answers are right or wrong.

        Graded scores scatter less, and each tells the more for it (the dispersion of a quasi-likelihood,
        Wedderburn 1974): a variable of mean m varies by m·(1 − m) less the mean of s·(1 − s). What is known
        of the node, and where that is little, of the flow.
        """
        wide = max(guess * (1.0 - guess), _CURVE)
        graded = score * (1.0 - score)
        if others < 1.0:
            # A call's part of a path's score scatters with the whole path. Its weight says so already.
            graded = wide - information(guess, others) * (guess * (1.0 - guess) - graded)
        self.graded += graded
        self.wide += wide
        own.graded += graded
        own.wide += wide
        common = self.graded / (self.wide + 1.0)
        return min(max(1.0 - (own.graded + common) / (own.wide + 1.0), _LEAST_SCATTER), 1.0)

    def revise(self, node: str, place: int, words: NDArray[np.intp], by: float) -> None:
        """A score that was learned has changed by ``by``: the step that it made changes in proportion."""
        own = self.node(node).terms
        doubt = self.terms.variance_of(place) + own.variance_of(place)
        count, width = len(words), self.words.shape[2]
        if count:
            doubt += kernel.said(self.words, words, width, place)[1] / count
        move = by / (1.0 + _CURVE * doubt)
        self.terms.shift(place, move)
        own.shift(place, move)
        if count:
            kernel.move(self.words, words, width, place, move / math.sqrt(count), 0.0)

    def forget(self, node: str, place: int) -> None:
        """Be as unsure of an arm at a node as before its first score, for it has changed."""
        self.node(node).terms.forget(place, _CHANGED)

    # -- costs ----------------------------------------------------------------------------------

    def cost(self, node: str, place: int, dollars: float) -> None:
        """An answer of an arm cost so much."""
        self.paid[place] += dollars
        self.priced[place] += 1.0
        mean = self.paid[place] / self.priced[place]
        own = self.node(node)
        own.answers += 1
        if place in self.late:
            self.late[place] -= 1
            if not self.late[place]:
                del self.late[place]
        own.factor += min(dollars / mean, 10.0) if mean > 0.0 else 1.0

    def guess_cost(self, node: str, place: int, paid: float, priced: int, listed: float) -> float:
        """Dollars of an arm's next answer at a node, where ``priced`` answers there cost ``paid`` in all.

        ``listed`` is what it costs by its price, where nobody knows more. A node whose answers are long is
        dear with every model.
        """
        common = (self.paid[place] + _PSEUDO * listed) / (self.priced[place] + _PSEUDO)
        own = self.node(node)
        factor = (own.factor + _PSEUDO) / (own.answers + _PSEUDO)
        return float((paid + _PSEUDO * common * factor) / (priced + _PSEUDO))

    def reprice(self, key: str, factor: float) -> None:
        """An arm's calls cost so many times what they did."""
        place = self.arms.get(key)
        if place is not None:
            self.paid[place] *= factor

    # -- saved state ----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All of it, JSON-ready, to the last bit."""
        return {
            "arms": list(self.arms),
            "common": self.terms.state(),
            "scatter": [self.graded, self.wide],
            "probation": self.probation.state(),
            "late": [[key, left] for key, place in self.arms.items() if (left := self.late.get(place))],
            "costs": [pack(self.paid), pack(self.priced)],
            "words": pack(self.words),
            "nodes": {
                node: [own.terms.state(), own.factor, own.answers, own.graded, own.wide]
                for node, own in self.nodes.items()
            },
            "prices": {wish: price.state() for wish, price in self._prices.items()},
        }

    def restore(self, state: Mapping[str, Any], tiers: Mapping[str, Tier]) -> None:
        """Know what :meth:`state` gave. ``tiers`` are those of the arms that are there now, by key."""
        saved = {key: place for place, key in enumerate(state["arms"], 1)}
        for key in saved:
            self.add(key, tiers.get(key, Tier.standard))
        to = np.array([0, *(self.arms[key] for key in saved)])
        self.terms.restore(state["common"], to)
        self.graded, self.wide = state["scatter"]
        self.probation.restore(state["probation"])
        self.late = {self.arms[key]: left for key, left in state["late"]}
        self.paid[to], self.priced[to] = (unpack(packed) for packed in state["costs"])
        self.words[:, :, to] = unpack(state["words"])
        for node, (terms, *own_sums) in state["nodes"].items():
            own = self.node(node)
            own.terms.restore(terms, to)
            own.factor, own.answers, own.graded, own.wide = own_sums
        for wish, known in state["prices"].items():
            self.price(wish).restore(known, to)
