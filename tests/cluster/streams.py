"""Clients of the served platform that tell what became of their request."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass(slots=True)
class Outcome:
    """What one streaming client saw."""

    status: int = 0
    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    done: bool = False
    headers: httpx.Headers = field(default_factory=httpx.Headers)

    @property
    def complete(self) -> bool:
        return self.status == 200 and self.finish_reason is not None and self.done


async def stream(
    client: httpx.AsyncClient,
    *,
    max_tokens: int,
    model: str = "tiny",
    prompt: str = "Hello",
    begun: asyncio.Event | None = None,
) -> Outcome:
    """One streamed completion, read to its end; ``begun`` is set at its first text."""
    outcome = Outcome()
    body = completion(model, prompt, max_tokens) | {
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with client.stream("POST", "/v1/completions", json=body) as response:
        outcome.status = response.status_code
        outcome.headers = response.headers
        if response.status_code != 200:
            outcome.error = json.loads(await response.aread())["error"]
            return outcome
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                outcome.done = True
            elif line.startswith("data: "):
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    outcome.error = chunk["error"]
                    continue
                if chunk.get("usage"):
                    outcome.tokens = chunk["usage"]["completion_tokens"]
                for choice in chunk["choices"]:
                    outcome.text += choice["text"]
                    if outcome.text and begun is not None:
                        begun.set()
                    outcome.finish_reason = choice["finish_reason"] or outcome.finish_reason
    return outcome


async def whole(
    client: httpx.AsyncClient, *, max_tokens: int, model: str = "tiny", prompt: str = "Hello"
) -> Outcome:
    """The same, answered in one piece."""
    response = await client.post("/v1/completions", json=completion(model, prompt, max_tokens))
    outcome = Outcome(status=response.status_code, headers=response.headers)
    if response.status_code != 200:
        outcome.error = response.json()["error"]
        return outcome
    answer = response.json()
    choice = answer["choices"][0]
    outcome.text, outcome.finish_reason = choice["text"], choice["finish_reason"]
    outcome.tokens = answer["usage"]["completion_tokens"]
    outcome.done = True
    return outcome


def completion(model: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    """A body that gets exactly ``max_tokens``, the same ones each time."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
