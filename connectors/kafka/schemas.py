"""Values in a Schema Registry's wire format: a zero byte, the schema's id in four bytes, then the value."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

from chainwax.connectors.kafka.codecs import NotYet
from chainwax.connectors.kafka.registry import Client, NotThere, Refused, Schema, SchemaRegistry, Unreachable
from chainwax.connectors.record import SourceError
from chainwax.router.errors import ConfigError

__all__ = ["SchemaCodec"]

log = logging.getLogger(__name__)

HEAD = 5
"""Bytes before the value."""
WAIT_SECONDS = 0.05
"""How long a record waits for its schema before the worker turns to other things."""
AGAIN_SECONDS = 1.0
"""After so long a registry that did not answer is asked again."""
MISSING_SECONDS = 30.0
"""For so long an id that the registry does not know is not asked for again."""
MAX_ASKED = 1000

Reader = Callable[[bytes], Any]
"""Makes a value of a whole record, head and all."""
Writer = Callable[[Any], bytes]
"""Makes what comes behind the head. Raises TypeError or ValueError."""


class _Asked:
    """A question about an id, answered by a thread of its own: a slow registry must not hold the flow up."""

    def __init__(self, ask: Callable[[], Reader], number: int) -> None:
        self.answer: Future[Reader] = Future()
        self.until: float | None = None
        """When it may be asked again, where the answer was not a schema."""
        self._ask = ask
        threading.Thread(target=self._run, name=f"chainwax-schema-{number}", daemon=True).start()

    def _run(self) -> None:
        try:
            reader = self._ask()
        except Exception as error:
            away = isinstance(error, Unreachable)
            self.until = time.monotonic() + (AGAIN_SECONDS if away else MISSING_SECONDS)
            self.answer.set_exception(error)
        else:
            self.answer.set_result(reader)


class SchemaCodec(ABC):
    """What the formats share: the head, and schemas, each asked for once.

    Reading goes by the id in each record, with the schema that it was written with. Writing goes by a
    subject, ``TOPIC-value`` unless told otherwise: its latest schema as it is when the flow starts, or
    that of a file, which is registered where that is allowed.

    Reading, a record whose schema the registry does not have is a `BadRecord`, as is one that does not fit
    its schema. A registry that does not answer is waited for.
    """

    name: ClassVar[str]
    """The codec's, in a URI."""
    kind: ClassVar[str]
    """The registry's word for it."""
    form: ClassVar[str | None] = None
    """What the registry is asked to give schemas as, where not as they were registered."""

    def __init__(
        self,
        registry: str | SchemaRegistry | None = None,
        *,
        subject: str | None = None,
        schema: str | Path | None = None,
    ) -> None:
        self._registry = registry if isinstance(registry, SchemaRegistry) else SchemaRegistry(registry)
        self._address = self._registry.address
        self._subject = subject
        self._file = schema
        self._client: Client | None = None
        self._readers: dict[int, Reader] = {}
        self._writers: dict[str, tuple[bytes, Writer, str]] = {}
        self._asked: dict[int, _Asked] = {}
        self._lock = threading.Lock()

    @abstractmethod
    def reader(self, schema: Schema) -> Reader:
        """What reads records of a schema. Raises where it is none."""

    @abstractmethod
    def writer(self, schema: Schema) -> Writer:
        """What writes values by a schema. Raises where it is none."""

    def ready(self, topics: Sequence[str], *, writing: bool) -> None:
        """Ask the registry whether it is there and, to write, for the schema of each topic.

        Raises ConfigError where it does not answer, refuses, or has no such schema.
        """
        self._client = self._client or Client(self._registry)
        if not writing and (self._subject or self._file):
            raise ConfigError("'subject' and 'schema' are for sinks: a record says itself what its schema is")
        try:
            self._client.check()
            for topic in topics if writing else ():
                subject = self._subject or f"{topic}-value"
                self._writers[topic] = self._writer_of(self._client, subject)
        except (Unreachable, Refused, NotThere) as error:
            raise ConfigError(f"codec={self.name}: {error}") from error

    def _writer_of(self, client: Client, subject: str) -> tuple[bytes, Writer, str]:
        if self._file is None:
            try:
                found = client.latest(subject, self.form)
            except NotThere as error:
                raise NotThere(f"{error} (subject '{subject}'); schema=FILE would register one") from None
        else:
            try:
                text = Path(self._file).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"schema: {self._file} cannot be read: {error}") from error
            found = client.put(subject, self.kind, text, self.form)
        what = f"schema {found.id} of subject '{subject}'"
        try:
            writer = self.writer(self._of_this_kind(found))
        except Exception as error:
            raise ConfigError(f"codec={self.name}: {what}: {error}") from error
        return b"\0" + found.id.to_bytes(4), writer, what

    def _of_this_kind(self, schema: Schema) -> Schema:
        if schema.kind != self.kind:
            raise ValueError(f"schema {schema.id} is {schema.kind}, not {self.kind}")
        return schema

    def decode(self, raw: bytes, topic: str) -> Any:
        """The value. Raises ValueError; NotYet while the registry is asked, SourceError where it refuses."""
        if len(raw) < HEAD or raw[0]:
            raise ValueError(_not_the_format(raw))
        number = int.from_bytes(raw[1:HEAD])
        reader = self._readers.get(number) or self._reader_of(number)
        try:
            return reader(raw)
        except Exception as error:  # the libraries raise whatever comes up in them
            raise ValueError(f"does not fit its schema {number}: {_why(error)}") from None

    def encode(self, value: Any, topic: str) -> bytes:
        """The bytes of a value. Raises ValueError where it does not fit the schema."""
        head, writer, what = self._writers[topic]
        try:
            return head + writer(value)
        except Exception as error:
            raise ValueError(f"does not fit {what}: {_why(error)}") from None

    def _reader_of(self, number: int) -> Reader:
        """What reads records of that id; asks the registry beside the flow."""
        with self._lock:
            asked = self._asked.get(number)
            new = asked is None or (asked.until is not None and time.monotonic() >= asked.until)
            if asked is None or new:
                if len(self._asked) >= MAX_ASKED:  # a flood of unknown ids
                    self._asked = {key: one for key, one in self._asked.items() if not one.answer.done()}
                asked = self._asked[number] = _Asked(lambda: self._fetched(number), number)
        try:
            reader = asked.answer.result(WAIT_SECONDS if new else 0)
        except TimeoutError:
            raise NotYet(f"the schema registry at {self._address} has not answered yet") from None
        except Unreachable as error:
            raise NotYet(str(error)) from None
        except Refused as error:
            if error.status == 401:
                raise SourceError(str(error)) from None
            raise ValueError(f"schema {number} may not be read: {error}") from None
        except NotThere as error:
            raise ValueError(f"schema {number} cannot be had: {error}") from None
        except Exception as error:
            raise ValueError(f"schema {number} cannot be used: {_why(error)}") from None
        self._readers[number] = reader
        with self._lock:
            self._asked.pop(number, None)
        return reader

    def _fetched(self, number: int) -> Reader:
        client = self._client
        if client is None:
            client = self._client = Client(self._registry)
        return self.reader(self._of_this_kind(client.by_id(number, self.form)))


def _not_the_format(raw: bytes) -> str:
    if not raw:
        return "not in the registry's wire format: it is empty"
    if raw[0] == 1:
        return "not in the registry's wire format: it begins with 1, ids of schemas in headers are not read"
    if raw[0]:
        return f"not in the registry's wire format: it begins with byte 0x{raw[0]:02x}, not with 0"
    return f"not in the registry's wire format: cut off after {len(raw)} bytes"


def _why(error: Exception) -> str:
    text = str(error)[:500]
    if type(error) is ValueError and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
