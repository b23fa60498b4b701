"""Clients of an engine, for tests: ask, collect, wait, look at events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, cast

from deployments.engines.engine import Engine
from deployments.observability.events import Event
from models.contracts import Delta, GenerateRequest, Sampling

Start = Callable[..., Engine]
Tiny = Callable[[str], Path]

GREEDY = Sampling(temperature=0.0, ignore_eos=True)
LONG = tuple(i * 7 % 251 for i in range(60))


def request(
    prompt: Any = (1, 2, 3), sampling: Sampling = GREEDY, **options: Any
) -> GenerateRequest:
    return GenerateRequest(
        **{"id": "r", "model": "tiny", "prompt": prompt, "sampling": sampling, **options}
    )


def greedy(max_tokens: int | None = None, **options: Any) -> Sampling:
    return Sampling(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens, **options})


def stream(engine: Engine, what: GenerateRequest) -> AsyncGenerator[Delta, None]:
    return cast("AsyncGenerator[Delta, None]", engine.generate(what))


async def answer(engine: Engine, what: GenerateRequest) -> list[Delta]:
    async with asyncio.timeout(240):
        return [delta async for delta in engine.generate(what)]


def tokens(deltas: list[Delta], index: int = 0) -> list[int]:
    return [token for delta in deltas if delta.index == index for token in delta.token_ids]


def text(deltas: list[Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the engine's thread does."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  # there is nothing to be told by
            await asyncio.sleep(0.001)


async def idle(engine: Engine) -> None:
    await until(lambda: engine._scheduler.idle)
    engine.check_integrity()


def kinds(events: list[Event], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]
