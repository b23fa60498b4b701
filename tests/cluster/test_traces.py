"""One trace over gateway, choice of a replica, engine and its phases, at a receiver of OTLP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from deployments.launcher.background import Served
from tests.cluster.conftest import serving, tiny_args, wait_until
from tests.cluster.registered import chat

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

PHASES = ("queue", "prefill", "decode")


class Collector:
    """What OpenTelemetry's collector does first: takes spans by HTTP, in protobuf."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["content-length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for attribute in resource.resource.attributes:
                        if attribute.key == "service.name":
                            collector.services.add(attribute.value.string_value)
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @contextmanager
    def listening(self) -> Iterator[str]:
        thread = threading.Thread(target=self.server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{self.server.server_port}"
        finally:
            self.server.shutdown()
            thread.join()
            self.server.server_close()

    def trace(self, trace_id: str) -> dict[str, Span]:
        found = [span for span in self.spans if span.trace_id.hex() == trace_id]
        named = {span.name: span for span in found}
        assert len(named) == len(found)
        return named


@pytest.fixture(scope="module")
def collector() -> Collector:
    return Collector()


@pytest.fixture(scope="module")
def traced(
    long_llama: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    config = tiny_args(long_llama, replicas=1, slots=4)
    with collector.listening() as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        with serving(config, tmp_path_factory.mktemp("traced")) as platform:
            yield platform


def attributes(span: Span) -> dict[str, str | int]:
    return {each.key: each.value.string_value or each.value.int_value for each in span.attributes}


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
def test_a_request_is_one_trace_with_its_id(
    traced: Served, collector: Collector, streamed: bool
) -> None:
    trace_id = ("a" if streamed else "b") * 32
    headers = {"traceparent": f"00-{trace_id}-{'c' * 16}-01", "x-request-id": f"mine-{streamed}"}
    url = f"{traced.url}/v1/completions"
    answer = httpx.post(url, json=chat("tiny") | {"stream": streamed}, headers=headers, timeout=60)
    assert answer.status_code == 200

    request = "POST /v1/completions"

    def arrived() -> bool:
        return {request, *PHASES} <= collector.trace(trace_id).keys()

    wait_until(arrived, timeout_s=20, what="all spans of the request")
    spans = collector.trace(trace_id)
    gateway = spans.pop(request)
    phases = [spans.pop(name) for name in PHASES]
    [choice] = [span for name, span in spans.items() if name.startswith("route_to_replica tiny")]
    [engine] = [span for name, span in spans.items() if name.startswith("replica_handle_request")]
    assert len(spans) == 2

    assert gateway.parent_span_id.hex() == "c" * 16
    assert choice.parent_span_id == gateway.span_id
    assert engine.parent_span_id == choice.span_id
    assert {span.parent_span_id for span in phases} == {engine.span_id}
    assert attributes(gateway)["request_id"] == f"mine-{streamed}"
    assert attributes(gateway)["http.response.status_code"] == 200
    assert attributes(engine)["request_id"] == f"mine-{streamed}"
    assert attributes(engine)["gen_ai.usage.output_tokens"] == 8
    began, ended = gateway.start_time_unix_nano, gateway.end_time_unix_nano
    assert began <= engine.start_time_unix_nano <= engine.end_time_unix_nano <= ended
    assert all(began <= phase.start_time_unix_nano for phase in phases)
    assert all(phase.end_time_unix_nano <= ended for phase in phases)
    assert collector.services == {"frontier-run"}


def test_a_refusal_is_found_by_the_id_that_the_client_was_told(
    traced: Served, collector: Collector
) -> None:
    trace_id = "d" * 32
    headers = {"traceparent": f"00-{trace_id}-{'c' * 16}-01"}
    url = f"{traced.url}/v1/completions"
    answer = httpx.post(url, json=chat("absent"), headers=headers, timeout=60)
    wait_until(lambda: bool(collector.trace(trace_id)), timeout_s=20, what="the span")
    [span] = collector.trace(trace_id).values()
    told = attributes(span)
    assert told["request_id"] == answer.headers["x-request-id"]
    assert (told["http.response.status_code"], told["error.type"]) == (404, "NOT_FOUND")
    assert span.status.code == Status.STATUS_CODE_UNSET, "the fault is not ours"


def test_a_request_whose_caller_does_not_trace_it_is_not_traced(
    traced: Served, collector: Collector
) -> None:
    trace_id = "e" * 32
    headers = {"traceparent": f"00-{trace_id}-{'c' * 16}-00"}
    assert httpx.get(f"{traced.url}/v1/models", headers=headers, timeout=60).status_code == 200
    after = {"traceparent": f"00-{'f' * 32}-{'c' * 16}-01"}
    assert httpx.get(f"{traced.url}/v1/models", headers=after, timeout=60).status_code == 200
    wait_until(lambda: bool(collector.trace("f" * 32)), timeout_s=20, what="the later span")
    assert not collector.trace(trace_id)
