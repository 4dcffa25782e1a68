"""The answers of a run in Redis: what one machine was answered, no other machine pays for again.

Written like the recording: whoever records appends to a queue; one thread takes all there is, sends it at
once and tells those who wait.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import TypeAdapter

from chainwax.connectors.redis.servers import AWAY, RedisServers
from chainwax.router.errors import RecordingError
from chainwax.router.recording import RecordedCall
from chainwax.router.share import Away
from chainwax.router.types import Attempt, CallResult, Query

__all__ = ["RedisStore"]

log = logging.getLogger(__name__)

_CALL = TypeAdapter(RecordedCall)
_GROUP = 1000
_RETRY_S = 0.5
_CLOSE_S = 5.0
_FIND = 500

_Row = tuple[Query, CallResult | Attempt, Callable[[], None] | None]


class RedisStore:
    """Keeps calls and attempts under ``PREFIX:RUN:CALL_ID``, each for ``keep_hours`` after it came.

    What it says is durable is as durable as Redis is set to be. Rows that cannot be written wait in memory,
    at most ``most_rows``, and results go on: they are in this machine's recording too.
    """

    def __init__(self, servers: RedisServers, *, most_rows: int = 200_000) -> None:
        self.lost = 0
        """Rows that will never be written."""
        self._servers = servers
        self._most = most_rows
        self._run = ""
        self._expire_s = int(servers.config.keep_hours * 3600)
        self._client = servers.client()
        self._loop_client: Any = None
        self._queue: deque[_Row] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._away = False
        self._thread: threading.Thread | None = None

    def open_run(self, run_id: str) -> None:
        """All that follows belongs to this run. Raises :class:`ConfigError` where Redis cannot be used."""
        self._run = run_id
        if self._thread is not None:
            return
        settings = self._servers.check()
        if settings.get("appendonly") == "no":
            log.warning("%s keeps nothing over its own restart: 'appendonly' is off", self._servers.place)
        if settings.get("maxmemory-policy", "noeviction") != "noeviction":
            log.warning(
                "%s may throw answers away: 'maxmemory-policy' is not noeviction", self._servers.place
            )
        self._thread = threading.Thread(target=self._work, name="chainwax-store", daemon=True)
        self._thread.start()

    async def find(self, call_ids: Sequence[str]) -> dict[str, RecordedCall]:
        """What is there of these calls, all of it paid by then. On one loop. Raises :class:`Away`."""
        if self._loop_client is None:
            self._loop_client = self._servers.loop_client()
        found: dict[str, RecordedCall] = {}
        try:
            for start in range(0, len(call_ids), _FIND):
                ids = call_ids[start : start + _FIND]
                pipe = self._loop_client.pipeline(transaction=False)
                for call_id in ids:
                    pipe.lrange(self._key(call_id), 0, -1)
                async with asyncio.timeout(2 * self._servers.config.timeout):
                    answers = await pipe.execute()
                for call_id, rows in zip(ids, answers, strict=True):
                    call = _merged(call_id, rows)
                    if call is not None:
                        found[call_id] = call
        except AWAY as error:
            raise Away(f"{self._servers.place} does not answer: {error}") from None
        return found

    async def leave(self) -> None:
        """Nothing more is looked for. On the loop that :meth:`find` was used on."""
        client, self._loop_client = self._loop_client, None
        if client is not None:
            await client.aclose()

    def attempt(self, query: Query, attempt: Attempt) -> None:
        """Keep an attempt that does not end its call."""
        if attempt.text is not None and not attempt.reused:
            self._put((query, attempt, None))

    def result(self, query: Query, result: CallResult, on_durable: Callable[[], None]) -> None:
        """Keep the end of a call. ``on_durable`` is called once it is kept, or is clear that it must wait."""
        if result.reused:
            on_durable()
        else:
            self._put((query, result, on_durable))

    def close(self) -> None:
        """Write what is left. Raises :class:`RecordingError` with what cannot be written."""
        if self._closing:
            return
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_S + 2 * self._servers.config.timeout)
        self._client.close()
        missing = len(self._queue) + self.lost
        if missing:
            raise RecordingError(
                f"{missing} answers are missing in {self._servers.place}: other machines may ask for them "
                "again"
            )

    def _key(self, call_id: str) -> str:
        return self._servers.key(self._run, call_id)

    def _put(self, row: _Row) -> None:
        if len(self._queue) >= self._most:
            self.lost += 1
            if row[2] is not None:
                row[2]()
            return
        self._queue.append(row)
        self._wake.set()

    def _work(self) -> None:
        told = 0  # rows at the head of the queue that nobody waits for any more
        until = float("inf")
        while True:
            if self._closing:
                until = min(until, time.monotonic() + _CLOSE_S)
            rows = [self._queue[n] for n in range(min(len(self._queue), _GROUP))]
            if not rows:
                if self._closing:
                    return
                self._wake.wait()
                self._wake.clear()
                continue
            well = self._write(rows)
            for _, _, callback in rows[told:]:
                if callback is not None:
                    callback()
            if well:
                for _ in rows:
                    self._queue.popleft()
                told = max(0, told - len(rows))
                continue
            told = max(told, len(rows))
            # While it is away nobody waits: what has come is told, and stays in the queue.
            while told < len(self._queue):
                callback = self._queue[told][2]
                if callback is not None:
                    callback()
                told += 1
            if time.monotonic() >= until:
                return
            time.sleep(_RETRY_S)

    def _write(self, rows: Sequence[_Row]) -> bool:
        """Send them; False where Redis is away."""
        pipe = self._client.pipeline(transaction=False)
        for query, what, _ in rows:
            try:
                key, text = self._key(query.call_id), _text(query, what)
            except Exception as error:  # an answer is other people's text
                log.error("the answer of call %s cannot be kept in Redis: %r", query.call_id, error)
                continue
            pipe.rpush(key, text)
            pipe.expire(key, self._expire_s)
        try:
            refused = [r for r in pipe.execute(raise_on_error=False)[::2] if isinstance(r, Exception)]
            if refused and len(refused) == len(rows):
                raise refused[0]  # it is full, or reads only
        except AWAY as error:
            if not self._away:
                self._away = True
                log.error(
                    "%s cannot be written: %s. Answers wait in memory; they are in this machine's recording",
                    self._servers.place,
                    error,
                )
            return False
        self._away = False
        for reason in refused:
            self.lost += 1
            log.error("an answer cannot be kept in Redis: %s", reason)
        return True


def _text(query: Query, what: CallResult | Attempt) -> str:
    node = query.node.id
    if isinstance(what, Attempt):
        call = RecordedCall(query.call_id, node, "unfinished", [what])
    else:
        error = what.error
        call = RecordedCall(
            query.call_id,
            node,
            "ok" if error is None else "error",
            [a for a in what.attempts if not a.reused],
            text=what.text,
            arm=what.arm,
            error=None if error is None else type(error).__name__,
            message=None if error is None else str(error),
            waited_s=what.waited_s,
        )
    # Not pydantic's own JSON: it has no way to write a lone surrogate.
    return json.dumps(_CALL.dump_python(call, mode="python"), separators=(",", ":"))


def _merged(call_id: str, rows: Sequence[str]) -> RecordedCall | None:
    """One call from all that was said of it."""
    merged: RecordedCall | None = None
    for row in rows:
        try:
            call = _CALL.validate_python(json.loads(row))
        except ValueError as error:
            log.error("what Redis holds of call %s is no call: %s", call_id, error)
            continue
        for attempt in call.attempts:
            # Counted where it was paid.
            attempt.reused, attempt.cost_usd = True, 0.0
        if merged is None:
            merged = call
            continue
        attempts = [*merged.attempts, *call.attempts]
        if call.status == "ok" or merged.status == "unfinished":
            merged = call
        merged.attempts = attempts
    return merged
