"""One Lua script on a Redis: atomic, one round trip, and errors in our own words."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import AuthenticationError, RedisError

from state.errors import StateMisconfigured, StateUnavailable

CONNECTIONS = 64
"""At most, of one process."""


class RedisScript:
    """Args:
        url: ``redis://`` or ``rediss://``, with password and number of the database.
        script: its Lua text.
        timeout_s: a server that does not answer for so long counts as unreachable.
        what: is kept there, for messages.

    Raises:
        StateMisconfigured: the URL is none.
    """

    def __init__(self, url: str, script: str, *, timeout_s: float, what: str) -> None:
        try:
            # One that waits for a connection to be free: a burst is no server that is down.
            pool = BlockingConnectionPool.from_url(
                url,
                timeout=timeout_s,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                max_connections=CONNECTIONS,
            )
        except ValueError as error:
            raise StateMisconfigured(f"the URL of the {what} is none: {error}") from None
        self._redis = Redis.from_pool(pool)
        told = pool.connection_kwargs
        self._called = f"redis://{told.get('host')}:{told.get('port')}/{told.get('db', 0)}"
        self._script = self._redis.register_script(script)

    async def run(self, keys: Sequence[str], arguments: Sequence[str | int | bytes]) -> Any:
        """Raises StateUnavailable, StateMisconfigured."""
        return await self._told(lambda: self._script(keys=keys, args=arguments))

    async def ping(self) -> None:
        """Raises as ``run`` does, unless the server answers."""
        await self._told(lambda: self._redis.ping())

    async def close(self) -> None:
        await self._redis.aclose()

    async def _told(self, call: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await call()
        except AuthenticationError as error:
            raise StateMisconfigured(f"{self._called}: {error}") from None
        except (RedisError, OSError) as error:
            raise StateUnavailable(f"{self._called}: {error or type(error).__name__}") from None
