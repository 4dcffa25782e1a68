"""Between the router's types and rows: what is recorded of a call, and a call made from what is recorded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache, partial
from numbers import Integral, Real
from typing import Any, NamedTuple

from pydantic_core import from_json, to_json

from chainwax.router import errors
from chainwax.router.answers import AnswerForm
from chainwax.router.errors import CallError
from chainwax.router.types import (
    Arm,
    Attempt,
    CallRef,
    CallResult,
    Decision,
    Feedback,
    FeedbackKind,
    Params,
    Query,
    Usage,
    content_key,
)

__all__ = ["DeadLetter", "Learned", "RecordedCall", "RecordedItem", "Row", "RunInfo"]

Row = tuple[Any, ...]

_LONGEST_REPR = 10_000  # characters


@dataclass(slots=True)
class DeadLetter:
    """An item that a node could not handle, with the reason."""

    node: str
    value: Any
    """The item's value."""
    error: str
    """Class of the error."""
    message: str
    item_key: str = ""
    position: str = ""
    attempts: Sequence[Attempt] = ()
    time: float | None = None
    """Time of day; None takes the time at which it is recorded."""
    item_time: float | None = None
    """The item's own time."""
    window_id: str | None = None
    """The window or batch that the item was in."""
    parents: Sequence[CallRef] = ()
    """The calls that the item owes its value to."""


class RecordedItem(NamedTuple):
    """An item of a source as it was recorded."""

    position: str
    key: str
    time: float | None
    value: Any
    """As JSON holds it; where ``is_repr``, the ``repr`` of what JSON cannot hold."""
    is_repr: bool = False


class Learned(NamedTuple):
    """One score with what it is about: what a router learns from."""

    node: str
    arm: str
    score: float
    kind: FeedbackKind
    time: float
    cost_usd: float
    """Of the arm's attempts in the call; 0 where none is recorded."""
    metric: str
    source: str
    call_id: str
    item_key: str
    run: str
    context: str = ""
    """The call's."""
    weight: float = 1.0
    path: tuple[CallRef, ...] = ()
    """The calls of the item whose end result is scored."""


class RunInfo(NamedTuple):
    """One run of a flow."""

    run: str
    flow: str
    config: Any
    started: float
    ended: float | None
    status: str
    """``running`` (or killed), ``finished``, ``stopped``, ``failed``."""


@dataclass(slots=True)
class RecordedCall:
    """What is known of a call: how it ended, or the attempts that were made before the run was cut off."""

    call_id: str
    node: str
    status: str
    """``ok``, ``error`` or ``unfinished``."""
    attempts: list[Attempt] = field(default_factory=list)
    """In order of number. Each is paid: those of an unfinished call need not be made again."""
    value: Any = None
    """As JSON holds it."""
    text: str | None = None
    arm: Arm | None = None
    error: str | None = None
    """Class of the error."""
    message: str | None = None
    cost_usd: float = 0.0
    waited_s: float = 0.0

    def as_result(self, answer: AnswerForm) -> CallResult:
        """The call's result, ``reused`` and at no cost, with its value parsed anew by the node's form.

        Raises :class:`~chainwax.router.errors.AnswerInvalid` where the form no longer accepts the recorded
        text, and ValueError for a call without an end.
        """
        if self.status == "unfinished":
            raise ValueError(f"the call {self.call_id} has no end in the recording")
        result = CallResult(
            self.call_id, self.node, text=self.text, arm=self.arm, attempts=self.attempts, reused=True
        )
        if self.status == "error":
            result.error = _error(self.error or "", self.message or "")
        else:
            result.value = self.value if self.text is None else answer.parse(self.text)
        return result


def _error(name: str, message: str) -> CallError:
    known = getattr(errors, name, None)
    if isinstance(known, type) and issubclass(known, CallError):
        return known(message)
    return CallError(f"{name}: {message}")


def json_text(value: Any) -> str:
    """JSON for what is known to be JSON-like; anything else in it stands as its ``repr``."""
    try:
        return to_json(value, fallback=partial(shown, longest=_LONGEST_REPR)).decode()
    except Exception:
        # Lone surrogates, for instance, have no UTF-8, but an escape in JSON.
        text, is_repr = value_text(value)
        return json.dumps(text) if is_repr or text is None else text


def value_text(value: Any) -> tuple[str | None, int]:
    """An item's or answer's value as JSON, and whether that is only its ``repr``; None for None."""
    if value is None:
        return None, 0
    try:
        return to_json(value).decode(), 0
    except Exception:
        pass
    try:
        return json.dumps(value, separators=(",", ":")), 0
    except Exception:
        return json.dumps(shown(value, _LONGEST_REPR)), 1


def shown(value: Any, longest: int = 80) -> str:
    """The value's ``repr``, whatever it is, cut to ``longest`` characters."""
    try:
        text = repr(value)
    except Exception as error:  # a repr is other people's code
        text = f"<{type(value).__name__} whose repr raises {type(error).__name__}>"
    return text[:longest]


def quoted(kinds: Iterable[FeedbackKind]) -> str:
    """Kinds of feedback as a query names them."""
    return ", ".join(f"'{kind}'" for kind in kinds)


def parse_json(text: str | None) -> Any:
    """The value of a JSON column."""
    if text is None:
        return None
    try:
        return from_json(text)
    except ValueError:
        return json.loads(text)  # escapes of lone surrogates, which the faster parser refuses


@lru_cache(maxsize=4096)
def _arm_texts(arm: Arm) -> tuple[str, str]:
    parts = {name: value for name, value in asdict(arm).items() if value is not None and value != ""}
    return arm.key, json_text(parts)


@lru_cache(maxsize=4096)
def _params_text(params: Params) -> str:
    return json_text(params.as_json())


