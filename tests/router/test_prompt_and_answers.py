"""Prompts are bound, answers are read: with what people write, and with what is thrown at them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from chainwax.router import (
    MODEL_TYPES,
    AnswerInvalid,
    Choice,
    ConfigError,
    FreeText,
    NodeSpec,
    Prompt,
    PromptFieldMissing,
    Structured,
    UnknownModelType,
    parse_model_type,
)
from chainwax.router.types import Arm, Params, call_id, content_key


class Ticket(BaseModel):
    text: str
    size: int = 3


@dataclasses.dataclass
class Mail:
    text: str


# -- prompts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [{"text": "hi"}, Ticket(text="hi"), Mail("hi")])
def test_fields_come_from_mappings_models_and_dataclasses(value: Any) -> None:
    assert Prompt("Say {text}").render(value) == [{"role": "user", "content": "Say hi"}]


def test_anything_else_is_the_value() -> None:
    assert Prompt("{value}!").render(7)[0]["content"] == "7!"


def test_system_and_examples_stand_before_the_item_and_stay_the_same() -> None:
    prompt = Prompt("{text}", system="Be brief.", examples=[("a", "1"), ("b", "2")])
    one, two = prompt.render({"text": "x"}), prompt.render({"text": "y"})
    assert [m["role"] for m in one] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert one[:-1] == two[:-1]


def test_the_version_changes_with_every_part() -> None:
    prompts = [Prompt("a"), Prompt("b"), Prompt("a", system="s"), Prompt("a", examples=[("q", "r")])]
    assert len({p.version for p in prompts}) == len(prompts)
    assert Prompt("a").version == Prompt("a").version


@pytest.mark.parametrize("template", ["{}", "{0}", "{text", "text}", "{text:{width}}", "{!r}"])
def test_templates_that_cannot_work_are_refused(template: str) -> None:
    with pytest.raises(ConfigError):
        Prompt(template)


@given(st.text())
def test_an_items_braces_and_percent_signs_stay_text(text: str) -> None:
    assert Prompt("A {text} B").render({"text": text})[0]["content"] == f"A {text} B"
    assert Prompt("{text}").render({"text": "{secret}", "secret": "s"})[0]["content"] == "{secret}"


@pytest.mark.parametrize("value", [{}, {"txt": 1}, None, [], Mail])
def test_a_missing_field_is_named_with_the_node(value: Any) -> None:
    with pytest.raises(PromptFieldMissing, match=r"node 'n'.*\{text\}"):
        Prompt("{text}").render(value, node="n")


def test_a_missing_part_of_a_field_is_no_crash() -> None:
    with pytest.raises(PromptFieldMissing, match="node 'n'"):
        Prompt("{a.b[c]}").render({"a": 1}, node="n")


# -- answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("billing", "billing"),
        ("  Billing.\n", "billing"),
        ('"not billing"', "not billing"),
        ("**Sales**", "sales"),
        ("The answer is: sales", "sales"),
        ("It is clearly not billing, I think.", "not billing"),
        ("STRASSE", "straße"),
    ],
)
def test_a_choice_is_found_where_it_is_plain(text: str, choice: str) -> None:
    assert Choice(["billing", "not billing", "sales", "straße"]).parse(text) == choice


@pytest.mark.parametrize("text", ["", " ", "bill", "billing or sales", "presales", "x" * 2_000_000, "\x00"])
def test_what_names_no_choice_or_two_is_invalid(text: str) -> None:
    with pytest.raises(AnswerInvalid):
        Choice(["billing", "sales"]).parse(text)


@pytest.mark.parametrize("choices", [[], ["a"], ["a", "A"], ["a", ""], "ab", ["a", 1]])
def test_choices_that_cannot_be_told_apart_are_refused(choices: Any) -> None:
    with pytest.raises(ConfigError):
        Choice(choices)


@given(st.text(max_size=300))
def test_no_text_breaks_a_form(text: str) -> None:
    for form in (Choice(["yes", "no"]), Structured(Ticket), FreeText()):
        try:
            value = form.parse(text)
        except AnswerInvalid:
            continue
        form.jsonable(value)


@pytest.mark.parametrize(
    "text",
    [
        '{"text": "a", "size": 1}',
        'Here it is:\n```json\n{"text": "a", "size": 1}\n```',
        '{"text": "a", "size": 1,',
        "{'text': 'a', 'size': 1}",
    ],
)
def test_json_is_read_where_its_meaning_is_plain(text: str) -> None:
    assert Structured(Ticket).parse(text) == Ticket(text="a", size=1)


@pytest.mark.parametrize(
    "text", ["", "none", "[]", '{"size": 1}', '{"text": "a", "size": "big"}', "{" * 50_000, '{"a":' * 9000]
)
def test_json_that_does_not_fit_is_invalid_and_says_why(text: str) -> None:
    with pytest.raises(AnswerInvalid, match=r"JSON|Ticket"):
        Structured(Ticket).parse(text)


def test_a_schema_must_be_a_model() -> None:
    with pytest.raises(ConfigError, match="pydantic model"):
        Structured(dict)  # type: ignore[arg-type]


# -- types and identities ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("text", "text"),
        ("Vision", "text+image"),
        ("image", "text+image"),
        ("AUDIO + text", "text+audio"),
        (["audio", "Image", "text"], "text+image+audio"),
        ("image,audio", "text+image+audio"),
        ("Speech", "speech"),
        ("embedding", "embedding"),
    ],
)
def test_model_types_in_any_order_and_case(name: Any, canonical: str) -> None:
    assert parse_model_type(name) == canonical
    assert canonical in MODEL_TYPES


@pytest.mark.parametrize("name", ["", "txt", "text+smell", "video", "text embedding", []])
def test_an_unknown_type_names_the_known(name: Any) -> None:
    with pytest.raises(UnknownModelType, match=r"did you mean|known:"):
        parse_model_type(name)


def test_a_call_is_the_same_for_the_same_question_only() -> None:
    node = NodeSpec("n", Prompt("{text}"), FreeText())
    hot = NodeSpec("n", Prompt("{text}"), FreeText(), params=Params(temperature=1.0))
    messages = [{"role": "user", "content": "x"}]
    known = call_id("run", node, "key", "pos", messages)
    assert known == call_id("run", node, "key", "pos", [dict(messages[0])])
    others = [
        call_id("run2", node, "key", "pos", messages),
        call_id("run", NodeSpec("m", Prompt("{text}"), FreeText()), "key", "pos", messages),
        call_id("run", node, "key2", "pos", messages),
        call_id("run", node, "key", "pos2", messages),
        call_id("run", node, "key", "pos", [{"role": "user", "content": "y"}]),
        call_id("run", node, "key", "pos", [{"role": "system", "content": "x"}]),
        call_id("run", hot, "key", "pos", messages),
        call_id("run", node, "keypos", "", messages),
    ]
    assert len({known, *others}) == len(others) + 1


def test_ids_of_neighbours_in_a_stream_are_neighbours() -> None:
    node = NodeSpec("n", Prompt("{text}"), FreeText())

    def known(position: str) -> str:
        return call_id("run", node, "", position, [{"role": "user", "content": position}])

    for name, piece in (
        ("tickets.jsonl:", ""),
        ("tickets/3/", ""),
        ("", ""),
        ("t:0:", "/2"),
        ("t:", "/2/0#"),
    ):
        ids = [known(f"{name}{n}{piece}") for n in (1, 9, 10, 2_000, 2**31, 2**32 - 1)]
        assert ids == sorted(ids)
    odd = [known(p) for p in ("", "x", "1x", "9" * 400, "-1", "\u0661", "1\n", "\ud800", str(2**32))]
    assert {len(one) for one in [*ids, *odd]} == {32}
    assert len({*ids, *odd}) == len(ids) + len(odd)
    assert all(int(one, 16) >= 0 for one in odd)


def test_content_is_known_without_run_and_position() -> None:
    messages = [{"role": "user", "content": "x"}]
    keys = {
        content_key(messages, Arm("a"), Params(), "text"),
        content_key(messages, Arm("b"), Params(), "text"),
        content_key(messages, Arm("a"), Params(max_tokens=5), "text"),
        content_key(messages, Arm("a"), Params(), "choice:[]"),
        content_key([*messages, *messages], Arm("a"), Params(), "text"),
    }
    assert len(keys) == 5
