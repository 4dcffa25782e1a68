"""The recording in SQLite: one writer thread with natural group commit.

Whoever records appends to a queue and goes on. The writer takes all there is, writes it in one transaction,
and tells those who wait; meanwhile more has piled up. There is no timer: a lone call is written at once, a
flood in large groups.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainwax.router.clock import SYSTEM_CLOCK, Clock
from chainwax.router.errors import RecordingError
from chainwax.router.recording.group import INSERT, NEW_RUN, Group
from chainwax.router.recording.reader import RecordingReader
from chainwax.router.recording.rows import DeadLetter, Row, run_row, storable
from chainwax.router.recording.schema import explain, open_database
from chainwax.router.types import Attempt, CallResult, Decision, Feedback, Query

if TYPE_CHECKING:
    from chainwax.router.share import ResponseStore

__all__ = ["SqliteRecording"]

Callback = Callable[[], None]

_GROUP = 5_000  # entries of the queue that one transaction takes at most
_BUSY_S = 5.0  # how long to wait for another process's lock
_LOOK_S = 0.5  # how often to see that the file is still there


class SqliteRecording(RecordingReader):
    """A recording that is written, and read as :class:`RecordingReader` does: reads see what is durable.

    * ``on_error`` is told once, in words that name the file, when rows cannot be written, and when rows are
      lost. Rows that cannot be written wait in memory, the writer tries again every ``retry_s`` seconds, and
      results go on. At most ``most_rows`` wait: further ones are lost, and :attr:`fatal` says so; a run
      should stop then, for what it goes on to pay for is forgotten.
    * ``content_keys`` records each attempt's content key, so that a later run can reuse its answer; it costs
      some 4 µs an attempt.

    * ``also`` keeps attempts and results too; a result is durable when it is in both.

    Several processes may write one file. Durable means: not lost with the process, at any moment.

    Raises :class:`~chainwax.router.errors.RecordingError` where the file cannot be opened.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        clock: Clock = SYSTEM_CLOCK,
        on_error: Callable[[str], None] | None = None,
        content_keys: bool = False,
        most_rows: int = 200_000,
        retry_s: float = 1.0,
        also: ResponseStore | None = None,
    ) -> None:
        self._write_db = open_database(Path(path), write=True, timeout=_BUSY_S)
        super().__init__(path)
        self.lost = 0
        """Rows that will never be written."""
        self._clock = clock
        self._on_error = on_error
        self._content_keys = content_keys
        self._most_rows = most_rows
        self._retry_s = retry_s
        self._also = also
        self._run = ""
        self._failed: str | None = None
        self._fatal = False
        self._index_wanted = False
        self._identity = _identity(self.path)
        self._next_look = 0.0
        self._write_lock = threading.Lock()
        self._queue: deque[tuple[Callable[..., None], Row, Callback | None]] = deque()
        self._group = Group(content_keys)
        self._idle = False
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="chainwax-recording", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> str | None:
        """Why rows cannot be written now; None where all is well."""
        return self._failed

    @property
    def fatal(self) -> bool:
        """Whether rows were lost because too many waited for a file that cannot be written."""
        return self._fatal

    # What is recorded. Everything is queued as it is, and made into rows by the writer.

    def open_run(self, run_id: str, flow: str, config: Mapping[str, Any]) -> bool:
        """Begin or resume a run, to which all that follows belongs; whether it was there before.

        Raises :class:`RecordingError` where it cannot be written, or the run is one of another flow.
        """
        row = storable(run_row(run_id, flow, config, self._clock.time()))
        try:
            with self._write_lock:
                # In this order two processes that begin the same run cannot both find it new.
                new = self._write_db.execute(NEW_RUN, row).rowcount
                (known,) = self._write_db.execute("SELECT flow FROM runs WHERE run = ?", row[:1]).fetchone()
                if not new and known == row[1]:
                    self._write_db.execute(INSERT["runs"], row)
        except sqlite3.Error as error:
            raise RecordingError(f"the recording '{self.path}' cannot be written: {explain(error)}") from None
        if known != row[1]:
            raise RecordingError(
                f"the recording '{self.path}' has a run '{run_id}' of the flow '{known}': it cannot be "
                f"resumed as one of '{flow}'"
            )
        self._run = row[0]
        return not new

    def close_run(self, run_id: str, status: str) -> None:
        """Say how a run ended: ``finished``, ``stopped`` or ``failed``."""
        self._put(Group.end, (run_id, status, self._clock.time()))

    def snapshot(self, run_id: str, snapshot: Mapping[str, Any]) -> None:
        """Keep what the recorders of a run say now, for other processes to read; the last one stays."""
        self._put(Group.snapshot, (run_id, snapshot))

    def keep_state(self, flow: str, state: str) -> None:
        """Keep what the routers of a flow know, in place of what was kept before."""
        self._put(Group.state, (flow, state))

    def attempt(self, query: Query, attempt: Attempt) -> None:
        """Record an attempt that does not end its call: escalated, parallel, shadow, failed."""
        self._put(Group.attempt, (self._run, query, attempt))
        if self._also is not None:
            self._also.attempt(query, attempt)

    def result(self, query: Query, result: CallResult, on_durable: Callback | None = None) -> None:
        """Record the end of a call with its attempts; those that are there already stay as they are.

        ``on_durable`` is called on the writer's thread, once the rows are durable or it is clear that they
        must wait: it must be quick.
        """
        if self._also is not None:
            on_durable = _Both(on_durable)
            self._also.result(query, result, on_durable)
        self._put(Group.result, (self._run, query, result, self._clock.time()), on_durable)

    def feedback(self, feedback: Sequence[Feedback]) -> None:
        """Record scores; the same metric of the same source about the same call and arm is revised.

        A score that names no call is one of the call that its node made last about its item key.
        """
        if feedback:
            self._put(Group.feedback, (self._run, tuple(feedback)))

    def decision(self, decision: Decision) -> None:
        """Record what was decided."""
        self._put(Group.decision, (self._run, decision, self._clock.time()))

    def dead_letters(self, rows: Sequence[DeadLetter]) -> None:
        """Record items that could not be handled; each position once for a node."""
        if rows:
            self._put(Group.dead_letters, (self._run, tuple(rows), self._clock.time()))

    def items(self, source: str, rows: Sequence[tuple[str, str, float | None, Any]]) -> None:
        """Record items of a source as (position, key, time, value); each position once."""
        if rows:
            self._put(Group.items, (self._run, source, tuple(rows)))

    def latest_call(self, node: str, item_key: str) -> str | None:
        """The id of the call that a node made last about an item key, for feedback that names only those.

        The first time makes an index for it, which runs without such feedback do not have to keep.
        """
        if not self._index_wanted and not self._closing:
            self._index_wanted = True
            self._put(Group.index, ())
        return super().latest_call(node, item_key)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was handed over is durable; False where it is not in ``timeout`` seconds."""
        done = threading.Event()
        self._put(Group.nothing, (), done.set)
        return done.wait(timeout) and self._failed is None

    def close(self, timeout: float = 30.0) -> None:
        """Write what is left, within ``timeout`` seconds, and close the file. Closing twice does no harm.

        Raises :class:`RecordingError` with the number of rows that are missing and the reason.
        """
        if self._closing:
            return
        self._closing = True
        self._wake.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise RecordingError(
                f"the recording '{self.path}' was not written within {timeout:g} s: rows may be missing"
            )
        super().close()
        self._write_db.close()
        missing = len(self._group) + self.lost
        if missing:
            reason = f": {self._failed}" if self._failed else ""
            raise RecordingError(f"{missing} rows are missing in the recording '{self.path}'{reason}")

    def _put(self, add: Callable[..., None], args: Row, on_durable: Callback | None = None) -> None:
        if self._closing:
            raise RecordingError(f"the recording '{self.path}' is closed")
        self._queue.append((add, args, on_durable))
        # The writer says that it is idle before it looks at the queue a last time: either it sees this
        # entry, or this thread sees that it has to be woken.
        if self._idle:
            self._wake.set()

    # The writer's thread from here on.

    def _work(self) -> None:
        retry_at = 0.0
        while True:
            closing = self._closing
            callbacks = self._take()
            if self._group and (self._failed is None or closing or time.monotonic() >= retry_at):
                self._store()
                retry_at = time.monotonic() + self._retry_s
            self._call(callbacks)
            del callbacks  # what they hold must not live through an idle hour
            if self._queue:
                continue
            if closing:
                return
            self._idle = True
            if not self._queue and not self._closing:
                self._wake.wait(None if self._failed is None else max(0.0, retry_at - time.monotonic()))
            self._idle = False
            self._wake.clear()

    def _take(self) -> list[Callback]:
        callbacks: list[Callback] = []
        queue, group = self._queue, self._group
        for _ in range(min(len(queue), _GROUP)):
            add, args, callback = queue.popleft()
            if callback is not None:
                callbacks.append(callback)
            if self._failed is not None and group is self._group and len(group) >= self._most_rows:
                group = Group(False)  # only to count what is lost
            try:
                add(group, *args)
            except Exception as error:  # a row is made of other people's values
                self._lose(1, f"a row of the recording '{self.path}' cannot be made: {error!r}")
        if group is not self._group:
            told, self._fatal = self._fatal, True
            self._lose(
                len(group),
                f"fatal: {self._most_rows} rows wait for the recording '{self.path}', which cannot be "
                f"written ({self._failed}): what comes now is lost",
                again=not told,
            )
        return callbacks

    def _call(self, callbacks: Sequence[Callback]) -> None:
        for callback in callbacks:
            try:
                callback()
            except Exception as error:
                self._tell(f"a callback of the recording '{self.path}' failed: {error!r}")

    def _store(self) -> None:
        """Write all rows that wait; where that fails they go on waiting. Never raises."""
        try:
            with self._write_lock:
                self._look()
                refused = self._group.write(self._write_db)
        except Exception as error:
            reason = explain(error) if isinstance(error, sqlite3.Error) else str(error) or repr(error)
            first, self._failed = self._failed is None, reason
            if first:
                self._wait_for_lock(0.1)  # from now on those who wait for a result would wait, too
                self._tell(
                    f"the recording '{self.path}' cannot be written: {reason}. The run goes on; its rows "
                    f"wait in memory and are written as soon as that is possible"
                )
            return
        self._group = Group(self._content_keys)
        for why in refused:
            self._lose(1, f"a row cannot be kept in the recording '{self.path}': {why}")
        if self._failed is not None:
            self._failed = None
            self._wait_for_lock(_BUSY_S)

    def _wait_for_lock(self, seconds: float) -> None:
        self._write_db.execute(f"PRAGMA busy_timeout = {seconds * 1000:.0f}")

    def _look(self) -> None:
        """See now and then that the file is still there: SQLite writes to a deleted one without a word.

        All that a deleted file held is still in the open one, and is written anew to the same path. A file
        that was put in its place is left alone: what SQLite keeps beside it (``-wal``) is of the old one.
        """
        now = time.monotonic()
        if now < self._next_look and not self._closing and self._failed is None:
            return
        self._next_look = now + _LOOK_S
        if _identity(self.path) == self._identity:
            return
        if self.path.exists():
            raise RecordingError("another file was put in its place while it was in use")
        self._write_db.execute("VACUUM INTO ?", (str(self.path),))
        self._tell(f"the recording '{self.path}' was deleted while in use, and has been written anew")
        db = open_database(self.path, write=True, timeout=_BUSY_S)
        self._write_db.close()
        self._write_db = db
        self._identity = _identity(self.path)
        with self._lock:
            self._db.close()
            self._db = open_database(self.path, write=False)

    def _lose(self, rows: int, why: str, *, again: bool = False) -> None:
        if again or not self.lost:
            self._tell(why)
        self.lost += rows

    def _tell(self, message: str) -> None:
        if self._on_error is not None:
            try:
                self._on_error(message)
            except Exception:  # whoever listens must not stop the writer
                logging.getLogger(__name__).exception("on_error of the recording failed")


class _Both:
    """Calls back when it is called the second time."""

    __slots__ = ("_callback", "_left", "_lock")

    def __init__(self, callback: Callback | None) -> None:
        self._callback = callback
        self._left = 2
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            last = not self._left
        if last and self._callback is not None:
            self._callback()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
