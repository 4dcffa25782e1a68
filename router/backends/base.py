"""What the router wants of a model server: one small protocol.

To add a backend: write a class with these methods, raise the errors of
:mod:`chainwax.router.errors`, and register it in :data:`chainwax.router.backends.BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from chainwax.router.types import Arm, Query, Usage

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainwax.router.custom.dataset import Example

__all__ = ["Backend", "Health", "Learning", "Reply", "Request", "Weighing"]


@dataclass(slots=True)
class Request:
    """One attempt on its way out."""

    query: Query
    arm: Arm
    timeout: float
    """Seconds for the whole answer."""
    on_delta: Callable[[str], None] | None = None
    """Set where the answer is to be streamed: called with each new piece of text."""


@dataclass(slots=True)
class Reply:
    """What a model server answered."""

    text: str
    usage: Usage = field(default_factory=Usage)
    first_token_s: float | None = None
    """Seconds to the first token, where the answer was streamed or the server told."""
    finish_reason: str | None = None
    simulated: bool = False
    logprob: float | None = None
    """Mean log-probability of the answer's tokens, where the server gives them."""
    recorded_s: float | None = None
    """Seconds that the answer took when it was made, where it was made in an earlier run: not paid now."""


@dataclass(slots=True)
class Health:
    """Whether a backend serves, and what it says of itself."""

    ok: bool
    detail: str = ""
    slots: int | None = None
    """Requests that it serves at once, where it tells."""
    extra: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Weighing(Protocol):
    """A backend that may abstain, and then weighs what others say with what it thinks itself."""

    def weigh(self, query: Query, said: Mapping[str, str]) -> str | None:
        """The answer to a query that it abstained from, given what others, by the arm's key, answered.

        With nothing said, its own. None lets theirs stand. On the router's loop.
        """
        ...


@runtime_checkable
class Learning(Protocol):
    """A backend that learns as it goes."""

    def learn(self, example: Example) -> None:
        """A right answer has come. Must return at once; from any thread."""
        ...


class Backend(Protocol):
    """One model behind one server. All methods run on the router's loop."""

    simulated: bool
    """Whether answers are made up: every record of them says so."""
    batch_max: int
    """The most requests that one HTTP request can carry; 1 where the API takes one prompt."""

    async def start(self) -> int | None:
        """Get ready; return the number of requests served at once, where the server tells.

        Called once before the first request. Must not raise because the server is down: requests
        say that themselves.
        """
        ...

    async def generate(self, request: Request) -> Reply:
        """Answer one request, or raise a :class:`~chainwax.router.errors.BackendError`."""
        ...

    async def generate_batch(self, requests: Sequence[Request]) -> list[Reply | Exception]:
        """Answer several requests in one HTTP request, in order. Only called if ``batch_max > 1``."""
        ...

    async def health(self) -> Health:
        """Ask the server how it is; never raises."""
        ...

    async def close(self) -> None:
        """Give back connections and processes."""
        ...
