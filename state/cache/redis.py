"""A cache that all machines share, in Redis: each call is one script, one round trip.

All of it lies under keys ``PREFIX{cache}:…``; the braces keep it on one node of a Redis
cluster. The clock is Redis' own, so gateways need not agree on the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, RedisError

from state.cache.contract import ENTRY_BYTES, Bounds
from state.errors import StateMisconfigured, StateUnavailable

TIMEOUT_S = 0.25
"""A server that does not answer for so long is no help: computing may well be quicker."""
KINDS = ("values", "used", "expire", "names")


class RedisCache:
    """See ``Cache``.

    Args:
        url: ``redis://`` or ``rediss://``, with password and number of the database.
        prefix: of all keys.
        clock: Unix seconds; ``None``: the server's.

    Raises:
        StateMisconfigured: the URL is none.
    """

    def __init__(
        self,
        url: str,
        bounds: Bounds,
        *,
        prefix: str = "frontier:",
        clock: Callable[[], float] | None = None,
    ) -> None:
        try:
            self._redis = Redis.from_url(
                url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, max_connections=64
            )
        except ValueError as error:
            raise StateMisconfigured(f"the URL of the cache is none: {error}") from None
        told = self._redis.connection_pool.connection_kwargs
        self._called = f"redis://{told.get('host')}:{told.get('port')}/{told.get('db', 0)}"
        self._bounds = bounds
        self._keys = [f"{prefix}{{cache}}:{kind}" for kind in KINDS]
        self._clock = clock
        self._script = self._redis.register_script(
            files("state.cache").joinpath("cache.lua").read_text()
        )

    async def get(self, owner: str, keys: Sequence[str]) -> list[bytes | None]:
        if not keys:
            return []
        found = await self._run("get", 0, [_member(owner, key) for key in keys])
        return cast("list[bytes | None]", found)

    async def put(self, owner: str, entries: Mapping[str, bytes], *, ttl_s: float) -> None:
        words: list[str | bytes] = []
        too_long = []
        for key, value in entries.items():
            if self._bounds.fits(value):
                words += (_member(owner, key), value)
            else:
                too_long.append(_member(owner, key))
        if too_long:
            await self._run("forget", 0, too_long)
        await self._run("put", ttl_s, words)  # what has expired leaves, though nothing may come

    async def drop(self, owner: str) -> int:
        return int(await self._run("drop", 0, [owner]))

    async def ping(self) -> None:
        await self._told(lambda: self._redis.ping())

    async def close(self) -> None:
        await self._redis.aclose()

    async def _run(self, operation: str, ttl_s: float, words: Sequence[str | bytes]) -> Any:
        now: str | int = "" if self._clock is None else int(self._clock() * 1000)
        ttl_ms = round(ttl_s * 1000)
        arguments = [operation, now, ttl_ms, self._bounds.max_bytes, ENTRY_BYTES, *words]
        return await self._told(lambda: self._script(keys=self._keys, args=arguments))

    async def _told(self, call: Callable[[], Any]) -> Any:
        try:
            return await call()
        except AuthenticationError as error:
            raise StateMisconfigured(f"{self._called}: {error}") from None
        except (RedisError, OSError) as error:
            raise StateUnavailable(f"{self._called}: {error or type(error).__name__}") from None


def _member(owner: str, key: str) -> str:
    return f"{owner}\0{key}"
