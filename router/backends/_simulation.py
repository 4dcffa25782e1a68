"""What a simulated model answers: a pure function of its seed, its name, the node and the item.

A model of stated accuracy ``a`` is right on an item where its *rank* there is below ``a``. The rank is
uniform in [0, 1), so the share of right answers is ``a`` in expectation. It mixes a part that all
models of the same seed have in common for the item (how hard the item is) with a part of the model's
own. With ``correlation`` c in both, the mixtures of two models correlate by c² / (c² + (1 - c)²): at 0
errors fall independently, at 1 the errors of the better model are among those of the worse.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from chainwax.router.config import Simulation
from chainwax.router.errors import ConfigError

__all__ = ["NOT_KNOWN", "SimulatedModel", "Truth", "load_truth", "minimal_instance"]

NOT_KNOWN = "(simulated answer)"
"""The free text of a simulated model where no right answer is known."""

_WRONG = "(a wrong simulated answer)"
_DEEPEST = 32  # levels of a minimal instance; a schema that needs more contains itself


class Truth:
    """Right answers by item and node."""

    def __init__(self, answers: dict[str, dict[str, Any]]) -> None:
        self._answers = answers
        distinct: dict[str, dict[str, Any]] = {}
        for of_item in answers.values():
            for node, value in of_item.items():
                distinct.setdefault(node, {})[as_text(value)] = None
        self._by_node = {node: list(texts) for node, texts in distinct.items()}

    @property
    def nodes(self) -> list[str]:
        """Those that right answers are known for."""
        return list(self._by_node)

    def value(self, node: str, item: str) -> Any:
        """The right answer as it is written down; None where it is not known."""
        return self._answers.get(item, {}).get(node)

    def of(self, node: str, item: str) -> str | None:
        """The right answer as a model would write it; None where it is not known."""
        value = self.value(node, item)
        return None if value is None else as_text(value)

    def another(self, node: str, right: str, at: float) -> str | None:
        """Another item's right answer that is not this one; ``at`` in [0, 1) says which."""
        texts = self._by_node.get(node, ())
        if len(texts) < 2:
            return None
        start = int(at * len(texts))
        return texts[start] if texts[start] != right else texts[(start + 1) % len(texts)]


def as_text(value: Any) -> str:
    """A right answer as a model would write it: texts as they are, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def load_truth(path: Path) -> Truth:
    """Read right answers: JSON lines with ``id`` and ``answers`` (``{node: value}``), others ignored.

    A file is read once in each process, however many models share it.

    Raises :class:`ConfigError` with file and line.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise ConfigError(f"simulation.truth: {path}: {error.strerror}") from None
    return _load(path.resolve(), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=8)
def _load(path: Path, _mtime: int, _size: int) -> Truth:
    answers: dict[str, dict[str, Any]] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ConfigError(f"{path}:{number}: no valid JSON: {error}") from None
                if not isinstance(record, dict) or not isinstance(record.get("id"), str | int):
                    raise ConfigError(f"{path}:{number}: needs an object with an 'id' (a text or a number)")
                if not isinstance(record.get("answers"), dict):
                    raise ConfigError(f"{path}:{number}: needs 'answers', an object of node and right answer")
                item = str(record["id"])
                if item in answers:
                    raise ConfigError(f"{path}:{number}: the id '{item}' stands in an earlier line already")
                answers[item] = record["answers"]
    except OSError as error:
        raise ConfigError(f"simulation.truth: {path}: {error.strerror}") from None
    return Truth(answers)


