"""Counters that all machines share, in Redis: each decision is one script, atomic, one round trip.

Keys are ``PREFIX{OWNER}:cells``, ``:leases`` and ``:holds``; the braces keep an owner's on one
node of a Redis cluster. The clock is Redis' own, so gateways need not agree on the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any, cast

from state.counters.contract import Reservation
from state.counters.limits import Demand, Level, Limit, asked
from state.patience import SERVER_S
from state.redis_script import RedisScript

TIMEOUT_S = SERVER_S
"""A server that does not answer for so long counts as unreachable."""


class RedisCounters:
    """See ``Counters``.

    Args:
        url: ``redis://`` or ``rediss://``, with password and number of the database.
        prefix: of all keys.
        clock: Unix seconds; ``None``: the server's.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "frontier:",
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._script = RedisScript(
            url,
            files("state.counters").joinpath("quota.lua").read_text(),
            timeout_s=TIMEOUT_S,
            what="counters",
        )
        self._prefix = prefix
        self._clock = clock

    async def reserve(
        self, owner: str, lease: str, demands: Sequence[Demand], *, ttl_s: float
    ) -> Reservation:
        answer = await self._run("reserve", owner, lease, ttl_s, _arguments(demands))
        return Reservation(allowed=bool(answer[0]), levels=_levels(demands, answer))

    async def settle(self, owner: str, lease: str, used: Mapping[str, int]) -> bool:
        words = [word for name, amount in used.items() for word in (name, amount)]
        return bool(await self._run("settle", owner, lease, 0, words))

    async def renew(self, owner: str, lease: str, *, ttl_s: float) -> bool:
        return bool(await self._run("renew", owner, lease, ttl_s, ()))

    async def levels(self, owner: str, limits: Sequence[Limit]) -> tuple[Level, ...]:
        demands = asked(limits)
        return _levels(demands, await self._run("levels", owner, "", 0, _arguments(demands)))

    async def spent(self, owner: str, limit: Limit) -> Level:
        demands = asked([limit])
        [level] = _levels(demands, await self._run("spent", owner, "", 0, _arguments(demands)))
        return level

    async def drop(self, owner: str) -> bool:
        return bool(await self._run("drop", owner, "", 0, ()))

    async def ping(self) -> None:
        await self._script.ping()

    async def close(self) -> None:
        await self._script.close()

    async def _run(
        self, operation: str, owner: str, lease: str, ttl_s: float, words: Sequence[str | int]
    ) -> Any:
        keys = [f"{self._prefix}{{{owner}}}:{kind}" for kind in ("cells", "leases", "holds")]
        now = "" if self._clock is None else round(self._clock() * 1000)
        arguments = [operation, now, lease, round(ttl_s * 1000), *words]
        return await self._script.run(keys, arguments)


def _arguments(demands: Sequence[Demand]) -> list[str | int]:
    words: list[str | int] = []
    for each in demands:
        limit = each.limit
        words += (limit.name, limit.strategy, limit.amount, limit.window_ms, each.amount)
    return words


def _levels(demands: Sequence[Demand], answer: Sequence[int]) -> tuple[Level, ...]:
    told = cast("list[tuple[int, int, int]]", list(zip(*[iter(answer[1:])] * 3, strict=True)))
    return tuple(
        Level(
            name=each.limit.name,
            amount=each.limit.amount,
            remaining=remaining,
            reset_ms=reset_ms,
            retry_ms=None if retry_ms < 0 else retry_ms,
        )
        for each, (remaining, reset_ms, retry_ms) in zip(demands, told, strict=True)
    )
