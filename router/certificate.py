"""Whether a node keeps its target: an answer that may be read at any time and is right 19 times in 20.

At a known share of its calls a node asks the strongest model too. Such a *pair* tells what the node's own
answer is worth beside the strongest's:

* Where both are the same (or the strongest gave the node's own), so are their scores.
* Where they differ, a fair coin says which of the two is served, and the score of that one tells of both:
  with a centre ``c`` that was fixed before, ``c + 2·(score − c)`` where the answer was served and ``c`` where
  it was not has the answer's score as its mean (inverse propensity with a baseline; Robins et al. 1994).

Each scored pair gives one number *x* in [−1.8, 1.8] whose mean is the *margin* of that call: the expected
score of the node's own answer less ``target`` times that of the strongest's. For fixed bets λ the capital
``∏ (1 + λ·x)`` is a betting martingale (Waudby-Smith and Ramdas 2024). Because λ does not change,
``∏ (1 + λ·x)·exp(−λ·Σ margin)`` is a supermartingale whatever the margins do, so that Ville's inequality on
the mean over a grid of λ bounds the *running mean* of the margins at all times at once, drift included.

What is claimed, with the error :data:`ALPHA` for all claims of a run together:

* ``met``: the mean margin of the pairs that were scored since the epoch began is not below 0. It is taken
  back when the capital no longer says so.
* ``not met``: that mean is below 0; or lately it is: a running sum that forgets (CUSUM; as an e-detector,
  Shin, Ramdas and Rinaldo 2023) has passed :data:`LATELY`, which while the target is met happens at most once
  in that many scored pairs on average. A new epoch begins then, with a share of the error that sums up.

A pair's chance is fixed before the call, so pairs stand for the calls among which they were drawn. Scores
that are missing must be missing whatever they would have been.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chainwax.router.bounded import make_room
from chainwax.router.learning.packed import generator, resume
from chainwax.router.types import Decision

__all__ = ["ALPHA", "Certificate", "Certified", "certified_flow", "certified_json"]

ALPHA = 0.05
"""Chance of ever saying ``met`` wrongly, and of ever saying ``not met`` wrongly by the running mean."""
LATELY = 1000.0
"""Scored pairs between two false alarms of what happened lately, at least, on average."""

_FIRST = 0.9
"""Share of the error that the first epoch has; the later ones divide the rest."""
_ENTER = 0.8
"""``met`` is first said at this share of the error, and kept up to the whole, so that it does not flicker."""
_BETS: NDArray[np.float64] = 0.5 * np.exp2(-0.5 * np.arange(12.0))
"""Shape (bets,): 0.5 to 0.011. At most 0.5: a pair of −1.8 must leave some capital."""
_CENTRE = (0.1, 0.9)
_FULL = 2000
"""Pairs of an epoch after which the share goes down although nothing is known yet."""
_KEPT = 0.2
"""Least part of the share that goes on: what was met may cease to be."""
_REMEMBERED = 20_000
"""Pairs whose scores are waited for, or may be revised."""


class Certified(StrEnum):
    """What is known of a target."""

    met = "met"
    not_met = "not met"
    unknown = "not yet known"


@dataclass(slots=True)
class _Pair:
    """One pair: its number is ``offset + slope · score``, the score being that of ``arm``'s answer."""

    epoch: int
    arm: str
    slope: float
    offset: float
    differ: bool
    total: float = 0.0
    scores: int = 0


