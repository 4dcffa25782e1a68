"""A training in a process of its own: at low priority, held to its limits, and never in the way.

That process reads ``work.json`` and ``data/`` in its folder, and leaves ``trained.json``, or ``failed.json``
with the reason.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chainwax.router.custom.dataset import Dataset
from chainwax.router.custom.trainer import Limits, Progress, Trained
from chainwax.router.errors import ChainwaxError, ConfigError, TrainerFailed

__all__ = ["train_apart"]

_MAIN = f"from {__name__} import main; main()"
"""What the process runs: not ``-m``, for the package imports this module, and Python warns of that."""
_LOOK = 0.1
_ORPHAN_LOOK = 1.0
_NICE = 15
_TOLD = 2000
"""Characters of what a process said last, where it failed."""


def train_apart(
    name: str,
    maker: Callable[..., Any],
    options: Mapping[str, Any],
    dataset: Dataset,
    folder: Path,
    limits: Limits,
    progress: Progress,
    stop: threading.Event,
) -> Trained:
    """Have ``maker(options)`` train in a process of its own; blocks until it has ended.

    Raises :class:`TrainerFailed` where it fails, dies, takes more than its limits, or ``stop`` is set, and
    :class:`ConfigError` where the trainer cannot be imported by another process.
    """
    module, place = maker.__module__, maker.__qualname__
    if module == "__main__" or "<" in place:
        raise ConfigError(
            f"the trainer '{name}' is made by {module}.{place}, which another process cannot import: put it "
            "at the top level of a module"
        )
    folder.mkdir(parents=True, exist_ok=True)
    dataset.save(folder / "data")
    for old in ("trained.json", "failed.json"):
        (folder / old).unlink(missing_ok=True)
    job: dict[str, Any] = {"module": module, "maker": place, "options": dict(options)}
    job |= {"limits": asdict(limits), "path": sys.path, "parent": os.getpid()}
    (folder / "work.json").write_text(json.dumps(job), encoding="utf-8")
    threads = {f"{lib}_NUM_THREADS": str(limits.threads) for lib in ("OMP", "OPENBLAS", "MKL")}
    with (folder / "training.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **threads},
            start_new_session=True,
        )
        reader = threading.Thread(target=_hear, args=(process, progress), daemon=True)
        reader.start()
        try:
            _watch(process, name, limits, stop)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started too
            process.wait()
            reader.join(1)
            assert process.stdout is not None
            process.stdout.close()
    return _result(name, folder, process.returncode)


def _watch(process: subprocess.Popen[bytes], name: str, limits: Limits, stop: threading.Event) -> None:
    ends = time.monotonic() + limits.minutes * 60
    while process.poll() is None:
        if stop.wait(_LOOK):
            raise TrainerFailed(f"the trainer '{name}' was stopped")
        if time.monotonic() > ends:
            raise TrainerFailed(f"the trainer '{name}' took longer than its {limits.minutes:g} minutes")
        used = _resident_mb(process.pid)
        if used > limits.memory_mb:
            raise TrainerFailed(
                f"the trainer '{name}' took {used:.0f} MB of memory, and may take {limits.memory_mb}"
            )


def _resident_mb(pid: int) -> float:
    """Resident memory, where the system tells it in /proc; else 0."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _hear(process: subprocess.Popen[bytes], progress: Progress) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            said = json.loads(line)
            progress(min(max(float(said["share"]), 0.0), 1.0), str(said["what"])[:200])


def _result(name: str, folder: Path, code: int) -> Trained:
    failed = folder / "failed.json"
    if code == 0 and (folder / "trained.json").exists():
        return Trained.load(folder)
    if failed.exists():
        with contextlib.suppress(OSError, ValueError, KeyError):
            raise TrainerFailed(json.loads(failed.read_text(encoding="utf-8"))["error"])
    said = (folder / "training.log").read_text(encoding="utf-8", errors="replace")[-_TOLD:].strip()
    last = said.splitlines()[-1] if said else "it said nothing"
    raise TrainerFailed(f"the trainer '{name}' ended with code {code}: {last} ({folder / 'training.log'})")


def _end_with(parent: int) -> None:
    """End this process, and what it started, when the one that holds it to its limits is gone."""
    while os.getppid() == parent:
        threading.Event().wait(_ORPHAN_LOOK)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """The process that trains."""
    folder = Path(sys.argv[1])
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    job = json.loads((folder / "work.json").read_text(encoding="utf-8"))
    threading.Thread(target=_end_with, args=(job["parent"],), daemon=True).start()
    sys.path[:] = job["path"]
    # What libraries print must not be taken for progress.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def progress(share: float, what: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            out.write(json.dumps({"share": share, "what": what}) + "\n")

    try:
        maker: Any = importlib.import_module(job["module"])
        for part in job["maker"].split("."):
            maker = getattr(maker, part)
        trainer = maker(job["options"])
        dataset = Dataset.load(folder / "data")
        trainer.fit(dataset, folder, progress, Limits(**job["limits"])).save()
    except ChainwaxError as error:
        (folder / "failed.json").write_text(json.dumps({"error": str(error)}), encoding="utf-8")
        sys.exit(1)
