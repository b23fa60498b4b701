"""What is written onto the spans that Serve makes, and when Serve makes them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import pytest
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode, Tracer
from ray.serve._private import constants, tracing_utils

from deployments.observability import traces
from deployments.observability.events import (
    BatchRan,
    Event,
    GenerationFinished,
    RequestFinished,
    RequestStarted,
)
from deployments.observability.traces import Traces, serve_environment
from models.contracts import Priority, Timings, Usage
from models.errors import ConfigError
from tests.log_lines import LogLines

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}
USAGE = Usage(prompt_tokens=7, completion_tokens=3, cached_tokens=2)
TIMINGS = Timings(queue_s=0.5, prefill_s=0.25, ttft_s=0.75, decode_s=1.0, total_s=1.75)


class Spans:
    """Of a provider of its own; ``emit`` is called as on behalf of a request."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._provider = TracerProvider()
        self._provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer: Tracer = self._provider.get_tracer("tests")

    def of(self, *events: Event) -> dict[str, ReadableSpan]:
        emit = Traces(self.tracer)
        with self.tracer.start_as_current_span("replica_handle_request"):
            for event in events:
                emit(event)
        return {span.name: span for span in self._exporter.get_finished_spans()}


@pytest.fixture
def spans() -> Spans:
    return Spans()


def finished(status: int = 200, code: str | None = None) -> RequestFinished:
    return RequestFinished(
        request_id="r-1",
        route="/v1/chat/completions",
        method="POST",
        status=status,
        code=code,
        duration_s=2.0,
        model="tiny",
        priority=Priority.VIP,
        tenant="acme",
        ttft_s=0.8,
        usage=USAGE,
    )


def test_a_request_says_which_it_was_and_how_it_ended(spans: Spans) -> None:
    [span] = spans.of(finished()).values()
    assert span.name == "POST /v1/chat/completions"
    assert span.attributes == {
        "request_id": "r-1",
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.request.model": "tiny",
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3,
        "frontier.cached_tokens": 2,
        "frontier.priority": "vip",
        "frontier.tenant": "acme",
        "frontier.ttft_s": 0.8,
    }
    assert span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize(
    ("status", "code", "ours"),
    [
        (500, "INTERNAL", True),
        (200, "UPSTREAM_ERROR", True),
        (429, "OVERLOADED", False),
        (499, None, False),
    ],
)
def test_what_failed_by_our_fault_is_an_error(
    spans: Spans, status: int, code: str | None, ours: bool
) -> None:
    [span] = spans.of(finished(status, code)).values()
    assert span.attributes is not None
    assert span.attributes.get("error.type") == code
    assert span.status.status_code is (StatusCode.ERROR if ours else StatusCode.UNSET)


def test_an_answer_shows_where_its_time_went(spans: Spans) -> None:
    now = time.time_ns()
    found = spans.of(GenerationFinished(request_id="r-1", usage=USAGE, timings=TIMINGS))
    parent = found["replica_handle_request"]
    assert parent.attributes is not None
    assert parent.attributes["request_id"] == "r-1"
    phases = [found[name] for name in ("queue", "prefill", "decode")]
    assert {span.parent and span.parent.span_id for span in phases} == {parent.context.span_id}
    times = [(span.start_time or 0, span.end_time or 0) for span in phases]
    assert [(end - start) / 1e9 for start, end in times] == [0.5, 0.25, 1.0]
    assert times[0][1] == times[1][0]
    assert times[1][1] == times[2][0]
    assert 0 <= times[2][1] - now < 1e9, "it ended when it was told"


def test_other_events_are_no_business_of_a_request(spans: Spans) -> None:
    found = spans.of(
        BatchRan(model="tiny", rows=1, duration_s=1.0),
        RequestStarted(model="tiny", priority=Priority.VIP, queue_s=1.0),
    )
    assert [dict(span.attributes or {}) for span in found.values()] == [{}]


def test_nothing_is_traced_where_nobody_has_begun_a_span(spans: Spans) -> None:
    emit = Traces(spans.tracer)
    emit(finished())
    emit(GenerationFinished(request_id="r-1", usage=USAGE, timings=TIMINGS))
    assert list(spans.of()) == ["replica_handle_request"]


def test_a_line_of_the_log_names_its_trace(spans: Spans, log: LogLines) -> None:
    with spans.tracer.start_as_current_span("request") as span:
        logging.getLogger("deployments").info("in it")
    logging.getLogger("deployments").info("outside")
    within, outside = log.lines
    assert within["trace_id"] == trace.format_trace_id(span.get_span_context().trace_id)
    assert "trace_id" not in outside


def test_without_a_place_to_send_them_serve_traces_nothing() -> None:
    assert serve_environment({}) == {}
    assert serve_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "", "OTEL_SERVICE_NAME": "x"}) == {}


@pytest.mark.parametrize("name", traces.ENDPOINTS)
def test_serve_is_told_by_variables_that_it_reads(name: str) -> None:
    told = serve_environment({name: "http://collector:4318"})
    assert told == {
        traces.SERVE_EXPORTER: "deployments.observability.traces:processors",
        traces.SERVE_RATIO: "1",
        "OTEL_SERVICE_NAME": "frontier-run",
    }
    assert hasattr(constants, traces.SERVE_EXPORTER)
    assert hasattr(constants, traces.SERVE_RATIO)


def test_what_a_person_has_set_holds() -> None:
    chosen = ENDPOINT | {"OTEL_TRACES_SAMPLER_ARG": "0.1", "OTEL_SERVICE_NAME": "ours"}
    told = serve_environment(chosen)
    assert (told[traces.SERVE_RATIO], told["OTEL_SERVICE_NAME"]) == ("0.1", "ours")


@pytest.mark.parametrize("share", ["2", "-0.1", "half", "nan"])
def test_a_share_that_is_none_is_refused(share: str) -> None:
    with pytest.raises(ConfigError, match="OTEL_TRACES_SAMPLER_ARG") as refused:
        serve_environment(ENDPOINT | {"OTEL_TRACES_SAMPLER_ARG": share})
    assert share in str(refused.value)
    assert "0 to 1" in str(refused.value)


def test_serve_accepts_where_spans_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    path = serve_environment(ENDPOINT)[traces.SERVE_EXPORTER]
    load: Callable[[str, str], list[BatchSpanProcessor]] = tracing_utils._load_span_processors
    [processor] = load(path, "unused")
    assert isinstance(processor.span_exporter, OTLPSpanExporter)
    processor.shutdown()
