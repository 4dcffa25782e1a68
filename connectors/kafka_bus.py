"""The feedback bus over Kafka: whatever any process or program says reaches the router of every process."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from kafka.errors import KafkaError
from pydantic_core import to_json

from chainwax.connectors.bus_ledger import Ledger, Parked
from chainwax.connectors.bus_reader import TopicReader, records_of
from chainwax.connectors.bus_topics import Topics
from chainwax.connectors.bus_writer import Message, TopicWriter
from chainwax.connectors.kafka.servers import KafkaServers, reason_of
from chainwax.connectors.wire import (
    SHOWN_CHARS,
    CallsMessage,
    ControlMessage,
    DeadLetterMessage,
    FeedbackMessage,
    Unreadable,
    decode,
    encode_calls,
    encode_decision,
    encode_feedback,
)
from chainwax.router.control import Change
from chainwax.router.errors import ConfigError
from chainwax.router.feedback import Learn, LookUp, Told
from chainwax.router.types import CallRef, CallResult, Decision, Feedback, Query

__all__ = ["KafkaBus"]

log = logging.getLogger(__name__)
# Its log repeats itself many times a second while a broker is away; whoever wants it configures a handler.
logging.getLogger("kafka").addHandler(logging.NullHandler())

_CALLS_AT_ONCE = 200
_CLOSE_S = 10.0
_OLD_LETTERS = 1000
"""Unusable messages from before the start that are looked at again: did anybody tell of them?"""


class KafkaBus:
    """Carries feedback, announced calls and decisions over the topics of ``topics``.

    >>> bus = KafkaBus("127.0.0.1:9092", flow="triage")
    >>> bus.publish([Feedback("route", 1.0, item_key="ticket-7", source="agent")])  # doctest: +SKIP

    A router hears what its own process publishes from the topic too, and from nowhere else: every router then
    learns the same in the same order. :meth:`publish`, :meth:`announce` and :meth:`called` return at once,
    whether Kafka is there or not; :meth:`catch_up` begins to read. A program that only has something to say
    never needs it.

    ``flow`` is the flow that this process runs: feedback about another is passed over. ``patience`` is how
    many seconds catching up may stand still.
    """

    def __init__(
        self,
        servers: str | KafkaServers | None = None,
        *,
        flow: str,
        topics: Topics | None = None,
        patience: float = 30.0,
    ) -> None:
        self.topics = topics or Topics()
        self._flow = flow
        self._servers = servers if isinstance(servers, KafkaServers) else KafkaServers(servers)
        self._servers.client()  # what cannot work is told now
        self._ledger = Ledger(flow)
        self._counts: Counter[str] = Counter()
        self._old: list[DeadLetterMessage] = []
        self._learners: tuple[Learn, ...] = ()
        self._recall: Learn | None = None
        self._told: Told | None = None
        self._patience = patience
        self._wanted: SimpleQueue[Callable[[Mapping[str, Any]], None]] = SimpleQueue()
        self._writer = TopicWriter(self._servers, self.topics, self._messages)
        self._reader = TopicReader(self._servers, self.topics, self._handle)
        self._lock = threading.Lock()
        self._closed = False

    # -- from this process ----------------------------------------------------------------------

    def publish(self, feedback: Sequence[Feedback]) -> None:
        """Send feedback on. Called from any thread."""
        self._writer.put(list(feedback))

    def announce(self, decision: Decision) -> None:
        """Tell the world of a decision of the router."""
        self._writer.put([decision])

    def called(self, run: str, query: Query, result: CallResult) -> None:
        """Tell the others of an answered call, so that feedback may name it by its id alone."""
        arm = result.arm.key if result.arm is not None else ""
        fields = {"call_id": query.call_id, "node": query.node.id, "arm": arm, "time": time.time()}
        if query.item_key and len(query.item_key) <= 4000:
            fields["item_key"] = query.item_key
        if result.cost_usd:
            fields["cost_usd"] = result.cost_usd
        if result.simulated:
            fields["simulated"] = True
        if query.context:
            fields["context"] = query.context
        self._writer.put([(query.node.flow, run, fields)])

    def _messages(self, things: list[Any]) -> list[Message]:
        out: list[Message] = []
        calls: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for thing in things:
            if type(thing) is tuple:
                flow, run, fields = thing
                calls.setdefault((flow, run), []).append(fields)
                continue
            try:
                out.append(thing if type(thing) is Message else self._message(thing))
            except Unreadable as error:
                if not self._counts["unsendable"]:
                    log.warning(
                        "feedback bus: what is said of node '%s' cannot be sent: %s", thing.node, error
                    )
                self._counts["unsendable"] += 1
        announced: list[Message] = []
        for (flow, run), lines in calls.items():
            for at in range(0, len(lines), _CALLS_AT_ONCE):
                some = lines[at : at + _CALLS_AT_ONCE]
                announced.append(
                    Message(self.topics.calls, _key(run), encode_calls(flow, run, some), len(some))
                )
        # Calls first, for feedback may name them.
        return announced + out

    def _message(self, thing: Feedback | Decision) -> Message:
        if isinstance(thing, Decision):
            raw = encode_decision(thing, self._flow)
            return Message(self.topics.decisions, _key(thing.node), raw, 1)
        raw, whole = encode_feedback(thing, self._flow)
        if not whole:
            log.warning("the correction of a score of node '%s' cannot be sent whole", thing.node)
        # What is about one call stays in order, however many partitions there are.
        key = _key(thing.call_id or f"{thing.node}/{thing.item_key}")
        return Message(self.topics.feedback, key, raw, 1)

    # -- to this process ------------------------------------------------------------------------

    def subscribe(self, learn: Learn) -> None:
        """Have ``learn`` called with all feedback that comes after :meth:`catch_up` has begun."""
        with self._lock:
            self._learners += (learn,)

    def look_up_with(self, look_up: LookUp) -> None:
        """Ask this of calls that nobody announced; it is called on the bus's own thread."""

        def guarded(call_id: str, node: str, item_key: str) -> CallRef | None:
            try:
                return look_up(call_id, node, item_key)
            except Exception as error:  # a recording that cannot be read must not stop the bus
                log.warning("feedback bus: call '%s' cannot be looked up: %s", call_id, error)
                return None

        self._ledger.look_up = guarded

    def control_with(self, told: Told) -> None:
        """Have ``told`` called with what operators change; it is called on the bus's own thread."""
        self._told = told

    def catch_up(self, recall: Learn) -> None:
        """Begin to read; returns when ``recall`` was called with all that was said before.

        Raises ConfigError, with the reason, where reading stands still.
        """
        self._recall = recall
        self._reader.catch_up(self._patience)

    def stand(self, take: Callable[[Mapping[str, Any]], None]) -> None:
        """Have ``take`` called with where it stands; on its own thread while it reads."""
        if self._reader.alive:
            self._wanted.put(take)
        else:
            take(self._where())

    def go_on_from(self, where: Mapping[str, Any]) -> bool:
        """Stand there again, before it begins to read; False where the topic is another one by now."""
        if not self._reader.go_on_from(where["positions"]):
            return False
        self._ledger.restore(where["ledger"])
        return True

    def _where(self) -> dict[str, Any]:
        return {"positions": self._reader.positions, "ledger": self._ledger.state()}

    def flush(self, timeout: float) -> bool:
        """Wait until all that was published is written, and has come back; False where it has not."""
        until = time.monotonic() + timeout
        if not self._writer.flush(until):
            return False
        if not self._reader.started:
            return True
        for (topic, partition), offset in list(self._writer.reached.items()):
            if topic not in (self.topics.feedback, self.topics.calls):
                continue
            while not self._reader.passed(topic, partition, offset):
                if time.monotonic() >= until:
                    return False
                time.sleep(0.002)
        return True

    def close(self) -> None:
        """Write what is left and hear it, within 10 seconds, and stop."""
        if self._closed:
            return
        self._closed = True
        until = time.monotonic() + _CLOSE_S
        self.flush(_CLOSE_S)
        self._reader.close()
        self._writer.close(until)

    def snapshot(self) -> dict[str, Any]:
        """What came, what became of it, and what waits; JSON-ready."""
        counts: Counter[str] = Counter(_COUNTED)
        counts.update(self._ledger.counts)
        counts.update(self._counts)
        counts.update(self._writer.counts)
        counts["outages"] += self._reader.outages
        return {
            "topic": self.topics.feedback,
            **counts,
            "to_write": self._writer.waiting,
            "waiting_for_call": self._ledger.waiting,
        }

    # -- on the reader's thread -----------------------------------------------------------------

    def _handle(self, records: Sequence[Any], live: bool) -> None:
        ledger = self._ledger
        if live and self._old:
            self._tell_old()
        feedback: list[Feedback] = []
        unknown: list[Parked] = []
        now = time.time()
        for record in records:
            at = record.timestamp / 1000
            raw = record.value
            if not live:
                now = at
            try:
                if record.topic == self.topics.calls:
                    feedback += ledger.calls(decode(CallsMessage, raw))
                elif record.topic == self.topics.control:
                    self._control(decode(ControlMessage, raw).change, at, live)
                else:
                    message = decode(FeedbackMessage, raw)
                    place = f"{record.topic}:{record.partition}:{record.offset}"
                    feedback += ledger.feedback(message, at=at, place=place, size=len(raw), now=now)
            except Unreadable as error:
                self._unreadable(record, error, live)
            except Exception as error:  # else it would be read again and again
                log.exception("feedback bus: a message of '%s' cannot be handled", record.topic)
                self._unreadable(record, Unreadable("malformed", repr(error)), live)
            if not live and ledger.waiting:
                found, lost = ledger.overdue(now)
                feedback += found
                unknown += lost
        if ledger.waiting and live:
            found, unknown = ledger.overdue(now)
            feedback += found
        self._tell_unknown(unknown, live)
        if feedback:
            self._tell(feedback, live)
        while live and not records and not self._wanted.empty():
            self._wanted.get()(self._where())

    def _control(self, change: Change, at: float, live: bool) -> None:
        if change.flow != self._flow:
            self._counts["other_flow"] += 1
            return
        self._counts["controls"] += 1
        if self._told is not None:
            self._told([replace(change, time=at)], live)

    def _tell(self, feedback: list[Feedback], live: bool) -> None:
        learners = self._learners if live or self._recall is None else (self._recall,)
        for learn in learners:
            try:
                learn(feedback)
            except Exception:
                log.exception("a listener of the feedback bus failed")

    def _unreadable(self, record: Any, error: Unreadable, live: bool) -> None:
        place = f"{record.topic}:{record.partition}:{record.offset}"
        if not self._counts[error.reason]:
            log.warning("feedback bus: the message at %s is %s: %s", place, error.reason, error)
        self._counts[error.reason] += 1
        self._letter(place, error.reason, str(error), record.value or b"", live)

    def _tell_unknown(self, unknown: list[Parked], live: bool) -> None:
        for one in unknown:
            message = one.message
            what = f"call '{message.call_id}'" if message.call_id else f"item '{message.item_key}'"
            error = f"nobody knows the {what[:200]}"
            self._letter(one.place, "unknown_call", error, to_json(message), live)

    def _letter(self, place: str, reason: str, error: str, raw: bytes, live: bool) -> None:
        shown = raw[: 4 * SHOWN_CHARS].decode("utf-8", "backslashreplace")[:SHOWN_CHARS]
        letter = DeadLetterMessage(
            flow=self._flow,
            place=place,
            reason=reason,
            error=error,
            value=shown,
            size=len(raw),
            time=time.time(),
        )
        if live:
            self._send_letters([letter])
        elif len(self._old) < _OLD_LETTERS:
            self._old.append(letter)

    def _send_letters(self, letters: Sequence[DeadLetterMessage]) -> None:
        # Every process that hears a message says so: the key tells that it is the same.
        topic = self.topics.dead_letters
        self._writer.put([Message(topic, _key(letter.place), letter.encoded(), 1) for letter in letters])

    def _tell_old(self) -> None:
        """Write the letters that nobody wrote while these messages were new."""
        letters, self._old = self._old, []
        try:
            told = {one.key for one in records_of(self._servers, self.topics.dead_letters)}
        except (KafkaError, ConfigError, OSError) as error:
            log.warning("feedback bus: the dead letters cannot be read: %s", reason_of(error))
            told = set()
        self._send_letters([letter for letter in letters if _key(letter.place) not in told])


_COUNTED = dict.fromkeys(
    (
        *("received", "passed_on", "late", "duplicate", "out_of_order", "revised", "waited", "unknown_call"),
        *("controls", "other_flow", "malformed", "unknown_version", "huge", "unsendable"),
        *("written", "lost", "tried_again", "outages"),
    ),
    0,
)


def _key(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")
