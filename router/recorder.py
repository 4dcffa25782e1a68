"""What the recorders know of a model and of an interface: the last minute, the last hour, the uptime.

An :class:`LLMRecorder` belongs to one instance and counts attempts; an :class:`LLMInterfaceRecorder`
belongs to one interface and counts queries. Both keep a ring of slots (12 of 5 s, 60 of a minute) and a
total, so that nothing grows with history. The loop's thread writes; any thread may read.

Windows are as fine as their slots: "the last minute" covers the last 55 to 60 seconds, "the last hour" the
last 59 to 60 minutes.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ddsketch import LogCollapsingLowestDenseDDSketch

from chainwax.router.clock import SYSTEM_CLOCK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from chainwax.router.clock import Clock
    from chainwax.router.types import Attempt, CallResult

__all__ = ["LLMInterfaceRecorder", "LLMRecorder", "wilson"]

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
ACCURACY = 0.01
"""Largest relative error of a quantile."""
BUCKETS = tuple(0.01 * 2.0**n for n in range(14))
"""Seconds: the bounds of ``gen_ai.client.operation.duration`` in OpenTelemetry's GenAI conventions."""

_SLOT = 5.0  # seconds
_SLOTS = 12
_MINUTES = 60
_NAMES = 200  # different arms or classes of errors counted by name; the rest together


