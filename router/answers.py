"""What a node accepts as an answer: free text, one of some choices, or a pydantic model.

A form of answer says three things: what the backend should be told so that the model can only answer
so (``choices`` or ``schema``), how a text becomes a value, and its own ``key`` for a call's identity.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import json_repair
from pydantic import BaseModel, ValidationError

from chainwax.router.errors import AnswerInvalid, ConfigError

__all__ = ["AnswerForm", "Choice", "FreeText", "Structured"]

_LONGEST = 1_000_000  # characters; what is longer is no answer to parse, but an attack or a fault
_TRIM = re.compile(r"^[\s\"'`*.:;!()\[\]{}-]+|[\s\"'`*.:;!()\[\]{}-]+$")


class AnswerForm(Protocol):
    """The protocol. ``parse`` raises :class:`AnswerInvalid` with a reason that a person can use."""

    choices: tuple[str, ...] | None
    schema: dict[str, Any] | None
    key: str

    def parse(self, text: str) -> Any:
        """The value that the text stands for."""
        ...

    def jsonable(self, value: Any) -> Any:
        """The value as JSON can hold it."""
        ...


class FreeText:
    """Any text; an own check may refuse it by raising ValueError or returning False."""

    choices: tuple[str, ...] | None = None
    schema: dict[str, Any] | None = None

    def __init__(self, check: Callable[[str], object] | None = None) -> None:
        self._check = check
        self.key = "text"

    def parse(self, text: str) -> str:
        """The text itself, stripped; an empty one is no answer."""
        stripped = text.strip()
        if not stripped:
            raise AnswerInvalid("the model answered with an empty text")
        if self._check is not None:
            try:
                passed = self._check(stripped)
            except ValueError as error:
                raise AnswerInvalid(f"the check refused the answer: {error}") from None
            if passed is False:
                raise AnswerInvalid("the check refused the answer")
        return stripped

    def jsonable(self, value: Any) -> Any:
        """Texts are JSON already."""
        return value


class Choice:
    """Exactly one of some texts.

    A model that is not held to the choices by its server answers ``"Billing."`` or ``The answer is
    billing``: case, quotes and punctuation are forgiven, and so is a sentence that names one choice only.
    """

    schema: dict[str, Any] | None = None

    def __init__(self, choices: Sequence[str]) -> None:
        if isinstance(choices, str):
            raise ConfigError(f"choices must be a list of texts, not the text {choices!r}")
        bad = [c for c in choices if not isinstance(c, str) or not c.strip()]
        if bad:
            raise ConfigError(f"choices must be texts that are not empty, not {bad[0]!r}")
        folded = [c.strip().casefold() for c in choices]
        if len(set(folded)) != len(folded):
            raise ConfigError(f"choices must differ in more than case: {list(choices)}")
        if len(choices) < 2:
            raise ConfigError(f"a choice needs at least two choices, not {list(choices)}")
        self.choices: tuple[str, ...] | None = tuple(choices)
        self.key = "choice:" + json.dumps(list(choices), ensure_ascii=False)
        self._by_folded = dict(zip(folded, choices, strict=True))
        # Longest first, so that "not billing" is not found as "billing" where both are choices.
        ordered = sorted(folded, key=len, reverse=True)
        self._inside = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, ordered)) + r")(?!\w)")

    def parse(self, text: str) -> str:
        """The choice that the text names."""
        if len(text) > _LONGEST:
            raise AnswerInvalid(f"the model answered with {len(text)} characters")
        folded = text.strip().casefold()
        found = self._by_folded.get(folded) or self._by_folded.get(_TRIM.sub("", folded))
        if found is not None:
            return found
        named = set(self._inside.findall(folded[:4000]))
        if len(named) == 1:
            return self._by_folded[named.pop()]
        raise AnswerInvalid(
            f"the model answered {text.strip()[:80]!r}, which is "
            f"{'more than one' if named else 'none'} of {list(self._by_folded.values())}"
        )

    def jsonable(self, value: Any) -> Any:
        """Choices are JSON already."""
        return value


class Structured:
    """JSON that a pydantic model accepts. Broken JSON is repaired where its meaning is plain."""

    choices: tuple[str, ...] | None = None

    def __init__(self, model: type[BaseModel]) -> None:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            raise ConfigError(f"extract needs a pydantic model, not {model!r}")
        self.model = model
        self.schema: dict[str, Any] | None = model.model_json_schema()
        self.key = "schema:" + json.dumps(self.schema, sort_keys=True, ensure_ascii=False)

    def parse(self, text: str) -> BaseModel:
        """The model's instance."""
        if len(text) > _LONGEST:
            raise AnswerInvalid(f"the model answered with {len(text)} characters")
        try:
            return self.model.model_validate_json(text)
        except ValidationError as first:
            start = text.find("{")
            if start < 0:
                raise AnswerInvalid(f"the model answered without JSON: {text.strip()[:80]!r}") from None
            try:
                repaired = json_repair.loads(text[start:])
                return self.model.model_validate(repaired)
            except ValidationError as second:
                raise AnswerInvalid(
                    f"the answer does not fit {self.model.__name__}: {_short(second)}"
                ) from None
            except (ValueError, RecursionError):
                raise AnswerInvalid(
                    f"the answer is no JSON for {self.model.__name__}: {_short(first)}"
                ) from None

    def jsonable(self, value: Any) -> Any:
        """The model as plain JSON values."""
        return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _short(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, e['loc'])) or 'the whole'}: {e['msg']}"
        for e in error.errors(include_url=False)[:3]
    )
