"""What is believed of arms: the level that they share, how scores scatter, and the first calls."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainwax.router import FreeText, LLMManager, NodeSpec, Prompt, Tier, load_settings
from chainwax.router.credit import information
from chainwax.router.learning.context import NOTHING
from chainwax.router.learning.knowledge import Knowledge
from chainwax.router.learning.pooled import Pooled
from chainwax.router.learning.probation import Probation

PRIORS = ((0.0, 0.02), (-0.1, 0.3), (-0.8, 0.4))


def pooled() -> Pooled:
    made = Pooled((1.7, 1.0))
    for mean, variance in PRIORS:
        made.add(mean, variance)
    return made


@given(
    st.lists(st.tuples(st.integers(1, 3), st.floats(-2.0, 2.0), st.floats(0.0, 2.0)), max_size=60),
)
def test_a_pooled_belief_is_the_full_covariances(seen: list[tuple[int, float, float]]) -> None:
    """The same as a Kalman filter over the level and all differences, whose covariance is kept in full."""
    small = pooled()
    mean, cov = small.mean.copy(), np.diag([1.0, *(variance for _, variance in PRIORS)])
    for place, move, precision in seen:
        along = cov[:, 0] + cov[:, place]
        wide = along[0] + along[place]
        assert small.variance_of(place) == pytest.approx(wide)
        small.learn(place, move, precision)
        mean += along * move
        cov -= np.outer(along, along) * precision / (1.0 + precision * wide)
    assert small.mean == pytest.approx(mean)
    assert [small.variance_of(place) for place in range(1, len(small))] == pytest.approx(
        (cov[0, 0] + 2.0 * cov[0] + cov.diagonal())[1:]
    )


def test_what_was_forgotten_is_learned_anew_and_the_rest_stays() -> None:
    belief = pooled()
    for _ in range(50):
        belief.learn(2, 0.01, 0.2)
    before, level = belief.mean.copy(), belief.level
    belief.forget(2, 1.0)
    assert belief.mean == pytest.approx(before)
    assert belief.own[2] == 1.0
    assert belief.level > level  # what it told of the level is gone with it
    again = pooled()
    again.restore(json.loads(json.dumps(belief.state())), np.arange(4))
    assert again.state() == belief.state()


def knowledge(scores: list[float]) -> Knowledge:
    known = Knowledge()
    place = known.add("a", Tier.standard)
    for score in scores:
        known.learn("n", place, NOTHING, score)
    return known


def test_graded_scores_tell_more_than_right_and_wrong() -> None:
    graded, plain = knowledge([0.9] * 40), knowledge([1.0] * 36 + [0.0] * 4)
    variances = [known.nodes["n"].terms.variance_of(1) for known in (graded, plain)]
    assert variances[0] < 0.5 * variances[1]
    assert graded.expected("n", 1, NOTHING) == pytest.approx(0.9, abs=0.02)


def doubt_after_ends(*, graded: bool, others: float) -> float:
    """How unsure one is of an arm after 60 end scores of a path with others' answers, which differ too."""
    rng, known = np.random.default_rng(1), Knowledge()
    place = known.add("a", Tier.standard)
    for _ in range(60):
        end = math.prod(rng.beta(0.9 * 20, 0.1 * 20) for _ in range(3))
        end = end if graded else float(rng.random() < end)
        own = known.expected("n", place, NOTHING)
        known.learn("n", place, NOTHING, end / others, information(own, others), others)
    assert known.expected("n", place, NOTHING) == pytest.approx(0.9, abs=0.05)
    return known.nodes["n"].terms.variance_of(place)


def test_graded_scores_of_a_path_tell_more_too() -> None:
    graded, plain = (doubt_after_ends(graded=graded, others=0.81) for graded in (True, False))
    assert graded < 0.7 * plain
    # Right and wrong tell as much as their share of the information is, but for the luck of sixty of them.
    known = Knowledge()
    place = known.add("a", Tier.standard)
    for end in [1.0] * 44 + [0.0] * 16:
        known.learn("n", place, NOTHING, end, information(known.expected("n", place, NOTHING), 0.81))
    assert plain == pytest.approx(known.nodes["n"].terms.variance_of(place), rel=0.3)


def apart(nodes: int) -> float:
    """By how much more is expected of an arm on prompts of the kind that it was right about."""
    known = Knowledge()
    arms = [known.add(key, Tier.standard) for key in ("a", "b")]
    for number in range(nodes):
        known.node(str(number))
    kinds = np.arange(0, 20), np.arange(20, 40)
    for _ in range(20):
        for arm in arms:
            for kind, words in enumerate(kinds):
                known.learn("0", arm, words, float(arm == arms[0] or kind == 0))
    right, wrong = (known.scores("0", words)[0][arms] for words in kinds)
    return float(right[1] - wrong[1] - (right[0] - wrong[0]))


def test_the_fewer_nodes_share_the_tasks_the_more_the_words_tell_of_an_arm() -> None:
    assert apart(1) > apart(7) > apart(10) == apart(100)


def test_a_few_answers_may_be_open_and_more_for_good_ones() -> None:
    probation = Probation()

    def asks(most: int) -> int:
        for number in range(most):
            if probation.closed(0.99):
                return number
            probation.call(other=True)
        return most

    assert asks(100) in (3, 4)
    assert not probation.closed(0.9)  # more may be lost, and more may be tried
    for _ in range(3):
        probation.heard(0.9, 0.9)
    assert asks(100) in range(20, 30)
    for _ in range(47):
        probation.heard(0.9, 0.9)
    assert probation.over
    assert not probation.closed(0.99)


def test_answers_on_one_way_lose_one_end_together() -> None:
    node = NodeSpec("n", Prompt("{value}"), FreeText(), depth=2)
    free = {"backend": "simulated", "input_cost_per_token": 0.0, "output_cost_per_token": 0.0}
    tiers = {"a": "strongest", "b": "local"}
    settings = load_settings(
        run={"recording": None}, models={name: {"tier": tier, **free} for name, tier in tiers.items()}
    )
    with LLMManager(settings) as manager:
        probation = manager.register(node).router.stats.knowledge.probation
    assert probation.way == 3
    for _ in range(8):
        assert not probation.closed(0.99)
        probation.call(other=True)
    for _ in range(2):
        probation.call(other=True)
    assert probation.closed(0.99)


def test_after_bad_ones_none_is_asked_for_long_but_not_for_ever() -> None:
    probation = Probation()
    for _ in range(10):
        probation.call(other=True)
        probation.heard(0.0, 0.9)
    closed = 0
    while probation.closed(0.99):
        closed += 1
        probation.call(other=False)
    assert 300 < closed < 2000


def test_where_no_arm_is_of_the_strongest_tier_nobody_waits() -> None:
    known = Knowledge()
    known.add("a", Tier.local)
    assert not known.on_probation
    known.add("b", Tier.strongest)
    assert known.on_probation
