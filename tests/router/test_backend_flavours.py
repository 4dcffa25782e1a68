"""What each dialect is told about the form of an answer."""

import json
import re
from typing import Any, Literal, Optional

import pytest
from openai.lib._pydantic import to_strict_json_schema
from pydantic import BaseModel, ConfigDict, Field

from chainwax.router.answers import Choice, FreeText, Structured
from chainwax.router.backends._flavours import choice_schema, choices_of, constraint, strict_schema, unwrap


class Inner(BaseModel):
    kind: Literal["a", "b"]
    size: int | None = None


class Outer(BaseModel):
    """An answer with everything in it."""

    name: str = Field(description="the name", min_length=1, max_length=9)
    inner: Inner = Field(description="what is inside")
    many: list[Inner] = []
    either: int | str = 3
    link: str = Field("x", json_schema_extra={"format": "uri"})


class Tree(BaseModel):
    value: int
    children: list["Tree"] = []
    left: Optional["Tree"] = Field(None, description="the left one")


class Plain(BaseModel):
    a: str
    b: Inner
    c: list[Inner]
    d: int | None


class FreeKeys(BaseModel):
    counts: dict[str, int]


class Anything(BaseModel):
    what: Any


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int


CHOICE = Choice(["yes", 'say "no"', "a.b (c)\n"])


def test_free_text_is_not_constrained():
    for provider in ("", "llamacpp", "vllm", "sglang", "ollama"):
        assert constraint(provider, "chat", FreeText()).fields == {}


@pytest.mark.parametrize(
    ("provider", "field"),
    [
        ("llamacpp", "grammar"),
        ("vllm", "structured_outputs"),
        ("SGLang", "regex"),
        ("ollama", "response_format"),
        ("openai", "response_format"),
        ("some-cloud", "response_format"),
        ("", "response_format"),
    ],
)
def test_each_dialect_has_its_field_for_choices(provider, field):
    held = constraint(provider, "chat", CHOICE)
    assert list(held.fields) == [field]
    assert held.wrapped == (field == "response_format")


def test_choices_keep_their_characters():
    assert constraint("llamacpp", "chat", CHOICE).fields["grammar"] == (
        r'root ::= "yes" | "say \"no\"" | "a.b (c)\x0A"'
    )
    assert constraint("vllm", "chat", CHOICE).fields == {
        "structured_outputs": {"choice": list(CHOICE.choices)}
    }
    pattern = constraint("sglang", "chat", CHOICE).fields["regex"]
    assert all(re.fullmatch(pattern, choice) for choice in CHOICE.choices)
    assert not re.fullmatch(pattern, "aXb (c)\n")
    assert "\\ " not in pattern


@pytest.mark.parametrize(
    ("provider", "api", "field"),
    [
        ("llamacpp", "chat", "json_schema"),
        ("llamacpp", "completions", "json_schema"),
        ("vllm", "completions", "structured_outputs"),
        ("sglang", "chat", "response_format"),
        ("sglang", "completions", "json_schema"),
        ("ollama", "chat", "response_format"),
        ("", "chat", "response_format"),
    ],
)
def test_each_dialect_has_its_field_for_schemas(provider, api, field):
    assert list(constraint(provider, api, Structured(Outer)).fields) == [field]


@pytest.mark.parametrize("provider", ["", "ollama"])
def test_the_plain_completions_api_has_no_field(provider):
    assert constraint(provider, "completions", CHOICE).fields == {}
    assert constraint(provider, "completions", Structured(Outer)).fields == {}


def test_the_wrapping_can_be_told_from_a_schema_of_the_same_shape():
    assert choices_of(choice_schema(["a", "b"])) == ["a", "b"]
    other = {"type": "object", "properties": {"answer": {"enum": ["a"]}, "why": {"type": "string"}}}
    for schema in (other, None, [], {"properties": {"answer": {"enum": "a"}}}):
        assert choices_of(schema) is None


@pytest.mark.parametrize(("text", "bare"), [('{"answer": "a"}', "a"), ("a", "a"), ("[" * 9999, "[" * 9999)])
def test_unwrap(text, bare):
    assert unwrap(text) == bare


def test_strict_schemas_are_those_of_the_official_client():
    assert strict_schema(Plain.model_json_schema()) == to_strict_json_schema(Plain)
    assert strict_schema(Inner.model_json_schema()) == to_strict_json_schema(Inner)


def objects_in(schema):
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        for value in schema.values():
            yield from objects_in(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from objects_in(value)


@pytest.mark.parametrize("model", [Outer, Tree, Plain])
def test_strict_schemas_say_only_what_strict_mode_hears(model):
    before = json.dumps(model.model_json_schema())
    strict = strict_schema(model.model_json_schema())
    assert strict["type"] == "object"
    found = list(objects_in(strict))
    assert found
    for each in found:
        assert each["additionalProperties"] is False
        assert each["required"] == list(each["properties"])
    text = json.dumps(strict)
    for word in ('"default"', "minLength", "maxLength", "uri", "oneOf", "allOf"):
        assert word not in text
    # A reference has no neighbours, and what the field says of itself is kept.
    assert all(set(d) == {"$ref"} for d in dicts_in(strict) if "$ref" in d)
    assert json.dumps(model.model_json_schema()) == before
    if model is Outer:
        assert strict["properties"]["inner"]["description"] == "what is inside"


def dicts_in(schema):
    if isinstance(schema, dict):
        yield schema
        for value in schema.values():
            yield from dicts_in(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from dicts_in(value)


@pytest.mark.parametrize("model", [FreeKeys, Anything, Open])
def test_what_strict_mode_cannot_say_goes_out_as_it_is(model):
    schema = model.model_json_schema()
    assert strict_schema(schema) is None
    sent = constraint("", "chat", Structured(model)).fields["response_format"]["json_schema"]
    assert sent["strict"] is False
    assert sent["schema"] == schema
