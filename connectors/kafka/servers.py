"""Where a Kafka cluster is and how to get in."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from kafka import KafkaAdminClient, KafkaProducer
from kafka.errors import (
    IllegalSaslStateError,
    KafkaConfigurationError,
    KafkaError,
    SaslAuthenticationFailedError,
    UnsupportedSaslMechanismError,
)
from kafka.net.compat import KafkaNetClient
from kafka.protocol.api_header import ResponseClassRegistry

from chainwax.connectors.kafka.net import opened
from chainwax.router.errors import ConfigError, nearest

__all__ = ["SERVER_OPTIONS", "KafkaServers", "end", "partitions_of", "reason_of", "shut"]

CONNECT_SECONDS = 10.0
"""How long a cluster may take to answer at the start."""
CLOSE_SECONDS = 5.0
RECONNECT_MS = 2000
"""The longest pause between two attempts at a broker that has gone; the library's own is 30 s."""

log = logging.getLogger(__name__)

ENV = "CHAINWAX_KAFKA_"


@dataclass(frozen=True, slots=True)
class KafkaServers:
    """A cluster's addresses, and what TLS and SASL need.

    What is None is taken from the environment: ``CHAINWAX_KAFKA_SERVERS``,
    ``CHAINWAX_KAFKA_SECURITY_PROTOCOL`` and so on. Passwords are only ever read from the variables
    that ``sasl_password_env`` and ``ssl_password_env`` name, ``CHAINWAX_KAFKA_SASL_PASSWORD`` and
    ``CHAINWAX_KAFKA_SSL_PASSWORD`` unless told otherwise.

    >>> KafkaServers("broker-1:9092,broker-2:9092").addresses
    'broker-1:9092,broker-2:9092'
    """

    servers: str | None = None
    """``host:port``, several with commas between; else 127.0.0.1:9092."""
    security_protocol: str | None = None
    """PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL."""
    sasl_mechanism: str | None = None
    """PLAIN, SCRAM-SHA-256, SCRAM-SHA-512, GSSAPI or OAUTHBEARER."""
    sasl_username: str | None = None
    sasl_password_env: str | None = None
    ssl_cafile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_password_env: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of kafka-python's clients, such as ``sasl_oauth_token_provider``."""

    @property
    def addresses(self) -> str:
        """The addresses in one line."""
        return self._value("servers") or "127.0.0.1:9092"

    def _value(self, name: str) -> str | None:
        return getattr(self, name) or os.environ.get(f"{ENV}{name.upper()}")

    def client(self) -> dict[str, Any]:
        """What kafka-python's clients are made with. Raises ConfigError where it cannot be right."""
        made: dict[str, Any] = {
            "bootstrap_servers": _addresses(self.addresses),
            "bootstrap_timeout_ms": int(CONNECT_SECONDS * 1000),
            "reconnect_backoff_max_ms": RECONNECT_MS,
        }
        names = {"sasl_username": "sasl_plain_username"}
        for option in fields(self):
            name = option.name
            if name in ("servers", "settings") or name.endswith("_env"):
                continue
            value = self._value(name)
            if value:
                made[names.get(name, name)] = value
        protocol = made.get("security_protocol", "PLAINTEXT")
        if protocol not in _PROTOCOLS:
            raise ConfigError(f"security_protocol '{protocol}' is unknown: {nearest(protocol, _PROTOCOLS)}")
        if protocol.startswith("SASL") and made.get("sasl_mechanism", "PLAIN") in _WITH_PASSWORD:
            made["sasl_plain_password"] = self._password("sasl_password_env", "SASL_PASSWORD", needed=True)
        password = self._password("ssl_password_env", "SSL_PASSWORD", needed=False)
        if password:
            made["ssl_password"] = password
        return made | dict(self.settings)

    def _password(self, option: str, name: str, *, needed: bool) -> str | None:
        variable = getattr(self, option) or f"{ENV}{name}"
        value = os.environ.get(variable)
        if not value and (needed or getattr(self, option)):
            raise ConfigError(f"the environment variable {variable}, which holds a password, is not set")
        return value

    @contextmanager
    def admin(self) -> Iterator[KafkaAdminClient]:
        """A client for questions about the cluster. Raises ConfigError where it does not answer."""
        admin = self.connected(KafkaAdminClient)
        try:
            yield admin
        finally:
            shut(admin)

    def connected(self, kind: Any, **more: Any) -> Any:
        """A client of kafka-python's. Raises ConfigError, with the reason, where nobody answers."""
        opened_clients: list[KafkaNetClient] = []

        def opening(**settings: Any) -> KafkaNetClient:
            opened_clients.append(opened(**settings))
            return opened_clients[-1]

        settings = {"kafka_client": opening} | self.client() | more
        for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
            if settings.get(name) and not os.path.isfile(settings[name]):
                raise ConfigError(f"{name}: there is no file {settings[name]}")
        made = False
        with _heard() as said:
            try:
                client = kind(**settings)
                made = True
                return client
            except (KafkaConfigurationError, ValueError, RuntimeError, AssertionError) as error:
                raise ConfigError(f"Kafka's settings cannot work: {error}") from error
            except (KafkaError, OSError) as error:
                refused = next((net._manager.refused for net in opened_clients if net._manager.refused), None)
                if refused is not None:
                    raise ConfigError(f"Kafka at {self.addresses}: {_refusal(refused, settings)}") from error
                # Its own error says only that the time is over; why, it tells its log alone.
                why = said[-1] if said else str(error)
                raise ConfigError(f"Kafka at {self.addresses} cannot be reached: {why}") from error
            finally:
                if not made:  # else its thread would go on for ever
                    for net in opened_clients:
                        net.close()


