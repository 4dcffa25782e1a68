"""Messages of the bus's topics: what is written can be read, and nothing that is read can do harm."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainwax.connectors.wire import (
    MOST_BYTES,
    CallsMessage,
    ControlMessage,
    DeadLetterMessage,
    DecisionMessage,
    FeedbackMessage,
    Unreadable,
    decode,
    encode_calls,
    encode_control,
    encode_decision,
    encode_feedback,
)
from chainwax.router.control import Change
from chainwax.router.types import CallRef, Decision, Feedback, FeedbackKind

GOOD = {"version": 1, "score": 0.5, "call_id": "c"}


def raw(**changes: Any) -> bytes:
    return json.dumps({k: v for k, v in {**GOOD, **changes}.items() if v is not ...}).encode()


def reason(data: bytes | None, kind: Any = FeedbackMessage) -> str:
    with pytest.raises(Unreadable) as caught:
        decode(kind, data)
    assert str(caught.value)
    return caught.value.reason


def test_feedback_survives_the_wire_to_the_last_bit() -> None:
    sent = Feedback(
        "route", 0.1 + 0.2, "call", "item-ü", "big[effort=low]", "team", "agent", FeedbackKind.human, 1e9 / 3,
        {"team": ["billing", None, 1.5]},
    )  # fmt: skip
    data, whole = encode_feedback(sent, "triage")
    got = decode(FeedbackMessage, data)
    assert whole
    assert got.version == 1
    assert got.flow == "triage"
    for name in (
        "node",
        "score",
        "call_id",
        "item_key",
        "arm",
        "metric",
        "source",
        "kind",
        "time",
        "correction",
    ):
        assert getattr(got, name) == getattr(sent, name)


@pytest.mark.parametrize(
    "about",
    [
        {"call_id": "c"},
        {"call_id": ..., "node": "n", "item_key": "i"},
        {"call_id": ..., "node": "n", "arm": "a"},
    ],
)
def test_a_score_names_a_call_or_an_item_or_an_arm(about: dict[str, Any]) -> None:
    assert decode(FeedbackMessage, raw(**about)).score == 0.5


@pytest.mark.parametrize(
    "changes",
    [
        {"call_id": ...},
        {"call_id": ..., "node": "n"},
        {"call_id": ..., "item_key": "i"},
        {"score": ...},
        {"score": -0.01},
        {"score": 1.01},
        {"score": "0.5"},
        {"score": True},
        {"score": None},
        {"score": float("nan")},
        {"score": float("inf")},
        {"score": 10**400},
        {"time": -1.0},
        {"time": "now"},
        {"time": float("inf")},
        {"kind": "guess"},
        {"call_id": 7},
        {"call_id": ["c"]},
        {"call_id": "c" * 501},
        {"item_key": "i" * 4001},
        {"callid": "c"},
    ],
)
def test_a_score_that_is_wrong_is_malformed(changes: dict[str, Any]) -> None:
    assert reason(raw(**changes)) == "malformed"


@pytest.mark.parametrize("version", [2, 0, "1", None, ..., {"a": 1}])
def test_an_unknown_version_says_so_whatever_else_is_in_it(version: Any) -> None:
    assert reason(raw(version=version, something_new=[1])) == (
        "malformed" if version is ... else "unknown_version"
    )
    assert reason(raw(version=version)) == "unknown_version"


@pytest.mark.parametrize(
    "data",
    [
        None,
        b"",
        b"   ",
        b"null",
        b"[]",
        b"7",
        b'"text"',
        b"{",
        raw()[:-1],
        raw() + b"{}",
        b"\xef\xbb\xbf" + raw(),
        "über".encode("latin-1"),
        json.dumps(GOOD).encode("utf-16"),
        b'{"version": 1, "score": 1, "call_id": "\\ud800"}',
        b'{"version": 1, "score": 1, "call_id": "c", "correction": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"a": ' * 20_000 + b"1" + b"}" * 20_000,
        b'{"version": 1, "score": 1, "call_id": "c", "correction": ' + b"9" * 100_000 + b"}",
        b"\x00" * 1000,
    ],
)
def test_what_is_no_message_is_malformed(data: bytes | None) -> None:
    assert reason(data) == "malformed"


def test_what_is_huge_is_not_even_parsed() -> None:
    assert reason(b"{" * (MOST_BYTES + 1)) == "huge"


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
@settings(max_examples=200, deadline=None)
def test_no_bytes_at_all_raise_anything_else(data: bytes) -> None:
    for kind in (FeedbackMessage, CallsMessage):
        with pytest.raises(Unreadable):
            decode(kind, data)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@given(
    score=st.floats(0, 1),
    texts=st.lists(st.text(st.characters(), max_size=30), min_size=4, max_size=4),
    correction=_json,
)
@settings(max_examples=100, deadline=None)
def test_what_is_encoded_can_be_decoded(score: float, texts: list[str], correction: Any) -> None:
    sent = Feedback("node", score, "call", texts[0], "arm", texts[1], texts[2], correction=correction)
    try:
        data, _ = encode_feedback(sent, "flow")
    except Unreadable:
        # Half surrogate pairs have no UTF-8.
        assert any(not t.isprintable() for t in texts)
        return
    got = decode(FeedbackMessage, data)
    assert (got.score, got.item_key) == (score, texts[0])


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "correction",
    [
        object(),
        Unshowable(),
        {1: {2: object()}},
        b"\xff",
        "\ud800",
        "x" * (MOST_BYTES + 1),
        [10**5000],
        {"a": float("nan")},
    ],
)
def test_a_correction_that_json_does_not_have_never_costs_the_score(correction: Any) -> None:
    data, _ = encode_feedback(Feedback("n", 0.5, "c", correction=correction), "f")
    assert decode(FeedbackMessage, data).score == 0.5


def test_a_correction_that_holds_itself_never_costs_the_score() -> None:
    loop: list[Any] = []
    loop.append(loop)
    data, whole = encode_feedback(Feedback("n", 0.5, "c", correction=loop), "f")
    assert not whole
    assert decode(FeedbackMessage, data).correction == "[[...]]"


@pytest.mark.parametrize("score", [math.nan, math.inf, -0.1, 1.5, "0.5", None])
def test_a_score_that_no_router_takes_is_refused_where_it_is_said(score: Any) -> None:
    with pytest.raises(Unreadable):
        encode_feedback(Feedback("n", score, "c"), "f")


def test_an_items_key_that_is_a_novel_is_left_out_where_the_call_is_named() -> None:
    data, _ = encode_feedback(Feedback("n", 0.5, "c", "k" * 5000), "f")
    assert decode(FeedbackMessage, data).item_key == ""
    with pytest.raises(Unreadable):
        encode_feedback(Feedback("n", 0.5, "", "k" * 5000), "f")


def test_calls_survive_the_wire() -> None:
    line = {
        "call_id": "c",
        "node": "n",
        "arm": "a",
        "item_key": "i",
        "time": 1.5,
        "cost_usd": 1e-7,
        "simulated": True,
        "context": "AAEC",
    }
    got = decode(CallsMessage, encode_calls("f", "r", [line, {"call_id": "d", "node": "n", "arm": "a"}]))
    assert (got.flow, got.run) == ("f", "r")
    assert got.calls[0].model_dump() == line
    assert got.calls[1].item_key == ""


def test_an_items_key_without_utf8_does_not_cost_the_other_calls() -> None:
    lines = [
        {"call_id": c, "node": "n", "arm": "a", "item_key": k} for c, k in (("c", "\ud800"), ("d", "ok"))
    ]
    got = decode(CallsMessage, encode_calls("f", "r", lines))
    assert [line.call_id for line in got.calls] == ["c", "d"]
    assert got.calls[1].item_key == "ok"


@pytest.mark.parametrize(
    "changes",
    [{"calls": "all"}, {"calls": [{"call_id": "c"}]}, {"calls": [7]}, {"run": ...}, {"flow": 1}, {"more": 1}],
)
def test_calls_that_are_wrong_are_malformed(changes: dict[str, Any]) -> None:
    message = {"version": 1, "flow": "f", "run": "r", "calls": []} | changes
    data = json.dumps({k: v for k, v in message.items() if v is not ...}).encode()
    assert reason(data, CallsMessage) == "malformed"


def test_too_many_calls_in_one_message_are_malformed() -> None:
    line = {"call_id": "c", "node": "n", "arm": "a"}
    data = encode_calls("f", "r", [line] * 1001)
    assert reason(data, CallsMessage) == "malformed"


@pytest.mark.parametrize("detail", [{"n": 1}, {"n": float("nan")}, {1: object()}, {"n": "\ud800"}])
def test_any_decision_can_be_announced(detail: dict[Any, Any]) -> None:
    got = decode(DecisionMessage, encode_decision(Decision("promoted", "route", detail, 2.0), "f"))
    assert (got.kind, got.node, got.time, got.flow) == ("promoted", "route", 2.0, "f")


def test_a_dead_letter_can_be_read_again() -> None:
    letter = DeadLetterMessage(flow="f", place="t:0:1", reason="huge", error="e", value="v", size=7, time=1.0)
    assert decode(DeadLetterMessage, letter.encoded()) == letter


# -- control --------------------------------------------------------------------------------------


def control(**changes: Any) -> bytes:
    fields = {"version": 1, "flow": "triage", "node": "route", "set": "target", "value": 0.9}
    return json.dumps(fields | changes).encode()


@pytest.mark.parametrize(
    ("setting", "value"),
    [("target", 0.9), ("target", 1), ("budget", 0), ("pin", "small"), ("paused", True), ("pin", None)],
)
def test_a_change_survives_the_wire(setting: str, value: Any) -> None:
    change = Change("triage", setting, value, "route")
    key, sent = encode_control(change)
    assert key == f"triage/route/{setting}".encode()
    assert decode(ControlMessage, sent).change == change


@pytest.mark.parametrize(
    "changes",
    [
        {"flow": ""},
        {"flow": 7},
        {"node": None},
        {"set": "targt"},
        {"set": "target", "value": 1.5},
        {"set": "target", "value": "0.9"},
        {"set": "target", "value": {"a": [1]}},
        {"set": "budget", "value": -1},
        {"set": "pin", "value": True},
        {"set": "pin", "value": "x" * 501},
        {"set": "paused", "value": "yes"},
        {"sett": "target"},
        {"node": "x" * 501},
    ],
)
def test_a_change_that_is_wrong_is_malformed(changes: dict[str, Any]) -> None:
    assert reason(control(**changes), ControlMessage) == "malformed"


def test_a_change_says_what_is_wrong_and_the_nearest() -> None:
    with pytest.raises(Unreadable, match="did you mean 'target'"):
        decode(ControlMessage, control(set="targt"))
    assert reason(control(version=2, set="colour"), ControlMessage) == "unknown_version"
    assert reason(None, ControlMessage) == "malformed"


@given(st.binary(max_size=200))
def test_no_bytes_make_a_change_raise_anything_else(data: bytes) -> None:
    reason(data, ControlMessage)


def test_a_change_that_nobody_would_take_is_refused_where_it_is_said() -> None:
    with pytest.raises(Unreadable):
        encode_control(Change("triage", "target", 7.0))


def test_the_path_of_an_end_score_survives_the_wire() -> None:
    path = tuple(CallRef(f"n{i}", f"call{i}", "small") for i in range(150))
    data, _ = encode_feedback(Feedback("n149", 1.0, "call149", arm="small", weight=0.25, path=path), "f")
    got = decode(FeedbackMessage, data)
    assert got.weight == 0.25
    assert [(ref.node, ref.call_id, ref.arm) for ref in got.path] == [
        (ref.node, ref.call_id, ref.arm) for ref in path[-100:]
    ]


@pytest.mark.parametrize(
    "path", ["a", [1], [{"node": "a"}], [{"node": "a", "call_id": "c", "arm": ""}], [{}] * 2, {"node": "a"}]
)
def test_a_path_that_names_no_calls_is_refused(path: Any) -> None:
    assert reason(raw(path=path)) == "malformed"


@pytest.mark.parametrize("weight", [-0.1, 1.1, "1", float("inf")])
def test_a_weight_that_is_none_is_refused(weight: Any) -> None:
    assert reason(raw(weight=weight)) == "malformed"
