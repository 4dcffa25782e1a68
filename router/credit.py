"""Credit: what the score of an item's end result says of each call that the item owes its value to.

Taken is that an end result is right where all answers on its path are. Call *j* was expected to be right with
``p_j``, and the whole path with ``P = ∏ p``. An end score *s* then says of call *j*:

* the score ``s / (P / p_j)``, what is left of *s* when the others are taken out. Its mean is the quality of
  call *j* alone, so arms that are compared by it are compared fairly, whatever the other nodes did meanwhile.
* with the weight ``P·(1 − p_j) / (p_j·(1 − P))``, the part of the information that the end score keeps of
  what a score of the answer itself would have told (Louis 1982); it is the square of the correlation of the
  two. A lone call has weight 1, one of three calls of 0.9 each 0.3, and a call that is all but surely right
  next to nothing.

One step of so much weight towards that score is a step of expectation maximisation, ``posterior − p_j``, over
the information that is really there (Fisher scoring; Titterington 1984). With the posterior itself as the
score and the weight 1 a guess would mostly confirm itself, and learn at a rate that falls with the length of
the path. Of several nodes' qualities the end scores fix the product, and of each node how its arms compare;
how good the nodes are one by one they leave to the prior, to scores of single answers and to counterfactuals.

A counterfactual is what the end result of a failed item would have been, had the strongest answered call *j*
in place of the arm that did. A good end says that *j* was wrong and that all others were right; a bad one
makes it likelier that *j* was right, for another call is to blame, or the strongest was wrong too. The
failure alone left call *k* right with the probability ``f = (p_k − P)/(1 − P)``; let *g* be what is left of
it after the counterfactual (Bayes, the strongest's answer being right or wrong on its own account, given the
prompt). Then the score ``g / v`` with the weight ``v = f / p_k`` is added: ``v`` is what the end score's
weight lacked of 1, and the step of both together is ``g − p_k``, as if the call itself had been scored with
*g*. As *g* is *f* on average, counterfactuals move no expectation that is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from chainwax.router.types import CallRef, Feedback, FeedbackKind

__all__ = ["DOUBTED", "FAILED", "LONGEST", "Share", "failure", "information", "rights", "shares", "split"]

LONGEST = 100
"""Calls of a path that a score is shared among: those that came last."""

FAILED = 0.2
"""Weight of a failure further down, a dead letter or an invalid answer: it may well have other reasons."""
DOUBTED = 0.05
"""Weight of a valid answer further down that was not trusted, so that another model was asked."""

_SURE = (0.05, 0.98)
"""No call is taken to be worse or better than that: a call that is beyond doubt could never be found out."""


class Share(NamedTuple):
    """What an end score says of one call."""

    others: float
    """What the other calls were expected to get: the end score over it is the call's own."""
    weight: float
    """In (0, 1]."""


def shares(expected: Sequence[float]) -> list[Share]:
    """Each call's share; ``expected`` are the scores that the calls were expected to get, in path order.

    >>> [round(share.weight, 2) for share in shares([0.95, 0.6])]
    [0.07, 0.88]
    """
    bounded = [_bounded(p) for p in expected]
    whole = math.prod(bounded)
    return [Share(whole / p, information(p, whole / p)) for p in bounded]


def information(expected: float, others: float) -> float:
    """What the end score keeps of what a score of the answer itself would have told, as a share.

    It is also the variance of such an answer's own scores over that of its parts of end scores.
    """
    p = _bounded(expected)
    return others * (1.0 - p) / (1.0 - min(others * p, _SURE[1]))


def rights(expected: Sequence[float], place: int, instead: float) -> list[tuple[float, float, float]]:
    """Each call's chance to have been right where the path ended with 0, without and with a counterfactual.

    ``place`` is the call that was asked again, ``instead`` the score that the strongest was expected to get
    there. Chances: before, after a bad end, after a good one.

    >>> [[round(chance, 2) for chance in call] for call in rights([0.9, 0.6], 1, 0.9)]
    [[0.78, 0.26, 1.0], [0.13, 0.44, 0.0]]
    """
    bounded = [_bounded(p) for p in expected]
    whole = math.prod(bounded)
    wrong = (1.0 - bounded[place]) * (1.0 - _bounded(instead))
    others = whole / bounded[place]
    # Bad ends both times: one of the others was wrong, or both answers to the call were.
    both = 1.0 - others + others * wrong
    out = []
    for k, p in enumerate(bounded):
        rest = others if k == place else others / p
        right = p * (1.0 - rest + (0.0 if k == place else rest * wrong)) / both
        out.append(((p - whole) / (1.0 - whole), right, 0.0 if k == place else 1.0))
    return out


def failure(
    path: Sequence[CallRef], source: str, *, weight: float = FAILED, item_key: str = "", time: float = 0.0
) -> Feedback:
    """That the node ``source`` failed with what the calls of ``path``, at least one, had answered."""
    last = path[-1]
    return Feedback(
        last.node,
        0.0,
        last.call_id,
        item_key,
        last.arm,
        "failure",
        source,
        FeedbackKind.failure,
        time,
        context=last.context,
        weight=weight,
        path=tuple(path[-LONGEST:]),
    )


def split(feedback: Feedback, expected: Callable[[CallRef], float | None]) -> list[Feedback]:
    """The score of a path as one for each of its calls.

    ``expected`` tells what a call was expected to get, and None of a call that nobody here knows: such a
    call is left out. The same state gives the same shares, in every process.
    """
    if feedback.kind is FeedbackKind.counterfactual:
        return _corrected(feedback, expected)
    known = [(ref, p) for ref in feedback.path[-LONGEST:] if (p := expected(ref)) is not None]
    told = zip(known, shares([p for _, p in known]), strict=True)
    return [_part(feedback, ref, feedback.score, share.others, share.weight) for (ref, _), share in told]


def _corrected(feedback: Feedback, expected: Callable[[CallRef], float | None]) -> list[Feedback]:
    """What a counterfactual adds to the score of the path."""
    *path, asked = feedback.path
    known = [(ref, p) for ref in path[-LONGEST:] if (p := expected(ref)) is not None]
    place = next((k for k, (ref, _) in enumerate(known) if ref.call_id == asked.call_id), None)
    instead = expected(asked)
    if place is None or instead is None:
        return []
    out = []
    chances = rights([p for _, p in known], place, instead)
    for (ref, p), (before, bad, good) in zip(known, chances, strict=True):
        weight = before / _bounded(p)
        right = bad + feedback.score * (good - bad)
        if right > 0.0:
            out.append(_part(feedback, ref, 1.0, weight / right, weight))
        else:
            out.append(_part(feedback, ref, 0.0, 1.0, weight))
    return out


def _part(feedback: Feedback, ref: CallRef, score: float, others: float, weight: float) -> Feedback:
    return replace(
        feedback,
        node=ref.node,
        score=score,
        call_id=ref.call_id,
        arm=ref.arm,
        context=ref.context,
        path=(),
        others=others,
        weight=feedback.weight * weight,
        correction=None,
    )


def _bounded(p: float) -> float:
    return min(max(p, _SURE[0]), _SURE[1])
