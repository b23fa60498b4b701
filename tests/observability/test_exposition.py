"""What processes counted arrives on the cluster's page, whatever happened on the way.

prometheus_client is the reference: it counts the same events, and it writes the pages of
the pretended Ray agents and parses the result.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count
from math import isclose, nan

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Exemplar

from deployments.gateway.policies.request_id import SANE
from deployments.observability.accumulator import Accumulator
from deployments.observability.events import (
    BatchFailed,
    BatchRan,
    EngineState,
    Event,
    RequestFinished,
    RequestPreempted,
    RequestShed,
    RequestStarted,
)
from deployments.observability.exemplars import LONGEST, Exemplars
from deployments.observability.exposition import open_metrics, text
from deployments.observability.merging import merge
from deployments.observability.metrics import TABLE, Kind, LabelValues, Metric, record
from deployments.observability.wire import Sample, encode
from models.contracts import Priority, Timings, Usage

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class ReferenceSink:
    """prometheus_client, as one process that sees all events of a node would use it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._counters: dict[Metric, Counter] = {}
        self._gauges: dict[Metric, Gauge] = {}
        self._histograms: dict[Metric, Histogram] = {}
        self.replica = ""
        for metric in TABLE:
            head = (metric.name, metric.help)
            if metric.kind is Kind.COUNTER:
                self._counters[metric] = Counter(*head, metric.labels, registry=self.registry)
            elif metric.kind is Kind.GAUGE:
                labels = (*metric.labels, "replica")
                self._gauges[metric] = Gauge(*head, labels, registry=self.registry)
            else:
                self._histograms[metric] = Histogram(
                    *head, metric.labels, registry=self.registry, buckets=metric.buckets
                )

    def add(self, counter: Metric, labels: LabelValues, amount: float) -> None:
        self._counters[counter].labels(*labels).inc(amount)

    def observe(self, histogram: Metric, labels: LabelValues, value: float) -> None:
        self._histograms[histogram].labels(*labels).observe(value)

    def set(self, gauge: Metric, labels: LabelValues, value: float) -> None:
        self._gauges[gauge].labels(*labels, self.replica).set(value)


class FakeAgent:
    """A node's Ray agent: sums the increments of each worker, and prints far more than ours."""

    def __init__(self) -> None:
        self._families: dict[str, Family] = {}
        self._values: dict[tuple[str, tuple[str, ...], tuple[str, ...]], float] = defaultdict(float)
        self._kinds: dict[str, Kind] = {}

    def receive(self, worker: str, sample: Sample) -> None:
        tags = {"SessionName": "s1", **sample.tags, "WorkerId": worker}
        key = (f"ray_{sample.name}", tuple(tags), tuple(tags.values()))
        self._kinds[key[0]] = sample.kind
        if sample.kind is Kind.GAUGE:
            self._values[key] = sample.amount
        else:
            assert sample.amount > 0, "Ray refuses it"
            self._values[key] += sample.amount

    def collect(self) -> Iterator[Family]:
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for (name, labels, values), value in self._values.items():
            if name not in families:
                make = GaugeMetricFamily if self._kinds[name] is Kind.GAUGE else CounterMetricFamily
                families[name] = make(name, "some help", labels=labels)
            families[name].add_metric(values, value)
        noise = GaugeMetricFamily("ray_frontier_unknown", "of another release", labels=["a"])
        noise.add_metric(["b"], 1)
        yield from (noise, *families.values())

    def page(self) -> bytes:
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)


def parsed(page: bytes) -> Samples:
    """Every sample of a page without empty labels; the parser itself checks the format."""
    found: Samples = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            labels = frozenset((k, v) for k, v in sample.labels.items() if v)
            assert (sample.name, labels) not in found
            if not sample.name.endswith("_created"):
                found[sample.name, labels] = sample.value
    return found


