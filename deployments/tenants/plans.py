"""What a tenant may use: named plans, and each tenant's own exceptions (spec C2). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from functools import lru_cache
from types import MappingProxyType
from typing import TypeAlias

from state.counters import Limit, Strategy

MINUTE_MS, HOUR_MS, DAY_MS = 60_000, 3_600_000, 86_400_000
Amounts: TypeAlias = "tuple[tuple[str, float | None], ...]"
MICRO = 1_000_000
"""Money is counted in millionths, as whole numbers."""


class LimitName(StrEnum):
    REQUESTS_PER_MINUTE = "requests_per_minute"
    REQUESTS_PER_HOUR = "requests_per_hour"
    REQUESTS_PER_DAY = "requests_per_day"
    TOKENS_PER_MINUTE = "tokens_per_minute"
    TOKENS_PER_DAY = "tokens_per_day"
    CONCURRENT_REQUESTS = "concurrent_requests"
    BUDGET_PER_MONTH = "budget_per_month"
    """In the currency of the price list; a calendar month in UTC."""


WINDOWS_MS: Mapping[LimitName, int] = {
    LimitName.REQUESTS_PER_MINUTE: MINUTE_MS,
    LimitName.REQUESTS_PER_HOUR: HOUR_MS,
    LimitName.REQUESTS_PER_DAY: DAY_MS,
    LimitName.TOKENS_PER_MINUTE: MINUTE_MS,
    LimitName.TOKENS_PER_DAY: DAY_MS,
}
REQUESTS = frozenset(name for name in LimitName if name.startswith("requests_"))
TOKENS = frozenset(name for name in LimitName if name.startswith("tokens_"))


@lru_cache(maxsize=1024)  # every request asks, of a few plans
def limits(plan: Amounts, overrides: Amounts, strategy: Strategy) -> Mapping[LimitName, Limit]:
    """What the counters shall hold a tenant to; a limit of ``None`` is none."""
    amounts: dict[str, float | None] = {**dict(plan), **dict(overrides)}
    found: dict[LimitName, Limit] = {}
    for name in LimitName:
        amount = amounts.get(name)
        if amount is None:
            continue
        match name:
            case LimitName.CONCURRENT_REQUESTS:
                limit = Limit(name=name, strategy=Strategy.CONCURRENT, amount=int(amount))
            case LimitName.BUDGET_PER_MONTH:
                money = round(amount * MICRO)
                limit = Limit(name=name, strategy=Strategy.FIXED_WINDOW, amount=money)
            case _:
                limit = Limit(
                    name=name, strategy=strategy, amount=int(amount), window_ms=WINDOWS_MS[name]
                )
        found[name] = limit
    return MappingProxyType(found)
