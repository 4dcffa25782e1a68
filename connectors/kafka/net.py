"""Connections of kafka-python's that tell why a broker refuses them, and at once.

kafka-python 3.0 throws away what a broker says together with hanging up, which is how a broker refuses
credentials; and while it looks for its first broker it tries again whatever was said.
"""

from __future__ import annotations

from typing import Any

from kafka import errors
from kafka.net.compat import KafkaNetClient
from kafka.net.connection import KafkaConnection
from kafka.net.manager import KafkaConnectionManager
from kafka.net.selector import NetworkSelector
from typing_extensions import override

__all__ = ["Connections", "opened"]

_FINAL = (
    errors.SaslAuthenticationFailedError,
    errors.UnsupportedSaslMechanismError,
    errors.IllegalSaslStateError,
)


class Connections(KafkaConnectionManager):  # type: ignore[misc]  # it has no types
    """The connections of one client."""

    refused: BaseException | None = None
    """Why no broker lets us in, where trying again is of no use."""

    @override
    async def _build_transport(self, node: Any, timeout_at: float | None = None) -> Any:
        transport = await super()._build_transport(node, timeout_at=timeout_at)
        receive = transport._sock_recv

        def said_before_hanging_up() -> tuple[bytes, BaseException | None]:
            data, error = receive()
            # The next look at the socket finds the error again.
            return (data, None) if data else (data, error)

        transport._sock_recv = said_before_hanging_up
        return transport

    @override
    def get_connection(self, *given: Any, **more: Any) -> KafkaConnection:
        connection = super().get_connection(*given, **more)
        if not self.bootstrapped:
            connection.init_future.add_errback(self._failed)
        return connection

    def _failed(self, error: BaseException) -> None:
        if isinstance(error, _FINAL) or "CERTIFICATE_VERIFY_FAILED" in str(error):
            self.refused = error
            self.close()


def opened(**settings: Any) -> KafkaNetClient:
    """What kafka-python's clients connect with, as their ``kafka_client``."""
    net = NetworkSelector(**settings)
    return KafkaNetClient(net=net, manager=Connections(net, **settings))
