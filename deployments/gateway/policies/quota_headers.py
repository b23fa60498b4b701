"""Every answer to a tenant with limits says where they stand.

Ours (spec C2), OpenAI's, and the IETF's (draft-ietf-httpapi-ratelimit-headers).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.gateway.errors import speaks_openai
from deployments.gateway.exchange import exchange_of
from deployments.tenants.plans import WINDOWS_MS, LimitName
from state.counters import Level

NAMES = (
    "X-RateLimit-Limit-RPM",
    "X-RateLimit-Remaining-RPM",
    "X-RateLimit-Reset-Minute",
    "X-RateLimit-Limit",
    "X-RateLimit-Remaining",
    "X-RateLimit-Reset",
    "X-TokenLimit-Limit-PerMin",
    "X-TokenLimit-Remaining-PerMin",
    *(
        f"x-ratelimit-{what}-{of}"
        for of in ("requests", "tokens")
        for what in ("limit", "remaining", "reset")
    ),
    "RateLimit",
    "RateLimit-Policy",
)
"""All of them, for browsers, which let scripts read no others than they are told of."""


class QuotaHeaders:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = exchange_of(scope)

        async def send_with_levels(message: Message) -> None:
            if message["type"] == "http.response.start" and exchange.levels:
                told = headers(exchange.levels, openai=speaks_openai(scope["path"]))
                message["headers"] = [*message.get("headers", ()), *told]
            await send(message)

        await self.app(scope, receive, send_with_levels)


def headers(levels: Sequence[Level], *, openai: bool) -> list[tuple[bytes, bytes]]:
    by_name = {level.name: level for level in levels}
    requests = by_name.get(LimitName.REQUESTS_PER_MINUTE)
    tokens = by_name.get(LimitName.TOKENS_PER_MINUTE)
    told: list[tuple[bytes, bytes]] = []
    if requests is not None:
        limit, remaining = b"%d" % requests.amount, b"%d" % requests.remaining
        reset = b"%d" % _seconds(requests)
        told += [
            (b"x-ratelimit-limit-rpm", limit),
            (b"x-ratelimit-remaining-rpm", remaining),
            (b"x-ratelimit-reset-minute", reset),
            (b"x-ratelimit-limit", limit),
            (b"x-ratelimit-remaining", remaining),
            (b"x-ratelimit-reset", reset),
        ]
    if tokens is not None:
        told += [
            (b"x-tokenlimit-limit-permin", b"%d" % tokens.amount),
            (b"x-tokenlimit-remaining-permin", b"%d" % tokens.remaining),
        ]
    if openai:
        for what, level in ((b"requests", requests), (b"tokens", tokens)):
            if level is not None:
                told += [
                    (b"x-ratelimit-limit-" + what, b"%d" % level.amount),
                    (b"x-ratelimit-remaining-" + what, b"%d" % level.remaining),
                    (b"x-ratelimit-reset-" + what, b"%ds" % _seconds(level)),
                ]
    windowed = [(level, seconds) for level in levels if (seconds := WINDOWS.get(level.name))]
    if windowed:
        limits = [f'"{each.name}";r={each.remaining};t={_seconds(each)}' for each, _ in windowed]
        policy = [f'"{each.name}";q={each.amount};w={seconds}' for each, seconds in windowed]
        told += [
            (b"ratelimit", ", ".join(limits).encode()),
            (b"ratelimit-policy", ", ".join(policy).encode()),
        ]
    return told


WINDOWS: Mapping[str, int] = {str(name): ms // 1000 for name, ms in WINDOWS_MS.items()}


def _seconds(level: Level) -> int:
    return math.ceil(level.reset_ms / 1000)
