"""Answers that are known as a whole before the first byte goes out."""

from __future__ import annotations

import orjson
from starlette.responses import Response

from deployments.gateway.errors import envelope
from deployments.gateway.exchange import Exchange
from deployments.gateway.services import Services


def json_response(value: object, headers: dict[str, str] | None = None) -> Response:
    # Vectors may come as NumPy arrays; orjson writes them without a copy.
    body = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, 200, headers, "application/json")


def enveloped(
    services: Services, exchange: Exchange, data: object, headers: dict[str, str] | None = None
) -> Response:
    return json_response(envelope(exchange.id, services.now(), data), headers)


def server_timing(services: Services, exchange: Exchange) -> dict[str, str]:
    """Where the time went, as the header browsers and tracing tools read (milliseconds)."""
    timings = exchange.timings
    if timings is None:
        return {}
    gateway_s = services.clock() - exchange.arrived - timings.total_s
    shares = {
        "queue": timings.queue_s,
        "prefill": timings.prefill_s,
        "decode": timings.decode_s,
        "gateway": max(0.0, gateway_s),
    }
    return {
        "server-timing": ", ".join(
            f"{name};dur={seconds * 1000:.2f}" for name, seconds in shares.items()
        )
    }
