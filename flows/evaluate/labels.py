"""Right answers: where they come from, what an answer is worth by them, and how a router hears of that."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from chainwax.flows.evaluate.similarity import Measure, alike, plain
from chainwax.flows.graph import Flow
from chainwax.flows.nodes import FeedbackNode
from chainwax.router import ConfigError, LLMManager
from chainwax.router.backends._simulation import as_text, load_truth
from chainwax.router.errors import UnknownName, nearest
from chainwax.router.recording.rows import RecordedItem
from chainwax.router.types import CallResult, Feedback, FeedbackKind, Query

__all__ = [
    "FieldLabels",
    "FileLabels",
    "Labels",
    "Origins",
    "Teacher",
    "read_labels",
    "scored_by_flow",
    "worth",
]

_LAST_PART = re.compile(r"[/?#][^/?#]*$")


class Origins:
    """The items of the sources by their places, and from the place of anything the item that it came from."""

    def __init__(self, items: Iterable[RecordedItem]) -> None:
        self._items = {item.position: item.value for item in items if not item.is_repr}
        self._numbers = {position: number for number, position in enumerate(self._items)}

    def __len__(self) -> int:
        return len(self._items)

    def place(self, position: str) -> str:
        """The place of the item; the position itself where none is known, as of what comes from a window."""
        place = position
        while place not in self._items:
            shorter = _LAST_PART.sub("", place)
            if shorter == place:
                return position
            place = shorter
        return place

    @property
    def fields(self) -> list[str]:
        """The fields that items have, of all of them."""
        found = (value for value in self._items.values() if isinstance(value, Mapping))
        return list(dict.fromkeys(str(name) for value in found for name in value))

    def item(self, position: str) -> Any:
        """The item, or None."""
        return self._items.get(self.place(position))

    def number(self, position: str) -> int | None:
        """The item's place among all of them, from 0."""
        return self._numbers.get(self.place(position))


class Labels(Protocol):
    """Right answers. ``of`` gives None where none is known."""

    def check(self, nodes: Sequence[str]) -> None:
        """Raise :class:`ConfigError` where they are about none of these LLM nodes."""
        ...

    def of(self, node: str, item_key: str, position: str, origins: Origins) -> Any:
        """The right answer of a node about an item, as JSON holds it."""
        ...

    def why_none(self, origins: Origins) -> str:
        """Why there may be none for any item, for people."""
        ...