@lru_cache(maxsize=4096)
def _arm(parts: str) -> Arm:
    return Arm(**json.loads(parts))


def attempt_row(run: str, query: Query, attempt: Attempt, with_content_key: bool) -> Row:
    """The row of one attempt."""
    arm_key, arm_parts = _arm_texts(attempt.arm)
    usage = attempt.usage
    return (
        run,
        attempt.call_id,
        attempt.number,
        query.node.id,
        arm_key,
        arm_parts,
        attempt.tier,
        attempt.started,
        attempt.queued_s,
        attempt.latency_s,
        attempt.first_token_s,
        attempt.text,
        usage.input,
        usage.output,
        usage.cached,
        usage.reasoning,
        attempt.cost_usd,
        attempt.propensity,
        attempt.error,
        attempt.invalid,
        attempt.simulated,
        attempt.shadow,
        attempt.reused,
        content_key(query.messages, attempt.arm, query.node.params, query.node.answer.key)
        if with_content_key
        else None,
    )


ATTEMPT_COLUMNS = (
    "call_id, number, arm_parts, tier, started, queued_s, latency_s, first_token_s, text, input_tokens, "
    "output_tokens, cached_tokens, reasoning_tokens, cost_usd, propensity, error, invalid, simulated, "
    "shadow, reused"
)


def attempt_of(row: Row) -> Attempt:
    """The attempt in a row of :data:`ATTEMPT_COLUMNS`."""
    (call_id, number, arm_parts, tier, started, queued, latency, first_token, text, *tokens) = row[:13]
    cost, propensity, error, invalid, simulated, shadow, reused = row[13:]
    return Attempt(
        call_id,
        number,
        _arm(arm_parts),
        tier,
        started or 0.0,
        queued or 0.0,
        latency or 0.0,
        first_token,
        text,
        Usage(*tokens),
        cost or 0.0,
        propensity,
        error,
        bool(invalid),
        bool(simulated),
        bool(shadow),
        bool(reused),
    )


def call_row(run: str, query: Query, result: CallResult, time: float) -> Row:
    """The row of a call that has ended."""
    node = query.node
    error = result.error
    value: str | None = None
    is_repr = 0
    if error is None:
        value, is_repr = _answer_text(node.answer, result.value)
    arm = result.arm
    simulated = False
    for attempt in result.attempts:
        if attempt.simulated and attempt.arm == arm:
            simulated = True
            break
    return (
        run,
        result.call_id,
        node.id,
        query.item_key,
        query.position,
        query.window_id,
        json_text(query.messages),
        _params_text(node.params),
        json_text(query.parents) if query.parents else "[]",
        "ok" if error is None else "error",
        None if error is None else type(error).__name__,
        None if error is None else str(error),
        value,
        is_repr,
        result.text,
        None if arm is None else _arm_texts(arm)[0],
        result.cost_usd,
        result.waited_s,
        time,
        result.reused,
        simulated,
        query.context or None,
    )


def _answer_text(answer: AnswerForm, value: Any) -> tuple[str | None, int]:
    try:
        return value_text(answer.jsonable(value))
    except Exception:  # an answer form may be other people's code
        return json.dumps(shown(value, _LONGEST_REPR)), 1


def feedback_row(run: str, f: Feedback) -> Row:
    """The row of one score."""
    return (
        run,
        f.call_id,
        f.node,
        f.item_key,
        f.arm,
        f.metric,
        f.source,
        str(f.kind),
        f.score,
        f.time,
        None if f.correction is None else json_text(f.correction),
        f.weight,
        json_text(f.path) if f.path else None,
    )


def path_of(text: str | None) -> tuple[CallRef, ...]:
    """The path in a row of feedback; what a later version says of a call beside is left out.

    A file that people wrote may hold anything: what is no call is passed over.
    """
    refs = parse_json(text)
    return tuple(
        CallRef(*(str(ref.get(name, "")) for name in _REF))
        for ref in (refs if isinstance(refs, list) else ())
        if isinstance(ref, dict)
    )


_REF = tuple(f.name for f in fields(CallRef))


def decision_row(run: str, decision: Decision, now: float) -> Row:
    """The row of one decision; without a time of its own it was made now."""
    return (run, decision.kind, decision.node, json_text(dict(decision.detail)), decision.time or now)


def dead_letter_row(run: str, letter: DeadLetter, now: float) -> Row:
    """The row of one dead letter."""
    attempts = [asdict(a) for a in letter.attempts]
    time = now if letter.time is None else letter.time
    value, is_repr = value_text(letter.value)
    return (
        run,
        letter.node,
        letter.item_key,
        letter.position,
        value,
        is_repr,
        letter.error,
        letter.message,
        json_text(attempts),
        time,
        letter.item_time,
        letter.window_id,
        json_text(list(letter.parents)),
        None,
    )


def item_row(run: str, source: str, position: str, key: str, time: float | None, value: Any) -> Row:
    """The row of one item of a source."""
    text, is_repr = value_text(value)
    return (run, source, position, key, time, text, is_repr)


def run_row(run: str, flow: str, config: Mapping[str, Any], now: float) -> Row:
    """The row of a run that starts now."""
    return (run, flow, json_text(dict(config)), now, None, "running")


def storable(row: Row) -> Row:
    """The row with what SQLite cannot hold replaced: lone surrogates escaped, other things as their repr."""
    return tuple(_storable(value) for value in row)


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if value is None or isinstance(value, float):
        return value
    if isinstance(value, Integral):  # a token count that a server makes up may be of any size
        return min(max(int(value), -(2**63)), 2**63 - 1)
    if isinstance(value, Real):  # NumPy's, for instance
        return float(value)
    return _storable(shown(value))
