"""Health, readiness and metrics of a run over HTTP, on a thread and a loop of its own.

The router's loop has calls to make, and a scrape that waits for all processes of a run must not delay one.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from aiohttp import web
from rich.console import Console

from chainwax.flows.metrics import Look, exposition
from chainwax.flows.progress import Counts
from chainwax.router import ConfigError, Settings

__all__ = ["Address", "Seen", "Status", "address_of", "serving"]

Seen = tuple[Counts, Mapping[str, Any]]
"""Counters, and a manager's snapshot."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen; ``port`` 0 takes a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def address_of(option: str | None, settings: Settings) -> Address | None:
    """Where ``--serve [HOST:]PORT``, else the configuration, else ``PORT`` says; None where nothing does.

    Raises :class:`ConfigError`.
    """
    if option is None:
        host, port = settings.serve.host, settings.serve.port
        if port is not None:
            return Address(host, port)
        text = os.environ.get("PORT", "")
        return Address(host, _port(text, "environment variable PORT: ")) if text else None
    host, colon, text = option.rpartition(":")
    if colon and not host:
        raise ConfigError(f"--serve {option}: is written --serve HOST:PORT or --serve PORT")
    return Address(host.strip("[]") or settings.serve.host, _port(text, f"--serve {option}: "))


def _port(text: str, where: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < 65536):
        raise ConfigError(f"{where}'{text}' is no port, which is a number up to 65535")
    return int(text)


class Status:
    """What a run tells of itself. Told by the run as it gets on, read from the server's thread."""

    def __init__(self, flow: str) -> None:
        self._flow = flow
        self._version = version("chainwax")
        self._state: Callable[[], str] = lambda: "starting"
        self._seen: Callable[[], Seen] = lambda: (Counts(), {})
        self._processes = 0

    def follow(self, state: Callable[[], str], seen: Callable[[], Seen], processes: int = 1) -> None:
        """The run is prepared: ``state`` is ``starting``, ``running`` or ``draining``.

        ``seen`` gives the counters and the recorders' snapshot, which may take a second.
        """
        self._state, self._seen, self._processes = state, seen, processes

    @property
    def state(self) -> str:
        """How far the run is."""
        return self._state()

    def look(self) -> Look:
        """What there is to know now."""
        return Look(self.state, self._flow, self._version, self._processes, *self._seen())

    @property
    def described(self) -> dict[str, str]:
        """What this is, for whoever opens the address without a path."""
        return {
            "name": "chainwax",
            "version": self._version,
            "flow": self._flow,
            "state": self.state,
            "health": "/healthz",
            "readiness": "/readyz",
            "metrics": "/metrics",
        }


@contextmanager
def serving(address: Address | None, flow: str, console: Console) -> Iterator[Status]:
    """Serve the status that is given while the run runs; nothing is served without an address.

    Raises :class:`ConfigError` where nobody can listen there.
    """
    status = Status(flow)
    if address is None:
        yield status
        return
    server = _Server(address, status)
    server.start()
    console.print(
        f"health, readiness and metrics at http://{server.bound}/",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    try:
        yield status
    finally:
        server.stop()


class _Server:
    def __init__(self, address: Address, status: Status) -> None:
        self.bound = address
        self._status = status
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._ready = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="chainwax-serve", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            self._thread.join()
            taken = self._error.errno == errno.EADDRINUSE
            why = "another program listens there" if taken else self._error.strerror or str(self._error)
            raise ConfigError(f"health and metrics cannot be served at {self.bound}: {why}") from None

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(5)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_get("/", self._root)
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/readyz", self._readiness)
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        try:
            await web.TCPSite(runner, self.bound.host, self.bound.port).start()
            self.bound = Address(self.bound.host, runner.addresses[0][1])
            self._ready.set()
            await self._over.wait()
        except OSError as error:
            self._error = error
        finally:
            self._ready.set()
            await runner.cleanup()

    async def _root(self, _: web.Request) -> web.Response:
        return web.json_response(self._status.described)

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"alive": True})

    async def _readiness(self, _: web.Request) -> web.Response:
        state = self._status.state
        ready = state == "running"
        return web.json_response({"ready": ready, "state": state}, status=200 if ready else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        look = await asyncio.to_thread(self._status.look)
        text, kind = exposition(look, request.headers.get("Accept", ""))
        return web.Response(body=text, headers={"Content-Type": kind})
