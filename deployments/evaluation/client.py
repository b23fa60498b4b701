"""One question to a served model, as a client asks it, with a watch in hand."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from models.contracts import Json
from models.errors import ConfigError, UpstreamError

NO_STORE = {"cache-control": "no-store"}
"""What is measured is the model, not the gateway's cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back; ``error`` if it did not come whole."""

    output: Json = None
    error: str | None = None
    latency_s: float = 0.0
    ttft_s: float | None = None
    """To the first text of a stream."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    version: str | None = None
    """NAME@VERSION, where the answer says it."""


class Client:
    """Asks one model.

    Args:
        http: with the gateway's address, and a timeout.
        model: as a request names it.
    """

    def __init__(
        self,
        http: httpx.AsyncClient,
        model: str,
        *,
        max_tokens: int = 64,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._http = http
        self._model = model
        self._max_tokens = max_tokens
        self._clock = clock

    async def chat(self, messages: list[dict[str, str]]) -> Answer:
        """The greedy answer, streamed.

        Raises:
            ConfigError: the model refuses the request as it is; no other try will help.
        """
        began = self._clock()
        body = {
            "model": self._model,
            "messages": messages,
            "max_tokens": self._max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        text, first, done = "", None, False
        usage: dict[str, int] = {}
        try:
            async with self._http.stream(
                "POST", "/v1/chat/completions", json=body, headers=NO_STORE
            ) as response:
                if response.status_code != 200:
                    return self._failure(response.status_code, await response.aread(), began)
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        done = True
                    elif line.startswith("data: "):
                        chunk = json.loads(line.removeprefix("data: "))
                        if "error" in chunk:
                            raise UpstreamError(chunk["error"]["message"])
                        usage = chunk.get("usage") or usage
                        for choice in chunk["choices"]:
                            text += choice["delta"].get("content") or ""
                        if text and first is None:
                            first = self._clock() - began
            if not done:
                raise UpstreamError("the stream ended before its end")
        except (httpx.HTTPError, UpstreamError, ValueError) as error:
            return Answer(error=_told(error), latency_s=self._clock() - began)
        return Answer(
            output=text,
            latency_s=self._clock() - began,
            ttft_s=first,
            prompt_tokens=usage.get("prompt_tokens", 0),
            completion_tokens=usage.get("completion_tokens", 0),
        )

    async def predict(self, input: Json) -> Answer:
        """What the model says of one input.

        Raises:
            ConfigError: the model refuses the input.
        """
        began = self._clock()
        route = f"/v1/models/{self._model}/predict"
        try:
            response = await self._http.post(route, json={"inputs": [input]})
            if response.status_code != 200:
                return self._failure(response.status_code, response.content, began)
            data = response.json()["data"]
            [output] = data["predictions"]
        except (httpx.HTTPError, ValueError) as error:
            return Answer(error=_told(error), latency_s=self._clock() - began)
        return Answer(output=output, latency_s=self._clock() - began, version=data.get("version"))

    def _failure(self, status: int, body: bytes, began: float) -> Answer:
        message = f"{status} {_message(body)}"
        if 400 <= status < 500 and status != 429:
            raise ConfigError(f"{self._model} at {self._http.base_url} refuses: {message}")
        return Answer(error=message, latency_s=self._clock() - began)


def _message(body: bytes) -> str:
    try:
        tree: Any = json.loads(body)
        return str(tree["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
