"""A provider on this machine: OpenAI's files, fine-tuning jobs and chat, to try a training without paying.

What it trains is no model: it answers a question that it was shown with the answer that it was shown, and
any other with the commonest of them. Each of its answers says ``"simulated": true``.

>>> with LoopbackProvider() as provider:
...     provider.url.endswith("/v1"), provider.jobs
(True, {})
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from aiohttp import BodyPartReader, web
from pydantic_core import from_json, to_json

__all__ = ["STATUSES", "LoopbackProvider", "Seen"]

STATUSES = ("validating_files", "queued", "running", "running", "succeeded")
"""What a job is at each look; the last one stays."""
ENDED = ("succeeded", "failed", "cancelled")
LEAST = 10
"""Examples that a training file must have."""
_EPOCHS = 3
_LIMIT = 512 * 1024 * 1024

Handler = Callable[[web.Request, Any], Awaitable[web.Response]]
"""Takes a request with its body: JSON, or the fields of a form."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as it came."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: Any
    """JSON, or the fields of a form; a file as (name, type, bytes)."""


@dataclass(slots=True)
class _File:
    id: str
    name: str
    purpose: str
    content: bytes
    created: int


@dataclass(slots=True)
class _Job:
    asked: Mapping[str, Any]
    fields: dict[str, Any]
    left: deque[str]
    events: list[dict[str, Any]] = field(default_factory=list)


