"""What the router wants of a recording, and the recording that keeps nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from chainwax.router.recording.rows import DeadLetter, Learned, RecordedCall
from chainwax.router.types import Attempt, CallRef, CallResult, Decision, Feedback, Query

__all__ = ["NoRecording", "Recording"]


class Recording(Protocol):
    """Where calls, attempts and feedback are kept. All methods may be called from any thread.

    What is handed over must not be changed afterwards: rows are made from it later, on another thread.
    """

    @property
    def failed(self) -> str | None:
        """Why rows cannot be written now; None where all is well."""
        ...

    @property
    def fatal(self) -> bool:
        """Whether rows are lost by now, so that a run had better stop."""
        ...

    def open_run(self, run_id: str, flow: str, config: Mapping[str, Any]) -> bool:
        """Begin or resume a run, to which all that follows belongs; whether it was there before."""
        ...

    def close_run(self, run_id: str, status: str) -> None:
        """Say how a run ended: ``finished``, ``stopped`` or ``failed``."""
        ...

    def snapshot(self, run_id: str, snapshot: Mapping[str, Any]) -> None:
        """Keep what the recorders of a run say now, for other processes to read."""
        ...

    def attempt(self, query: Query, attempt: Attempt) -> None:
        """Record an attempt that does not end its call."""
        ...

    def result(self, query: Query, result: CallResult, on_durable: Callable[[], None] | None = None) -> None:
        """Record the end of a call with its attempts; those that are there already stay as they are.

        ``on_durable`` is called once the rows are durable, or once it is clear that they must wait in
        memory: a result never hangs on a disk.
        """
        ...

    def find(self, call_ids: Sequence[str]) -> dict[str, RecordedCall]:
        """What is recorded of calls: on a resumed run, what need not be asked again."""
        ...

    def spent(self, run_id: str) -> dict[str, float]:
        """Dollars that a run has paid by now, by node."""
        ...

    def find_content(self, keys: Sequence[str]) -> dict[str, Attempt]:
        """Answers of any run by content key."""
        ...

    def feedback(self, feedback: Sequence[Feedback]) -> None:
        """Record scores; the same metric of the same source about the same call is revised."""
        ...

    def decision(self, decision: Decision) -> None:
        """Record what was decided."""
        ...

    def dead_letters(self, rows: Sequence[DeadLetter]) -> None:
        """Record items that could not be handled."""
        ...

    def items(self, source: str, rows: Sequence[tuple[str, str, float | None, Any]]) -> None:
        """Record items of a source as (position, key, time, value); what is there already stays."""
        ...

    def fold(self, flow: str, node: str | None = None) -> Iterator[Learned]:
        """All scores of a flow, or of one node of it, in the order of their time."""
        ...

    def ref_of(self, call_id: str) -> CallRef | None:
        """An answered call: its node, its arm's key, its context."""
        ...

    def latest_call(self, node: str, item_key: str) -> str | None:
        """The id of the call that a node made last about an item key."""
        ...

    def controls(self, flow: str) -> Sequence[Mapping[str, Any]]:
        """What operators changed of a flow while it runs, in the order in which they said it."""
        ...

    def keep_state(self, flow: str, state: str) -> None:
        """Keep what the routers of a flow know, in place of what was kept before."""
        ...

    def kept_state(self, flow: str) -> str | None:
        """What was kept last."""
        ...

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was handed over is durable; False where it is not in ``timeout`` seconds."""
        ...

    def close(self) -> None:
        """Write what is left and close; raises where rows are missing."""
        ...


class NoRecording:
    """Keeps nothing: for ``recording = None``. After a crash nothing is known."""

    failed: str | None = None
    fatal: bool = False

    def open_run(self, run_id: str, flow: str, config: Mapping[str, Any]) -> bool:
        """Every run is a new one."""
        return False

    def close_run(self, run_id: str, status: str) -> None:
        """Nothing to close."""

    def snapshot(self, run_id: str, snapshot: Mapping[str, Any]) -> None:
        """Not kept."""

    def attempt(self, query: Query, attempt: Attempt) -> None:
        """Not kept."""

    def result(self, query: Query, result: CallResult, on_durable: Callable[[], None] | None = None) -> None:
        """Not kept; ``on_durable`` is called at once."""
        if on_durable is not None:
            on_durable()

    def find(self, call_ids: Sequence[str]) -> dict[str, RecordedCall]:
        """Nothing is found."""
        return {}

    def spent(self, run_id: str) -> dict[str, float]:
        """Nothing is known."""
        return {}

    def find_content(self, keys: Sequence[str]) -> dict[str, Attempt]:
        """Nothing is found."""
        return {}

    def feedback(self, feedback: Sequence[Feedback]) -> None:
        """Not kept."""

    def decision(self, decision: Decision) -> None:
        """Not kept."""

    def dead_letters(self, rows: Sequence[DeadLetter]) -> None:
        """Not kept."""

    def items(self, source: str, rows: Sequence[tuple[str, str, float | None, Any]]) -> None:
        """Not kept."""

    def fold(self, flow: str, node: str | None = None) -> Iterator[Learned]:
        """Nothing was learned."""
        return iter(())

    def ref_of(self, call_id: str) -> CallRef | None:
        """Nothing is known."""
        return None

    def latest_call(self, node: str, item_key: str) -> str | None:
        """Nothing is known."""
        return None

    def controls(self, flow: str) -> Sequence[Mapping[str, Any]]:
        """Nobody can say anything."""
        return ()

    def keep_state(self, flow: str, state: str) -> None:
        """Not kept."""

    def kept_state(self, flow: str) -> str | None:
        """Nothing was kept."""
        return None

    def flush(self, timeout: float | None = None) -> bool:
        """Nothing to wait for."""
        return True

    def close(self) -> None:
        """Nothing to close."""
