"""Who may ask how much of each model, where many processes share its slots and its minute.

A :class:`Hub` is plain state: whoever keeps it (one process, the one that watches over several, or Redis)
calls :meth:`Hub.exchange` for each process that reports.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["LEASE", "NEVER", "Ask", "Bucket", "Hub", "Lent"]

LEASE = 15.0
"""Seconds after which what a process holds that was not heard of is lent to others."""
TURN = 2.0
"""Seconds until the slots that cannot be shared out evenly go to the next process."""
NEVER = 1e9
"""Seconds: nothing is lacking. A number that JSON has."""
AGAIN = 0.1
"""Seconds after which a process that got less than it wants asks again."""
GUESSED_TOKENS = 264.0
"""Tokens of a request before the first was answered."""
REMEMBERED = 1000
"""Requests that the mean number of tokens is taken over."""


@dataclass(slots=True)
class Ask:
    """What a process wants of one model."""

    slots: int | None = None
    """Of the whole model; None where this process does not know."""
    floor: int = 0
    """Requests in flight: it will not have more until it hears."""
    want: int = 0
    """Slots that it could use."""
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    permits: int = 0
    """Requests that wait for nothing but the minute."""
    spare: int = 0
    """Permits that it gives back."""
    answered: int = 0
    """Requests that have ended, since it began."""
    tokens: int = 0
    """Tokens that they took, in and out."""


@dataclass(slots=True)
class Lent:
    """What a process gets of one model."""

    slots: int
    """In flight at once, until it hears anew."""
    permits: int
    """Requests more; only told where the model has so many a minute."""
    again_s: float
    """Seconds after which it may ask for what is lacking."""


@dataclass(slots=True)
class Bucket:
    """At most ``per_minute`` in any 60 seconds: a tenth of them at once, the others as time passes.

    >>> bucket = Bucket(60.0)
    >>> sum(bucket.take(now / 10) for now in range(600))
    60
    """

    per_minute: float
    level: float = -1.0
    at: float = 0.0

    def __post_init__(self) -> None:
        if self.level < 0 and not self.at:
            self.level = self.most if self.per_minute >= 1 else 0.0

    @property
    def most(self) -> float:
        """What it holds."""
        return max(1.0, self.per_minute // 10)

    @property
    def rate(self) -> float:
        """What flows in each second: whoever empties it has had a tenth already."""
        return (self.per_minute - self.most + 1.0) / 60.0 if self.per_minute >= 1 else self.per_minute / 60.0

    def fill(self, now: float) -> None:
        """Let flow in what has come since."""
        if self.at:
            self.level = min(self.most, self.level + max(0.0, now - self.at) * self.rate)
        self.at = now

    def take(self, now: float) -> bool:
        """Take one, where there is one."""
        self.fill(now)
        if self.level < 1.0 - 1e-9:
            return False
        self.level -= 1.0
        return True


@dataclass(slots=True)
class _Held:
    """What one process has of one model."""

    slots: int = 0
    want: int = 0
    answered: int = 0
    tokens: int = 0
    open: int = 0
    """Permits whose requests have not ended."""
    charged: float = 0.0
    """Tokens taken for them."""


@dataclass(slots=True)
class _Pool:
    """One model."""

    slots: int = 16
    by: dict[str, _Held] = field(default_factory=dict)
    requests: Bucket | None = None
    tokens: Bucket | None = None
    count: float = 1.0
    sum: float = GUESSED_TOKENS

    def lend(self, process: str, ask: Ask, now: float) -> Lent:
        if ask.slots is not None:
            self.slots = ask.slots
        mine = self.by.setdefault(process, _Held())
        mine.want = max(ask.want, ask.floor)
        others = sum(held.slots for name, held in self.by.items() if name != process)
        granted = max(0, min(self._fair(now)[process], self.slots - others))
        # What is in flight cannot be called back: it stays the process's own until it says that it ended.
        mine.slots = max(granted, ask.floor)
        self._settle(mine, ask, now)
        permits, again = self._permits(mine, ask, now)
        return Lent(granted, permits, min(AGAIN, again) if granted < mine.want else again)

    def _fair(self, now: float) -> dict[str, int]:
        """Slots for each process: what it wants, where there are enough, else as many as others get."""
        names = sorted(self.by)
        shares = dict.fromkeys(names, 0)
        first = int(now / TURN) % len(names)
        wanting = [name for name in names[first:] + names[:first] if self.by[name].want]
        left = self.slots
        while left > 0 and wanting:
            each = left // len(wanting)
            for name in wanting if each else wanting[:left]:
                more = min(max(each, 1), self.by[name].want - shares[name])
                shares[name] += more
                left -= more
            if not each:
                break
            wanting = [name for name in wanting if shares[name] < self.by[name].want]
        return shares

    def _settle(self, mine: _Held, ask: Ask, now: float) -> None:
        """Take note of what requests took in the end."""
        self.requests = _configured(self.requests, ask.requests_per_minute, now)
        self.tokens = _configured(self.tokens, ask.tokens_per_minute, now)
        if self.requests is not None:
            self.requests.level = min(self.requests.most, self.requests.level + ask.spare)
        answered, tokens = ask.answered - mine.answered, ask.tokens - mine.tokens
        mine.answered, mine.tokens = ask.answered, ask.tokens
        self.count += answered
        self.sum += tokens
        if self.count > REMEMBERED:
            self.count, self.sum = self.count / 2, self.sum / 2
        ended = min(answered + ask.spare, mine.open)
        if ended <= 0:
            back = 0.0
        else:
            back = mine.charged * ended / mine.open
            mine.open -= ended
            mine.charged -= back
        if self.tokens is not None:
            self.tokens.level = min(self.tokens.most, self.tokens.level + back - tokens)

    def _permits(self, mine: _Held, ask: Ask, now: float) -> tuple[int, float]:
        """How many requests may go now, and in how many seconds the next one may."""
        wanted = ask.permits
        if self.requests is None and self.tokens is None:
            return wanted, NEVER
        # One that wants many must not leave none for the others.
        wanting = max(1, sum(1 for held in self.by.values() if held.want))
        given, again = wanted, 0.0
        if self.requests is not None:
            given = min(given, math.ceil(math.floor(self.requests.level + 1e-9) / wanting))
            again = max(again, (1.0 - self.requests.level) / self.requests.rate)
        mean = self.sum / self.count
        if self.tokens is not None:
            # A request larger than what the bucket ever holds goes when it is full.
            needed = min(mean, self.tokens.most)
            given = min(given, math.ceil(math.floor(self.tokens.level / needed + 1e-9) / wanting))
            again = max(again, (needed - self.tokens.level) / self.tokens.rate)
        given = max(0, given)
        if self.requests is not None:
            self.requests.level -= given
        if self.tokens is not None:
            self.tokens.level -= given * mean
            mine.charged += given * mean
        mine.open += given
        return given, NEVER if given == wanted else max(again, 0.005)


def _configured(bucket: Bucket | None, per_minute: float | None, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None or bucket.per_minute != per_minute:
        bucket = Bucket(per_minute)
    bucket.fill(now)
    return bucket


@dataclass(slots=True)
class Hub:
    """All models. Its fields are JSON-ready; times are whatever clock ``now`` is of, in seconds above 0."""

    pools: dict[str, _Pool] = field(default_factory=dict)
    heard: dict[str, float] = field(default_factory=dict)

    def exchange(self, process: str, asks: dict[str, Ask], now: float) -> dict[str, Lent]:
        """Take note of what a process says, and say what it may have of each model that it names.

        At no time do all processes together have more slots than there are, as long as each keeps to what it
        is told: at most ``floor`` in flight from the moment that it asks, ``Lent.slots`` once it hears.
        """
        for silent in [name for name, at in self.heard.items() if now - at > LEASE]:
            self.forget(silent)
        self.heard[process] = now
        return {
            name: self.pools.setdefault(name, _Pool()).lend(process, ask, now) for name, ask in asks.items()
        }

    def forget(self, process: str) -> None:
        """A process is gone: what it held is there for the others."""
        self.heard.pop(process, None)
        for pool in self.pools.values():
            pool.by.pop(process, None)