def wilson(successes: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share; ``z`` 1.96 is 95 %.

    ``successes`` may be a sum of scores in [0, 1], which makes the interval a cautious one for their mean.
    Without any observation nothing is known: (0, 1).

    >>> tuple(round(bound, 3) for bound in wilson(9, 10))
    (0.596, 0.982)
    """
    if n < 1e-9:  # what weighs next to nothing; squared below, it would vanish
        return 0.0, 1.0
    share = min(max(successes / n, 0.0), 1.0)
    z2 = z * z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


class _Durations:
    """Durations in seconds, as a sketch that answers quantiles."""

    __slots__ = ("sketch",)

    def __init__(self) -> None:
        # The number of bins is limited, so that a hostile spread of values cannot take the memory.
        self.sketch = LogCollapsingLowestDenseDDSketch(ACCURACY, bin_limit=1024)

    def add(self, seconds: float) -> None:
        if 0.0 <= seconds < 1e9:  # neither NaN nor infinite, which the sketch cannot hold
            self.sketch.add(seconds)

    def merge(self, other: _Durations) -> None:
        self.sketch.merge(other.sketch)

    def report(self) -> dict[str, float | None]:
        sketch = self.sketch
        out: dict[str, float | None] = {
            "count": sketch.count,
            "sum": sketch.sum,
            "mean": sketch.avg if sketch.count else None,
        }
        for name, quantile in QUANTILES.items():
            out[name] = sketch.get_quantile_value(quantile)
        return out

    def buckets(self) -> dict[str, float]:
        """How many were at most so long, for each of :data:`BUCKETS`; a bound is as exact as a quantile."""
        # The sketch has no public way to ask for a rank: a bin holds what lies above the bin before it.
        store, key_of = self.sketch._store, self.sketch._mapping.key
        below = [0.0, *accumulate(store.bins)]
        out = {}
        for bound in BUCKETS:
            bins = min(max(key_of(bound) - store.offset + 1, 0), len(below) - 1)
            out[f"{bound:g}"] = self.sketch._zero_count + below[bins]
        return out


class _Slot(Protocol):
    """What happened in some stretch of time."""

    def merge(self, other: Any) -> None: ...


S = TypeVar("S", bound=_Slot)


class _Windows(Generic[S]):
    """The ring of slots.

    What is new goes into :attr:`open` alone. A closed slot is never written again, so that what closed ones
    come to needs to be reckoned but once until the next one closes.
    """

    def __init__(self, make: Callable[[], S], clock: Clock) -> None:
        self._make = make
        self._clock = clock
        self._born = clock.monotonic()
        self._index = 0  # of the open slot, counted from birth
        self._ends = self._born + _SLOT
        self._closed: deque[tuple[int, S]] = deque(maxlen=_SLOTS)
        self._minutes: deque[tuple[int, S]] = deque(maxlen=_MINUTES)
        self._this_minute = make()  # closed slots of the running minute
        self._total = make()  # all closed slots
        # Of the last minute: sums of closed slots from each up to the newest then, the oldest's last; and the
        # sum of those that closed since.
        self._up_to: list[tuple[int, S]] = []
        self._since = make()
        self._hour = (0, make())  # the minute in which it was reckoned, and what closed minutes come to
        self.lock = threading.Lock()
        self.open = make()

    def roll(self) -> S:
        """The slot to write to now. The caller holds the lock."""
        now = self._clock.monotonic()
        if now >= self._ends:
            self._turn(now)
        return self.open

    def _turn(self, now: float) -> None:
        # However long the gap, this is one step: empty slots are never made, they are just not there.
        index = int((now - self._born) // _SLOT)
        self._closed.append((self._index, self.open))
        self._this_minute.merge(self.open)
        self._total.merge(self.open)
        self._since.merge(self.open)
        minute = self._index // _SLOTS
        if index // _SLOTS != minute:
            self._minutes.append((minute, self._this_minute))
            self._this_minute = self._make()
        self.open = self._make()
        self._index = index
        self._ends = self._born + (index + 1) * _SLOT

    def read(self) -> dict[str, tuple[float, S]]:
        """For each window the seconds that it covers and what happened in it."""
        with self.lock:
            self.roll()
            age = self._clock.monotonic() - self._born
            index = self._index
            minute = index // _SLOTS
            recent = self._merged([*self._last_minute(index), self.open])
            hour = self._merged([self._last_hour(minute), self._this_minute, self.open])
            total = self._merged([self._total, self.open])
        return {
            "minute": (age - max(0, index - _SLOTS + 1) * _SLOT, recent),
            "hour": (age - max(0, minute - _MINUTES + 1) * _SLOT * _SLOTS, hour),
            "uptime": (age, total),
        }

    def _last_hour(self, minute: int) -> S:
        """What its closed minutes come to, where ``minute`` is running: reckoned once in a minute."""
        if self._hour[0] != minute:
            closed = self._merged(slot for at, slot in self._minutes if at > minute - _MINUTES)
            self._hour = (minute, closed)
        return self._hour[1]

    def _last_minute(self, index: int) -> list[S]:
        """What its closed slots come to together, where ``index`` is open.

        Each is added a few times in all, however often that is asked (a queue made of two stacks).
        """
        while self._up_to and self._up_to[-1][0] <= index - _SLOTS:
            self._up_to.pop()
        if not self._up_to:
            come_to, self._since = self._make(), self._make()
            for at, slot in reversed(self._closed):
                if at > index - _SLOTS:
                    come_to = self._merged([come_to, slot])
                    self._up_to.append((at, come_to))
        return [*(slot for _, slot in self._up_to[-1:]), self._since]

    def _merged(self, slots: Iterable[S]) -> S:
        out = self._make()
        for slot in slots:
            out.merge(slot)
        return out


class _AttemptSlot:
    """What an instance did in some stretch of time."""

    __slots__ = (
        "attempts",
        "cached",
        "cost",
        "errors",
        "first_token",
        "input",
        "invalid",
        "latency",
        "output",
        "reused",
        "score_sum",
        "scores",
        "simulated",
    )

    def __init__(self) -> None:
        self.attempts = self.invalid = self.reused = self.simulated = 0
        self.input = self.output = self.cached = 0
        self.cost = 0.0
        self.scores = 0
        self.score_sum = 0.0
        self.errors: Counter[str] = Counter()
        self.latency = _Durations()
        self.first_token = _Durations()

    def merge(self, other: _AttemptSlot) -> None:
        self.attempts += other.attempts
        self.invalid += other.invalid
        self.reused += other.reused
        self.simulated += other.simulated
        self.input += other.input
        self.output += other.output
        self.cached += other.cached
        self.cost += other.cost
        self.scores += other.scores
        self.score_sum += other.score_sum
        _merge_counts(self.errors, other.errors)
        self.latency.merge(other.latency)
        self.first_token.merge(other.first_token)

    def report(self, seconds: float) -> dict[str, Any]:
        low, high = wilson(self.score_sum, self.scores)
        return {
            "seconds": seconds,
            "attempts": self.attempts,
            "reused": self.reused,
            "simulated": self.simulated,
            "errors": sum(self.errors.values()),
            "errors_by_class": dict(self.errors),
            "validation_failures": self.invalid,
            "input_tokens": self.input,
            "output_tokens": self.output,
            "cached_tokens": self.cached,
            "cost_usd": self.cost,
            "latency_s": self.latency.report(),
            "first_token_s": self.first_token.report(),
            "scores": self.scores,
            "score": self.score_sum / self.scores if self.scores else None,
            "score_low": low,
            "score_high": high,
        }


class LLMRecorder:
    """What one instance did: latency, tokens, cost, errors and how good its answers were."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._windows = _Windows(_AttemptSlot, clock)
        self._p95: tuple[float, float | None] = (0.0, None)

    def record(self, attempt: Attempt) -> None:
        """Count one attempt.

        One that was answered from a recording (``reused``) asked nothing of the model: only its number is
        kept. Latency is that of attempts that brought an answer, be it a valid one or not: an error after
        a millisecond would make a broken model look fast.
        """
        windows = self._windows
        with windows.lock:
            slot = windows.roll()
            if attempt.reused:
                slot.reused += 1
                return
            slot.attempts += 1
            usage = attempt.usage
            slot.input += usage.input
            slot.output += usage.output
            slot.cached += usage.cached
            slot.cost += attempt.cost_usd
            if attempt.simulated:
                slot.simulated += 1
            if attempt.invalid:
                slot.invalid += 1
            if attempt.error is not None:
                _count(slot.errors, attempt.error.partition(":")[0])
            if attempt.error is None or attempt.invalid:
                slot.latency.add(attempt.latency_s)
                if attempt.first_token_s is not None:
                    slot.first_token.add(attempt.first_token_s)

    def score(self, value: float) -> None:
        """Count one score in [0, 1] that an answer of this instance got; what is no number is passed over."""
        if not math.isfinite(value):
            return
        with self._windows.lock:
            slot = self._windows.roll()
            slot.scores += 1
            slot.score_sum += min(max(value, 0.0), 1.0)

    def latency_p95(self) -> float | None:
        """Seconds that 95 % of the last minute's answers took at most; None without an answer.

        Looked up anew once a second: it is asked for each call of a node that wants a latency.
        """
        now = self._clock.monotonic()
        if now >= self._p95[0]:
            latency = self._windows.read()["minute"][1].latency.sketch
            self._p95 = (now + 1.0, latency.get_quantile_value(0.95))
        return self._p95[1]

    def snapshot(self) -> dict[str, Any]:
        """JSON-ready: ``minute``, ``hour`` and ``uptime``, each with the same keys.

        ``latency_s`` and ``first_token_s`` hold ``count``, ``sum``, ``mean`` and the quantiles (None without
        a value), those of the uptime also ``buckets``: how many were at most so many seconds. ``score`` is
        the mean with its 95 % interval from ``score_low`` to ``score_high``, ``seconds`` the time covered.
        """
        windows = self._windows.read()
        out = {name: slot.report(seconds) for name, (seconds, slot) in windows.items()}
        uptime = windows["uptime"][1]
        out["uptime"]["latency_s"]["buckets"] = uptime.latency.buckets()
        out["uptime"]["first_token_s"]["buckets"] = uptime.first_token.buckets()
        return out


class _QuerySlot:
    """What an interface did in some stretch of time."""

    __slots__ = ("choices", "errors", "finished", "queries", "reused", "waited")

    def __init__(self) -> None:
        self.queries = self.finished = self.errors = self.reused = 0
        self.choices: Counter[str] = Counter()
        self.waited = _Durations()

    def merge(self, other: _QuerySlot) -> None:
        self.queries += other.queries
        self.finished += other.finished
        self.errors += other.errors
        self.reused += other.reused
        _merge_counts(self.choices, other.choices)
        self.waited.merge(other.waited)

    def report(self, seconds: float) -> dict[str, Any]:
        return {
            "seconds": seconds,
            "queries": self.queries,
            "finished": self.finished,
            "errors": self.errors,
            "reused": self.reused,
            "choices": dict(self.choices),
            "waited_s": self.waited.report(),
        }


class LLMInterfaceRecorder:
    """What went through one interface: queries, choices by arm, waiting time, errors."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._windows = _Windows(_QuerySlot, clock)
        self._in_flight = 0
        self._last_error: dict[str, Any] | None = None

    def submitted(self, n: int = 1) -> None:
        """``n`` queries came in."""
        with self._windows.lock:
            self._windows.roll().queries += n
            self._in_flight += n

    def chosen(self, arm_key: str) -> None:
        """The router chose an arm for a query."""
        with self._windows.lock:
            _count(self._windows.roll().choices, arm_key)

    def finished(self, result: CallResult) -> None:
        """A query was answered, or failed."""
        with self._windows.lock:
            slot = self._windows.roll()
            self._in_flight -= 1
            slot.finished += 1
            slot.waited.add(result.waited_s)
            if result.reused:
                slot.reused += 1
            if result.error is not None:
                slot.errors += 1
                self._last_error = {
                    "error": type(result.error).__name__,
                    "message": str(result.error)[:1000],
                    "node": result.node,
                    "time": self._clock.time(),
                }

    def snapshot(self) -> dict[str, Any]:
        """JSON-ready: ``in_flight``, ``rate_per_s``, ``last_error`` and ``minute``, ``hour``, ``uptime``.

        ``rate_per_s`` counts queries over the last minute; ``last_error`` is None, or has ``error``,
        ``message``, ``node`` and ``time`` of day.
        """
        windows = self._windows.read()
        seconds, minute = windows["minute"]
        out: dict[str, Any] = {
            "in_flight": self._in_flight,
            "rate_per_s": minute.queries / max(seconds, 1.0),
            "last_error": self._last_error,
        }
        for name, (covered, slot) in windows.items():
            out[name] = slot.report(covered)
        out["uptime"]["waited_s"]["buckets"] = windows["uptime"][1].waited.buckets()
        return out


def _count(counts: Counter[str], name: str, n: int = 1) -> None:
    # A server that makes up a new error for each request must not take the memory.
    counts[name if name in counts or len(counts) < _NAMES else "other"] += n


def _merge_counts(counts: Counter[str], other: Counter[str]) -> None:
    for name, n in other.items():
        _count(counts, name, n)
