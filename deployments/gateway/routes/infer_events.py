"""What a streamed inference tells, as server-sent events, NDJSON lines or socket messages.

``token`` carries new text, ``done`` closes with the summary, ``error`` closes with the
error envelope.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from deployments.gateway.errors import error_envelope, error_json
from deployments.gateway.exchange import Exchange
from deployments.gateway.services import Services
from deployments.gateway.sse import NDJSON, SSE, SSE_COMMENT, ndjson_line, sse_event, sse_place
from models.contracts import Delta, FinishReason, Place, Timings, Usage
from models.errors import PlatformError


class InferEvents:
    """The encoder for one request, which has one choice."""

    media_type = SSE
    keepalive = SSE_COMMENT

    def __init__(self, services: Services, exchange: Exchange) -> None:
        self._services = services
        self._exchange = exchange
        self._finish_reason: FinishReason | None = None

    def frame(self, event: bytes, data: bytes) -> bytes:
        return sse_event(data, event)

    def place(self, place: Place) -> bytes:
        return sse_place(place)

    def deltas(self, deltas: Sequence[Delta]) -> bytes:
        self._finish_reason = deltas[-1].finish_reason
        text = "".join([delta.text for delta in deltas])
        return self.frame(b"token", b'{"text":' + orjson.dumps(text) + b"}") if text else b""

    def end(self, exchange: Exchange) -> bytes:
        data = summary(self._services, exchange, self._finish_reason)
        return self.frame(b"done", orjson.dumps(data))

    def failure(self, error: PlatformError) -> bytes:
        body = error_envelope(self._exchange.id, self._services.now(), error)
        return self.frame(b"error", error_json(body))


class InferLines(InferEvents):
    """The same as one JSON object a line."""

    media_type = NDJSON
    keepalive = ndjson_line(b"null", b"keep-alive")

    def place(self, place: Place) -> bytes:
        told = {"position": place.position, "waiting": place.waiting, "wait_s": place.wait_s}
        return self.frame(b"queue", orjson.dumps(told))

    def frame(self, event: bytes, data: bytes) -> bytes:
        return ndjson_line(data, event)


def summary(
    services: Services, exchange: Exchange, finish_reason: FinishReason | None
) -> dict[str, object]:
    """How a request ended; durations in milliseconds."""
    usage = exchange.usage or Usage(prompt_tokens=0, completion_tokens=0)
    return {
        "id": exchange.id,
        "model": exchange.called,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
        },
        "latency_ms": _ms(services.clock() - exchange.arrived),
        "finish_reason": finish_reason,
        "timings": None if exchange.timings is None else _timings(exchange.timings),
    }


def _timings(timings: Timings) -> dict[str, float]:
    return {
        "queue_ms": _ms(timings.queue_s),
        "prefill_ms": _ms(timings.prefill_s),
        "ttft_ms": _ms(timings.ttft_s),
        "decode_ms": _ms(timings.decode_s),
        "total_ms": _ms(timings.total_s),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
