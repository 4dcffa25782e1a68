"""A Schema Registry that speaks Confluent's protocol: where it is, and what it is asked.

The protocol: https://docs.confluent.io/platform/current/schema-registry/develop/api.html

Confluent's own client is not used: it reads Protobuf only into classes that were generated before, is four
times as slow (Avro, a record of three fields: 8.7 against 2.4 µs), and brings a second Kafka client and
some fifteen packages along.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from chainwax.router.errors import ConfigError

__all__ = ["REGISTRY_OPTIONS", "Client", "NotThere", "Refused", "Schema", "SchemaRegistry", "Unreachable"]

ENV = "CHAINWAX_REGISTRY_"
TIMEOUT = httpx.Timeout(10.0, connect=5.0)
"""Seconds; an answer that takes longer counts as none."""
_NONE_KEPT = httpx.Limits(max_keepalive_connections=0)
"""Questions are rare: no connection is held open between them."""
MAX_REFERENCES = 200
"""Schemas that one schema may be made of."""


class Unreachable(Exception):
    """The registry does not answer, or cannot now: the same question may be answered later."""


class Refused(Exception):
    """The registry does not let us in (401), or not do this (403 and the like)."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class NotThere(ValueError):
    """The registry answers that it has no such thing, or that it is wrong."""


