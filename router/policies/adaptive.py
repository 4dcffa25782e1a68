"""``adaptive``: for each call, the arm that is worth most by what its prompt leads one to expect.

What an arm's answer will probably be scored comes from what all nodes of the flow have learned
(:mod:`chainwax.router.learning.knowledge`): of the arm, of the node, of the arm at the node, and of the
prompt's words. The scores are drawn from that belief (Thompson 1933), and the arm is asked for which

    price · score drawn − cost

is greatest. ``price``, the dollars that a point of quality is worth, is the node's ``worth``; else the
least that keeps its ``target``, or the greatest that keeps its ``pace``
(:mod:`chainwax.router.learning.price`). The chance of an arm is reckoned from many draws at once and logged
as its propensity.

Each node with a target of its own keeps it by itself: where what it serves is expected to fall short, quality
is dearer there than elsewhere, whatever the others' price is. Nodes that share their flow's target have but
the one price: each is asked for as much quality as a dollar buys there (:mod:`chainwax.router.flow_target`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chainwax.router.learning import kernel
from chainwax.router.learning.context import NOTHING, decode
from chainwax.router.learning.price import FIRST, Price
from chainwax.router.policies.base import Plan
from chainwax.router.stats import ArmState, NodeStats
from chainwax.router.types import NodeSpec, Query, Tier

__all__ = ["Adaptive"]

_DRAWN = 0.15
"""How far a draw strays from what is expected, in deviations of the belief."""
_DRAWN_LATE = 2.7
"""How many times as far where an arm has come that nobody knows, while the others are known."""
_DRAWS = 256
"""Numbers drawn for one call: for each arm as many as that makes, at least sixteen."""
_DEAR = 100.0
"""What a point is worth before anything is known, in costs of the strongest: quality first."""
_GIVEN = 0.02
"""All that a target lets be lost is worth at least this share of what the strongest costs. A model that is
hardly cheaper than the next and much worse saves next to nothing, and would spend what others could save by.
"""
_FREE = 1e-9
"""Dollars that a point is worth at least, where the strongest costs nothing."""
_STEP = 1.0
"""How quickly a node's own factor of the price moves: by so much of what a call falls short."""
_MOST = 5.0
"""The factor is at most e to this, and at least its inverse."""
_LAST = 256
"""Calls that a mean goes back over."""
_LOOKS = 0.5
"""How often the strongest is asked whatever is expected of it: with so much of a chance, times what the
target would be missed by were its answers perfect, over the root of the calls so far. What that costs of a
call falls to nothing, and what is known of the strongest still grows without end.
"""
_SLOW_AFTER = 20
"""Answers after which a measured latency counts against a node's wanted one."""


