"""The table is well-formed, and each event becomes the measurements that it should."""

import re

import pytest

from deployments.caching.reuse import Outcome
from deployments.guardrails.kinds import Done, Way
from deployments.observability import metrics
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
from deployments.observability.merging import FAMILIES
from deployments.observability.metrics import TABLE, Kind, LabelValues, Metric, record
from models.contracts import Priority, Timings, Usage


class ListSink:
    """Keeps measurements as they come."""

    def __init__(self) -> None:
        self.seen: list[tuple[Metric, LabelValues, float]] = []

    def _keep(self, kind: Kind, metric: Metric, labels: LabelValues, value: float) -> None:
        assert metric.kind is kind
        assert len(labels) == len(metric.labels)
        self.seen.append((metric, labels, value))

    def add(self, counter: Metric, labels: LabelValues, amount: float) -> None:
        self._keep(Kind.COUNTER, counter, labels, amount)

    def observe(self, histogram: Metric, labels: LabelValues, value: float) -> None:
        self._keep(Kind.HISTOGRAM, histogram, labels, value)

    def set(self, gauge: Metric, labels: LabelValues, value: float) -> None:
        self._keep(Kind.GAUGE, gauge, labels, value)


def measured(event: Event) -> dict[tuple[Metric, LabelValues], float]:
    sink = ListSink()
    record(event, sink)
    return {(metric, labels): value for metric, labels, value in sink.seen}


TIMINGS = Timings(queue_s=0.5, prefill_s=0.25, ttft_s=0.75, decode_s=1.0, total_s=1.75)


