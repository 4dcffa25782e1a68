"""One training at a provider: what is uploaded and begun, how it is watched, and what becomes of it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import to_json

from chainwax.router.answers import Choice
from chainwax.router.backends._flavours import constraint
from chainwax.router.backends._http import shorten
from chainwax.router.custom._jobs import FineTuning
from chainwax.router.custom.dataset import Dataset, Example
from chainwax.router.custom.trainer import Limits, Progress, Trained
from chainwax.router.errors import BackendError, BackendRefused, TrainerFailed

if TYPE_CHECKING:
    from chainwax.router.custom.provider import ProviderOptions

__all__ = ["JOB", "Training"]

JOB = "job.json"
_ENDED = ("succeeded", "failed", "cancelled")
_CANCEL_S = 30.0
"""How long a job is given to end once it was cancelled; kept free at the end of the time."""
_SUFFIX = 40


@dataclass(slots=True)
class _Begun:
    """What was begun, as ``job.json`` has it."""

    about: str
    """A hash of data and options: another training is another job."""
    begun: float
    """Time of day."""
    training_file: str = ""
    validation_file: str = ""
    job: str = ""


class Training:
    """One training."""

    def __init__(
        self, options: ProviderOptions, dataset: Dataset, folder: Path, progress: Progress, limits: Limits
    ) -> None:
        self._options = options
        self._dataset = dataset
        self._folder = folder
        self._progress = progress
        self._limits = limits
        self._key = _key_of(options)
        self._wrapped = dataset.choices is not None and (
            constraint(options.provider, "chat", Choice(list(dataset.choices))).wrapped
        )
        self._train = self._lines(dataset.train)
        self._held_out = self._lines(dataset.held_out) if options.validation else b""
        self._done = 0.0
        self._events: set[str] = set()
        self._losses: dict[str, float] = {}

    async def run(self) -> Trained:
        begun = self._recall()
        seconds = self._limits.minutes * 60.0
        # What is kept free is for cancelling, before whoever runs this ends it.
        ends = begun.begun + max(seconds - _CANCEL_S, 0.8 * seconds)
        left = ends - time.time()
        options = self._options
        until = time.monotonic() + max(left, _CANCEL_S)
        async with FineTuning(options.url, self._key, headers=options.headers, until=until) as client:
            job = await self._job(client, begun)
            job = await self._ended(client, begun, job, ends)
            if not options.keep_files:
                await self._delete_files(client, begun)
        status, name = job["status"], job.get("fine_tuned_model")
        if status != "succeeded":
            self._forget()
            raise TrainerFailed(f"{self._whose(begun)} {_why(job, self._key)}")
        if not isinstance(name, str) or not name:
            raise TrainerFailed(f"{self._whose(begun)} succeeded, and names no model")
        self._progress(1.0, f"{name} is there")
        tokens = _number(job.get("trained_tokens")) or 0.0
        return Trained(
            "provider",
            self._folder,
            name,
            tokens * (options.training_cost_per_token or 0.0),
            {"trained_tokens": tokens, "seconds": time.time() - begun.begun, **self._losses},
            {"url": options.url, "base": options.model, "job": begun.job, "provider": options.provider},
        )

    # -- steps ----------------------------------------------------------------------------------

    async def _job(self, client: FineTuning, begun: _Begun) -> dict[str, Any]:
        """The job that was begun, else a new one."""
        if begun.job:
            try:
                job = await client.job(begun.job)
            except BackendRefused as error:
                raise TrainerFailed(
                    f"{self._whose(begun)}, which was begun before, cannot be looked at ({error}): "
                    f"to begin another one, remove {self._folder / JOB}"
                ) from None
            self._say(0.1, f"going on with the job {begun.job}")
            return job
        if not begun.training_file:
            self._say(0.0, f"uploading {len(self._dataset.train)} examples")
            begun.training_file = await self._uploaded(client, "train", self._train, begun)
        if self._held_out and not begun.validation_file:
            begun.validation_file = await self._uploaded(client, "held-out", self._held_out, begun)
        # A job that was begun when the last try was cut off is known by its file.
        job = await client.find_job(begun.training_file) or await client.create(self._body(begun))
        if not isinstance(job.get("id"), str):
            raise TrainerFailed(f"{self._options.url}: a job without an id was begun")
        begun.job = job["id"]
        self._keep(begun)
        self._say(0.1, f"the job {begun.job} has begun")
        return job

    async def _uploaded(self, client: FineTuning, what: str, content: bytes, begun: _Begun) -> str:
        # The name says what is in it, so that what an earlier try sent is found and not sent again.
        name = (
            f"chainwax-{what}-{hashlib.blake2b(content, digest_size=12).hexdigest()}-{begun.about[:8]}.jsonl"
        )
        file = await client.find_file(name, len(content)) or await client.upload(name, content)
        if what == "train":
            begun.training_file = file
        else:
            begun.validation_file = file
        self._keep(begun)
        return file

    def _body(self, begun: _Begun) -> dict[str, Any]:
        options = self._options
        hyper = {
            "n_epochs": options.epochs,
            "batch_size": options.batch_size,
            "learning_rate_multiplier": options.learning_rate,
        }
        body: dict[str, Any] = {
            "model": options.model,
            "training_file": begun.training_file,
            "method": {"type": "supervised", "supervised": {"hyperparameters": hyper}},
            "suffix": _suffix(options.suffix or self._dataset.node),
            "metadata": {"flow": self._dataset.flow[:512], "node": self._dataset.node[:512]},
        }
        if begun.validation_file:
            body["validation_file"] = begun.validation_file
        if options.seed is not None:
            body["seed"] = options.seed
        return body

    async def _ended(
        self, client: FineTuning, begun: _Begun, job: dict[str, Any], ends: float
    ) -> dict[str, Any]:
        """The job at its end. Raises :class:`TrainerFailed` where it does not come in time."""
        while True:
            await self._tell(client, begun, job)
            if job.get("status") in _ENDED:
                return job
            left = ends - time.time()
            if left <= 0:
                return await self._given_up(client, begun, job)
            await asyncio.sleep(min(self._options.poll_seconds, left))
            try:
                job = await client.job(begun.job)
            except BackendError as error:
                if not error.retryable:
                    raise
                # It goes on without being looked at.
                self._say(self._done, f"the job cannot be looked at now: {error}")

    async def _given_up(self, client: FineTuning, begun: _Begun, job: dict[str, Any]) -> dict[str, Any]:
        """Cancel a job that takes too long; where it succeeded meanwhile it counts."""
        was = job.get("status")
        late = f"{self._whose(begun)} has not ended within {self._limits.minutes:g} minutes (it was '{was}')"
        client.until = time.monotonic() + _CANCEL_S / 2
        try:
            await client.cancel(begun.job)
        except BackendRefused:
            pass  # it has ended meanwhile: the next look tells
        except BackendError as error:
            raise TrainerFailed(
                f"{late} and could not be cancelled: {error}. It may go on, and cost"
            ) from None
        until = time.monotonic() + _CANCEL_S / 2
        while True:
            job = await client.job(begun.job)
            if job.get("status") == "succeeded":
                return job
            if job.get("status") in _ENDED:
                break
            if time.monotonic() > until:
                raise TrainerFailed(f"{late} and is still '{job.get('status')}' after it was cancelled")
            await asyncio.sleep(min(1.0, self._options.poll_seconds))
        if not self._options.keep_files:
            await self._delete_files(client, begun)
        self._forget()
        raise TrainerFailed(f"{late}, and was cancelled")

    async def _tell(self, client: FineTuning, begun: _Begun, job: Mapping[str, Any]) -> None:
        """Tell of what is new; that there is nothing to tell stops nothing."""
        status = str(job.get("status"))[:40]
        try:
            events = await client.events(begun.job, self._events)
        except BackendError:
            events = []
        for event in events:
            data = event.get("data")
            if isinstance(data, dict):
                self._measure(data)
            self._say(self._done, shorten(str(event.get("message", "")), self._key))
        self._say({"validating_files": 0.12, "queued": 0.15}.get(status, 0.2), status)

    def _measure(self, data: Mapping[str, Any]) -> None:
        for key in ("train_loss", "valid_loss", "full_valid_loss"):
            loss = _number(data.get(key))
            if loss is not None:
                self._losses[key] = loss
        step, of = _number(data.get("step")), _number(data.get("total_steps"))
        if step is not None and of:
            self._done = max(self._done, 0.2 + 0.75 * min(max(step / of, 0.0), 1.0))

    async def _delete_files(self, client: FineTuning, begun: _Begun) -> None:
        for file in (begun.training_file, begun.validation_file):
            if file:
                try:
                    await client.delete_file(file)
                except BackendRefused:
                    pass  # an earlier try took it away
                except BackendError as error:
                    self._say(self._done, f"the file {file} stays at the provider: {error}")

    def _say(self, done: float, what: str) -> None:
        self._done = max(self._done, done)
        if what:
            self._progress(self._done, what)

    # -- what was begun -------------------------------------------------------------------------

    def _recall(self) -> _Begun:
        about = hashlib.blake2b(digest_size=12)
        wanted = to_json([self._options.url, self._body(_Begun("", 0.0))])
        for part in (self._train, self._held_out, wanted):
            about.update(part)
            about.update(b"\0")
        new = _Begun(about.hexdigest(), time.time())
        file = self._folder / JOB
        try:
            known = _Begun(**json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return new
        except (OSError, ValueError, TypeError) as error:
            raise TrainerFailed(
                f"{file}: cannot be read: {error}; a job may have been begun: look at the provider's list "
                "before this file is removed"
            ) from None
        if known.about != new.about:
            raise TrainerFailed(
                f"{file}: the job '{known.job}' was begun with other data or options: cancel it where "
                "it still runs, and remove the file"
            )
        return known

    def _keep(self, begun: _Begun) -> None:
        part = self._folder / f"{JOB}.part"
        fields = {name: getattr(begun, name) for name in _Begun.__slots__}
        part.write_text(json.dumps(fields, indent=1), encoding="utf-8")
        os.replace(part, self._folder / JOB)

    def _forget(self) -> None:
        """The job came to nothing: the next try begins another one."""
        (self._folder / JOB).unlink(missing_ok=True)

    def _whose(self, begun: _Begun) -> str:
        return (
            f"node '{self._dataset.node}': the job {begun.job or '(without a name)'} at {self._options.url}"
        )

    def _lines(self, examples: Sequence[Example]) -> bytes:
        """Chats as JSON lines, answered as the model will be asked to answer."""
        lines = []
        for one in examples:
            answer = json.dumps({"answer": one.answer}, ensure_ascii=False) if self._wrapped else one.answer
            messages = [*one.messages, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        return "".join(lines).encode("utf-8", "replace")


def _key_of(options: ProviderOptions) -> str:
    if options.key_env is None:
        return ""
    key = os.environ.get(options.key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        fault = "holds no key that a header can carry" if key else "is not set"
        raise TrainerFailed(f"trainers.provider.key_env: the environment variable {options.key_env} {fault}")
    return key


def _suffix(name: str) -> str:
    """What providers take in the name of a model.

    >>> _suffix("Which team? (ümlaut)")
    'which-team-mlaut'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:_SUFFIX].strip("-") or "node"


def _why(job: Mapping[str, Any], key: str) -> str:
    """Why a job came to nothing, in its provider's words."""
    status = str(job.get("status"))
    error = job.get("error")
    said = error.get("message") or error.get("code") if isinstance(error, dict) else None
    if status == "cancelled":
        return "was cancelled" + (f": {shorten(str(said), key)}" if said else " at the provider")
    return "failed" + (f": {shorten(str(said), key)}" if said else ", and its provider does not say why")


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
