"""How each kind of server is told what it may answer: one function for each dialect.

OpenAI-compatible servers agree on messages and disagree on constraints. A dialect is chosen by a
model's ``provider``; one that is not listed here is spoken to as OpenAI itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json, to_json

from chainwax.router.answers import AnswerForm

__all__ = ["Constraint", "choice_schema", "choices_of", "constraint", "strict_schema", "unwrap"]


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a request says so that the model can only answer in the node's form."""

    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of the request's body."""
    wrapped: bool = False
    """A choice comes back as ``{"answer": "…"}``, because the root of a schema must be an object."""


def constraint(provider: str, api: str, answer: AnswerForm) -> Constraint:
    """The constraint for one dialect, API (``chat`` or ``completions``) and form of answer."""
    if answer.choices is None and answer.schema is None:
        return Constraint()
    return _DIALECTS.get(provider.lower(), _openai)(api, answer.choices, answer.schema)


def choice_schema(choices: Sequence[str]) -> dict[str, Any]:
    """The object schema whose only field is one of the choices."""
    return {
        "type": "object",
        "properties": {"answer": {"type": "string", "enum": list(choices)}},
        "required": ["answer"],
        "additionalProperties": False,
    }


def choices_of(schema: Any) -> list[str] | None:
    """The choices in a schema that :func:`choice_schema` made; None for any other."""
    try:
        choices = schema["properties"]["answer"]["enum"]
    except (KeyError, TypeError):
        return None
    return choices if isinstance(choices, list) and schema == choice_schema(choices) else None


def unwrap(text: str) -> str:
    """The choice in ``{"answer": "…"}``; the text itself where the server did not keep to the schema."""
    try:
        answer = from_json(text)["answer"]
    except (ValueError, KeyError, TypeError):
        return text
    return answer if isinstance(answer, str) else text


def _openai(api: str, choices: Sequence[str] | None, schema: dict[str, Any] | None) -> Constraint:
    if api == "completions":
        return Constraint()  # the API has no field for it: the node's own check has to do
    if choices is not None:
        return Constraint(_response_format("choice", choice_schema(choices), strict=True), wrapped=True)
    assert schema is not None
    strict = strict_schema(schema)
    return Constraint(_response_format(_name(schema), strict or schema, strict=strict is not None))


def _llamacpp(api: str, choices: Sequence[str] | None, schema: dict[str, Any] | None) -> Constraint:
    if choices is not None:
        return Constraint({"grammar": "root ::= " + " | ".join(map(_gbnf, choices))})
    return Constraint({"json_schema": schema})


def _vllm(api: str, choices: Sequence[str] | None, schema: dict[str, Any] | None) -> Constraint:
    if choices is not None:
        return Constraint({"structured_outputs": {"choice": list(choices)}})
    return Constraint({"structured_outputs": {"json": schema}})


def _sglang(api: str, choices: Sequence[str] | None, schema: dict[str, Any] | None) -> Constraint:
    if choices is not None:
        # re.escape also escapes spaces, which the server's regular expressions do not know.
        quoted = (re.sub(r"([\\.^$*+?{}\[\]|()])", r"\\\1", c) for c in choices)
        return Constraint({"regex": "(" + "|".join(quoted) + ")"})
    assert schema is not None
    if api == "completions":
        return Constraint({"json_schema": to_json(schema).decode()})
    return Constraint(_response_format(_name(schema), schema, strict=True))


def _ollama(api: str, choices: Sequence[str] | None, schema: dict[str, Any] | None) -> Constraint:
    # Ollama's own API calls it `format`; its OpenAI-compatible one takes `response_format` and makes
    # `format` of the schema inside, unchanged.
    if api == "completions":
        return Constraint()
    if choices is not None:
        return Constraint(_response_format("choice", choice_schema(choices), strict=True), wrapped=True)
    assert schema is not None
    return Constraint(_response_format(_name(schema), schema, strict=True))


_DIALECTS: dict[str, Callable[[str, Sequence[str] | None, dict[str, Any] | None], Constraint]] = {
    "llamacpp": _llamacpp,
    "vllm": _vllm,
    "sglang": _sglang,
    "ollama": _ollama,
}


def _response_format(name: str, schema: dict[str, Any], *, strict: bool) -> dict[str, Any]:
    named = {"name": name, "schema": schema, "strict": strict}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _name(schema: dict[str, Any]) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", str(schema.get("title", "")))[:64] or "answer"


def _gbnf(text: str) -> str:
    """A literal of llama.cpp's grammar language."""
    plain = re.sub(r'(["\\])', r"\\\1", text)
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\x{ord(m.group()):02X}", plain) + '"'


class _NotStrict(Exception):
    """Strict mode has no words for this schema."""


# What strict mode refuses to hear. Nothing is lost: pydantic checks the answer again.
_UNHEARD = {"default", "discriminator", "examples", "maxLength", "minLength", "uniqueItems"}
_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"}
_SAYS_SOMETHING = {"type", "$ref", "anyOf", "enum", "const"}


def strict_schema(schema: dict[str, Any]) -> dict[str, Any] | None:
    """A JSON schema as OpenAI's strict mode wants it; None where strict mode cannot say it.

    Strict mode wants every property required and no others allowed, and a root that is an object.
    A field with free keys (``dict[str, int]``) or of any type cannot be said.
    """
    try:
        root = _strict(schema)
    except _NotStrict:
        return None
    reference = root.pop("$ref", None)
    if reference is not None:  # a model that contains itself
        target = root.get("$defs", {}).get(str(reference).removeprefix("#/$defs/"))
        if target is None:
            return None
        root = {**target, "$defs": root["$defs"]}
    return root if root.get("type") == "object" else None


def _strict(schema: Any) -> dict[str, Any]:
    if not isinstance(schema, dict):
        raise _NotStrict
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _UNHEARD or (key == "format" and value not in _FORMATS):
            continue
        if key in ("properties", "$defs"):
            out[key] = {name: _strict(part) for name, part in value.items()}
        elif key in ("anyOf", "oneOf"):
            out["anyOf"] = [_strict(part) for part in value]
        elif key == "allOf":
            if len(value) != 1:
                raise _NotStrict
            out.update(_strict(value[0]))
        elif key == "items":
            out[key] = _strict(value)
        elif key in ("prefixItems", "patternProperties", "not", "if"):
            raise _NotStrict
        else:
            out[key] = value
    if not _SAYS_SOMETHING & out.keys():
        raise _NotStrict
    if out.get("type") == "object":
        if out.get("additionalProperties", False) is not False or "properties" not in out:
            raise _NotStrict
        out["additionalProperties"] = False
        out["required"] = list(out["properties"])
    if "$ref" in out and "$defs" not in out and len(out) > 1:
        # A reference may have no neighbours; its description is worth keeping.
        out["anyOf"] = [{"$ref": out.pop("$ref")}]
    return out
