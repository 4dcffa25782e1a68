"""The four ways to collect items. Each is a function of one item, with a state that can be pickled."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from chainwax.flows.chainstream._world import invoked

__all__ = ["Collecting", "collecting"]


class Collecting:
    """A function of an item that remembers; ``state`` is all that it remembers."""

    state: Any

    def __call__(self, item: Any) -> Any:
        """What comes out when the item comes in; None where nothing does."""
        raise NotImplementedError


class ByCount(Collecting):
    """So many items at a time, none twice; what is left over at the end never comes."""

    def __init__(self, count: int) -> None:
        self.__name__ = "batch_by_count"
        self._count = count
        self.state: list[Any] = []

    def __call__(self, item: Any) -> Any:
        """The items, with the last of them."""
        self.state.append(item)
        if len(self.state) < self._count:
            return None
        items, self.state = self.state, []
        return {"item_list": items}


class ByTime(Collecting):
    """What came in so many seconds, when a later item arrives.

    That item is the first of the next collection and does not start its clock: the one after it does.
    """

    def __init__(self, seconds: int) -> None:
        self.__name__ = "batch_by_time"
        self._seconds = seconds
        self.state: tuple[list[Any], float | None] = ([], None)

    def __call__(self, item: Any) -> Any:
        """The items before this one, once their time is over."""
        invocation = invoked()
        assert invocation is not None
        items, begun = self.state
        now = invocation.time
        # As upstream counts: whole seconds, and of a day.
        if begun is None or timedelta(seconds=now - begun).seconds < self._seconds:
            items.append(item)
            self.state = (items, now if begun is None else begun)
            return None
        self.state = ([item], None)
        return {"item_list": items}


class ByItem(Collecting):
    """What came up to an item that equals the marker, and the marker."""

    def __init__(self, marker: Any) -> None:
        self.__name__ = "batch_by_item"
        self._marker = marker
        self.state: list[Any] = []

    def __call__(self, item: Any) -> Any:
        """The items, with the marker as their last."""
        self.state.append(item)
        if self._marker != item:
            return None
        items, self.state = self.state, []
        return {"item_list": items}


class ByFunction(Collecting):
    """As a function ``f(item, kwargs) -> (out, kwargs)`` says."""

    def __init__(self, fn: Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]) -> None:
        self.__name__ = getattr(fn, "__name__", "batch_by_func")
        self.fn = fn
        self.state: dict[str, Any] = {}

    def __call__(self, item: Any) -> Any:
        """What the function gives out."""
        out, self.state = self.fn(item, self.state)
        return out


def collecting(
    by_count: object = None, by_time: object = None, by_item: object = None, by_func: object = None
) -> Collecting:
    """The collection that was asked for. Raises ValueError where it is none, more than one, or impossible."""
    given = {
        name: value
        for name, value in (
            ("by_count", by_count),
            ("by_time", by_time),
            ("by_item", by_item),
            ("by_func", by_func),
        )
        if value is not None
    }
    if len(given) != 1:
        raise ValueError(
            "batch takes exactly one of by_count, by_time, by_item and by_func, not "
            + (", ".join(given) or "none")
        )
    if by_count is not None:
        return ByCount(_positive("by_count", by_count))
    if by_time is not None:
        return ByTime(_positive("by_time", by_time))
    if by_func is not None:
        if not callable(by_func):
            raise ValueError(f"by_func is a function, not {by_func!r}")
        return ByFunction(by_func)
    return ByItem(by_item)


def _positive(name: str, value: object) -> int:
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name} is a whole number above 0, not {value!r}")
    return value