class Adaptive:
    """The arm that is worth most, as far as is known."""

    def __init__(self, node: NodeSpec, stats: NodeStats, seed: int | None = None) -> None:
        self.node = node
        self._stats = stats
        self._knowledge = stats.knowledge
        probation = stats.knowledge.probation
        probation.way = max(probation.way, node.depth + 1)
        self._random = np.random.default_rng(seed)
        self._factor = 0.0
        """Logarithm of the node's own factor of the price."""
        self._target = node.target
        """What the factor is for."""
        self._priced_for: NodeSpec | None = None
        self._shared = Price()
        """The common price, of what that node wants."""
        self._seen = 0
        self._strongest = self._bought = 0.0
        """Means of the last calls: what the strongest, and what the chosen arm, was expected to be scored."""

    @property
    def price(self) -> float:
        """Dollars that one point of quality, from 0 to 1, is worth to the node now."""
        if self.node.worth is not None:
            return self.node.worth
        value = self._price().value
        cost = float(self._stats.costs()[self._stats.arms[0].place])
        if not self._has_target:
            return value or _dear(cost)
        return self._own(value or _dear(cost), self._least(self._strongest, cost))

    @property
    def bought(self) -> float | None:
        """The share of the strongest's score that the last calls were expected to get; None before them."""
        return self._bought / self._strongest if self._seen >= FIRST else None

    def plan(self, query: Query, arms: Sequence[ArmState]) -> Plan:
        """Draw an arm; stronger ones follow it for the case that it fails or answers invalidly."""
        arms = self._quick_enough(arms)
        if len(arms) == 1:
            return Plan((arms[0],))
        if self._target != self.node.target and self.node.flow_target is None:
            self._target, self._factor = self.node.target, 0.0
        places = self._places(arms)
        scores, doubt = self._knowledge.scores(self._stats.node, decode(query.context))
        mean = scores[places]
        cost = self._stats.costs()[places]
        spread = np.empty(len(arms))
        # What saves nothing beside the strongest is not tried; it is asked where it is known to be better.
        kernel.spread(spread, mean, doubt[places], cost, _DRAWN)
        if self._knowledge.late:
            spread *= [_DRAWN_LATE if place in self._knowledge.late else 1.0 for place in places.tolist()]
        rows = max(16, _DRAWS // len(arms))
        normals = self._random.standard_normal((rows, len(arms)))
        price = self._priced(places, mean + spread * normals[0], mean, cost)
        chosen, wins = kernel.best(mean, spread, cost / price, normals)
        chance = wins / rows
        # An arm of the node's own was proved before it served.
        held = self._held and arms[chosen].instance.tier is not Tier.custom
        if held:
            chosen, chance = 0, 1.0
        elif self._has_target:
            chosen, chance = self._looked(chosen, chance, float(mean[chosen]))
        if self._waits:
            self._knowledge.probation.call(other=chosen > 0)
        if self.node.worth is None:
            shared = self._price()
            shared.spent += float(cost[chosen])
            self._note(float(mean[0]), float(mean[chosen]))
            if not held and self.node.pace is None and not self._shares:
                short = self.node.target * mean[0] - mean[chosen]
                self._factor = min(max(self._factor + _STEP * float(short), -_MOST), _MOST)
        # Stronger ones in turn, up to the strongest; after that the rest.
        return Plan(arms[chosen::-1] if chosen else arms, chance)

    def _looked(self, chosen: int, chance: float, expected: float) -> tuple[int, float]:
        """The strongest in place of what was chosen now and then, with the chance of what is asked then.

        A target is a share of what the strongest is worth here, and where it is never asked that is a guess:
        a wrong one would never be found out. ``expected`` is the score to expect of what was chosen.
        """
        missed = max(self.node.target - expected, 0.0)
        look = _LOOKS * missed / math.sqrt(self._seen + 1.0)
        if chosen and self._random.random() >= look:
            return chosen, (1.0 - look) * chance
        return 0, look if chosen else look + (1.0 - look) * chance

    def choice(self) -> str | None:
        """The arm for a call of which nothing is known but the node. Draws nothing."""
        arms = self._quick_enough(self._stats.arms)
        if not arms:
            return None
        if self._held:
            return arms[0].key
        places = self._places(arms)
        mean = self._knowledge.scores(self._stats.node, NOTHING)[0][places]
        worth = mean - self._stats.costs()[places] / self.price
        return arms[int(worth.argmax())].key

    def state(self) -> dict[str, Any]:
        """What is the node's alone, and where the random generator stands."""
        return {
            "factor": self._factor,
            "bought": [self._seen, self._strongest, self._bought],
            "random": self._random.bit_generator.state,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as :meth:`state` said."""
        self._factor = state["factor"]
        self._seen, self._strongest, self._bought = state["bought"]
        if "random" in state:
            self._random.bit_generator.state = state["random"]

    def _places(self, arms: Sequence[ArmState]) -> NDArray[np.intp]:
        """The columns of arms."""
        stats = self._stats
        return stats.places if arms is stats.arms else np.array([s.place for s in arms], dtype=np.intp)

    def _priced(
        self,
        places: NDArray[np.intp],
        drawn: NDArray[np.float64],
        mean: NDArray[np.float64],
        cost: NDArray[np.float64],
    ) -> float:
        """The price for a call, which is kept to reckon with."""
        if self.node.worth is not None:
            return self.node.worth
        shared = self._price()
        # Nodes that share a flow's target count in shares of what the strongest is worth at each.
        unit = self._strongest if self._shares and self._seen else 1.0
        wanted = self.node.target * float(mean[0]) / unit
        told = (drawn, mean) if unit == 1.0 else (drawn / unit, mean / unit)
        shared.note(places, *told, cost, wanted, len(self._knowledge.arms))
        if self.node.pace is not None:
            return shared.for_pace(self.node.pace)
        if self._shares and not self._waits and self._stats.arms[0].asked < FIRST:
            # What the strongest is worth at this node no other node's calls can tell. At the flow's
            # beginning, when nothing is known of any, the probation keeps what may be lost in bounds.
            return math.inf
        known = shared.calls >= FIRST or all(state.scored >= FIRST for state in self._stats.arms)
        fallback = 0.0 if known else _dear(float(cost[0]))
        least, common = self._least(float(mean[0]), float(cost[0])), shared.for_target(fallback)
        # A factor that has no effect must not grow: it would have to come back before it had one again.
        self._factor = max(self._factor, min(math.log(least / common), 0.0))
        return self._own(common, least)

    def _least(self, strongest: float, cost: float) -> float:
        """The price at which all that the target lets be lost would go for next to nothing.

        ``strongest`` is the score to expect of the strongest, and ``cost`` what it costs.
        """
        # Of a flow's target a node may get next to nothing to lose: what counts is what all lose together.
        shared = self._price()
        target = shared.wanted if self._shares and shared.calls else self.node.target
        return max(_GIVEN * cost / max((1.0 - target) * strongest, 1e-3), _FREE)

    def _own(self, common: float, least: float) -> float:
        """The node's own price, where ``common`` is that of all nodes with its target.

        Its factor counts from ``least``: where others drive the common price down, a node that falls short
        would otherwise have to multiply next to nothing.
        """
        if self._shares:
            return max(common / self._strongest if self._seen else common, least)
        return max(max(common, least) * math.exp(self._factor), least)

    @property
    def _waits(self) -> bool:
        """Whether it is not known yet how good arms are that are cheaper than the strongest."""
        return self._has_target and self._knowledge.on_probation

    @property
    def _held(self) -> bool:
        """Whether they have to wait for their first scores."""
        return self._waits and self._knowledge.probation.closed(self.node.target)

    @property
    def _has_target(self) -> bool:
        """Whether it is a target that the node keeps."""
        return self.node.worth is None and self.node.pace is None

    @property
    def _shares(self) -> bool:
        """Whether the node has but a part of its flow's target."""
        return self.node.flow_target is not None and self.node.pace is None

    def _note(self, strongest: float, chosen: float) -> None:
        self._seen += 1
        step = 1.0 / min(self._seen, _LAST)
        self._strongest += step * (strongest - self._strongest)
        self._bought += step * (chosen - self._bought)

    def _price(self) -> Price:
        """The price that all nodes of the flow with the same wish have in common."""
        node = self.node
        if node is not self._priced_for:
            if node.pace is not None:
                wish = f"pace {node.pace}"
            elif node.flow_target is None:
                wish = f"target {node.target}"
            else:  # what a dollar buys of a flow's end result is to be the same at each of its nodes
                wish = f"flow {node.flow_target}"
            self._priced_for, self._shared = node, self._knowledge.price(wish)
        return self._shared

    def _quick_enough(self, arms: Sequence[ArmState]) -> Sequence[ArmState]:
        wanted = self.node.latency
        if wanted is None:
            return arms
        quick = [
            s for s in arms if s.asked < _SLOW_AFTER or (s.instance.recorder.latency_p95() or 0.0) <= wanted
        ]
        return quick or arms


def _dear(cost: float) -> float:
    """The price of quality before anything is known, where the strongest costs so much."""
    return _DEAR * max(cost, 1e-9)
