"""What stands in the bus's topics: JSON with a ``version``, read with the distrust that a wire deserves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from pydantic_core import to_json

from chainwax.router.control import Change, check_change
from chainwax.router.credit import LONGEST
from chainwax.router.errors import ConfigError
from chainwax.router.types import Decision, Feedback, FeedbackKind

__all__ = [
    "MOST_BYTES",
    "CallLine",
    "CallsMessage",
    "ControlMessage",
    "DeadLetterMessage",
    "DecisionMessage",
    "FeedbackMessage",
    "PathCall",
    "Unreadable",
    "decode",
    "encode_calls",
    "encode_control",
    "encode_decision",
    "encode_feedback",
]

MOST_BYTES = 256 * 1024
"""What a message may take: well below what a topic takes by default (1 MB)."""
SHOWN_CHARS = 1000
"""How much of something unreadable is kept."""
MOST_CALLS = 1000
"""Calls in one message."""

Name = Annotated[str, Field(max_length=500)]
Key = Annotated[str, Field(max_length=4000)]
Context = Annotated[str, Field(max_length=1000)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Unreadable(ValueError):
    """A message that cannot be used; ``reason`` is ``malformed``, ``unknown_version`` or ``huge``."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class _Message(BaseModel):
    # Strict: a program that sends "0.9" or true as a score has a fault that it should hear of. Unknown keys
    # are refused, for a misspelled one would otherwise be passed over without a word.
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    version: Literal[1] = 1


class PathCall(BaseModel):
    """One call that an item owes its end result to."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    node: Annotated[str, Field(min_length=1, max_length=500)]
    call_id: Annotated[str, Field(min_length=1, max_length=500)]
    arm: Annotated[str, Field(min_length=1, max_length=500)]
    context: Context = ""


class FeedbackMessage(_Message):
    """One score in ``chainwax.feedback``.

    The call is named by ``call_id``, or by ``node`` and ``item_key``, which mean the last call of the node
    about the item; ``node`` and ``arm`` alone say something of an arm without a call.
    """

    score: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    call_id: Name = ""
    flow: Name = ""
    """Needed where several flows share the topics, and the call is not named."""
    node: Name = ""
    item_key: Key = ""
    arm: Name = ""
    """Where the sender knows it; else it is looked up."""
    metric: Name = "score"
    source: Name = ""
    """Who says so. A later score of the same source, metric and call replaces the earlier one."""
    kind: FeedbackKind = FeedbackKind.downstream
    time: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Seconds since 1970, UTC; None takes the time at which it reached the topic."""
    correction: JsonValue = None
    """The right answer."""
    context: Context = ""
    """What the router read off the call's prompt, where the sender knows it; else it is looked up."""
    weight: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1.0
    """How much the score says; 1 is as much as any other."""
    path: Annotated[list[PathCall], Field(max_length=LONGEST)] = []
    """Where an item's end result is scored: the calls that it owes its value to, oldest first."""

    @model_validator(mode="after")
    def _about_something(self) -> FeedbackMessage:
        if not self.call_id and not (self.node and (self.item_key or self.arm)):
            raise ValueError("it names no call: give call_id, or node and item_key")
        return self


class CallLine(BaseModel):
    """One answered call."""

    model_config = ConfigDict(extra="forbid", strict=True)

    call_id: Annotated[str, Field(min_length=1, max_length=500)]
    node: Annotated[str, Field(min_length=1, max_length=500)]
    arm: Annotated[str, Field(min_length=1, max_length=500)]
    item_key: Key = ""
    time: Number = 0.0
    cost_usd: Number = 0.0
    simulated: bool = False
    context: Context = ""


class CallsMessage(_Message):
    """Answered calls of one run in ``chainwax.calls``."""

    flow: Name
    run: Name
    calls: Annotated[list[CallLine], Field(max_length=MOST_CALLS)]


class ControlMessage(_Message):
    """One change to a running flow in ``chainwax.control``, keyed by ``flow/node/set``."""

    flow: Annotated[str, Field(min_length=1, max_length=500)]
    node: Name = ""
    """Empty for all LLM nodes of the flow."""
    set: str
    """``target``, ``budget``, ``pin`` or ``paused``."""
    value: JsonValue
    """A share, dollars, a model, true or false; null takes it back."""

    @model_validator(mode="after")
    def _possible(self) -> ControlMessage:
        try:
            check_change(self.change)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def change(self) -> Change:
        """The same for the router."""
        return Change(self.flow, self.set, self.value, self.node)  # type: ignore[arg-type]  # as was checked


class DecisionMessage(_Message):
    """One decision in ``chainwax.decisions``: a budget reached, a model promoted and so on."""

    flow: Name
    run: Name = ""
    kind: str
    node: str
    detail: dict[str, JsonValue]
    time: Number


class DeadLetterMessage(_Message):
    """One message that could not be used, in ``chainwax.dead-letters``, keyed by its ``place``."""

    flow: Name
    place: str
    """``topic:partition:offset``."""
    reason: str
    """``malformed``, ``unknown_version``, ``huge``, or ``unknown_call``."""
    error: str
    value: str
    """The first thousand characters of it."""
    size: int
    """Bytes of the whole."""
    time: Number

    def encoded(self) -> bytes:
        """The message as it goes over the wire."""
        return self.model_dump_json().encode()