@dataclass(frozen=True, slots=True)
class SchemaRegistry:
    """A registry's address, and how to get in.

    What is None is taken from the environment: ``CHAINWAX_REGISTRY_URL`` and so on. The password is only
    ever read from the variable that ``password_env`` names, ``CHAINWAX_REGISTRY_PASSWORD`` unless told
    otherwise.

    >>> SchemaRegistry("http://127.0.0.1:8081/").address
    'http://127.0.0.1:8081'
    """

    url: str | None = None
    username: str | None = None
    """For HTTP's basic authentication; an API key goes here."""
    password_env: str | None = None
    cafile: str | None = None
    """Certificates to trust, in place of the system's."""

    @property
    def address(self) -> str:
        """The address. Raises ConfigError where there is none, or it cannot be one."""
        url = self._value("url")
        if not url:
            raise ConfigError(f"no schema registry is named: registry=http://HOST:PORT, or {ENV}URL")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise ConfigError("registry: the address is not http://HOST:PORT") from None
        if parts.username is not None or parts.password is not None:
            # It may hold a secret: it is not repeated here.
            raise ConfigError(
                f"registry: no credentials in the address; the password is read from {ENV}PASSWORD"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or parts.query:
            raise ConfigError(f"registry: '{url}' is not http://HOST:PORT, such as http://127.0.0.1:8081")
        return url.rstrip("/")

    def _value(self, name: str) -> str | None:
        return getattr(self, name) or os.environ.get(f"{ENV}{name.upper()}")

    def client(self) -> httpx.Client:
        """A client to ask it with. Raises ConfigError where it cannot be made."""
        username = self._value("username")
        variable = self.password_env or f"{ENV}PASSWORD"
        password = os.environ.get(variable)
        if (self.password_env or username) and not password:
            raise ConfigError(
                f"the environment variable {variable}, which holds the registry's password, is not set"
            )
        auth = httpx.BasicAuth(username, password or "") if username else None
        cafile = self._value("cafile")
        try:
            verify: ssl.SSLContext | bool = ssl.create_default_context(cafile=cafile) if cafile else True
        except OSError as error:  # SSLError is one
            raise ConfigError(
                f"registry: {cafile} holds no certificates that can be read: {error}"
            ) from error
        return httpx.Client(
            base_url=self.address, auth=auth, verify=verify, timeout=TIMEOUT, limits=_NONE_KEPT
        )


REGISTRY_OPTIONS = tuple(option.name for option in fields(SchemaRegistry))


@dataclass(frozen=True, slots=True)
class Schema:
    """A schema as the registry has it."""

    id: int
    kind: str
    """AVRO, JSON or PROTOBUF."""
    text: str
    references: tuple[tuple[str, str], ...] = ()
    """Name and text of all that it refers to; what one refers to itself stands before it."""


class Client:
    """Questions to one registry; may be asked from any thread.

    Raises Unreachable, Refused or NotThere, each with the registry's address and its own words.
    """

    def __init__(self, registry: SchemaRegistry) -> None:
        self._address = registry.address
        self._http = registry.client()

    def check(self) -> None:
        """Whether it is there and lets us in."""
        try:
            self._ask("GET", "/schemas/types")
        except NotThere:
            pass  # not every registry knows this one; what counts is that it answers
        except Refused as error:
            if error.status == 401:
                raise

    def by_id(self, number: int, form: str | None) -> Schema:
        """The schema of that id; ``form`` asks for its text in another form."""
        found = self._ask("GET", f"/schemas/ids/{number}", form)
        return self._schema(found, number, form)

    def latest(self, subject: str, form: str | None) -> Schema:
        """The newest schema of a subject."""
        found = self._ask("GET", f"/subjects/{quote(subject, safe='')}/versions/latest", form)
        return self._schema(found, found.get("id"), form)

    def put(self, subject: str, kind: str, text: str, form: str | None) -> Schema:
        """Register a schema, or find it where one may only read.

        Raises Refused where it is not there and may not be registered.
        """
        body = {"schema": text, "schemaType": kind}
        path = f"/subjects/{quote(subject, safe='')}"
        try:
            number = self._ask("POST", f"{path}/versions", body=body).get("id")
        except Refused as refused:
            try:
                number = self._ask("POST", path, body=body).get("id")
            except NotThere:
                raise refused from None
        if not isinstance(number, int):
            raise Unreachable(f"the schema registry at {self._address} answers without an id")
        return self.by_id(number, form)

    def _schema(self, found: dict[str, Any], number: Any, form: str | None) -> Schema:
        text, kind = found.get("schema"), found.get("schemaType", "AVRO")
        if not isinstance(text, str) or not isinstance(number, int):
            raise Unreachable(f"the schema registry at {self._address} answers without a schema")
        seen: dict[str, str] = {}
        self._refer(found, form, seen, 0)
        return Schema(number, kind, text, tuple(seen.items()))

    def _refer(self, found: dict[str, Any], form: str | None, seen: dict[str, str], depth: int) -> None:
        for reference in found.get("references") or ():
            name, subject, version = (reference.get(part) for part in ("name", "subject", "version"))
            if name in seen:
                continue
            if depth > 50 or len(seen) >= MAX_REFERENCES:
                raise NotThere(f"a schema refers to more than {MAX_REFERENCES} others, or to itself")
            path = f"/subjects/{quote(str(subject), safe='')}/versions/{version}"
            part = self._ask("GET", path, form)
            self._refer(part, form, seen, depth + 1)
            seen[str(name)] = str(part.get("schema"))

    def _ask(self, method: str, path: str, form: str | None = None, body: Any = None) -> dict[str, Any]:
        where = f"the schema registry at {self._address}"
        try:
            answer = self._http.request(method, path, params={"format": form} if form else None, json=body)
        except (httpx.HTTPError, OSError) as error:
            why = str(error) or type(error).__name__
            raise Unreachable(f"{where} cannot be reached: {why}") from error
        status = answer.status_code
        try:
            found = answer.json()
        except ValueError:
            found = None
        said = found.get("message") if isinstance(found, dict) else None
        why = f"{status} {str(said or answer.reason_phrase)[:300]}"
        if status == 401:
            raise Refused(f"{where} refuses the credentials: {why}", status)
        # 42205 is how Confluent's says that it, or the subject, is only to be read.
        if status in (403, 405) or (isinstance(found, dict) and found.get("error_code") == 42205):
            raise Refused(f"{where} does not allow this: {why}", status)
        if status in (408, 429) or status >= 500:
            raise Unreachable(f"{where} cannot answer now: {why}")
        if status >= 300:
            raise NotThere(f"{where} says: {why}")
        if isinstance(found, list):
            return {}
        if not isinstance(found, dict):
            raise Unreachable(f"{where} answers with something that is not JSON: is it one?")
        return found
