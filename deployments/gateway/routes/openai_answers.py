"""What chat and completions have in common: identity, usage, and the frame of a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import orjson

from deployments.gateway.errors import error_json, openai_error
from deployments.gateway.exchange import Exchange
from deployments.gateway.sse import SSE, SSE_COMMENT, SSE_DONE, one_line, sse_event, sse_place
from models.contracts import Delta, Place, Usage
from models.errors import PlatformError

FLOOR = -9999.0
"""OpenAI's figure for a token that cannot be; JSON has no minus infinity."""


class ChunkBody(Protocol):
    """The part of a chunk that chat and completions say differently."""

    def __call__(self, delta: Delta) -> dict[str, object] | None:
        """One entry of ``choices``; ``None`` when there is nothing to tell."""
        ...


def identity(prefix: str, object_: str, exchange: Exchange, created: float) -> dict[str, object]:
    return {
        "id": f"{prefix}-{exchange.id}",
        "object": object_,
        "created": int(created),
        "model": exchange.called,
    }


def usage_of(exchange: Exchange) -> dict[str, object]:
    usage = exchange.usage or Usage(prompt_tokens=0, completion_tokens=0)
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, FLOOR)


class Chunks:
    """The encoder of both routes. What never changes on a stream is turned into JSON once, with
    the first chunk: only then is it sure which model answers.
    """

    media_type = SSE
    keepalive = SSE_COMMENT

    def __init__(
        self, identity: Callable[[], dict[str, object]], choice: ChunkBody, *, include_usage: bool
    ) -> None:
        self._identity = identity
        self._choice = choice
        self._include_usage = include_usage
        self._head = b""
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def place(self, place: Place) -> bytes:
        return sse_place(place)

    def deltas(self, deltas: Sequence[Delta]) -> bytes:
        if not self._head:
            self._head = b"data: " + orjson.dumps(self._identity())[:-1] + b',"choices":['
        return b"".join(
            [
                self._head + one_line(orjson.dumps(choice)) + self._tail
                for delta in deltas
                if (choice := self._choice(delta)) is not None
            ]
        )

    def end(self, exchange: Exchange) -> bytes:
        if not self._include_usage:
            return SSE_DONE
        chunk = {**self._identity(), "choices": [], "usage": usage_of(exchange)}
        return sse_event(orjson.dumps(chunk)) + SSE_DONE

    def failure(self, error: PlatformError) -> bytes:
        return sse_event(error_json(openai_error(error)))
