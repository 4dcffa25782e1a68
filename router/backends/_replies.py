"""From an OpenAI-shaped answer, whole or streamed, to a :class:`Reply`.

Everything that a server sends is taken as it may be, not as it should be: what is not there or of
another type is a :class:`BackendGarbled` that says so, and usage that is missing is estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from time import perf_counter
from typing import Any

from chainwax.router.backends._flavours import unwrap
from chainwax.router.backends._http import server_message
from chainwax.router.backends.base import Reply
from chainwax.router.errors import BackendDown, BackendGarbled, BackendRefused
from chainwax.router.types import Query, Usage

__all__ = ["Stream", "reply_of", "share_usage", "texts_of", "usage_of"]

_CHARACTERS_PER_TOKEN = 4


def reply_of(data: dict[str, Any], query: Query, *, chat: bool, wrapped: bool) -> Reply:
    """The reply in a whole answer with one choice. Raises :class:`BackendGarbled`."""
    try:
        choice = data["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
        finish = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        said = server_message(data, "") if "error" in data else f"it has {sorted(data)[:8]}"
        raise BackendGarbled(f"the answer has no choice with a text: {said}") from None
    if type(text) is not str:
        refusal = choice["message"].get("refusal") if chat else None
        if isinstance(refusal, str):
            raise BackendRefused(f"the model declined: {refusal[:200]}")
        raise BackendGarbled(f"the answer's text is {type(text).__name__} (finish_reason {finish!r})")
    usage = usage_of(data, query, text)
    reason = finish if isinstance(finish, str) else None
    # A server that makes its answers up says so: chainwax's own do.
    simulated = data.get("simulated") is True
    return Reply(unwrap(text) if wrapped else text, usage, None, reason, simulated)


def texts_of(data: dict[str, Any], count: int) -> list[tuple[str, str | None] | BackendGarbled]:
    """Text and finish reason for each prompt of an array, by the choices' index, not their order."""
    found: list[tuple[str, str | None] | BackendGarbled] = [
        BackendGarbled("the answer has no choice for this prompt") for _ in range(count)
    ]
    choices = data.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if not isinstance(choice, dict):
            continue
        index, text, finish = choice.get("index"), choice.get("text"), choice.get("finish_reason")
        if type(index) is int and 0 <= index < count and isinstance(text, str):
            found[index] = (text, finish if isinstance(finish, str) else None)
    return found


def usage_of(data: dict[str, Any], query: Query, text: str) -> Usage:
    """The tokens that the server counted; where it did not, four characters are taken for one."""
    raw = data.get("usage")
    if not isinstance(raw, dict):
        return Usage(_estimate_prompt(query), _estimate(len(text)))
    sent, made = _count(raw, "prompt_tokens"), _count(raw, "completion_tokens")
    return Usage(
        sent := _estimate_prompt(query) if sent is None else sent,
        _estimate(len(text)) if made is None else made,
        min(sent, _count(raw.get("prompt_tokens_details"), "cached_tokens") or 0),
        _count(raw.get("completion_tokens_details"), "reasoning_tokens") or 0,
    )


def share_usage(
    whole: Usage | None, queries: Sequence[Query], texts: Sequence[str], *, first_only: bool
) -> list[Usage]:
    """One usage for each prompt of an array, by length; the sums are those of the whole.

    ``first_only`` says that the server counted the first prompt alone.
    """
    sent = [_estimate_prompt(query) for query in queries]
    made = [_estimate(len(text)) for text in texts]
    if whole is None:
        return [Usage(s, m) for s, m in zip(sent, made, strict=True)]

    def share(total: int, weights: list[int]) -> list[int]:
        if first_only:
            total = round(total * sum(weights) / weights[0])
        # Differences of rounded running sums add up to the total exactly.
        steps = [total * part // sum(weights) for part in accumulate(weights)]
        return [b - a for a, b in zip([0, *steps], steps, strict=False)]

    shares = zip(
        share(whole.input, sent),
        share(whole.output, made),
        share(whole.cached, sent),
        share(whole.reasoning, made),
        strict=True,
    )
    return [Usage(*each) for each in shares]


class Stream:
    """A streamed answer as it comes in. ``started`` is the ``perf_counter`` of the request."""

    def __init__(self, chat: bool, on_delta: Callable[[str], None] | None, started: float) -> None:
        self.done = False
        """Whether the server said that nothing follows."""
        self._chat = chat
        self._on_delta = on_delta
        self._started = started
        self._pieces: list[str] = []
        self._first: float | None = None
        self._finish: str | None = None
        self._usage: dict[str, Any] = {}

    def add(self, chunk: dict[str, Any], secret: str) -> None:
        """Take one chunk. Raises :class:`BackendGarbled`, or :class:`BackendDown` for an error in it."""
        if chunk.get("usage"):
            self._usage = chunk
        choices = chunk.get("choices")
        if not choices:
            if "error" in chunk:
                raise BackendDown(f"the server gave up in mid-answer: {server_message(chunk, secret)}")
            return  # the last chunk, with usage alone
        try:
            choice = choices[0]
            piece = choice["delta"].get("content") if self._chat else choice["text"]
            finish = choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise BackendGarbled("a piece of the streamed answer has another shape") from None
        if isinstance(finish, str):
            self._finish = finish
        if piece is None or piece == "":
            return
        if not isinstance(piece, str):
            raise BackendGarbled(f"a piece of the streamed answer is {type(piece).__name__}")
        if self._first is None:
            self._first = perf_counter() - self._started
        self._pieces.append(piece)
        if self._on_delta is not None:
            self._on_delta(piece)

    def reply(self, query: Query, *, wrapped: bool) -> Reply:
        """The whole. Raises :class:`BackendGarbled` for a stream that just stopped."""
        if not self.done and self._finish is None:
            raise BackendGarbled(f"the stream ended in mid-answer, after {len(self._pieces)} pieces")
        text = "".join(self._pieces)
        usage = usage_of(self._usage, query, text)
        return Reply(unwrap(text) if wrapped else text, usage, self._first, self._finish)


def _estimate(characters: int) -> int:
    return max(1, -(-characters // _CHARACTERS_PER_TOKEN))


def _estimate_prompt(query: Query) -> int:
    contents = (message.get("content") for message in query.messages)
    return _estimate(
        sum(len(content) if isinstance(content, str) else len(str(content)) for content in contents)
    )


def _count(raw: Any, name: str) -> int | None:
    value = raw.get(name) if isinstance(raw, dict) else None
    return value if type(value) is int and 0 <= value < 2**53 else None