M = TypeVar("M", bound=_Message)


def decode(kind: type[M], raw: bytes | None) -> M:
    """A message from its bytes. Raises :class:`Unreadable`, and nothing else."""
    if raw is None:
        raise Unreadable("malformed", "it has no value")
    if len(raw) > MOST_BYTES:
        raise Unreadable("huge", f"it has {len(raw)} bytes; at most {MOST_BYTES} are read")
    try:
        message = kind.model_validate_json(raw)
    except ValidationError as error:
        raise _unreadable(error) from None
    except Exception as error:  # whatever a parser may still raise for bytes that are made to break it
        raise Unreadable("malformed", f"{type(error).__name__}: {error}"[:SHOWN_CHARS]) from None
    if "version" not in message.model_fields_set:
        raise Unreadable("unknown_version", "version: it is missing; this is 1")
    return message


def _unreadable(error: ValidationError) -> Unreadable:
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    for one in errors:
        if one["loc"] == ("version",):
            return Unreadable("unknown_version", "version: only 1 is known")
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return Unreadable("malformed", (f"{where}: {message}" if where else message)[:SHOWN_CHARS])


def encode_feedback(feedback: Feedback, flow: str) -> tuple[bytes, bool]:
    """The bytes of a score, and whether its correction is whole.

    A correction that JSON does not have goes as its ``repr``; one that is too large is left out. Raises
    :class:`Unreadable` where no router would take the score: a router learns from the topic alone, so what
    cannot be read again had better be told to the sender's log.
    """
    score = feedback.score
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise Unreadable("malformed", f"the score {score!r} is no number in [0, 1]")
    fields: dict[str, Any] = {"version": 1, "flow": flow, "node": feedback.node, "score": float(score)}
    for name in ("call_id", "item_key", "arm", "metric", "source", "context"):
        if value := getattr(feedback, name):
            fields[name] = value
    if feedback.kind is not FeedbackKind.downstream:
        fields["kind"] = feedback.kind
    if feedback.time:
        fields["time"] = feedback.time
    if feedback.weight != 1.0:
        fields["weight"] = feedback.weight
    if feedback.path:
        fields["path"] = [asdict(ref) for ref in feedback.path[-LONGEST:]]
    if feedback.call_id and len(feedback.item_key) > 4000:
        del fields["item_key"]  # the call says it all
    if feedback.correction is None:
        return _checked(fields), True
    for whole, correction in ((True, feedback.correction), (False, _shown(feedback.correction))):
        try:
            return _checked(fields | {"correction": correction}), whole
        except Unreadable:
            continue
    return _checked(fields), False


def encode_calls(flow: str, run: str, calls: Sequence[Mapping[str, Any]]) -> bytes:
    """The bytes of answered calls, each with the fields of a :class:`CallLine`."""
    fields = {"version": 1, "flow": flow, "run": run, "calls": calls}
    try:
        return to_json(fields)
    except Exception:  # half surrogate pairs in an item's key: nobody can ask for those anyway
        return json.dumps(fields, ensure_ascii=False, default=_shown).encode("utf-8", "replace")


def _checked(fields: dict[str, Any]) -> bytes:
    try:
        raw = to_json(fields, inf_nan_mode="null", fallback=_shown)
    except Exception as error:  # an answer's value may be anyone's class
        raise Unreadable("malformed", f"it has no form in JSON: {error}") from None
    decode(FeedbackMessage, raw)
    return raw


def encode_control(change: Change) -> tuple[bytes, bytes]:
    """The key and the bytes of a change. Raises :class:`Unreadable` where no process would take it."""
    fields = {"flow": change.flow, "node": change.node, "set": change.setting, "value": change.value}
    raw = json.dumps({"version": 1, **fields}).encode()
    decode(ControlMessage, raw)
    return f"{change.flow}/{change.node}/{change.setting}".encode("utf-8", "backslashreplace"), raw


def encode_decision(decision: Decision, flow: str) -> bytes:
    """The bytes of a decision; what JSON does not have goes as its ``repr``. Raises :class:`Unreadable`."""
    fields: dict[str, Any] = {"version": 1, "flow": flow, "kind": decision.kind, "node": decision.node}
    fields |= {"time": decision.time}
    for detail in (dict(decision.detail), {"repr": _shown(decision.detail)}):
        try:
            raw = to_json(fields | {"detail": detail}, inf_nan_mode="null", fallback=_shown)
            decode(DecisionMessage, raw)
        except Exception as error:
            failure = error
        else:
            return raw
    raise Unreadable("malformed", f"it has no form in JSON: {failure}")


def _shown(value: Any) -> str:
    try:
        text = repr(value)[:SHOWN_CHARS]
    except Exception as error:  # a repr is other people's code
        text = f"<{type(value).__name__} whose repr raises {type(error).__name__}>"
    return text.encode("utf-8", "backslashreplace").decode()