def finished(**changes: object) -> RequestFinished:
    facts: dict[str, object] = {
        "request_id": "r1",
        "route": "/v1/chat/completions",
        "method": "POST",
        "status": 200,
        "code": None,
        "duration_s": 2.0,
        "model": "smollm2",
        "priority": Priority.VIP,
        "ttft_s": 1.0,
        "usage": Usage(prompt_tokens=7, completion_tokens=5),
        "timings": TIMINGS,
    }
    return RequestFinished(**{**facts, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", TABLE, ids=lambda metric: metric.name)
def test_a_family_follows_the_conventions_of_prometheus(metric: Metric) -> None:
    assert re.fullmatch(r"frontier_[a-z_]+", metric.name)
    assert (metric.kind is Kind.COUNTER) == metric.name.endswith("_total")
    assert metric.help.isprintable()
    assert "\\" not in metric.help
    assert (metric.kind is Kind.HISTOGRAM) == bool(metric.buckets)
    assert metric.buckets == tuple(sorted(set(metric.buckets)))
    assert all(bound > 0 for bound in metric.buckets)
    assert len(set(metric.labels)) == len(metric.labels)
    assert not {"request_id", "tenant", "key", "user", "node"} & set(metric.labels)


def test_names_are_unique() -> None:
    assert len({metric.name for metric in FAMILIES}) == len(FAMILIES)
    assert set(TABLE) <= set(FAMILIES)


def test_a_streamed_request() -> None:
    one = ("smollm2", "vip")
    assert measured(finished()) == {
        (metrics.REQUESTS, ("/v1/chat/completions", "POST", "200", "", *one)): 1,
        (metrics.REQUEST_SECONDS, ("/v1/chat/completions", *one)): 2.0,
        (metrics.TTFT_SECONDS, one): 1.0,
        (metrics.TPOT_SECONDS, one): (2.0 - 1.0) / (5 - 1),
        (metrics.PREFILL_SECONDS, ("smollm2",)): 0.25,
        (metrics.DECODE_SECONDS, ("smollm2",)): 1.0,
        (metrics.OVERHEAD_SECONDS, ("smollm2",)): 0.25,
        (metrics.PROMPT_TOKENS, one): 7,
        (metrics.COMPLETION_TOKENS, one): 5,
    }


def test_an_answer_in_one_piece_is_timed_by_the_engine() -> None:
    seen = measured(finished(ttft_s=None))
    assert seen[metrics.TTFT_SECONDS, ("smollm2", "vip")] == 0.75
    assert seen[metrics.TPOT_SECONDS, ("smollm2", "vip")] == 1.0 / 4


def test_choices_decode_side_by_side() -> None:
    usage = Usage(prompt_tokens=7, completion_tokens=10)
    seen = measured(finished(usage=usage, choices=2))
    assert seen[metrics.TPOT_SECONDS, ("smollm2", "vip")] == (2.0 - 1.0) / (5 - 1)


def test_a_single_token_has_no_time_per_further_token() -> None:
    seen = measured(finished(usage=Usage(prompt_tokens=7, completion_tokens=1, cached_tokens=4)))
    assert (metrics.TPOT_SECONDS, ("smollm2", "vip")) not in seen
    assert seen[metrics.CACHED_TOKENS, ("smollm2", "vip")] == 4


@pytest.mark.parametrize(
    ("status", "code"), [(200, "UPSTREAM_ERROR"), (499, None), (504, "TIMEOUT")]
)
def test_an_unfinished_request_says_nothing_about_speed(status: int, code: str | None) -> None:
    seen = measured(finished(status=status, code=code))
    kinds = {metric for metric, _ in seen}
    assert metrics.TPOT_SECONDS not in kinds
    assert metrics.OVERHEAD_SECONDS not in kinds
    assert metrics.COMPLETION_TOKENS in kinds, "its tokens were made all the same"
    labels = ("/v1/chat/completions", "POST", str(status), code or "", "smollm2", "vip")
    assert seen[metrics.REQUESTS, labels] == 1


def test_overhead_is_never_negative() -> None:
    seen = measured(finished(duration_s=1.7))
    assert seen[metrics.OVERHEAD_SECONDS, ("smollm2",)] == 0


def test_a_request_without_a_model() -> None:
    event = RequestFinished(
        request_id="r", route="/healthz", method="GET", status=200, code=None, duration_s=0.001
    )
    assert measured(event) == {
        (metrics.REQUESTS, ("/healthz", "GET", "200", "", "", "")): 1,
        (metrics.REQUEST_SECONDS, ("/healthz", "", "")): 0.001,
    }


def test_the_queue_and_the_engine() -> None:
    assert measured(RequestStarted(model="m", priority=Priority.LOW, queue_s=0.3)) == {
        (metrics.QUEUE_SECONDS, ("m", "low")): 0.3
    }
    assert measured(RequestShed(model="m", priority=Priority.VIP, reason="full")) == {
        (metrics.SHED, ("m", "vip", "full")): 1
    }
    assert measured(RequestPreempted(model="m", priority=Priority.LOW)) == {
        (metrics.PREEMPTED, ("m", "low")): 1
    }
    assert measured(BatchFailed(model="m", rows=3, error="boom")) == {
        (metrics.BATCH_FAILURES, ("m",)): 1
    }
    assert measured(BatchRan(model="m", rows=3, duration_s=0.02, decode_tokens=3)) == {
        (metrics.BATCH_ROWS, ("m",)): 3,
        (metrics.STEP_SECONDS, ("m",)): 0.02,
        (metrics.STEP_TOKENS, ("m", "decode")): 3,
    }
    state = EngineState(model="m", running=2, waiting={Priority.VIP: 1, Priority.LOW: 0})
    assert measured(state) == {
        (metrics.RUNNING, ("m",)): 2,
        (metrics.QUEUE_DEPTH, ("m", "vip")): 1,
        (metrics.QUEUE_DEPTH, ("m", "low")): 0,
    }


def test_the_cache() -> None:
    assert measured(CacheAsked(model="m", outcome=Outcome.HIT)) == {
        (metrics.CACHE_REQUESTS, ("m", "hit")): 1
    }
    assert measured(CacheAsked(model="m", outcome=Outcome.MISS, times=5)) == {
        (metrics.CACHE_REQUESTS, ("m", "miss")): 5
    }


def test_adapters() -> None:
    seen: dict[tuple[Metric, LabelValues], float] = {}
    seen |= measured(AdapterLoaded(model="smollm2", duration_s=0.04))
    seen |= measured(AdapterFailed(model="smollm2", adapter="poet", error="it is none"))
    seen |= measured(AdapterEvicted(model="smollm2"))
    seen |= measured(AdaptersResident(model="smollm2", adapters=3, bytes=4096))
    assert seen == {
        (metrics.ADAPTER_LOADS, ("smollm2", "loaded")): 1,
        (metrics.ADAPTER_LOAD_SECONDS, ("smollm2",)): 0.04,
        (metrics.ADAPTER_LOADS, ("smollm2", "failed")): 1,
        (metrics.ADAPTER_EVICTIONS, ("smollm2",)): 1,
        (metrics.ADAPTERS, ("smollm2",)): 3,
        (metrics.ADAPTER_BYTES, ("smollm2",)): 4096,
    }


@pytest.mark.parametrize("done", Done)
@pytest.mark.parametrize("way", Way)
def test_guardrails(done: Done, way: Way) -> None:
    event = GuardrailActed(guardrail="pii", category="email", done=done, way=way, times=3)
    assert measured(event) == {
        (metrics.GUARDRAIL_ACTIONS, ("pii", "email", done.value, way.value)): 3
    }


def test_limits_and_budgets() -> None:
    assert measured(QuotaDenied(tenant="acme", limit="tokens_per_day")) == {
        (metrics.QUOTA_DENIED, ("tokens_per_day",)): 1
    }
    for share, percent in ((0.5, "50"), (0.8, "80"), (1.0, "100")):
        assert measured(BudgetReached(tenant="acme", share=share)) == {
            (metrics.BUDGET_REACHED, (percent,)): 1
        }
    alert = AlertRaised(id=7, tenant="acme", kind="budget", period="2026-11", threshold=80)
    assert measured(alert) == {(metrics.ALERTS, ("budget", "80")): 1}
