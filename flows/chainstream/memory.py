"""What agents remember by name; upstream only sketches it. A memory belongs to the run.

Listeners that use the same memory are run together, as those are that share a buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chainwax.router.errors import nearest

__all__ = ["KVMemory", "SequentialMemory", "create", "fetch"]


class KVMemory:
    """Values by key."""

    def __init__(self, memory_id: str) -> None:
        self.name = memory_id
        self.items: dict[Any, Any] = {}

    def add_item(self, data_item: tuple[Any, Any]) -> None:
        """Add or change ``(key, value)``."""
        key, value = data_item
        self.items[key] = value

    def delete_item(self, data_key: Any) -> None:
        """Forget a key. Raises KeyError where it is not known."""
        del self.items[data_key]

    def find_item(self, data_key: Any) -> Any:
        """The value, or None."""
        return self.items.get(data_key)

    def get_keys(self) -> list[Any]:
        """All keys."""
        return list(self.items)


class SequentialMemory:
    """Rows in order, each a dict; the first column is the key."""

    def __init__(self, memory_id: str, columns: Any = None) -> None:
        self.name = memory_id
        self.columns = columns
        self.rows: list[dict[str, Any]] = []

    def add_item(self, data: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Add rows; one whose key is there replaces it."""
        for row in data if isinstance(data, list) else [data]:
            key = next(iter(row))
            for place, known in enumerate(self.rows):
                if known.get(key) == row[key]:
                    self.rows[place] = {**known, **row}
                    break
            else:
                self.rows.append(dict(row))

    def find_item(self, condition: Callable[[dict[str, Any]], object] | None = None) -> list[dict[str, Any]]:
        """The rows that a function says yes to; without one, all."""
        return [row for row in self.rows if condition is None or condition(row)]

    def remove_item(self, condition: Callable[[dict[str, Any]], object]) -> None:
        """Drop the rows that a function says yes to."""
        self.rows = [row for row in self.rows if not condition(row)]


_memories: dict[str, KVMemory | SequentialMemory] = {}


def known(memory_id: str) -> Any:
    """The memory of a name, where there is one; all by name for the empty name."""
    return _memories.get(memory_id) if memory_id else dict(_memories)


def restore(memory_id: str, value: Any) -> None:
    """Put in place what :func:`known` gave."""
    if memory_id:
        _memories[memory_id] = value
    else:
        _memories.clear()
        _memories.update(value)


def create(memory_id: str, type: str = "kv", columns_and_setting: Any = None) -> KVMemory | SequentialMemory:
    """A new memory, ``kv`` or ``seq``. Raises ValueError for another kind."""
    if type == "kv":
        _memories[memory_id] = KVMemory(memory_id)
    elif type == "seq":
        _memories[memory_id] = SequentialMemory(memory_id, columns_and_setting)
    else:
        raise ValueError(f"a memory is 'kv' or 'seq': {nearest(str(type), ['kv', 'seq'])}")
    return _memories[memory_id]


def fetch(memory_id: str) -> KVMemory | SequentialMemory:
    """The memory of a name. Raises KeyError where there is none."""
    if memory_id not in _memories:
        raise KeyError(f"no memory {memory_id!r}: {nearest(memory_id, _memories)}")
    return _memories[memory_id]
