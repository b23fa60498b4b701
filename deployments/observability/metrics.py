"""Every metric of the platform, and how an event becomes one. Pure: no metrics library.

The constants below are the whole table: name, kind, help, labels, bucket bounds. Values
are seconds, tokens or counts. No label grows with traffic: never a request, a key or a
user (what a tenant used is in the ledger). On its way out every series also gets the
``node`` it was measured on, and a gauge the ``replica`` (see ``exposition.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeAlias

from deployments.observability.events import (
    AdapterEvicted,
    AdapterFailed,
    AdapterLoaded,
    AdaptersResident,
    AlertRaised,
    BatchFailed,
    BatchRan,
    BudgetReached,
    CacheAsked,
    EngineState,
    Event,
    GuardrailActed,
    QuotaDenied,
    RequestFinished,
    RequestPreempted,
    RequestShed,
    RequestStarted,
)


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """One family. Compared by identity, so that it is a cheap dictionary key."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds, ascending, without infinity."""


LabelValues: TypeAlias = tuple[str, ...]
"""In the order of ``Metric.labels``; an empty string where the fact is unknown."""


class Sink(Protocol):
    """Where measurements go: one method a kind of metric."""

    def add(self, counter: Metric, labels: LabelValues, amount: float) -> None: ...
    def observe(self, histogram: Metric, labels: LabelValues, value: float) -> None: ...
    def set(self, gauge: Metric, labels: LabelValues, value: float) -> None: ...


# The first two rows of buckets are those of the OpenTelemetry gen_ai conventions.
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_TPOT = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_REQUEST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.6, 1, 1.5, 2.5, 5, 10, 30, 60, 120, 300)
_WAIT = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_OVERHEAD = (0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.012, 0.02, 0.05, 0.1, 0.5)
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.2, 0.5, 1, 2.5)
_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256)

# The edge.
REQUESTS = Metric(
    "frontier_requests_total",
    Kind.COUNTER,
    "Answered requests; code is the error's, also when a stream failed after a 200.",
    ("route", "method", "status", "code", "model", "priority"),
)
REQUEST_SECONDS = Metric(
    "frontier_request_duration_seconds",
    Kind.HISTOGRAM,
    "Arrival at the gateway to the last byte of the answer.",
    ("route", "model", "priority"),
    _REQUEST,
)
TTFT_SECONDS = Metric(
    "frontier_time_to_first_token_seconds",
    Kind.HISTOGRAM,
    "Arrival at the gateway to the first token, queue included.",
    ("model", "priority"),
    _TTFT,
)
TPOT_SECONDS = Metric(
    "frontier_time_per_output_token_seconds",
    Kind.HISTOGRAM,
    "(End-to-end - TTFT) / (tokens - 1) of requests that succeeded.",
    ("model", "priority"),
    _TPOT,
)
PREFILL_SECONDS = Metric(
    "frontier_prefill_seconds",
    Kind.HISTOGRAM,
    "Joining the batch to the first token.",
    ("model",),
    _TTFT,
)
DECODE_SECONDS = Metric(
    "frontier_decode_seconds",
    Kind.HISTOGRAM,
    "First token to the last.",
    ("model",),
    _REQUEST,
)
OVERHEAD_SECONDS = Metric(
    "frontier_gateway_overhead_seconds",
    Kind.HISTOGRAM,
    "The request's duration minus what its engine took, of requests that succeeded.",
    ("model",),
    _OVERHEAD,
)
PROMPT_TOKENS = Metric(
    "frontier_prompt_tokens_total",
    Kind.COUNTER,
    "Prompt tokens of finished requests.",
    ("model", "priority"),
)
CACHED_TOKENS = Metric(
    "frontier_cached_prompt_tokens_total",
    Kind.COUNTER,
    "Prompt tokens that were reused instead of computed.",
    ("model", "priority"),
)
COMPLETION_TOKENS = Metric(
    "frontier_completion_tokens_total",
    Kind.COUNTER,
    "New tokens of finished requests.",
    ("model", "priority"),
)
CACHE_REQUESTS = Metric(
    "frontier_cache_requests_total",
    Kind.COUNTER,
    "Generator calls and inputs to embed that may be cached, by outcome: hit, join, miss.",
    ("model", "outcome"),
)