class SimulatedModel:
    """A model whose accuracy and latency are stated.

    Raises :class:`ConfigError` where the right answers cannot be read.
    """

    def __init__(self, name: str, simulation: Simulation) -> None:
        self.name = name
        self._simulation = simulation
        self._truth = load_truth(simulation.truth) if simulation.truth is not None else Truth({})
        self._random = random.Random(f"{simulation.seed}/{name}")

    def accuracy(self, node: str) -> float:
        """The stated share of right answers for a node. Raises :class:`ConfigError` without one."""
        stated = self._simulation.accuracy
        if not isinstance(stated, dict):
            return stated
        found = stated.get(node, stated.get("default"))
        if found is None:
            raise ConfigError(f"models.{self.name}.simulation.accuracy has neither '{node}' nor 'default'")
        return found

    def is_right(self, node: str, item: str) -> bool:
        """Whether the model answers this node's question about this item rightly."""
        accuracy = self.accuracy(node)
        return accuracy >= 1 or self._rank(node, item) < accuracy

    def answer(
        self, node: str, item: str, choices: Sequence[str] | None = None, schema: dict[str, Any] | None = None
    ) -> str:
        """The text of the answer; the same for the same question, always."""
        right = self._truth.of(node, item)
        if choices:
            return self._choose(node, item, choices, right)
        if right is None:
            return json.dumps(minimal_instance(schema)) if schema is not None else NOT_KNOWN
        if self.is_right(node, item):
            return right
        other = self._truth.another(node, right, self._uniform("wrong", node, item))
        if other is not None:
            return other
        return json.dumps(minimal_instance(schema)) if schema is not None else _WRONG

    def latency(self) -> float:
        """Seconds that the next answer takes: log-normal around the stated median."""
        return self._simulation.latency * math.exp(self._random.gauss(0.0, self._simulation.latency_spread))

    def _choose(self, node: str, item: str, choices: Sequence[str], right: str | None) -> str:
        among = {choice.casefold(): choice for choice in choices}
        found = among.get(right.strip().casefold()) if right is not None else None
        at = self._uniform("wrong", node, item)
        if found is None:  # nobody knows what is right
            return choices[int(at * len(choices))]
        if self.is_right(node, item) or len(choices) == 1:
            return found
        others = [choice for choice in choices if choice != found]
        return others[int(at * len(others))]

    def _rank(self, node: str, item: str) -> float:
        c = self._simulation.correlation
        x = c * _hash("item", str(self._simulation.seed), node, item) + (1 - c) * self._uniform(
            "own", node, item
        )
        return _mixture_cdf(x, c)

    def _uniform(self, what: str, node: str, item: str) -> float:
        return _hash(what, str(self._simulation.seed), self.name, node, item)


def _hash(*parts: str) -> float:
    """Uniform in [0, 1), the same for the same parts on every machine."""
    digest = blake2b("\x1f".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53


def _mixture_cdf(x: float, c: float) -> float:
    """P(c·U + (1-c)·V ≤ x) for independent uniform U and V: the sum has a trapezoid for a density."""
    low, high = min(c, 1 - c), max(c, 1 - c)
    if low == 0:
        return x
    if x < low:
        return x * x / (2 * low * high)
    if x <= high:
        return (x - low / 2) / high
    return 1 - (1 - x) ** 2 / (2 * low * high)


def minimal_instance(schema: Any, root: Any = None, depth: int = 0) -> Any:
    """The least JSON value that fits a schema as pydantic writes them; None where there is none."""
    root = schema if root is None else root
    if not isinstance(schema, dict) or depth > _DEEPEST:
        return None

    def inner(part: Any) -> Any:
        return minimal_instance(part, root, depth + 1)

    if "default" in schema:
        return schema["default"]
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    if isinstance(schema.get("$ref"), str):
        return inner(root.get("$defs", {}).get(schema["$ref"].removeprefix("#/$defs/")))
    for union in ("anyOf", "oneOf", "allOf"):
        if schema.get(union):
            # Nothing is the least, and the only end of a model that contains itself.
            parts = schema[union]
            return None if {"type": "null"} in parts else inner(parts[0])
    kind = schema.get("type")
    if kind == "object":
        properties = schema.get("properties", {})
        return {name: inner(properties.get(name)) for name in schema.get("required", ())}
    if kind == "array":
        return [inner(schema.get("items")) for _ in range(min(schema.get("minItems", 0), 100))]
    if kind == "string":
        return "x" * min(schema.get("minLength", 0), 10_000)
    if kind in ("integer", "number"):
        return _least_number(schema)
    return False if kind == "boolean" else None


def _least_number(schema: dict[str, Any]) -> Any:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if low is not None:
        return low + 1 if "exclusiveMinimum" in schema and (high is None or low + 1 <= high) else low
    return min(0, high - 1) if high is not None else 0
