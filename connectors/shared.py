"""The choice of what processes on several machines share by."""

from __future__ import annotations

from chainwax.router.config import RedisConfig
from chainwax.router.errors import ConfigError
from chainwax.router.share import Lender, ResponseStore

__all__ = ["open_redis"]


def open_redis(config: RedisConfig) -> tuple[Lender, ResponseStore]:
    """What lends limits and budgets, and what keeps answers, as ``[redis]`` says.

    Raises :class:`ConfigError` where it cannot work; whether Redis is there is seen when a run begins.
    """
    try:
        # Who needs no Redis needs no library for it.
        from chainwax.connectors.redis import RedisLender, RedisServers, RedisStore
    except ModuleNotFoundError as error:
        if error.name != "redis":
            raise
        raise ConfigError("[redis] needs the extra 'redis': pip install 'chainwax[redis]'") from None
    servers = RedisServers(config)
    return RedisLender(servers), RedisStore(servers)
