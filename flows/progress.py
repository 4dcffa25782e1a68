"""How a run gets on: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from chainwax.flows.tally import Tally
from chainwax.router.manager import LLMManager

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Counts", "Progress", "counted", "money"]

_EVERY = 10.0
"""Seconds between two plain lines."""
_LOOKS_A_SECOND = 4
_OVER = 5.0
"""Seconds that the rate is taken over."""


def money(dollars: float) -> str:
    """An amount as a person reads it.

    >>> [money(x) for x in (0, 0.0000123, 0.01234, 1.5, 12345.678, -0.02)]
    ['$0', '$0.000012', '$0.0123', '$1.50', '$12,346', '-$0.0200']
    """
    if dollars < 0:
        return f"-{money(-dollars)}"
    if dollars == 0:
        return "$0"
    if dollars < 1e-7:
        return "<$0.0000001"
    if dollars >= 1000:
        return f"${dollars:,.0f}"
    if dollars >= 1:
        return f"${dollars:.2f}"
    # Two digits that count, three from a tenth of a cent on.
    digits = 2 if dollars < 0.001 else 3
    decimals = digits
    while dollars * 10 ** (decimals - digits + 1) < 1:
        decimals += 1
    return f"${dollars:.{decimals}f}"


class Counts(NamedTuple):
    """What a run did so far."""

    items: int = 0
    calls: int = 0
    in_flight: int = 0
    cost_usd: float = 0.0
    letters: int = 0


def counted(manager: LLMManager, tally: Tally) -> Counts:
    """One look at a process's counters, no statistics."""
    stats = [interface.router.stats for interface in list(manager.interfaces.values())]
    return Counts(
        tally.items,
        sum(s.calls for s in stats),
        sum(instance.queue.in_flight for instance in manager.instances.values()),
        sum(s.spent for s in stats),
        tally.letters,
    )


class _ToConsole(logging.Handler):
    """What is logged stands above the live line instead of tearing it."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = f"{record.levelname.lower()}: {self.format(record)}"
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        except Exception:
            self.handleError(record)


class Progress:
    """Shows items, calls, cost and failures while a run runs, on standard error.

    ``look`` says what they are now; it is called from a thread.
    """

    def __init__(
        self, look: Callable[[], Counts], *, console: Console, live: bool, every: float = _EVERY
    ) -> None:
        self._look = look
        self._console = console
        self._begun = time.monotonic()
        self._seen: deque[tuple[float, int]] = deque()
        self._note = ""
        self._ended = threading.Event()
        self._every = every
        self._spinner = Spinner("dots")
        self._live: Live | None = None
        self._thread: threading.Thread | None = None
        self._handler = _ToConsole(console)
        if live:
            self._live = Live(
                console=console,
                get_renderable=self._line,
                refresh_per_second=_LOOKS_A_SECOND,
                transient=True,
                redirect_stdout=False,
            )
        else:
            self._thread = threading.Thread(target=self._tell, name="chainwax-progress", daemon=True)

    def __enter__(self) -> Self:
        logging.getLogger().addHandler(self._handler)
        if self._live is not None:
            self._live.start()
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._live is not None:
            self._live.stop()
        if self._thread is not None:
            self._thread.join()
        logging.getLogger().removeHandler(self._handler)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._begun

    def note(self, text: str) -> None:
        """Say something from a signal handler: without a lock that the interrupted code may hold."""
        self._note = text
        if self._live is None:
            os.write(2, f"{text}\n".encode())

    def last_words(self, text: str) -> None:
        """Say something and leave the terminal as it was: the process ends at once."""
        end = "\r\x1b[K\x1b[?25h" if sys.stderr.isatty() else ""
        os.write(sys.stderr.fileno(), f"{end}{text}\n".encode())

    def text(self) -> str:
        """The line."""
        counts = self._look()
        now = self.seconds
        self._seen.append((now, counts.calls))
        while len(self._seen) > 2 and now - self._seen[1][0] >= _OVER:
            self._seen.popleft()
        then, before = self._seen[0]
        rate = (counts.calls - before) / (now - then) if now > then else 0.0
        parts = [
            f"{counts.items:,} items",
            f"{counts.calls:,} calls ({rate:,.1f}/s)",
            f"{counts.in_flight:,} in flight",
            money(counts.cost_usd),
            f"{counts.letters:,} errors",
            elapsed(now),
        ]
        return " · ".join(parts)

    def _line(self) -> Text:
        frame = self._spinner.render(self._console.get_time())
        assert isinstance(frame, Text)
        line = Text.assemble(frame, " ", self.text(), no_wrap=True)
        # Room for the terminal's own ^C: on a full line it would go to the next, and tear this one.
        line.truncate(max(self._console.width - 4, 10), overflow="ellipsis")
        if self._note:
            line.append(f"\n{self._note}", "yellow")
        return line

    def _tell(self) -> None:
        while not self._ended.wait(self._every):
            self._console.print(self.text(), markup=False, highlight=False, soft_wrap=True)


def elapsed(seconds: float) -> str:
    """A duration as a person reads it.

    >>> elapsed(9.26), elapsed(75), elapsed(7300)
    ('9.3 s', '1:15 min', '2:01 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    return f"{minutes // 60}:{minutes % 60:02} h"
