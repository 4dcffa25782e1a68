"""The client's side of files and fine-tuning jobs, as OpenAI's API has them and others copied it.

A request that fails for a moment is made again, after as long as the server's ``Retry-After`` says, or a
pause that grows. What costs money when it is done twice is looked for before it is done again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from time import monotonic
from typing import Any, TypeVar
from urllib.parse import quote

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport
from pydantic_core import from_json

from chainwax.router.backends._http import BODY_LIMIT, error_of, is_loopback, shorten
from chainwax.router.errors import (
    BackendDown,
    BackendError,
    BackendGarbled,
    BackendTimeout,
)

__all__ = ["FineTuning"]

_T = TypeVar("_T")

_CONTROL_S = 30.0
"""For one request without a file."""
_UPLOAD_S = 600.0
_TRIES = 6
_PAUSES = (0.5, 30.0)
"""Seconds: the first pause at most, and any at most, where the server does not say."""
_PAGES = 20
"""Pages of a list that are looked through."""


class FineTuning:
    """One provider's files and jobs. An asynchronous context manager.

    ``url`` is the base up to and with ``/v1``. ``key`` is sent as a bearer token where it is not empty, and
    stands in no error. After ``until`` (of the monotonic clock) nothing is tried again.
    """

    def __init__(
        self, url: str, key: str = "", *, headers: Mapping[str, str] | None = None, until: float | None = None
    ) -> None:
        self._url = url.rstrip("/")
        self._key = key
        self._headers = {"Accept": "application/json", **(headers or {})}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self.until = until
        self._session: aiohttp.ClientSession | None = None
        self._client: httpx.AsyncClient | None = None

    async def __aenter__(self) -> FineTuning:
        self._session = aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(), trust_env=not is_loopback(self._url)
        )
        transport = AiohttpTransport(client=self._session)
        self._client = httpx.AsyncClient(transport=transport, headers=self._headers, trust_env=False)
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._client is not None:
            await self._client.aclose()
        if self._session is not None:
            await self._session.close()

    # -- files ----------------------------------------------------------------------------------

    async def upload(self, name: str, content: bytes) -> str:
        """Send a file for fine-tuning; its id.

        ``name`` must say what is in it: by it the file is found that was sent before.
        """

        async def send() -> str:
            data = await self._call(
                "POST",
                "/files",
                data={"purpose": "fine-tune"},
                files={"file": (name, content, "application/jsonl")},
                timeout=_UPLOAD_S,
            )
            return _text(data, "id")

        return await self._once(send, lambda: self.find_file(name, len(content)))

    async def find_file(self, name: str, size: int) -> str | None:
        """The id of a file of this name and size in bytes that is there already."""

        def same(one: Mapping[str, Any]) -> bool:
            return one.get("filename") == name and one.get("bytes") == size and one.get("status") != "error"

        found = await self._find("/files", {"purpose": "fine-tune"}, same)
        return None if found is None else _text(found, "id")

    async def delete_file(self, file: str) -> None:
        """Take a file away."""
        await self._again(lambda: self._call("DELETE", f"/files/{quote(file, safe='')}"))

    # -- jobs -----------------------------------------------------------------------------------

    async def create(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Begin a job; the job. ``body`` has a ``training_file``, by which a job that was begun is found."""
        return await self._once(
            lambda: self._call("POST", "/fine_tuning/jobs", json=dict(body)),
            lambda: self.find_job(body["training_file"]),
        )

    async def find_job(self, training_file: str) -> dict[str, Any] | None:
        """The newest job about a training file, where there is one that was not given up."""

        def same(one: Mapping[str, Any]) -> bool:
            return one.get("training_file") == training_file and one.get("status") not in (
                "failed",
                "cancelled",
            )

        return await self._find("/fine_tuning/jobs", {}, same)

    async def job(self, job: str) -> dict[str, Any]:
        """A job as it is now."""
        return await self._again(lambda: self._call("GET", _job_path(job)))

    async def cancel(self, job: str) -> dict[str, Any]:
        """End a job."""
        return await self._again(lambda: self._call("POST", _job_path(job) + "/cancel"))

    async def events(self, job: str, known: set[str]) -> list[dict[str, Any]]:
        """The events of a job that are not among the ``known`` ids, oldest first; their ids are added."""
        new: list[dict[str, Any]] = []
        path = _job_path(job) + "/events"
        async for page in self._pages(path, {"limit": "100"}):  # newest first
            fresh = [one for one in page if str(one.get("id")) not in known]
            new.extend(fresh)
            if len(fresh) < len(page):
                break
        known.update(str(one.get("id")) for one in new)
        return new[::-1]

    # -- inside ---------------------------------------------------------------------------------

    async def _find(
        self, path: str, query: Mapping[str, str], wanted: Callable[[Mapping[str, Any]], bool]
    ) -> dict[str, Any] | None:
        async for page in self._pages(path, {**query, "limit": "100"}):
            for one in page:
                if wanted(one):
                    return one
        return None

    async def _pages(self, path: str, query: Mapping[str, str]) -> AsyncIterator[list[dict[str, Any]]]:
        after: dict[str, str] = {}
        for _ in range(_PAGES):
            data = await self._again(lambda: self._call("GET", path, query={**query, **after}))  # noqa: B023
            page = data.get("data")
            if not isinstance(page, list) or not all(isinstance(one, dict) for one in page):
                raise BackendGarbled(f"{path}: no list in 'data'")
            yield page
            if not data.get("has_more") or not page or after.get("after") == page[-1].get("id"):
                return
            after = {"after": str(page[-1].get("id"))}

    async def _again(self, make: Callable[[], Awaitable[_T]]) -> _T:
        """What may be asked twice, until it is answered."""

        async def nothing() -> None:
            return None

        return await self._once(make, nothing)

    async def _once(self, make: Callable[[], Awaitable[_T]], find: Callable[[], Awaitable[_T | None]]) -> _T:
        """What is not to be done twice: after a failure that leaves it open it is looked for first."""
        for tried in range(1, _TRIES + 1):
            try:
                return await make()
            except BackendError as error:
                pause = error.retry_after
                if pause is None:
                    pause = random.uniform(0.0, min(_PAUSES[1], _PAUSES[0] * 2.0**tried))
                late = self.until is not None and monotonic() + pause > self.until
                if not error.retryable or tried == _TRIES or late:
                    raise
            await asyncio.sleep(pause)
            found = await find()
            if found is not None:
                return found
        raise AssertionError("unreachable: the last try returns or raises")

    async def _call(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        query: Mapping[str, str] | None = None,
        data: Mapping[str, str] | None = None,
        files: Mapping[str, Any] | None = None,
        timeout: float = _CONTROL_S,
    ) -> dict[str, Any]:
        assert self._client is not None
        where = f"{method} {path}"
        request = self._client.build_request(
            method, self._url + path, json=json, params=query, data=data, files=files, timeout=timeout
        )
        try:
            async with asyncio.timeout(timeout):
                response = await self._client.send(request, stream=True)
                try:
                    body = bytearray()
                    async for part in response.aiter_bytes():
                        body += part
                        if len(body) > BODY_LIMIT:
                            raise BackendGarbled(f"{where}: the answer has more than {BODY_LIMIT} bytes")
                finally:
                    await response.aclose()
        except (TimeoutError, httpx.TimeoutException):
            raise BackendTimeout(f"{where}: no whole answer within {timeout:g} s") from None
        except httpx.HTTPError as error:
            raise BackendDown(f"{where}: {type(error).__name__}: {shorten(str(error), self._key)}") from None
        if not 200 <= response.status_code < 300:
            refused, _ = error_of(response.status_code, response.headers, bytes(body), self._key)
            refused.args = (f"{where}: {refused}",)
            raise refused
        try:
            answer = from_json(bytes(body))
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise BackendGarbled(f"{where}: the answer is no JSON object")
        return answer


def _job_path(job: str) -> str:
    return f"/fine_tuning/jobs/{quote(job, safe='')}"


def _text(data: Mapping[str, Any], field: str) -> str:
    value = data.get(field)
    if not isinstance(value, str) or not value:
        raise BackendGarbled(f"the answer has no '{field}'")
    return value
