"""What the HTTP backends share: bounded bodies, server-sent events, and answers that are errors."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from pydantic_core import from_json

from chainwax.router.errors import (
    BackendBusy,
    BackendDown,
    BackendError,
    BackendGarbled,
    BackendRefused,
    BackendTimeout,
)

__all__ = [
    "BODY_LIMIT",
    "error_for",
    "error_of",
    "is_loopback",
    "read_body",
    "read_events",
    "retry_after",
    "server_message",
]

BODY_LIMIT = 8 * 1024 * 1024
"""Bytes of an answer; a server that sends more is not read on."""

_ERROR_LIMIT = 64 * 1024
_MESSAGE_LIMIT = 300  # characters of a server's own words in an error


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this machine."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def read_body(response: aiohttp.ClientResponse) -> bytes:
    """The whole body. Raises :class:`BackendGarbled` beyond :data:`BODY_LIMIT`, without reading on."""
    if (response.content_length or 0) > BODY_LIMIT:
        raise BackendGarbled(f"the answer has {response.content_length} bytes, more than {BODY_LIMIT}")
    body = await response.content.readany()
    if response.content.at_eof():
        return body  # nearly always: an answer fits into one read
    parts, size = [body], len(body)
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > BODY_LIMIT:
            raise BackendGarbled(f"the answer has more than {BODY_LIMIT} bytes")
    return b"".join(parts)


async def read_events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of each server-sent event; model servers put it on one line always.

    Raises :class:`BackendGarbled` beyond :data:`BODY_LIMIT`.
    """
    rest, size = b"", 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > BODY_LIMIT:
            raise BackendGarbled(f"the stream has more than {BODY_LIMIT} bytes")
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
    if rest.startswith(b"data:"):
        yield rest[5:].strip()


async def error_for(response: aiohttp.ClientResponse, secret: str) -> tuple[BackendError, Any]:
    """The error that an HTTP status stands for, with what the server says, and the body's JSON.

    ``secret`` is taken out of the server's words: some servers repeat the key that they refuse.
    """
    body = b""
    try:
        async for part in response.content.iter_any():
            body += part
            if len(body) > _ERROR_LIMIT:
                break
    except aiohttp.ClientError:
        pass  # the status says enough
    return error_of(response.status, response.headers, body, secret)


def error_of(status: int, headers: Mapping[str, str], body: bytes, secret: str) -> tuple[BackendError, Any]:
    """:func:`error_for` where the body was read already."""
    try:
        data = from_json(body)
    except ValueError:
        data = None
    said = server_message(data, secret) or shorten(body.decode("utf-8", "replace"), secret)
    text = f"HTTP {status}" + (f": {said}" if said else "")
    if status in (429, 503, 529):
        return BackendBusy(text, retry_after=retry_after(headers)), data
    if status >= 500:
        return BackendDown(text, retry_after=retry_after(headers)), data
    if status == 408:
        return BackendTimeout(text), data
    if status < 400:
        # Following it would carry the key to a host that nobody named.
        text = f"HTTP {status}: the server redirects elsewhere; state the final address in 'url'"
    return BackendRefused(text), data


def server_message(data: Any, secret: str) -> str:
    """A server's own words in the JSON of an error, in any of the usual places; else empty."""
    if isinstance(data, list) and data:
        data = data[0]
    if not isinstance(data, dict):
        return ""
    error = data.get("error", data)
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error.get("type") or ""
    return shorten(error if isinstance(error, str) else str(error), secret)


def shorten(text: str, secret: str) -> str:
    """One line of bounded length, without the secret."""
    if secret:  # before cutting, or half a key would stay
        text = text.replace(secret, "***")
    line = " ".join(text[: 4 * _MESSAGE_LIMIT].split())
    return line if len(line) <= _MESSAGE_LIMIT else line[:_MESSAGE_LIMIT] + " …"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: ``retry-after-ms``, seconds or an HTTP date; None without."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * unit
        except ValueError:
            seconds = _seconds_until(value)
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


def _seconds_until(date: str) -> float:
    try:
        when = parsedate_to_datetime(date)
    except (ValueError, IndexError, OverflowError):
        return math.nan
    if when.tzinfo is None:  # "-0000" says UTC without saying where
        when = when.replace(tzinfo=UTC)
    return (when - datetime.now(UTC)).total_seconds()
