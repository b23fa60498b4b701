"""A cache that all machines share, in Redis: each call is one script, one round trip.

All of it lies under keys ``PREFIX{cache}:…``; the braces keep it on one node of a Redis
cluster. The clock is Redis' own, so gateways need not agree on the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any, cast

from state.cache.contract import ENTRY_BYTES, Bounds
from state.patience import CACHE_S
from state.redis_script import RedisScript

TIMEOUT_S = CACHE_S
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
        self._script = RedisScript(
            url,
            files("state.cache").joinpath("cache.lua").read_text(),
            timeout_s=TIMEOUT_S,
            what="cache",
        )
        self._bounds = bounds
        self._keys = [f"{prefix}{{cache}}:{kind}" for kind in KINDS]
        self._clock = clock

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
        await self._script.ping()

    async def close(self) -> None:
        await self._script.close()

    async def _run(self, operation: str, ttl_s: float, words: Sequence[str | bytes]) -> Any:
        now: str | int = "" if self._clock is None else int(self._clock() * 1000)
        ttl_ms = round(ttl_s * 1000)
        arguments = [operation, now, ttl_ms, self._bounds.max_bytes, ENTRY_BYTES, *words]
        return await self._script.run(self._keys, arguments)


def _member(owner: str, key: str) -> str:
    return f"{owner}\0{key}"
