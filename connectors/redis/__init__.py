"""What processes on several machines share by Redis: answers, limits, budgets. Needs the extra ``redis``."""

from chainwax.connectors.redis.lender import RedisLender
from chainwax.connectors.redis.servers import RedisServers
from chainwax.connectors.redis.store import RedisStore

__all__ = ["RedisLender", "RedisServers", "RedisStore"]
