"""Traces by OpenTelemetry, sent by OTLP where ``OTEL_EXPORTER_OTLP_ENDPOINT`` says.

Serve makes the spans: one for a request in the gateway, as a child of the ``traceparent`` that came
with it, one for each choice of a replica, one for the call in the replica. What it does not know is
added here: which request it was, how it ended, and where the engine's time went.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import Span, Status, StatusCode, Tracer
from opentelemetry.util.types import AttributeValue

from deployments.observability.events import Event, GenerationFinished, RequestFinished
from models.contracts import Usage
from models.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
RATIO = "OTEL_TRACES_SAMPLER_ARG"
SERVICE = "OTEL_SERVICE_NAME"
SERVE_EXPORTER = "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"
SERVE_RATIO = "RAY_SERVE_TRACING_SAMPLING_RATIO"


def serve_environment(env: Mapping[str, str]) -> dict[str, str]:
    """What makes Serve trace, in the environment of a replica; empty without an endpoint.

    How many requests are traced, of those that do not come with a decision about that, is
    ``OTEL_TRACES_SAMPLER_ARG``, a share; all unless it is there.

    Raises:
        ConfigError: the share is none.
    """
    if not any(env.get(name) for name in ENDPOINTS):
        return {}
    share = env.get(RATIO) or "1"
    try:
        valid = 0 <= float(share) <= 1
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"{RATIO} is {share!r:.50}; expected a share of requests, 0 to 1")
    return {
        SERVE_EXPORTER: f"{__name__}:{processors.__name__}",
        SERVE_RATIO: share,
        SERVICE: env.get(SERVICE) or "frontier-run",
    }


def processors() -> list[SpanProcessor]:
    """Where spans of this process go. Serve calls it in each replica.

    All that OpenTelemetry's own variables say of the way there holds.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(f"traces need pip install 'frontier-run[traces]': {error}") from error
    return [BatchSpanProcessor(OTLPSpanExporter())]


class Traces:
    """A subscriber: writes onto the span of the request on whose behalf an event is emitted."""

    def __init__(self, tracer: Tracer | None = None) -> None:
        self._tracer = tracer or trace.get_tracer(__name__)

    def __call__(self, event: Event) -> None:
        if not isinstance(event, (RequestFinished, GenerationFinished)):
            return
        span = trace.get_current_span()
        if not span.is_recording():
            return
        if isinstance(event, RequestFinished):
            _describe(span, event)
        else:
            self._account(span, event)

    def _account(self, span: Span, event: GenerationFinished) -> None:
        """Lay the engine's phases out, as they went by until now."""
        timings = event.timings
        span.set_attributes({"request_id": event.request_id, **_tokens(event.usage)})
        at = time.time_ns() - _ns(timings.total_s)
        for phase, duration_s in (
            ("queue", timings.queue_s),
            ("prefill", timings.prefill_s),
            ("decode", timings.decode_s),
        ):
            child = self._tracer.start_span(phase, start_time=at)
            at += _ns(duration_s)
            child.end(at)


def _describe(span: Span, event: RequestFinished) -> None:
    """By OpenTelemetry's conventions of HTTP servers and of generative models, and our own."""
    span.update_name(f"{event.method} {event.route}")
    attributes: dict[str, AttributeValue | None] = {
        "request_id": event.request_id,
        "http.request.method": event.method,
        "http.route": event.route,
        "http.response.status_code": event.status,
        "error.type": event.code,
        "gen_ai.request.model": event.model,
        "frontier.adapter": event.adapter,
        "frontier.cache": event.outcome and event.outcome.value,
        "frontier.priority": event.priority and event.priority.value,
        "frontier.tenant": event.tenant,
        "frontier.ttft_s": event.ttft_s,
    }
    span.set_attributes({name: value for name, value in attributes.items() if value is not None})
    if event.usage is not None:
        span.set_attributes(_tokens(event.usage))
    if event.failed:
        span.set_status(Status(StatusCode.ERROR, event.code))


def _tokens(usage: Usage) -> dict[str, AttributeValue]:
    return {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "frontier.cached_tokens": usage.cached_tokens,
    }


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