def parsed_open(
    page: bytes,
) -> tuple[Samples, dict[tuple[str, frozenset[tuple[str, str]]], Exemplar]]:
    """A page of OpenMetrics: its samples, and the exemplars beside them."""
    found: Samples = {}
    noted = {}
    for family in open_families(page.decode()):
        for sample in family.samples:
            key = sample.name, frozenset((k, v) for k, v in sample.labels.items() if v)
            assert key not in found
            found[key] = sample.value
            if sample.exemplar is not None:
                noted[key] = sample.exemplar
    return found, noted


models = st.sampled_from(["smollm2", 'we"ird\\\n{name="x"} 3', "模型"])
routes = st.sampled_from(["/v1/infer", "/v1/models/{model}"])
priorities = st.sampled_from(Priority)
seconds = st.floats(min_value=0, max_value=1e4)
counts = st.integers(min_value=0, max_value=10**6)
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(BatchRan, model=models, rows=counts, duration_s=seconds, decode_tokens=counts),
    st.builds(RequestStarted, model=models, priority=priorities, queue_s=seconds),
    st.builds(RequestShed, model=models, priority=priorities, reason=st.just("full")),
    st.builds(RequestPreempted, model=models, priority=priorities),
    st.builds(BatchFailed, model=models, rows=counts, error=st.just("boom")),
    st.builds(
        EngineState,
        model=models,
        running=counts,
        waiting=st.dictionaries(priorities, counts),
    ),
    st.builds(
        RequestFinished,
        request_id=st.just("r"),
        route=routes,
        method=st.just("POST"),
        status=st.sampled_from([200, 500]),
        code=st.none(),
        duration_s=seconds,
        model=st.none() | models,
        priority=st.none() | priorities,
        ttft_s=st.none() | seconds,
        usage=st.none() | st.builds(Usage, prompt_tokens=counts, completion_tokens=counts),
        timings=st.none()
        | st.builds(
            Timings,
            queue_s=seconds,
            prefill_s=seconds,
            ttft_s=seconds,
            decode_s=seconds,
            total_s=seconds,
        ),
    ),
)
histories = st.dictionaries(
    keys=st.tuples(st.sampled_from(["10.0.0.1:9000", "10.0.0.2:9000"]), st.sampled_from("abc")),
    values=st.lists(st.none() | events, max_size=12),
    max_size=4,
)
"""(node, worker) → what happened there; ``None`` is a flush to Ray."""


@settings(max_examples=60)
@given(history=histories)
def test_the_page_says_what_one_process_would_have_counted(
    history: Mapping[tuple[str, str], list[Event | None]],
) -> None:
    agents: dict[str, FakeAgent] = defaultdict(FakeAgent)
    references: dict[str, ReferenceSink] = defaultdict(ReferenceSink)
    for (node, worker), happened in history.items():
        accumulator, reference = Accumulator(), references[node]
        reference.replica = worker
        for event in (*happened, None):
            if event is None:
                for sample in encode(accumulator.drain(), replica=worker):
                    agents[node].receive(worker, sample)
            else:
                accumulator.emit(event)
                record(event, reference)

    measured = merge({node: agents[node].page() for node in references})
    page = text(measured)

    expected: Samples = {}
    for node, reference in references.items():
        expected["frontier_scrape_up", frozenset({("node", node)})] = 1
        for (name, labels), value in parsed(generate_latest(reference.registry)).items():
            expected[name, labels | {("node", node)}] = value
    found = parsed(page)
    # A counter that was never raised has no series in Ray.
    missing = {key for key in expected.keys() - found.keys() if expected[key] != 0}
    wrong = {key for key in found if not isclose(found[key], expected.get(key, nan), rel_tol=1e-9)}
    assert not missing
    assert not wrong
    assert parsed_open(open_metrics(measured, {}, None)) == (found, {})


request_ids = st.from_regex(SANE.pattern.decode(), fullmatch=True)


