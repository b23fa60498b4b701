"""Every answer to a tenant with limits says where they stand.

Ours (spec C2), OpenAI's, and the IETF's (draft-ietf-httpapi-ratelimit-headers).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.gateway.errors import speaks_openai
from deployments.gateway.exchange import exchange_of
from deployments.tenants.plans import WINDOWS_MS, LimitName
from state.counters import Level


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
                message["headers"] = [
                    *message.get("headers", ()),
                    *((name.encode(), value.encode()) for name, value in told),
                ]
            await send(message)

        await self.app(scope, receive, send_with_levels)


def headers(levels: Sequence[Level], *, openai: bool) -> Iterator[tuple[str, str]]:
    by_name = {level.name: level for level in levels}
    requests = by_name.get(LimitName.REQUESTS_PER_MINUTE)
    tokens = by_name.get(LimitName.TOKENS_PER_MINUTE)
    if requests is not None:
        yield "x-ratelimit-limit-rpm", str(requests.amount)
        yield "x-ratelimit-remaining-rpm", str(requests.remaining)
        yield "x-ratelimit-reset-minute", str(_seconds(requests))
        yield "x-ratelimit-limit", str(requests.amount)
        yield "x-ratelimit-remaining", str(requests.remaining)
        yield "x-ratelimit-reset", str(_seconds(requests))
    if tokens is not None:
        yield "x-tokenlimit-limit-permin", str(tokens.amount)
        yield "x-tokenlimit-remaining-permin", str(tokens.remaining)
    if openai:
        for what, level in (("requests", requests), ("tokens", tokens)):
            if level is not None:
                yield f"x-ratelimit-limit-{what}", str(level.amount)
                yield f"x-ratelimit-remaining-{what}", str(level.remaining)
                yield f"x-ratelimit-reset-{what}", f"{_seconds(level)}s"
    windowed = {name: level for name, level in by_name.items() if name in WINDOWS}
    if windowed:
        yield (
            "ratelimit",
            ", ".join(
                f'"{name}";r={level.remaining};t={_seconds(level)}'
                for name, level in windowed.items()
            ),
        )
        yield (
            "ratelimit-policy",
            ", ".join(
                f'"{name}";q={level.amount};w={WINDOWS[name]}' for name, level in windowed.items()
            ),
        )


WINDOWS: Mapping[str, int] = {str(name): ms // 1000 for name, ms in WINDOWS_MS.items()}


def _seconds(level: Level) -> int:
    return math.ceil(level.reset_ms / 1000)
