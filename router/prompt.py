"""Prompts: a template with named fields, bound to an item when a call is made.

Templates are Python format strings, so that a field is ``{text}`` and a literal brace ``{{``. They are
formatted once, so braces inside an item's text stay text.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

from pydantic import BaseModel

from chainwax.router.errors import ConfigError, PromptFieldMissing, nearest
from chainwax.router.types import Message

__all__ = ["Prompt", "fields_of"]


def fields_of(value: Any) -> Mapping[str, Any]:
    """An item's fields by name: a mapping's keys, a model's or dataclass's fields, else ``value``."""
    if type(value) is dict:
        return value
    if isinstance(value, Mapping):
        return value
    if isinstance(value, BaseModel):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {"value": value}


class Prompt:
    """A prompt template.

    ``examples`` are (question, answer) pairs that stand before the item as earlier turns; they and
    ``system`` are the same for every item, so a server's prefix cache holds them.

    Raises :class:`ConfigError` for a template that is no format string or has a nameless field.
    """

    __slots__ = ("_prefix", "fields", "template", "version")

    def __init__(
        self,
        template: str,
        *,
        system: str | None = None,
        examples: Sequence[tuple[str, str]] = (),
    ) -> None:
        try:
            parsed = list(Formatter().parse(template))
        except ValueError as error:
            raise ConfigError(f"the prompt is no valid template ({error}): {template[:80]!r}") from None
        names: list[str] = []
        for _, name, spec, _ in parsed:
            if name is None:
                continue
            root = name.split(".")[0].split("[")[0]
            if not root or root.isdigit():
                raise ConfigError(
                    f"a field in the prompt has no name ('{{{name}}}'): name it as the item does, "
                    f"and write a literal brace as '{{{{': {template[:80]!r}"
                )
            if spec and "{" in spec:
                raise ConfigError(f"nested fields are not supported in a prompt: {template[:80]!r}")
            if root not in names:
                names.append(root)
        self.template = template
        self.fields: tuple[str, ...] = tuple(names)
        """Names that an item must have."""
        prefix: list[Message] = []
        if system:
            prefix.append({"role": "system", "content": system})
        for question, answer in examples:
            prefix.append({"role": "user", "content": question})
            prefix.append({"role": "assistant", "content": answer})
        self._prefix = prefix
        identity = repr((template, system, tuple(examples)))
        self.version = hashlib.blake2b(identity.encode(), digest_size=4).hexdigest()
        """A short hash of the whole prompt."""

    def render(self, value: Any, *, node: str = "") -> list[Message]:
        """The chat messages for one item.

        Raises :class:`PromptFieldMissing`, naming the node, the field and the nearest one there is.
        """
        fields = fields_of(value)
        try:
            text = self.template.format_map(fields)
        except KeyError as error:
            name = str(error.args[0])
            raise PromptFieldMissing(
                f"node '{node}': the prompt names {{{name}}}, which the item lacks: "
                f"{nearest(name, map(str, fields))}"
            ) from None
        except (ValueError, IndexError, AttributeError, TypeError) as error:
            raise PromptFieldMissing(f"node '{node}': the prompt does not fit the item: {error}") from None
        if self._prefix:
            return [*self._prefix, {"role": "user", "content": text}]
        return [{"role": "user", "content": text}]
