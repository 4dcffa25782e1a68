"""What processes of one run on one machine say to each other, through the one that watches over them.

Each has a socket to it. Over that it borrows slots, minutes and dollars, and sends feedback, which all get,
in one order.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection, Pipe
from queue import SimpleQueue

from pydantic import TypeAdapter

from chainwax.connectors import InProcessBus
from chainwax.router.feedback import Learn
from chainwax.router.hub import Hub
from chainwax.router.share import Away, Reply, Report
from chainwax.router.types import Feedback

__all__ = ["Relay", "RelayBus", "RelayLender", "RelayLine"]

log = logging.getLogger("chainwax")

_REPORT = TypeAdapter(Report)
_REPLY = TypeAdapter(Reply)
_FEEDBACK = TypeAdapter(list[Feedback])
_ANSWER_S = 10.0
_CLOSE_S = 5.0


class Relay:
    """Of the one that watches. ``spent`` is what the run has spent before, in dollars, by node."""

    def __init__(self, spent: Mapping[str, float]) -> None:
        self._hub = Hub()
        self._spent: dict[str, Mapping[str, float]] = {"before": spent}
        self._lines: dict[int, SimpleQueue[bytes | None]] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def connect(self, index: int) -> Connection:
        """The other end of a process's line, to be inherited by it and closed here."""
        ours, theirs = Pipe()
        out: SimpleQueue[bytes | None] = SimpleQueue()
        self._lines[index] = out
        for what, arguments in ((self._read, (index, ours, out)), (self._write, (ours, out))):
            thread = threading.Thread(
                target=what, args=arguments, name=f"chainwax-relay-{index}", daemon=True
            )
            thread.start()
            self._threads.append(thread)
        return theirs

    def close(self) -> None:
        """All processes are gone: what they had is free."""
        for thread in self._threads:
            thread.join(_CLOSE_S)
        self._threads.clear()
        with self._lock:
            self._lines.clear()
            for name in list(self._hub.heard):
                self._hub.forget(name)

    def _read(self, index: int, line: Connection, out: SimpleQueue[bytes | None]) -> None:
        process = ""
        try:
            while True:
                raw = line.recv_bytes()
                if raw[:1] == b"r":
                    report = _REPORT.validate_json(raw[1:])
                    process = report.process
                    out.put(b"r" + _REPLY.dump_json(self._exchange(report)))
                else:
                    self._pass_on(index, raw)
        except (EOFError, OSError):
            with self._lock:
                self._hub.forget(process)
                self._lines.pop(index, None)
            out.put(None)

    def _exchange(self, report: Report) -> Reply:
        with self._lock:
            lent = self._hub.exchange(report.process, report.asks, time.monotonic())
            self._spent[report.process] = report.spent
            total: Counter[str] = Counter()
            for one in self._spent.values():
                total.update(one)
            return Reply(lent, total, len(self._hub.heard))

    def _pass_on(self, index: int, raw: bytes) -> None:
        # Who said it gets it from here too, so that all get everything in the same order.
        with self._lock:
            for number, out in self._lines.items():
                out.put((b"o" if number == index else b"f") + raw[1:])

    @staticmethod
    def _write(line: Connection, out: SimpleQueue[bytes | None]) -> None:
        with line:
            while (raw := out.get()) is not None:
                with suppress(OSError):
                    line.send_bytes(raw)


class RelayLine:
    """A process's end of its line: it is told of replies and of feedback on a thread of its own."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._line = Connection(fd)
        self._lock = threading.Lock()
        self.replied: Callable[[bytes], None] = lambda raw: None
        self.said: Callable[[bytes, bool], None] = lambda raw, own: None
        """Takes feedback, and whether it is this process's own."""
        threading.Thread(target=self._read, name="chainwax-relay", daemon=True).start()

    def send(self, raw: bytes) -> None:
        """Send a message; to one that is gone nothing is sent, for this process ends too."""
        with self._lock, suppress(OSError):
            self._line.send_bytes(raw)

    def _read(self) -> None:
        try:
            while True:
                raw = self._line.recv_bytes()
                if raw[:1] == b"r":
                    self.replied(raw[1:])
                else:
                    self.said(raw[1:], raw[:1] == b"o")
        except (EOFError, OSError):
            return


class RelayLender:
    """Borrows over a line."""

    lends_slots = True

    def __init__(self, line: RelayLine) -> None:
        self._line = line
        self._replies: SimpleQueue[Future[Reply]] = SimpleQueue()
        line.replied = self._replied

    async def exchange(self, report: Report) -> Reply:
        """Tell and hear."""
        answer: Future[Reply] = Future()
        self._replies.put(answer)
        self._line.send(b"r" + _REPORT.dump_json(report))
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await asyncio.wrap_future(answer)
        except TimeoutError:
            raise Away("whoever watches over the processes does not answer") from None

    async def close(self) -> None:
        """The end of the process gives everything back."""

    def _replied(self, raw: bytes) -> None:
        # Replies come in the order of the reports: one that nobody waits for any more is taken too.
        answer = self._replies.get()
        if answer.set_running_or_notify_cancel():
            answer.set_result(_REPLY.validate_json(raw))


class RelayBus(InProcessBus):
    """The feedback of all processes: whatever one says, each hears, in one order."""

    def __init__(self, line: RelayLine) -> None:
        super().__init__()
        self._line = line
        self._sent = self._came = 0
        self._all_came = threading.Condition()
        self._recall: Learn | None = None
        line.said = self._said

    def recall_to(self, recall: Learn) -> None:
        """Have ``recall`` called with what the others said, and record."""
        self._recall = recall

    def publish(self, feedback: Sequence[Feedback]) -> None:
        """Send feedback on. Called from any thread."""
        if self._closed:
            log.warning("the feedback bus is closed: %d scores came too late", len(feedback))
            return
        with self._all_came:
            self._sent += 1
        # A correction may be anything; what is no JSON goes as text.
        self._line.send(b"f" + json.dumps([asdict(one) for one in feedback], default=str).encode())

    def close(self) -> None:
        """Wait until all that was published has come back, and stop."""
        with self._all_came:
            self._all_came.wait_for(lambda: self._came >= self._sent, _CLOSE_S)
        super().close()

    def _said(self, raw: bytes, own: bool) -> None:
        try:
            feedback = _FEEDBACK.validate_python(json.loads(raw))
            if own:
                super().publish(feedback)
            elif self._recall is not None and not self._closed:
                self._recall(feedback)
        except Exception:
            log.exception("feedback of another process cannot be learned")
        if own:
            with self._all_came:
                self._came += 1
                self._all_came.notify_all()
