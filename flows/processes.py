"""One process of a run, as the one that watches over it sees it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from chainwax.flows.progress import Counts

__all__ = ["Message", "Process"]

Message = Mapping[str, Any] | None
"""What a process tells; None once it tells nothing more."""


class Process:
    """A process that runs a part of a flow, in a session of its own: Ctrl-C is not for it.

    What it tells comes into ``inbox``, and is taken note of by :meth:`take`. It inherits the file descriptor
    ``keep``, and so holds the lock of the state folder as long as it lives.
    """

    def __init__(
        self,
        index: int,
        count: int,
        orders: str,
        inbox: SimpleQueue[tuple[Process, Message] | None],
        *,
        keep: int,
    ) -> None:
        self.name = f"process {index + 1} of {count}"
        self.ready = False
        self.counts = Counts()
        self.stops = ""
        """Why it stops on its own account."""
        self.killed = False
        """Whether it was killed from here."""
        self._end: Mapping[str, Any] = {}
        self._seen: Mapping[str, Any] | None = None
        self._saw = threading.Event()
        self._silent = False
        self._gone_at: float | None = None
        self._inbox = inbox
        ours, theirs = os.pipe()
        # A snapshot is longer than what a pipe takes in one piece: it has one of its own.
        our_looks, their_looks = os.pipe()
        try:
            # -P: a file beside the flow must not hide a module.
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-m", "chainwax.flows.member", str(theirs), str(their_looks)],
                stdin=subprocess.PIPE,
                pass_fds=(theirs, their_looks, keep),
                start_new_session=True,
                text=True,
            )
        finally:
            os.close(theirs)
            os.close(their_looks)
        threading.Thread(target=self._read, args=(ours,), name=f"chainwax-{self.name}", daemon=True).start()
        looks = threading.Thread(target=self._read_looks, args=(our_looks,), daemon=True)
        looks.start()
        self.tell(orders)

    @property
    def over(self) -> bool:
        """Whether it is gone, and all that it told is known."""
        if self._popen.poll() is None:
            return False
        if self._gone_at is None:
            self._gone_at = time.monotonic()
        # What a process of its own inherited may hold the pipe open.
        return self._silent or time.monotonic() - self._gone_at > 1.0

    @property
    def well(self) -> bool:
        """Whether it did its part to the end."""
        return bool(self._end) and not self._end["failed"]

    @property
    def was_killed(self) -> bool:
        """Whether a signal ended it, which may have nothing to do with what it did."""
        return (self._popen.returncode or 0) < 0

    @property
    def gave_up(self) -> bool:
        """Whether it ended because it lost another."""
        return bool(self._end) and bool(self._end["gave_up"])

    @property
    def hopeless(self) -> bool:
        """Whether it could not even begin: it never will."""
        return self._popen.returncode == 2

    @property
    def errors(self) -> list[str]:
        """What went wrong, one line each."""
        return list(self._end.get("errors", ()))

    @property
    def snapshot(self) -> Mapping[str, Any] | None:
        """What its recorders said at the end."""
        return self._end.get("snapshot")

    def ask_for_snapshot(self) -> None:
        """Have it tell what its recorders say now, once it was told to go."""
        self._saw.clear()
        self.tell("look\n")

    def seen(self, until: float) -> Mapping[str, Any] | None:
        """What its recorders said when they were last asked, waited for until that time (monotonic)."""
        self._saw.wait(max(until - time.monotonic(), 0.0))
        return self.snapshot or self._seen

    @property
    def fate(self) -> str:
        """What became of it, once it is over."""
        code = self._popen.returncode
        if code is not None and code < 0:
            return f"{self.name} was killed ({signal.Signals(-code).name})"
        if self.errors:
            return f"{self.name} failed"
        return f"{self.name} ended with exit code {code}"

    def tell(self, line: str) -> None:
        """Send it a line; to one that is gone nothing is sent."""
        assert self._popen.stdin is not None
        with suppress(OSError, ValueError):  # closed by it, or from here
            self._popen.stdin.write(line)
            self._popen.stdin.flush()

    def signal(self, number: int) -> None:
        """Send it a signal, where it is still there."""
        self._popen.send_signal(number)

    def kill(self) -> None:
        """End it, where it is still there, and give back what was kept for it."""
        if self._popen.poll() is None:
            self.killed = True
            self._popen.kill()
        self._popen.wait()
        assert self._popen.stdin is not None
        with suppress(OSError):
            self._popen.stdin.close()

    def take(self, message: Message) -> list[str]:
        """Take note of what it told; what of it a person should read."""
        match message:
            case None:
                self._silent = True
            case {"ready": True}:
                self.ready = True
            case {"counts": counts}:
                self.counts = Counts(*counts)
            case {"note": note}:
                self.stops = note
            case {"end": end}:
                self._end = end
            case {"log": text}:
                return [f"{self.name}: {text}"]
        return []

    def _read_looks(self, pipe: int) -> None:
        with os.fdopen(pipe, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                with suppress(ValueError):  # half a line: it was killed while it wrote
                    self._seen = json.loads(line)
                    self._saw.set()

    def _read(self, pipe: int) -> None:
        with os.fdopen(pipe, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                with suppress(ValueError):  # half a line: it was killed while it wrote
                    self._inbox.put((self, json.loads(line)))
        self._inbox.put((self, None))
