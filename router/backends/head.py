"""A classifier that was trained for one node, in this process: no tokens, about a millisecond."""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from chainwax.router.backends.base import Health, Reply, Request
from chainwax.router.bounded import make_room
from chainwax.router.config import ModelConfig
from chainwax.router.errors import Abstains, BackendRefused, ConfigError
from chainwax.router.types import Message, Query

if TYPE_CHECKING:
    from chainwax.router.custom.dataset import Example
    from chainwax.router.custom.head import Guess, Head

__all__ = ["HeadBackend"]

log = logging.getLogger("chainwax")
T = TypeVar("T")

_OPEN = 10_000
"""Guesses that are remembered until they are weighed."""
_AUDITED = 20
"""One of so many calls asks on although it is sure, so that it learns of its own mistakes."""


class HeadBackend:
    """Answers with one of the node's choices, or raises :class:`Abstains` so that another is asked.

    What that one says it weighs with its own guess (:meth:`weigh`), and from right answers it learns
    (:meth:`learn`).
    """

    simulated = False
    batch_max = 1

    def __init__(self, name: str, config: ModelConfig) -> None:
        if config.artefact is None:
            raise ConfigError(f"models.{name}.artefact: the backend 'head' needs a trained model's folder")
        self.name = name
        self._folder: Path = config.artefact
        self._head: Head | None = None
        self._open: dict[str, Guess] = {}
        # One thread of its own: the classifier is not asked and taught at once, and the loop never waits.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"chainwax-{name}")
        self.slots = 8

    @property
    def head(self) -> Head:
        """The classifier. Raises :class:`~chainwax.router.errors.TrainerFailed` where it cannot be read."""
        if self._head is None:
            from chainwax.router.custom.head import Head

            self._head = Head.load(self._folder)
        return self._head

    async def start(self) -> int | None:
        """Read the classifier."""
        await self._do(lambda: self.head)
        return self.slots

    async def generate(self, request: Request) -> Reply:
        """One of the choices. Raises :class:`Abstains` where another answer could change its mind."""
        query = request.query
        choices = query.node.answer.choices
        if choices is None or not set(choices) <= set(self.head.choices):
            raise BackendRefused(f"{self.name}: it was trained for the choices {list(self.head.choices)}")
        text = _text(query.messages)
        guess = await self._do(lambda: self.head.guess(text))
        answer = self.head.choices[guess.top]
        audited = zlib.crc32(query.call_id.encode()) % _AUDITED == 0
        if not guess.sure or audited:
            make_room(self._open, _OPEN)
            self._open[query.call_id] = guess
            raise Abstains(f"{self.name}: '{answer}' has a chance of {guess.chances[guess.top]:.2f}")
        return Reply(answer)

    def weigh(self, query: Query, said: Mapping[str, str]) -> str | None:
        """Its answer now that others, by the arm's key, have said theirs; None for a call it knows not of."""
        guess = self._open.pop(query.call_id, None)
        if guess is None:
            return None
        return self.head.weigh(guess, next(iter(said.values()), None))

    def learn(self, example: Example) -> None:
        """Take a right answer into account, soon. From any thread."""
        said = list(example.said.values())
        self._thread.submit(self._learn, example.text, example.answer, said)

    def _learn(self, text: str, answer: str, said: Sequence[str]) -> None:
        try:
            self.head.learn(text, answer, said)
        except Exception as error:  # nobody waits for it
            log.warning("model '%s' cannot learn: %r", self.name, error)

    async def generate_batch(self, requests: Sequence[Request]) -> list[Reply | Exception]:
        """Not used: requests are a millisecond each."""
        return [await self.generate(request) for request in requests]

    async def health(self) -> Health:
        """Whether the classifier can be read."""
        try:
            head = await self._do(lambda: self.head)
        except Exception as error:
            return Health(False, str(error))
        return Health(True, f"{len(head.choices)} choices", self.slots)

    async def close(self) -> None:
        """Let it go."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _do(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _text(messages: Sequence[Message]) -> str:
    """What it was trained on: the last message, redacted."""
    from chainwax.router.custom.dataset import message_text
    from chainwax.router.custom.redact import redact

    return redact(message_text(messages))