@given(
    happened=st.lists(st.tuples(request_ids, events), max_size=12),
    elsewhere=st.lists(events, max_size=3),
)
def test_a_bucket_names_the_last_request_that_fell_into_it(
    happened: list[tuple[str, Event]], elsewhere: list[Event]
) -> None:
    times = count(1)
    exemplars, here, there = Exemplars(lambda: next(times)), FakeAgent(), FakeAgent()
    accumulator, other = Accumulator(), Accumulator()
    expected: dict[str, float] = {}
    for request_id, event in happened:
        if isinstance(event, RequestFinished):
            event = replace(event, request_id=request_id)
            expected[request_id] = event.duration_s
        accumulator.emit(event)
        exemplars(event)
    for event in elsewhere:
        other.emit(event)
    for agent, each in ((here, accumulator), (there, other)):
        for sample in encode(each.drain(), replica="r"):
            agent.receive("w", sample)
    measured = merge({"here:1": here.page(), "there:1": there.page()})

    found, noted = parsed_open(open_metrics(measured, exemplars.last(), "here:1"))

    assert found == parsed(text(measured))
    durations = {
        key: noted[key] for key in noted if key[0] == "frontier_request_duration_seconds_bucket"
    }
    assert bool(durations) == any(len(each) <= LONGEST for each in expected)
    for (_, labels), exemplar in noted.items():
        assert ("node", "here:1") in labels
        assert exemplar.value <= float(dict(labels)["le"])
    for exemplar in durations.values():
        assert exemplar.labels["request_id"] in expected
    assert parsed_open(open_metrics(measured, exemplars.last(), None))[1] == {}


@given(page=st.binary(max_size=300).map(lambda junk: junk + b"\nray_frontier_ junk\n"))
def test_foreign_lines_are_passed_over(page: bytes) -> None:
    assert parsed(text(merge({"n:1": page}))) == {
        ("frontier_scrape_up", frozenset({("node", "n:1")})): 1
    }


def test_a_node_that_is_down_is_seen_to_be() -> None:
    page = parsed(text(merge({"a:1": b'ray_node_cpu_count{ip="a"} 2.0\n', "b:1": None})))
    assert page == {
        ("frontier_scrape_up", frozenset({("node", "a:1")})): 1,
        ("frontier_scrape_up", frozenset({("node", "b:1")})): 0,
        ("ray_node_cpu_count", frozenset({("node", "a:1")})): 2,
    }


def test_one_help_and_type_a_family_also_without_series() -> None:
    families = list(text_string_to_metric_families(text(merge({})).decode()))
    assert len({family.name for family in families}) == len(families)
    assert {"frontier_requests", "frontier_queue_depth"} <= {family.name for family in families}


def test_rays_own_families_lose_the_labels_of_ray() -> None:
    page = "".join(
        f'ray_serve_deployment_status{{WorkerId="{w}",application="app",deployment="d"}} {value}\n'
        for w, value in (("old", 3.0), ("new", 6.0))
    )
    labels = frozenset({("application", "app"), ("deployment", "d"), ("node", "a:1")})
    assert parsed(text(merge({"a:1": page.encode()})))["ray_serve_deployment_status", labels] == 6


def test_bins_of_other_bounds_are_never_lost() -> None:
    """An older release had a bucket that ours has not; past 2 000 series Ray drops the labels."""
    page = (
        b'ray_frontier_batch_size_bins_total{model="m",bin="3.0"} 2.0\n'
        b'ray_frontier_batch_size_bins_total{model="m",bin=""} 5.0\n'
    )
    found = parsed(text(merge({"a:1": page})))
    labels = {("model", "m"), ("node", "a:1")}
    assert found["frontier_batch_size_bucket", frozenset({*labels, ("le", "2.0")})] == 0
    assert found["frontier_batch_size_bucket", frozenset({*labels, ("le", "4.0")})] == 2
    assert found["frontier_batch_size_count", frozenset(labels)] == 7