class LoopbackProvider:
    """The server, in a thread of its own: a context manager.

    ``statuses`` are what a job says at each look. ``key`` is the only one it takes; None takes any.
    ``models`` are those that can be tuned.
    """

    def __init__(
        self,
        *,
        statuses: Sequence[str] = STATUSES,
        error: str = "the training data are not fit",
        key: str | None = None,
        models: Sequence[str] = ("gpt-4o-mini-2024-07-18",),
    ) -> None:
        self.statuses = tuple(statuses)
        self.error = error
        """What a job says that fails."""
        self.key = key
        self.models = list(models)
        self.url = ""
        self.files: dict[str, _File] = {}
        self.jobs: dict[str, _Job] = {}
        self.tuned: dict[str, tuple[dict[str, str], str]] = {}
        """By the name of a tuned model: the answers that it was shown, by question, and the commonest."""
        self.seen: list[Seen] = []
        self.faults: dict[tuple[str, str], deque[tuple[int, Mapping[str, str]] | None]] = {}
        """By method and path, answered in turn in place of what would have been: an HTTP status with headers,
        or None, which does what is asked and breaks the connection off."""
        self._ids = itertools.count(1)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> LoopbackProvider:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self._thread.start()
        ready.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._loop is not None and self._stop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=_LIMIT)

        def add(method: str, path: str, handler: Handler) -> None:
            app.router.add_route(method, path, partial(self._watched, handler))

        add("POST", "/v1/files", self._upload)
        add("GET", "/v1/files", self._files)
        add("GET", "/v1/files/{id}", self._file)
        add("DELETE", "/v1/files/{id}", self._delete)
        add("POST", "/v1/fine_tuning/jobs", self._create)
        add("GET", "/v1/fine_tuning/jobs", self._jobs)
        add("GET", "/v1/fine_tuning/jobs/{id}", self._job)
        add("POST", "/v1/fine_tuning/jobs/{id}/cancel", self._cancel)
        add("GET", "/v1/fine_tuning/jobs/{id}/events", self._events)
        add("GET", "/v1/models", self._models)
        add("POST", "/v1/chat/completions", self._chat)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _watched(self, handler: Handler, request: web.Request) -> web.Response:
        """Keep what was asked, and answer with what is to go wrong."""
        body = await _body(request)
        self.seen.append(
            Seen(request.method, request.path, request.query_string, dict(request.headers), body)
        )
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            given = request.headers.get("Authorization", "")
            return _refusal(401, f"Incorrect API key provided: {given.removeprefix('Bearer ')}")
        fault = self.faults.get((request.method, request.path))
        if fault:
            wrong = fault.popleft()
            if wrong is not None:
                status, headers = wrong
                return _refusal(status, "not now", headers=headers)
            answer = await handler(request, body)
            if request.transport is not None:
                request.transport.abort()
            return answer
        return await handler(request, body)

    # -- files ----------------------------------------------------------------------------------

    async def _upload(self, _: web.Request, form: Any) -> web.Response:
        if not isinstance(form, dict) or "file" not in form:
            return _refusal(400, "'file' is a required property")
        if form.get("purpose") != "fine-tune":
            return _refusal(400, f"'{form.get('purpose')}' is not one of ['fine-tune']", "purpose")
        name, _, content = form["file"]
        file = _File(f"file-{next(self._ids)}", name, "fine-tune", content, int(time.time()))
        self.files[file.id] = file
        return _json(_file_json(file))

    async def _files(self, request: web.Request, _: Any) -> web.Response:
        purpose = request.query.get("purpose")
        files = [f for f in self.files.values() if purpose in (None, f.purpose)]
        return _page(request, [_file_json(file) for file in reversed(files)])

    async def _file(self, request: web.Request, _: Any) -> web.Response:
        file = self.files.get(request.match_info["id"])
        return _missing("File", request) if file is None else _json(_file_json(file))

    async def _delete(self, request: web.Request, _: Any) -> web.Response:
        file = self.files.pop(request.match_info["id"], None)
        if file is None:
            return _missing("File", request)
        return _json({"id": file.id, "object": "file", "deleted": True})

    # -- jobs -----------------------------------------------------------------------------------

    async def _create(self, _: web.Request, asked: Any) -> web.Response:
        if not isinstance(asked, dict):
            return _refusal(400, "the body is no JSON object")
        if asked.get("model") not in self.models:
            return _refusal(
                404, f"The model '{asked.get('model')}' does not exist", "model", "model_not_found"
            )
        for name in ("training_file", "validation_file"):
            if asked.get(name) not in self.files and (name == "training_file" or asked.get(name)):
                return _refusal(400, f"invalid {name}: {asked.get(name)}", name)
        method = asked.get("method") or {"type": "supervised", "supervised": {}}
        if method.get("type") != "supervised":
            return _refusal(400, f"method.type '{method.get('type')}' is not served here", "method")
        wanted = (method.get("supervised") or {}).get("hyperparameters") or {}
        hyper = {
            name: wanted.get(name, "auto") for name in ("batch_size", "learning_rate_multiplier", "n_epochs")
        }
        job = f"ftjob-{next(self._ids)}"
        seed = asked.get("seed")
        fields = {
            "id": job,
            "object": "fine_tuning.job",
            "created_at": int(time.time()),
            "error": None,
            "fine_tuned_model": None,
            "finished_at": None,
            "hyperparameters": hyper,
            "model": asked["model"],
            "organization_id": "org-loopback",
            "result_files": [],
            "seed": 1 if seed is None else seed,
            "status": self.statuses[0],
            "trained_tokens": None,
            "training_file": asked["training_file"],
            "validation_file": asked.get("validation_file"),
            "metadata": asked.get("metadata"),
            "method": {"type": "supervised", "supervised": {"hyperparameters": hyper}},
            "simulated": True,
        }
        self.jobs[job] = _Job(asked, fields, deque(self.statuses[1:]))
        self._tell(self.jobs[job], f"Created fine-tuning job: {job}")
        return _json(fields)

    async def _jobs(self, request: web.Request, _: Any) -> web.Response:
        return _page(request, [job.fields for job in reversed(self.jobs.values())])

    async def _job(self, request: web.Request, _: Any) -> web.Response:
        job = self.jobs.get(request.match_info["id"])
        if job is None:
            return _missing("Fine-tuning job", request)
        if job.left and job.fields["status"] not in ENDED:
            self._become(job, job.left.popleft())
        return _json(job.fields)

    async def _cancel(self, request: web.Request, _: Any) -> web.Response:
        job = self.jobs.get(request.match_info["id"])
        if job is None:
            return _missing("Fine-tuning job", request)
        if job.fields["status"] in ENDED:
            return _refusal(400, f"Job has already completed: {job.fields['id']}")
        self._become(job, "cancelled")
        return _json(job.fields)

    async def _events(self, request: web.Request, _: Any) -> web.Response:
        job = self.jobs.get(request.match_info["id"])
        return _missing("Fine-tuning job", request) if job is None else _page(request, job.events[::-1])

    def _become(self, job: _Job, status: str) -> None:
        fields = job.fields
        if status == "succeeded":
            examples, wrong = _read(self.files.get(fields["training_file"]))
            if wrong:
                fields["error"] = {
                    "code": "invalid_training_file",
                    "message": wrong,
                    "param": "training_file",
                }
                status = "failed"
            else:
                self._tune(job, examples)
        elif status == "failed":
            fields["error"] = {"code": "invalid_training_file", "message": self.error, "param": None}
        if status in ENDED:
            fields["finished_at"] = int(time.time())
        if status == fields["status"] == "running":
            step, of = 10 * (1 + sum(e["type"] == "metrics" for e in job.events)), 100
            loss = {"step": step, "total_steps": of, "train_loss": 1.0 / step}
            self._tell(job, f"Step {step}/{of}: training loss={1.0 / step:.2f}", loss)
        else:
            self._tell(job, f"Fine-tuning job {status}")
        fields["status"] = status

    def _tune(self, job: _Job, examples: list[tuple[str, str]]) -> None:
        fields = job.fields
        suffix = job.asked.get("suffix") or ""
        name = f"ft:{fields['model']}:loopback:{suffix}:{next(self._ids)}"
        fields["fine_tuned_model"] = name
        asked = fields["hyperparameters"]["n_epochs"]
        tokens = sum(-(-len(question + answer) // 4) for question, answer in examples)
        fields["trained_tokens"] = tokens * (asked if isinstance(asked, int) else _EPOCHS)
        self.tuned[name] = (dict(examples), Counter(a for _, a in examples).most_common(1)[0][0])

    def _tell(self, job: _Job, message: str, metrics: Mapping[str, Any] | None = None) -> None:
        job.events.append(
            {
                "object": "fine_tuning.job.event",
                "id": f"ftevent-{next(self._ids)}",
                "created_at": int(time.time()),
                "level": "info",
                "message": message,
                "type": "message" if metrics is None else "metrics",
                "data": metrics or {},
            }
        )

    # -- models ---------------------------------------------------------------------------------

    async def _models(self, _: web.Request, body: Any) -> web.Response:
        names = [*self.models, *self.tuned]
        data = [{"id": n, "object": "model", "created": 0, "owned_by": "loopback"} for n in names]
        return _json({"object": "list", "data": data, "simulated": True})

    async def _chat(self, _: web.Request, asked: Any) -> web.Response:
        if asked.get("model") not in self.tuned:
            return _refusal(
                404, f"The model '{asked.get('model')}' does not exist", "model", "model_not_found"
            )
        known, common = self.tuned[asked["model"]]
        question = json.dumps(asked["messages"], sort_keys=True)
        text = known.get(question, common)
        usage = {"prompt_tokens": -(-len(question) // 4), "completion_tokens": -(-len(text) // 4)}
        message = {"role": "assistant", "content": text}
        return _json(
            {
                "id": f"chatcmpl-{next(self._ids)}",
                "object": "chat.completion",
                "created": int(time.time()),
                "model": asked["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
                "usage": {**usage, "total_tokens": sum(usage.values())},
                "simulated": True,
            }
        )


async def _body(request: web.Request) -> Any:
    if request.content_type == "multipart/form-data":
        form: dict[str, Any] = {}
        async for part in await request.multipart():
            assert isinstance(part, BodyPartReader)
            content = bytes(await part.read())
            if part.filename is None:
                form[str(part.name)] = content.decode("utf-8", "replace")
            else:
                form[str(part.name)] = (part.filename, part.headers.get("Content-Type", ""), content)
        return form
    raw = await request.read()
    try:
        return from_json(raw) if raw else None
    except ValueError:
        return raw


def _read(file: _File | None) -> tuple[list[tuple[str, str]], str]:
    """Question and answer of each example, and what is wrong with them."""
    examples = []
    for number, line in enumerate((file.content if file else b"").splitlines(), 1):
        try:
            messages = from_json(line)["messages"]
            *asked, last = messages
            if last["role"] != "assistant" or not isinstance(last["content"], str) or not asked:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            return [], f"Invalid file format. Line {number} is no example of a chat."
        examples.append((json.dumps(asked, sort_keys=True), last["content"]))
    if len(examples) < LEAST:
        return [], f"Training file has {len(examples)} example(s), but must have at least {LEAST} examples."
    return examples, ""


def _file_json(file: _File) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": len(file.content),
        "created_at": file.created,
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
        "simulated": True,
    }


def _page(request: web.Request, newest_first: list[dict[str, Any]]) -> web.Response:
    after = request.query.get("after")
    ids = [one["id"] for one in newest_first]
    start = ids.index(after) + 1 if after in ids else 0
    page = newest_first[start : start + int(request.query.get("limit", "20"))]
    more = start + len(page) < len(ids)
    return _json({"object": "list", "data": page, "has_more": more, "simulated": True})


def _json(
    data: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    return web.Response(body=to_json(data), status=status, content_type="application/json", headers=headers)


def _refusal(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return _json({"error": error, "simulated": True}, status, headers)


def _missing(what: str, request: web.Request) -> web.Response:
    return _refusal(404, f"No such {what}: {request.match_info['id']}", "id")