# What was said no to, and what somebody should hear of.
GUARDRAIL_ACTIONS = Metric(
    "frontier_guardrail_actions_total",
    Kind.COUNTER,
    "Finds of the guardrails: masked, refused, rerouted; unavailable, unchecked: not looked at.",
    ("guardrail", "category", "action", "direction"),
)
QUOTA_DENIED = Metric(
    "frontier_quota_denied_total",
    Kind.COUNTER,
    "Requests refused because a limit of their tenant is reached.",
    ("limit",),
)
BUDGET_REACHED = Metric(
    "frontier_budget_reached_total",
    Kind.COUNTER,
    "Shares of a budget that a gateway saw reached, in percent; each gateway sees for itself.",
    ("percent",),
)
ALERTS = Metric(
    "frontier_alerts_total",
    Kind.COUNTER,
    "Alerts raised, each counted once in the cluster.",
    ("kind", "percent"),
)

# The queue in front of a model.
QUEUE_DEPTH = Metric(
    "frontier_queue_depth",
    Kind.GAUGE,
    "Requests that wait in a replica.",
    ("model", "priority"),
)
QUEUE_SECONDS = Metric(
    "frontier_queue_wait_seconds",
    Kind.HISTOGRAM,
    "Arrival at the replica to joining a batch.",
    ("model", "priority"),
    _WAIT,
)
SHED = Metric(
    "frontier_shed_total",
    Kind.COUNTER,
    "Requests refused or dropped while waiting: full, expired, cancelled.",
    ("model", "priority", "reason"),
)
PREEMPTED = Metric(
    "frontier_preempted_total",
    Kind.COUNTER,
    "Requests that left the batch for one of a higher priority, to go on later.",
    ("model", "priority"),
)

# The work itself.
RUNNING = Metric(
    "frontier_running_sequences",
    Kind.GAUGE,
    "Sequences in the batch of a replica.",
    ("model",),
)
BATCH_ROWS = Metric(
    "frontier_batch_size",
    Kind.HISTOGRAM,
    "Sequences, or inputs, computed together in one step.",
    ("model",),
    _ROWS,
)
STEP_SECONDS = Metric(
    "frontier_step_duration_seconds",
    Kind.HISTOGRAM,
    "One step of an engine, or one batch of a predictor.",
    ("model",),
    _STEP,
)
STEP_TOKENS = Metric(
    "frontier_step_tokens_total",
    Kind.COUNTER,
    "Tokens computed, by phase: prefill, decode.",
    ("model", "phase"),
)
BATCH_FAILURES = Metric(
    "frontier_batch_failures_total",
    Kind.COUNTER,
    "Steps that raised.",
    ("model",),
)

# Adapters of a model; which ones is in the answer of the admin routes.
ADAPTER_LOADS = Metric(
    "frontier_adapter_loads_total",
    Kind.COUNTER,
    "Adapters read by a replica, and those that could not be: loaded, failed.",
    ("model", "outcome"),
)
ADAPTER_LOAD_SECONDS = Metric(
    "frontier_adapter_load_seconds",
    Kind.HISTOGRAM,
    "Checking and reading an adapter.",
    ("model",),
    _WAIT,
)
ADAPTER_EVICTIONS = Metric(
    "frontier_adapter_evictions_total",
    Kind.COUNTER,
    "Adapters that made room for others.",
    ("model",),
)
ADAPTERS = Metric(
    "frontier_adapters",
    Kind.GAUGE,
    "Adapters in a replica's memory.",
    ("model",),
)
ADAPTER_BYTES = Metric(
    "frontier_adapter_bytes",
    Kind.GAUGE,
    "Memory of a replica's adapters.",
    ("model",),
)

TABLE: tuple[Metric, ...] = tuple(v for v in tuple(globals().values()) if isinstance(v, Metric))


