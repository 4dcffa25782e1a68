"""One process of several that run a flow together: started by :mod:`chainwax.flows.cluster` alone.

It reads what it is to do from standard input: a line of JSON, and, once all others are ready too, a second
line. The end of standard input is the end of whoever started it, and it ends too. It tells how it gets on in
lines of JSON on the file descriptor that is its first argument, and on the second what its recorders say, for
each further line on standard input; the third, where it is given, is its end of a
:mod:`~chainwax.flows.relay`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chainwax.connectors import StopSwitch
from chainwax.flows.job import Job, Member
from chainwax.flows.load import load_flow
from chainwax.flows.options import settings_of
from chainwax.flows.panics import without_panics
from chainwax.flows.progress import counted
from chainwax.flows.relay import RelayLine
from chainwax.flows.runner import run_member
from chainwax.flows.tally import Tally
from chainwax.router import ChainwaxError, LLMManager
from chainwax.router.share import Share

__all__ = ["Orders", "main"]

_EVERY = 0.25
"""Seconds between two looks at the counters."""
_LONGEST = 2000
"""Characters of a message that are passed on: one write of it is never torn by another's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What one process is to do, JSON-ready."""

    flow: str
    config: str | None
    legacy: bool
    sources: Mapping[str, str]
    sinks: Mapping[str, str]
    dead_letters: str | None
    run_id: str
    state: str
    store: str
    workers: int
    speed: str | None
    config_file: str | None
    debug: bool
    index: int
    addresses: Sequence[str]

    def job(self, stop: StopSwitch, line: RelayLine | None) -> Job:
        """The same as a job. Raises :class:`ConfigError`."""
        settings = settings_of(None if self.config is None else Path(self.config), legacy=self.legacy)
        return Job(
            flow=load_flow(self.flow, agents=settings.agents, sources=self.sources, sinks=self.sinks),
            settings=settings,
            sources=self.sources,
            sinks=self.sinks,
            dead_letters=self.dead_letters,
            run_id=self.run_id,
            state=Path(self.state),
            workers=self.workers,
            speed=self.speed,
            config_file=self.config_file,
            debug=self.debug,
            stop=stop,
            member=Member(Share(self.index, len(self.addresses)), self.addresses, Path(self.store), line),
        )

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self)) + "\n"


class _Link:
    """What is told to whoever started this process."""

    def __init__(self, out: int, looks: int, *, quiet: bool) -> None:
        self._out = out
        self._looks = looks
        self._quiet = quiet
        self._manager: LLMManager | None = None
        self._ended = threading.Event()

    def send(self, **message: Any) -> None:
        self._write(self._out, message)

    def _write(self, out: int, message: Mapping[str, Any]) -> None:
        # No lock, and nothing buffered: this is called from signal handlers too.
        data = memoryview(json.dumps(message, default=str).encode() + b"\n")
        try:
            while data:
                data = data[os.write(out, data) :]
        except OSError:
            self._alone()

    def note(self, text: str) -> None:
        self.send(note=text)

    def last_words(self, text: str) -> None:
        """Whoever started this process has words of its own."""

    @contextmanager
    def together(self, manager: LLMManager, tally: Tally) -> Iterator[_Link]:
        """Say that all is ready, wait for the others, and tell of the counters from then on."""
        self._manager = manager
        self.send(ready=True)
        if not sys.stdin.readline():
            self._alone()
        threading.Thread(target=self._watch, name="chainwax-watch", daemon=True).start()
        telling = threading.Thread(target=self._tell, args=(tally,), name="chainwax-tell", daemon=True)
        telling.start()
        try:
            with _off_stdout(quiet=self._quiet):
                yield self
        finally:
            self._ended.set()
            telling.join()

    def _tell(self, tally: Tally) -> None:
        assert self._manager is not None
        last = False
        while not last:
            last = self._ended.wait(_EVERY)
            self.send(counts=counted(self._manager, tally))

    def _watch(self) -> None:
        assert self._manager is not None
        while os.read(0, 4096):  # not sys.stdin: its lock would be held when the process ends
            self._write(self._looks, self._manager.snapshot())  # whatever it says, it asks for that
        self._alone()

    def _alone(self) -> None:
        """End at once: nobody would start the others again, or keep a second run out of the state folder."""
        if self._manager is not None:
            self._manager.recording.flush(1.0)
        os._exit(1)


class _Handler(logging.Handler):
    def __init__(self, link: _Link) -> None:
        super().__init__()
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._link.send(log=f"{record.levelname.lower()}: {self.format(record)}"[:_LONGEST])
        except Exception:
            self.handleError(record)


@contextmanager
def _off_stdout(*, quiet: bool) -> Iterator[None]:
    """Keep off standard output what Bytewax's Rust side writes there while it waits for other processes.

    Python goes on writing there; descriptor 1 is standard error meanwhile, or nothing: a person wants to know
    of machines that are waited for, not of processes that begin in the same moment.
    """
    sys.stdout.flush()
    before, real = sys.stdout, os.dup(1)
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=before.encoding, errors="replace")
    if quiet:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
    else:
        os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.close()
        sys.stdout = before
        os.dup2(real, 1)
        os.close(real)


def main() -> None:
    """Do what the orders say. Exit codes: 0 ended as it should, 1 failed, 2 could not begin."""
    out, looks = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(out, False)
    os.set_inheritable(looks, False)
    stop = StopSwitch()
    # Until the run has handlers of its own. Ctrl-C goes to a group that this process is none of.
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    link = _Link(out, looks, quiet=bool(sys.argv[3]))
    logging.getLogger().addHandler(_Handler(link))
    line = RelayLine(int(sys.argv[3])) if sys.argv[3] else None
    orders = Orders(**json.loads(sys.stdin.readline()))
    with nullcontext() if orders.debug else without_panics(to_the_end=True):
        code = _obey(orders, link, stop, line)
        sys.stdout.flush()
    # Threads of Bytewax that lost another process abort this one in its usual end.
    os._exit(code)


def _obey(orders: Orders, link: _Link, stop: StopSwitch, line: RelayLine | None) -> int:
    try:
        ended, snapshot = run_member(orders.job(stop, line), link.together)
    except ChainwaxError as error:
        link.send(end={"failed": True, "gave_up": False, "errors": str(error).splitlines()})
        return 2
    except Exception as error:
        traceback.print_exc()
        link.send(end={"failed": True, "gave_up": False, "errors": [f"{type(error).__name__}: {error}"]})
        return 1
    link.send(
        end={
            "failed": ended.failed,
            "gave_up": ended.gave_up,
            "errors": ended.errors,
            "snapshot": snapshot,
        }
    )
    return 1 if ended.failed else 0


if __name__ == "__main__":
    main()
