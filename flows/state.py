"""The folder of ``--state``: where a run stands, so that the next start goes on with it.

It holds Bytewax's recovery store, ``run.json``, which says which run that is and how it is bound, and a
lock that keeps a second process out.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from bytewax.recovery import RecoveryConfig, init_db_dir

from chainwax.router.errors import ConfigError

__all__ = ["RunState", "recovery_from"]


def recovery_from(store: Path) -> RecoveryConfig:
    """What Bytewax wants to know of a recovery store."""
    return RecoveryConfig(store, timedelta(0))


class RunState:
    """One state folder, locked for as long as this object is open.

    ``bound`` is what must be the same when the run goes on: the flow's name, what its sources and sinks
    are, where the recording is. A new store has ``parts`` parts, so that as many processes can write to it;
    with fewer or more it still works. ``part`` is the only one that is kept here, where the others are on
    other machines.

    Raises :class:`ConfigError` where the folder is in use, holds a finished run, or one that is bound to
    something else.
    """

    def __init__(
        self,
        folder: Path,
        bound: Mapping[str, Any],
        *,
        run_id: str | None,
        fresh: bool = False,
        parts: int = 1,
        part: int | None = None,
    ) -> None:
        self.folder = folder
        self.run_id = run_id
        """Of the run to go on with; else what was given."""
        self.resumed = False
        self.finished = False
        """Whether the run that is asked for by its id is finished: there is nothing to do."""
        self._file = folder / "run.json"
        self.store = folder / "recovery"
        """Bytewax's part of it."""
        self._bound = dict(bound)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / "lock").open("w")
        except OSError as error:
            raise ConfigError(f"--state {folder}: cannot be used: {error.strerror}") from None
        try:
            self._lock_it()
            if fresh:
                self._wipe()
            self._go_on(self._read(), run_id)
            if not self.store.is_dir():
                self.store.mkdir()
                init_db_dir(self.store, parts)
                for file in self.store.glob("part-*.sqlite3*"):
                    if part is not None and file.name.split(".")[0] != f"part-{part}":
                        file.unlink()
        except BaseException:
            self._lock.close()
            raise

    @property
    def recovery(self) -> RecoveryConfig:
        """For Bytewax."""
        return recovery_from(self.store)

    def epoch(self) -> int:
        """How far the recovery store has come: it grows with each epoch that is closed."""
        newest = 0
        for part in self.store.glob("part-*.sqlite3"):
            # Bytewax has no way to ask; where another version of it keeps this elsewhere, nothing is known.
            with (
                suppress(sqlite3.Error),
                closing(sqlite3.connect(f"{part.absolute().as_uri()}?mode=ro", uri=True)) as db,
            ):
                ((found,),) = db.execute("SELECT max(worker_frontier) FROM fronts").fetchall()
                newest = max(newest, found or 0)
        return newest

    def begin(self, run_id: str) -> None:
        """Note that the run runs: whatever happens now, it is resumed."""
        self._write(run_id, "running")
        self.run_id = run_id

    def end(self, status: str) -> None:
        """Note how it ended; ``finished`` is the only one that is not resumed."""
        assert self.run_id is not None
        self._write(self.run_id, status)

    @property
    def lock(self) -> int:
        """The lock's file descriptor: a process that inherits it keeps others out while it lives."""
        return self._lock.fileno()

    def close(self) -> None:
        """Let others in."""
        self._lock.close()

    def _lock_it(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"--state {self.folder}: another run is using it now") from None

    def _wipe(self) -> None:
        self._file.unlink(missing_ok=True)
        self._wipe_store()

    def _wipe_store(self) -> None:
        # Only what is ours: the folder may have been named by mistake.
        for file in self.store.glob("part-*.sqlite3*"):
            file.unlink()
        if self.store.is_dir():
            try:
                self.store.rmdir()
            except OSError:
                raise ConfigError(f"{self.store}: holds files that are no recovery store's") from None

    def _go_on(self, known: dict[str, Any] | None, run_id: str | None) -> None:
        if known is None:
            # The store of a run that died before it began.
            self._wipe_store()
            return
        run = known["run"]
        self.finished = known["status"] == "finished" and run_id == run
        if known["status"] == "finished" and not self.finished:
            raise ConfigError(
                f"--state {self.folder}: run {run} is finished: add --fresh to begin a new one in its place"
            )
        if run_id is not None and run_id != run:
            raise ConfigError(
                f"--state {self.folder}: run {run} is unfinished, and --run-id says {run_id}: leave it out "
                "to go on, or add --fresh to begin a new one"
            )
        for name, value in self._bound.items():
            if known["bound"].get(name) != value:
                raise ConfigError(
                    f"--state {self.folder}: run {run} is {self._how()} and has {name} "
                    f"{_shown(known['bound'].get(name))}, not {_shown(value)}: put it back to go on, or add "
                    "--fresh to begin a new one"
                )
        self.run_id = run
        self.resumed = not self.finished

    def _how(self) -> str:
        return "finished" if self.finished else "unfinished"

    def _read(self) -> dict[str, Any] | None:
        try:
            known = json.loads(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self._file}: cannot be read: {error}; --fresh begins anew") from None
        if not (
            isinstance(known, dict)
            and isinstance(known.get("run"), str)
            and isinstance(known.get("status"), str)
            and isinstance(known.get("bound"), dict)
        ):
            raise ConfigError(f"{self._file}: is not what chainwax writes; --fresh begins anew")
        return known

    def _write(self, run_id: str, status: str) -> None:
        content = {
            "run": run_id,
            "status": status,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "bound": self._bound,
        }
        part = self._file.with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._file)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={uri}" for name, uri in value.items()) or "none"
    return f"'{value}'"
