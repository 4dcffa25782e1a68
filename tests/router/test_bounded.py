"""What is remembered is bounded."""

from hypothesis import given
from hypothesis import strategies as st

from chainwax.router.bounded import make_room


@given(most=st.integers(1, 60), keys=st.lists(st.integers(0, 200), max_size=200))
def test_the_newest_stay_and_there_are_never_too_many(most: int, keys: list[int]) -> None:
    known: dict[int, None] = {}
    for key in keys:
        known.pop(key, None)
        make_room(known, most)
        known[key] = None
        assert len(known) <= most
    newest = list(dict.fromkeys(reversed(keys)))[: len(known)]
    assert list(known) == newest[::-1]
    if len(set(keys)) > most:
        assert len(known) >= most - most // 8 - (most < 8)
