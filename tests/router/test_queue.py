"""The queue in front of a model: order, limit, ageing, closing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainwax.router.queue import AGEING, CallQueue


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


async def _serve_all(queue: CallQueue, callers: list[tuple[str, Callable[[], Awaitable[None]]]]) -> list[str]:
    """With the only slot taken, let all wait, then serve them one by one; the order of service."""
    await queue.enter()
    served: list[str] = []

    async def call(name: str, enter: Callable[[], Awaitable[None]]) -> None:
        await enter()
        served.append(name)
        queue.leave()

    tasks = []
    for name, enter in callers:
        tasks.append(asyncio.create_task(call(name, enter)))
        await asyncio.sleep(0)
    queue.leave()
    await asyncio.gather(*tasks)
    assert queue.in_flight == 0
    assert len(queue) == 0
    return served


def test_order_is_priority_then_deadline_then_arrival() -> None:
    async def go() -> list[str]:
        queue = CallQueue(1, FakeClock())
        return await _serve_all(
            queue,
            [
                ("low", lambda: queue.enter(0)),
                ("first", lambda: queue.enter(1)),
                ("second", lambda: queue.enter(1)),
                ("due", lambda: queue.enter(1, deadline=5.0)),
                ("high", lambda: queue.enter(2)),
            ],
        )

    assert asyncio.run(go()) == ["high", "due", "first", "second", "low"]


def test_a_call_that_was_sent_back_is_first_in_its_class() -> None:
    async def go() -> list[str]:
        queue = CallQueue(1, FakeClock())
        return await _serve_all(
            queue,
            [
                ("waiting", lambda: queue.enter(1, deadline=1.0)),
                ("again", lambda: queue.enter(1, again=True)),
                ("higher", lambda: queue.enter(2)),
            ],
        )

    assert asyncio.run(go()) == ["higher", "again", "waiting"]


def test_low_priority_ages_and_does_not_starve() -> None:
    async def go() -> list[str]:
        clock = FakeClock()
        queue = CallQueue(1, clock)

        async def later() -> None:
            clock.now += 3 * AGEING
            await queue.enter(2)

        return await _serve_all(queue, [("low", lambda: queue.enter(0)), ("late but high", later)])

    assert asyncio.run(go()) == ["low", "late but high"]


@given(st.integers(1, 5), st.integers(1, 40))
def test_never_more_than_the_limit(limit: int, calls: int) -> None:
    async def go() -> int:
        queue = CallQueue(limit)
        most = 0

        async def call() -> None:
            nonlocal most
            await queue.enter()
            most = max(most, queue.in_flight)
            await asyncio.sleep(0)
            queue.leave()

        await asyncio.gather(*(call() for _ in range(calls)))
        assert queue.in_flight == 0
        return most

    assert asyncio.run(go()) == min(limit, calls)


def test_a_closed_queue_opens_again_by_itself() -> None:
    async def go() -> tuple[bool, float]:
        queue = CallQueue(2)
        queue.close_for(0.05)
        begun = asyncio.get_running_loop().time()
        assert queue.closed
        await queue.enter()
        return queue.closed, asyncio.get_running_loop().time() - begun

    closed, waited = asyncio.run(go())
    assert not closed
    assert waited >= 0.045


def test_a_cancelled_call_leaves_no_hole() -> None:
    async def go() -> int:
        queue = CallQueue(1)
        await queue.enter()
        waiting = [asyncio.create_task(queue.enter()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        queue.leave()  # hands the slot to the second
        waiting[1].cancel()  # which is cancelled in the same moment
        with pytest.raises(asyncio.CancelledError):
            await waiting[1]
        await asyncio.wait_for(waiting[2], 1)
        queue.leave()
        return queue.in_flight

    assert asyncio.run(go()) == 0
