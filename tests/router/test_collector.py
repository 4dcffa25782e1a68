"""The collector rests while runs go on, and is as before when the last one is over."""

import gc
from collections.abc import Iterator

import pytest

from chainwax.flows import Flow
from chainwax.router import LLMManager, collector, load_settings


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def test_it_rests_from_the_first_run_to_the_last() -> None:
    gc.set_threshold(700, 10, 10)
    collector.begin()
    collector.begin()
    assert gc.get_threshold() == (20_000, 10, 10)
    assert gc.get_freeze_count() > 1000
    collector.end()
    assert gc.get_threshold() == (20_000, 10, 10)
    collector.end()
    assert gc.get_threshold() == (700, 10, 10)
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("first", [0, 50_000])
def test_who_has_it_look_never_or_seldom_is_left_alone(first: int) -> None:
    gc.set_threshold(first, 5, 5)
    collector.begin()
    assert gc.get_threshold() == (first, 5, 5)
    collector.end()
    assert gc.get_threshold() == (first, 5, 5)


def test_a_run_lets_it_rest() -> None:
    gc.set_threshold(700, 10, 10)
    with LLMManager(load_settings(run={"recording": None})) as manager:
        assert gc.get_threshold()[0] == 700  # no run yet
        manager.begin_run(Flow("quiet").id)
        assert gc.get_threshold()[0] == 20_000
    assert gc.get_threshold()[0] == 700
    assert gc.get_freeze_count() == 0