def record(event: Event, sink: Sink) -> None:
    """Turn one event into measurements; an event that no metric needs is ignored."""
    match event:
        case BatchRan():
            _batch_ran(event, sink)
        case EngineState():
            sink.set(RUNNING, (event.model,), event.running)
            for priority, depth in event.waiting.items():
                sink.set(QUEUE_DEPTH, (event.model, priority.value), depth)
        case RequestStarted():
            sink.observe(QUEUE_SECONDS, (event.model, event.priority.value), event.queue_s)
        case RequestFinished():
            _request_finished(event, sink)
        case RequestShed():
            sink.add(SHED, (event.model, event.priority.value, event.reason), 1)
        case RequestPreempted():
            sink.add(PREEMPTED, (event.model, event.priority.value), 1)
        case BatchFailed():
            sink.add(BATCH_FAILURES, (event.model,), 1)
        case AdapterLoaded():
            sink.add(ADAPTER_LOADS, (event.model, "loaded"), 1)
            sink.observe(ADAPTER_LOAD_SECONDS, (event.model,), event.duration_s)
        case AdapterFailed():
            sink.add(ADAPTER_LOADS, (event.model, "failed"), 1)
        case AdapterEvicted():
            sink.add(ADAPTER_EVICTIONS, (event.model,), 1)
        case AdaptersResident():
            sink.set(ADAPTERS, (event.model,), event.adapters)
            sink.set(ADAPTER_BYTES, (event.model,), event.bytes)
        case CacheAsked():
            sink.add(CACHE_REQUESTS, (event.model, event.outcome.value), event.times)
        case GuardrailActed():
            of = (event.guardrail, event.category, event.done.value, event.way.value)
            sink.add(GUARDRAIL_ACTIONS, of, event.times)
        case QuotaDenied():
            sink.add(QUOTA_DENIED, (event.limit,), 1)
        case BudgetReached():
            sink.add(BUDGET_REACHED, (str(round(event.share * 100)),), 1)
        case AlertRaised():
            sink.add(ALERTS, (event.kind, str(event.threshold)), 1)


def _batch_ran(event: BatchRan, sink: Sink) -> None:
    model = (event.model,)
    sink.observe(BATCH_ROWS, model, event.rows)
    sink.observe(STEP_SECONDS, model, event.duration_s)
    if event.prefill_tokens:
        sink.add(STEP_TOKENS, (event.model, "prefill"), event.prefill_tokens)
    if event.decode_tokens:
        sink.add(STEP_TOKENS, (event.model, "decode"), event.decode_tokens)


def _request_finished(event: RequestFinished, sink: Sink) -> None:
    model = event.model or ""
    priority = event.priority.value if event.priority else ""
    status, code = str(event.status), event.code or ""
    sink.add(REQUESTS, (event.route, event.method, status, code, model, priority), 1)
    sink.observe(REQUEST_SECONDS, (event.route, model, priority), event.duration_s)

    succeeded = event.code is None and event.status < 400
    usage, timings = event.usage, event.timings
    # An answer that is not streamed has its first byte at the end; there the engine's
    # own clock tells when the first token was made.
    ttft_s = event.ttft_s
    decode_s = None if ttft_s is None else max(0.0, event.duration_s - ttft_s)
    if timings is not None:
        if ttft_s is None:
            ttft_s, decode_s = timings.ttft_s, timings.decode_s
        sink.observe(PREFILL_SECONDS, (model,), timings.prefill_s)
        sink.observe(DECODE_SECONDS, (model,), timings.decode_s)
        if succeeded:
            # Two processes, two clocks: a difference of nothing can come out negative.
            overhead_s = max(0.0, event.duration_s - timings.total_s)
            sink.observe(OVERHEAD_SECONDS, (model,), overhead_s)
    if ttft_s is not None:
        sink.observe(TTFT_SECONDS, (model, priority), ttft_s)
    if usage is not None:
        sink.add(PROMPT_TOKENS, (model, priority), usage.prompt_tokens)
        sink.add(COMPLETION_TOKENS, (model, priority), usage.completion_tokens)
        if usage.cached_tokens:
            sink.add(CACHED_TOKENS, (model, priority), usage.cached_tokens)
        steps = usage.completion_tokens / event.choices - 1  # choices decode side by side
        if succeeded and decode_s is not None and steps > 0:
            tpot_s = decode_s / steps
            sink.observe(TPOT_SECONDS, (model, priority), tpot_s)
