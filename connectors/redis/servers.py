"""How Redis is reached, as ``[redis]`` of the configuration says."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError

from chainwax.router.config import RedisConfig
from chainwax.router.errors import ConfigError

__all__ = ["AWAY", "RedisServers"]

AWAY = (RedisError, OSError, asyncio.TimeoutError)
"""What its clients raise where it does not answer, or cannot do what it is asked."""


@dataclass(frozen=True, slots=True)
class RedisServers:
    """Makes clients. Raises :class:`ConfigError` where the configuration cannot work."""

    config: RedisConfig

    def __post_init__(self) -> None:
        name = self.config.password_env
        if name is not None and name not in os.environ:
            raise ConfigError(f"redis.password_env: the environment variable {name} is not set")

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        parts = urlsplit(self.config.url or "")
        return (
            f"Redis at {parts.hostname}:{parts.port or 6379}" if parts.hostname else f"Redis at {parts.path}"
        )

    def key(self, *parts: str) -> str:
        """A key under the prefix."""
        return ":".join((self.config.prefix, *parts))

    def client(self) -> Any:
        """A client for a thread. It never tries again by itself: whoever uses it knows better when."""
        return redis.Redis.from_url(self._url, retry=redis.retry.Retry(NoBackoff(), 0), **self._options)

    def loop_client(self) -> Any:
        """A client for an event loop."""
        retry = redis.asyncio.retry.Retry(NoBackoff(), 0)
        return redis.asyncio.Redis.from_url(self._url, retry=retry, **self._options)

    def check(self) -> dict[str, str]:
        """Its settings, as far as it tells. Raises :class:`ConfigError` where it cannot be used."""
        client = self.client()
        try:
            client.ping()
            try:
                return dict(client.config_get("append*", "maxmemory-policy"))
            except RedisError:  # where it is somebody's service, it may not tell
                return {}
        except AuthenticationError as error:
            raise ConfigError(f"{self.place}: {error}: redis.user and redis.password_env") from None
        except AWAY as error:
            raise ConfigError(f"{self.place} cannot be used: {error}") from None
        finally:
            client.close()

    @property
    def _url(self) -> str:
        assert self.config.url is not None
        return self.config.url

    @property
    def _options(self) -> dict[str, Any]:
        config = self.config
        password = os.environ[config.password_env] if config.password_env is not None else None
        return {
            "username": config.user,
            "password": password,
            "socket_timeout": config.timeout,
            "socket_connect_timeout": config.timeout,
            "decode_responses": True,
        }