def _make_classes() -> None:
    """Make kafka-python's classes of responses, one for each version, before there are threads.

    3.0 makes each when a response first comes, and has only a weak reference to the one it made last: where
    the threads of two clients make one at the same time, it may be the one that is thrown away. From then on
    no such response can be read in this process, and what waits for one waits until its request times out.
    """
    for response in list(ResponseClassRegistry._response_class_registry.values()):
        whole = response[None]
        for version in range(whole.max_version + 1):
            whole[version]


_make_classes()

SERVER_OPTIONS = tuple(option.name for option in fields(KafkaServers) if option.name != "settings")
"""The options of a URI that say where and how."""

_PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
_WITH_PASSWORD = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")


def _refusal(error: BaseException, settings: Mapping[str, Any]) -> str:
    if isinstance(error, UnsupportedSaslMechanismError):
        return f"it does not take sasl_mechanism {settings.get('sasl_mechanism')}"
    if isinstance(error, IllegalSaslStateError):
        return (
            f"it wants no credentials at this address, security_protocol is {settings['security_protocol']}"
        )
    if isinstance(error, SaslAuthenticationFailedError):
        return f"it refuses the credentials of '{settings.get('sasl_plain_username')}': {reason_of(error)}"
    return reason_of(error)


def _addresses(text: str) -> list[str]:
    found = [part.strip() for part in text.split(",") if part.strip()]
    for address in found:
        host, colon, port = address.rpartition(":")
        if not host or not colon or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(f"servers: '{address}' is not HOST:PORT, such as 127.0.0.1:9092")
    if not found:
        raise ConfigError("servers: there is no address in it")
    return found


class _Ear(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        error = next((arg for arg in record.args or () if isinstance(arg, Exception)), None)
        if error is not None and "bootstrap" not in str(error).lower():
            self._said.append(str(error))


_net_log = logging.getLogger("kafka.net")
_listening: list[logging.Handler] = []
_lock = threading.Lock()


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What kafka-python tells its log of connections, in place of a screen full of it."""
    said: list[str] = []
    ear = _Ear(said)
    with _lock:
        _listening.append(ear)
        _net_log.addHandler(ear)
        _net_log.propagate = False
    try:
        yield said
    finally:
        with _lock:
            _listening.remove(ear)
            _net_log.removeHandler(ear)
            _net_log.propagate = not _listening


def shut(client: Any, **how: Any) -> None:
    """Close a client of kafka-python's, which may tell its log of a socket that it has closed itself."""
    with _heard():
        client.close(**how)


def end(producer: KafkaProducer) -> None:
    """Close a producer with which nothing is under way any more, or nothing that matters.

    It raises nothing: an error while Bytewax clears up would end the process before anyone is told.
    """
    try:
        shut(producer, timeout=CLOSE_SECONDS)
    except Exception as error:
        log.debug("a producer was not closed: %s", error)
        producer._sender.force_close()


def partitions_of(
    admin: KafkaAdminClient, topics: list[str], servers: KafkaServers
) -> dict[str, tuple[str, int]]:
    """The id and the number of partitions of each topic.

    Raises ConfigError where one does not exist, with the nearest that does.
    """
    found: dict[str, tuple[str, int]] = {}
    try:
        for topic in admin.describe_topics(topics):
            if topic["error_code"] == 0:
                found[topic["name"]] = (str(topic["topic_id"]), len(topic["partitions"]))
        for name in topics:
            if name not in found:
                known = nearest(name, (topic for topic in admin.list_topics() if not topic.startswith("__")))
                raise ConfigError(f"Kafka at {servers.addresses} has no topic '{name}': {known}")
    except (KafkaError, ValueError, TypeError) as error:
        raise ConfigError(f"topic '{', '.join(topics)}' cannot be used: {reason_of(error)}") from error
    return found


def reason_of(error: BaseException) -> str:
    """What an error of kafka-python says, without the requests and answers that some carry along."""
    text = str(error).partition(" failed with response")[0]
    # "[Error 10] MessageSizeTooLargeError: None" is how it prints a name.
    return re.sub(r"^\[Error -?\d+\] |: None$", "", text).strip()[:300] or type(error).__name__
