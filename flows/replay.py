"""Answering a replay's calls from the recording of an earlier run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

from bytewax.outputs import DynamicSink, StatelessSinkPartition
from typing_extensions import override

from chainwax.flows.graph import Flow
from chainwax.router.backends import Backend, Health, Reply, Request, make_backend
from chainwax.router.config import ModelConfig
from chainwax.router.errors import BackendRefused, RecordingError, nearest
from chainwax.router.recording import RecordingReader
from chainwax.router.types import Attempt, content_key

__all__ = ["KnownAnswers", "Nowhere", "RecordedAnswers", "find_run", "recorded_answers"]


def find_run(reader: RecordingReader, flow: Flow, run: str, sources: Sequence[str]) -> str:
    """The run that is meant: the one with this id, or for ``latest`` the newest of the flow with items.

    ``sources`` are those whose items are wanted. Raises :class:`RecordingError` where there is none.
    """
    if run != "latest":
        info = reader.require_run(run)
        if info.flow != flow.id:
            raise RecordingError(
                f"run '{run}' in the recording '{reader.path}' is one of the flow '{info.flow}', "
                f"not of '{flow.id}'"
            )
        return run
    of_flow = [info for info in reader.runs() if info.flow == flow.id]
    if not of_flow:
        others = {info.flow for info in reader.runs()}
        raise RecordingError(
            f"the recording '{reader.path}' has no run of the flow '{flow.id}': {nearest(flow.id, others)}"
        )
    for info in reversed(of_flow):
        if set(sources) <= set(reader.sources(info.run)):
            return str(info.run)
    raise RecordingError(
        f"the recording '{reader.path}' has no run of the flow '{flow.id}' with the items of "
        f"{', '.join(sources)}: were they made with record_items = false?"
    )


class Knower(Protocol):
    """Where answers are looked up."""

    @property
    def path(self) -> Path:
        """The recording, for messages."""
        ...

    def find_content(self, keys: Sequence[str]) -> Mapping[str, Attempt]:
        """Answers by content key; unknown keys are left out."""
        ...


class KnownAnswers:
    """The answers of a recording that goes on being written, in memory: quick where many are looked up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Attempt] = {}
        self._row = 0

    def refresh(self) -> None:
        """Take up what was recorded since."""
        with closing(RecordingReader(self.path)) as reader:
            for row, key, attempt in reader.answers_after(self._row):
                self._known.setdefault(key, attempt)
                self._row = row

    def find_content(self, keys: Sequence[str]) -> dict[str, Attempt]:
        """Answers by content key; unknown keys are left out."""
        return {key: self._known[key] for key in keys if key in self._known}


def recorded_answers(models: Mapping[str, ModelConfig], reader: Knower, *, only: bool) -> dict[str, Backend]:
    """Backends for the models that answer from a recording what it knows.

    ``models`` are as the manager has them, so that a model that is simulated stays so. ``only`` makes an
    error of what is not known; then no model is started.
    """
    return {name: RecordedAnswers(name, config, reader, only=only) for name, config in models.items()}


class _NowherePart(StatelessSinkPartition[Any]):
    @override
    def write_batch(self, items: list[Any]) -> None:
        pass


class Nowhere(DynamicSink[Any]):
    """A sink for outputs that nobody wants: a replay is often about cost alone."""

    @override
    def build(self, step_id: str, worker_index: int, worker_count: int) -> _NowherePart:
        return _NowherePart()


class RecordedAnswers:
    """One model, with the answers of an earlier run in front of it.

    An answer is known where model, messages, parameters and form of the answer are the same. Its cost is
    counted at the price of today's configuration, and marked as not paid.
    """

    def __init__(self, name: str, config: ModelConfig, reader: Knower, *, only: bool) -> None:
        self.inner = make_backend(name, config)
        self.simulated = self.inner.simulated
        self.batch_max = 1 if only else self.inner.batch_max
        self._name = name
        self._reader = reader
        self._only = only

    async def start(self) -> int | None:
        """Start the model itself, unless it will never be asked."""
        return None if self._only else await self.inner.start()

    async def generate(self, request: Request) -> Reply:
        """From the recording, else from the model."""
        known = self._known([request])[0]
        if known is None:
            if self._only:
                raise BackendRefused(
                    f"{self._name}: no answer to this is recorded in '{self._reader.path}' (--only-recorded)"
                )
            return await self.inner.generate(request)
        if request.on_delta is not None:
            request.on_delta(known.text)
        return known

    async def generate_batch(self, requests: Sequence[Request]) -> list[Reply | Exception]:
        """What is recorded from there, the rest from the model in one request."""
        known = self._known(requests)
        unknown = [request for request, reply in zip(requests, known, strict=True) if reply is None]
        answers = iter(await self.inner.generate_batch(unknown) if unknown else ())
        return [next(answers) if reply is None else reply for reply in known]

    async def health(self) -> Health:
        """The model's own."""
        return await self.inner.health()

    async def close(self) -> None:
        """Close the model; the recording belongs to whoever opened it."""
        await self.inner.close()

    def _known(self, requests: Sequence[Request]) -> list[Reply | None]:
        keys = []
        for request in requests:
            node = request.query.node
            keys.append(content_key(request.query.messages, request.arm, node.params, node.answer.key))
        found = self._reader.find_content(keys)
        return [_reply(found[key]) if key in found else None for key in keys]


def _reply(attempt: Attempt) -> Reply:
    assert attempt.text is not None
    return Reply(
        attempt.text,
        attempt.usage,
        attempt.first_token_s,
        simulated=attempt.simulated,
        recorded_s=attempt.latency_s,
    )
