"""What flows between chainwax's operators: an item with its place and its lineage."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from chainwax.router.types import Attempt, CallRef

__all__ = ["Batch", "FailedItem", "Item"]


@dataclass(slots=True)
class Item:
    """One item of a stream. Functions that people write see ``value`` alone.

    >>> Item({"text": "hello"}, key="a", position="tickets.jsonl:1").value["text"]
    'hello'
    """

    value: Any
    key: str = ""
    """What the item is about, for instance a customer; order is kept for each key."""
    position: str = ""
    """The source's own name of the place: partition and offset, file and line."""
    time: float | None = None
    """Event time: seconds since 1970, UTC."""
    calls: tuple[CallRef, ...] = ()
    """The LLM calls that this item owes its value to, oldest first."""
    window_id: str | None = None
    """The window or batch that it went through last."""

    def with_value(self, value: Any) -> Item:
        """The same item with another value."""
        return Item(value, self.key, self.position, self.time, self.calls, self.window_id)

    def part(self, value: Any, number: int) -> Item:
        """One of several items that this one became; its position is a place of its own."""
        return replace(self, value=value, position=f"{self.position}/{number}")


@dataclass(slots=True)
class Batch:
    """Items that a window or a count-and-time collection put together, in order of arrival."""

    items: list[Item]
    window_id: str
    key: str = ""
    opened: float | None = None
    """Start of the window in seconds since 1970, where it has one."""
    closed: float | None = None

    @property
    def value(self) -> list[Any]:
        """The items' values."""
        return [item.value for item in self.items]

    def joined(self, value: Any) -> Item:
        """One item in place of all, with the lineage of each.

        Its position says which items these are: a batch that goes by the clock may have others when it is
        made again after a crash, and is another one then.
        """
        calls = tuple(dict.fromkeys(ref for item in self.items for ref in item.calls))
        time = self.items[-1].time if self.items else self.closed
        members = "\0".join(sorted(item.position for item in self.items))
        which = blake2b(members.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        return Item(value, self.key, f"window:{self.window_id}#{which}", time, calls, self.window_id)


@dataclass(slots=True)
class FailedItem:
    """An item that a node could not handle: what the dead letters hold."""

    item: Item
    node: str
    error: str
    """Class of the error."""
    message: str
    attempts: list[Attempt] = field(default_factory=list)

    @classmethod
    def of(
        cls, item: Item, node: str, error: BaseException, attempts: list[Attempt] | None = None
    ) -> FailedItem:
        """From the exception that says why."""
        try:
            message = str(error) or repr(error)
        except Exception:  # an error's own code runs in here, and must not end the flow
            message = "the error cannot be shown"
        return cls(item, node, type(error).__name__, message, attempts or [])