class Certificate:
    """The state of one node's certificate. Constant in time for a score, and in memory but for the pairs.

    ``target`` is the wanted share of the strongest's quality, in (0, 1]. ``share`` of the calls, in [0, 1],
    are paired, and fewer once it is known. ``arms`` are those that the node may serve, and ``about`` names
    what it asks: its prompt and form of answer.
    """

    def __init__(
        self,
        target: float,
        share: float,
        *,
        arms: Iterable[str] = (),
        about: str = "",
        seed: int | None = None,
    ) -> None:
        self.target = target
        self.share = share
        self.about = about
        self._arms = set(arms)
        self.status = Certified.unknown
        self.epoch = 1
        """Counts from 1; each has a claim of its own."""
        self.others = False
        """Whether another model's answer than the strongest's was ever paired."""
        self.found: dict[str, Any] | None = None
        """What :meth:`as_json` was when it was last found that the target is not met."""
        self._random = random.Random(seed)
        self._pairs: dict[str, _Pair] = {}
        self._differing = (2.0, 4.0)  # sum and number of the scores where the answers differed
        self._begin()

    def _begin(self) -> None:
        self._for = np.zeros(len(_BETS))  # log capital of each bet that the margin is above 0
        self._against = np.zeros(len(_BETS))
        self._lately = np.zeros(len(_BETS))
        self.made = 0
        """Pairs of this epoch."""
        self.scored = 0
        """Those of them with a score."""
        self._sum = 0.0
        self._bounds: tuple[float, float] | None = None

    # -- pairs ----------------------------------------------------------------------------------

    @property
    def share_now(self) -> float:
        """Probability with which the next call is paired."""
        if self.status is Certified.met:
            return self.share * _KEPT
        return self.share * max(_KEPT, min(1.0, _FULL / max(self.made, 1)))

    def serves(self, arm: str) -> bool:
        """An arm is about to serve; a new one, for instance a new prompt version, begins a new epoch.

        Returns whether the status changed.
        """
        if arm in self._arms:
            return False
        self._arms.add(arm)
        was = self.status
        self.renew()
        return was is not Certified.unknown

    def draw(self) -> bool:
        """Whether this call is to be paired."""
        return self._random.random() < self.share_now

    def coin(self) -> bool:
        """Whether the strongest's answer is served where the two differ."""
        return self._random.random() < 0.5

    def paired(self, call_id: str, arm: str, *, differ: bool, strongest: bool) -> None:
        """A pair was asked; ``arm`` was served, which ``strongest`` says is the strongest.

        Without ``differ`` both answers are the same.
        """
        q = self.target
        total, number = self._differing
        c = min(max(total / number, _CENTRE[0]), _CENTRE[1])
        if not differ:
            pair = _Pair(self.epoch, arm, 1.0 - q, 0.0, differ)
        elif strongest:
            pair = _Pair(self.epoch, arm, -2.0 * q, c * (1.0 + q), differ)
        else:
            pair = _Pair(self.epoch, arm, 2.0, -c * (1.0 + q), differ)
        self.made += 1
        self.others = self.others or differ or not strongest
        make_room(self._pairs, _REMEMBERED)
        self._pairs[call_id] = pair

    def learn(self, call_id: str, arm: str, score: float, earlier: float | None = None) -> bool:
        """Take a score of a served answer; ``earlier`` is the one that it revises.

        Returns whether the status changed.

        Several scores of one call count as their mean. Calls that were no pairs, or of an earlier epoch, say
        nothing here. A revised score replaces the earlier one in the claim about the mean.
        """
        pair = self._pairs.get(call_id)
        if pair is None or pair.arm != arm or pair.epoch != self.epoch:
            return False
        first = pair.scores == 0
        if first or earlier is None:
            before = pair.total / pair.scores if pair.scores else 0.0
            pair.total += score
            pair.scores += 1
        else:
            before = pair.total / pair.scores
            pair.total += score - earlier
        after = pair.total / pair.scores
        self._bet(pair, before, after, first)
        return self._judge()

    def _bet(self, pair: _Pair, before: float, after: float, first: bool) -> None:
        x = pair.offset + pair.slope * after
        gain, loss = np.log1p(_BETS * x), np.log1p(-_BETS * x)
        self._for += gain
        self._against += loss
        self._sum += x
        if first:
            self.scored += 1
            self._lately = np.maximum(self._lately, 0.0) + loss
        else:
            x = pair.offset + pair.slope * before
            self._for -= np.log1p(_BETS * x)
            self._against -= np.log1p(-_BETS * x)
            self._sum -= x
        if pair.differ:
            total, number = self._differing
            self._differing = (total + after - (0.0 if first else before), number + first)
        self._bounds = None

    def renew(self) -> None:
        """Begin anew, knowing nothing: what the node serves has changed, for instance its prompt."""
        self.epoch += 1
        self.status = Certified.unknown
        self._begin()

    # -- claims ---------------------------------------------------------------------------------

    @property
    def alpha(self) -> float:
        """This epoch's share of the error; those of all epochs sum up to :data:`ALPHA`."""
        if self.epoch == 1:
            return _FIRST * ALPHA
        return (1.0 - _FIRST) * ALPHA / ((self.epoch - 1) * self.epoch)

    def _judge(self) -> bool:
        was = self.status
        bar = -math.log(self.alpha)
        if _mixed(self._against) >= bar or _mixed(self._lately) >= math.log(LATELY):
            self.status = Certified.not_met
            self.found = self.as_json()
            self.renew()
            self.status = Certified.not_met
        else:
            says = _mixed(self._for)
            if says >= bar - math.log(_ENTER):
                self.status = Certified.met
            elif was is Certified.met and says < bar:
                self.status = Certified.unknown
        return self.status is not was

    def proves(self, claims: int) -> bool:
        """Whether ``met`` holds at the error that is left for each of ``claims`` claims made together."""
        return self.status is Certified.met and _mixed(self._for) >= math.log(claims / self.alpha)

    def bounds(self) -> tuple[float, float]:
        """The least and greatest mean margin of this epoch's scored pairs that the capital leaves open."""
        if self._bounds is None:
            bar = -math.log(self.alpha)
            if not self.scored:
                self._bounds = (-self.target, 1.0)
            else:
                self._bounds = (
                    max(_least(self._for, self.scored, bar), -self.target),
                    min(-_least(self._against, self.scored, bar), 1.0),
                )
        return self._bounds

    @property
    def only_strongest(self) -> bool:
        """Whether no pair ever said that another model's answer was wanted."""
        return not self.others and self.epoch == 1

    def decision(self, node: str) -> Decision:
        """What to tell the world of the present status."""
        kind = {
            Certified.met: "target_met",
            Certified.not_met: "target_not_met",
            Certified.unknown: "target_unknown",
        }[self.status]
        found = self.found if self.status is Certified.not_met else None
        return Decision(kind, node, {"target": self.target, **(found or self.as_json())})

    def as_json(self) -> dict[str, Any]:
        """For snapshots. ``margin`` is quality less target times the strongest's, on this epoch's pairs."""
        low, high = self.bounds()
        return {
            "status": self.status.value,
            "margin": self._sum / self.scored if self.scored else None,
            "margin_low": low,
            "margin_high": high,
            "pairs": self.made,
            "scored": self.scored,
            "share": self.share_now,
            "epoch": self.epoch,
        }

    # -- saved state ----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that :meth:`restore` needs to go on as if nothing had happened, JSON-ready."""
        return {
            "about": [self.about, self.target],
            "arms": sorted(self._arms),
            "status": self.status.value,
            "epoch": self.epoch,
            "others": self.others,
            "found": self.found,
            "capital": [self._for.tolist(), self._against.tolist(), self._lately.tolist()],
            "made": self.made,
            "scored": self.scored,
            "sum": self._sum,
            "differing": list(self._differing),
            "pairs": {
                call: [p.epoch, p.arm, p.slope, p.offset, p.differ, p.total, p.scores]
                for call, p in self._pairs.items()
            },
            "random": generator(self._random),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the state of an earlier certificate, where it is about the same question and target.

        Of another one only the number of epochs is taken, and one more begins: what was claimed of another
        prompt is no claim about this one.
        """
        if state["about"] != [self.about, self.target]:
            self.epoch = state["epoch"]
            self.renew()
            return
        self.status = Certified(state["status"])
        self.epoch = state["epoch"]
        self.others = state["others"]
        self.found = state["found"]
        self._for, self._against, self._lately = (np.array(c, dtype=float) for c in state["capital"])
        self.made = state["made"]
        self.scored = state["scored"]
        self._sum = state["sum"]
        self._differing = (state["differing"][0], state["differing"][1])
        self._pairs = {call: _Pair(*fields) for call, fields in state["pairs"].items()}
        if "random" in state:
            resume(self._random, state["random"])
        self._bounds = None
        if not self._arms <= set(state["arms"]):
            self.renew()
        self._arms.update(state["arms"])


def certified_json(known: Certificate | Certified, certificate: Certificate | None) -> dict[str, Any]:
    """What is ``known`` of a node for snapshots, with the figures of its certificate where it has one."""
    out = {} if certificate is None else certificate.as_json()
    if known is Certified.met:
        out |= {"status": known.value, "why": "the strongest model answered every call"}
    elif known is Certified.unknown:
        out |= {"status": known.value, "why": "no pairs are asked: 'certify' is 0, or the node only observes"}
    return out


def certified_flow(certificates: Iterable[Certificate | Certified]) -> Certified:
    """What is known of a flow's nodes together: ``met`` where each is, at its part of the error.

    A node whose every call the strongest answers is ``met`` by definition, and one without a certificate
    unknown: they are given as a :class:`Certified`.
    """
    nodes = list(certificates)
    if any(Certified.not_met in (n, getattr(n, "status", None)) for n in nodes):
        return Certified.not_met
    to_prove = [n for n in nodes if isinstance(n, Certificate)]
    proved = all(n.proves(len(to_prove)) for n in to_prove)
    known = all(n is Certified.met for n in nodes if isinstance(n, Certified))
    return Certified.met if nodes and proved and known else Certified.unknown


def _mixed(logs: NDArray[np.float64]) -> float:
    """Log of the mean capital over the bets."""
    return float(np.logaddexp.reduce(logs)) - math.log(len(_BETS))


def _least(logs: NDArray[np.float64], n: int, bar: float) -> float:
    """The mean below which the capital, paid back at ``exp(−λ·n·mean)``, is over the bar."""
    low, high = -2.0, 2.0
    for _ in range(30):
        middle = (low + high) / 2
        if _mixed(logs - _BETS * n * middle) >= bar:
            low = middle
        else:
            high = middle
    return low