class FileLabels:
    """Labels of a file of JSON lines with ``id`` (the item's key) and ``answers`` (``{node: value}``).

    Raises :class:`ConfigError` with file and line.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ConfigError(f"--labels {path}: there is no such file")
        self._path = path
        self._truth = load_truth(path)

    def check(self, nodes: Sequence[str]) -> None:
        """As the protocol says."""
        known = self._truth.nodes
        if not set(known) & set(nodes):
            raise ConfigError(
                f"--labels {self._path}: there is no label for any of the nodes {', '.join(nodes)}; "
                f"its answers name {', '.join(known) or 'none'}"
            )

    def of(self, node: str, item_key: str, position: str, origins: Origins) -> Any:
        """As the protocol says."""
        return self._truth.value(node, item_key)

    def why_none(self, origins: Origins) -> str:
        """As the protocol says."""
        return f"no id of {self._path} is the key of an item and has an answer for a node that was asked"


class FieldLabels:
    """Labels that the items themselves carry: fields by node, or one field for all of them.

    A field for all of them holds an object of node and right answer, or is the right answer of the only node.
    """

    def __init__(self, fields: Mapping[str, str]) -> None:
        self._fields = dict(fields)
        """By node; the empty name is for all."""
        self._only = ""

    def check(self, nodes: Sequence[str]) -> None:
        """As the protocol says."""
        for node in self._fields:
            if node and node not in nodes:
                raise UnknownName("LLM node for --labels:", node, nodes)
        self._only = nodes[0] if len(nodes) == 1 else ""

    def of(self, node: str, item_key: str, position: str, origins: Origins) -> Any:
        """As the protocol says."""
        item = origins.item(position)
        if not isinstance(item, Mapping):
            return None
        own = self._fields.get(node)
        if own is not None:
            return item.get(own)
        common = self._fields.get("")
        found = None if common is None else item.get(common)
        if isinstance(found, Mapping):
            return found.get(node)
        return found if node == self._only else None

    def why_none(self, origins: Origins) -> str:
        """As the protocol says."""
        known = origins.fields
        for field in self._fields.values():
            if field not in known:
                return f"--labels {field}: no item has such a field: {nearest(field, known)}"
        if "" in self._fields and not self._only:
            field = self._fields[""]
            return (
                f"--labels {field}: the field holds no object of node and right answer; as there are several "
                f"LLM nodes, it is written NODE={field}, once for each"
            )
        return "no label is about an item and a node that was asked"


def read_labels(given: Sequence[str]) -> Labels:
    """The labels that ``--labels`` names: one file, a field of the items, or fields as NODE=FIELD.

    Raises :class:`ConfigError`.
    """
    if len(given) == 1 and "=" not in given[0]:
        (text,) = given
        if text.lower().endswith((".jsonl", ".ndjson", ".json")) or Path(text).is_file():
            return FileLabels(Path(text))
        return FieldLabels({"": text})
    fields: dict[str, str] = {}
    for text in given:
        node, mark, field = text.partition("=")
        if not mark or not node or not field:
            raise ConfigError(f"--labels {text}: is written FILE, FIELD or, once for each node, NODE=FIELD")
        if node in fields:
            raise ConfigError(f"--labels {text}: '{node}' is given twice")
        fields[node] = field
    return FieldLabels(fields)


def worth(value: Any, right: Any, measure: Measure) -> float:
    """What an answer is worth, from 0 to 1.

    A text is read as JSON where the right answer is an object or a list, and compared as a text with a number
    or a yes or no.
    """
    if isinstance(value, str) and not isinstance(right, str):
        if isinstance(right, Mapping | list):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return 0.0
        else:
            right = as_text(right)
    return alike(plain(value), plain(right), measure)


def scored_by_flow(flow: Flow) -> frozenset[str]:
    """The LLM nodes that a flow's own feedback nodes score."""
    return frozenset(
        about
        for id, node in flow.nodes.items()
        if isinstance(node, FeedbackNode)
        for about in (node.about or flow.info(id).upstream)
    )


class Teacher:
    """Says of a run's answers what the labels make of them, each ``late`` answers of its node later.

    The scores take the way of all feedback. Nodes that the flow scores itself are left to it.
    """

    def __init__(
        self,
        manager: LLMManager,
        labels: Labels,
        origins: Origins,
        measure: Measure,
        *,
        late: int,
        silent: frozenset[str] = frozenset(),
    ) -> None:
        self._manager = manager
        self._labels = labels
        self._origins = origins
        self._measure = measure
        self._late = late
        self._silent = silent
        self._waiting: dict[str, deque[Feedback]] = {}

    def called(self, run: str, query: Query, result: CallResult) -> None:
        """An answer has come; on the router's loop."""
        node = query.node
        if node.id in self._silent or result.error is not None or result.arm is None:
            return
        right = self._labels.of(node.id, query.item_key, query.position, self._origins)
        waiting = self._waiting.setdefault(node.id, deque())
        if right is not None:
            score = worth(node.answer.jsonable(result.value), right, self._measure)
            waiting.append(
                Feedback(
                    node.id,
                    score,
                    call_id=query.call_id,
                    item_key=query.item_key,
                    arm=result.arm.key,
                    context=result.context,
                    metric="label",
                    source="evaluate",
                    kind=FeedbackKind.label,
                )
            )
        if len(waiting) > self._late:
            self._manager.feedback([waiting.popleft()])

    def finish(self) -> None:
        """All that is still to be said: the run has ended."""
        for waiting in self._waiting.values():
            self._manager.feedback(list(waiting))
            waiting.clear()
