"""Pages of Ray's exporters, one a node, become the measurements of the cluster. Pure.

A series is summed over the processes of a node, never over nodes: when a node goes, its
series end, as Prometheus expects; a sum over nodes would fall, and ``rate()`` would read
the fall as a restart. Ray's own labels (worker, session, version) are dropped.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias

from deployments.observability.accumulator import Distribution
from deployments.observability.metrics import TABLE, Kind, LabelValues, Metric
from deployments.observability.wire import BIN, EXPORTED, REPLICA, Part

SCRAPE_UP = Metric("frontier_scrape_up", Kind.GAUGE, "1 if the metrics of a node could be read.")

# Of Ray's several hundred families, those that an operator of this platform looks at.
# Ray forgets a gauge after two report intervals, so none that is set less often is here.
RAY_FAMILIES = (
    Metric("ray_node_cpu_utilization", Kind.GAUGE, "CPU use of a node, percent."),
    Metric("ray_node_cpu_count", Kind.GAUGE, "CPUs of a node."),
    Metric("ray_node_mem_used", Kind.GAUGE, "Memory in use on a node, bytes."),
    Metric("ray_node_mem_total", Kind.GAUGE, "Memory of a node, bytes."),
    Metric("ray_node_gpus_utilization", Kind.GAUGE, "GPU use, percent.", ("GpuIndex",)),
    Metric("ray_node_gram_used", Kind.GAUGE, "GPU memory in use, MB.", ("GpuIndex",)),
    Metric("ray_node_gram_available", Kind.GAUGE, "GPU memory free, MB.", ("GpuIndex",)),
    Metric(
        "ray_serve_deployment_status",
        Kind.GAUGE,
        "0 unknown, 1 deploy failed, 2 unhealthy, 3 updating, 4/5 up-/downscaling, 6 healthy.",
        ("application", "deployment"),
    ),
    Metric(
        "ray_serve_autoscaling_target_replicas",
        Kind.GAUGE,
        "Replicas that Serve wants a deployment to have.",
        ("application", "deployment"),
    ),
    Metric(
        "ray_serve_deployment_replica_starts_total",
        Kind.COUNTER,
        "Replicas started.",
        ("application", "deployment"),
    ),
)

# The labels that a family keeps on the page, beside ``node``.
FAMILIES: Mapping[Metric, tuple[str, ...]] = {
    SCRAPE_UP: (),
    **{m: (*m.labels, REPLICA) if m.kind is Kind.GAUGE else m.labels for m in TABLE},
    **{m: m.labels for m in RAY_FAMILIES},
}

Key: TypeAlias = tuple[str, LabelValues]
"""A node, and the values of the family's labels, still escaped as they came."""
Values: TypeAlias = dict[Key, float]
Distributions: TypeAlias = dict[Key, Distribution]


class Measurements(NamedTuple):
    """Of the cluster, by family, in the order of ``FAMILIES``."""

    values: Mapping[Metric, Values]
    distributions: Mapping[Metric, Distributions]


_KNOWN = {**EXPORTED, **{metric.name: (metric, Part.VALUE) for metric in RAY_FAMILIES}}
_PREFIXES = (b"ray_frontier_", *(metric.name.encode() for metric in RAY_FAMILIES))
_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')


def merge(pages: Mapping[str, bytes | None]) -> Measurements:
    """Those of all nodes, from ``{host:port: its page, None if it could not be read}``."""
    values: dict[Metric, Values] = {metric: {} for metric in FAMILIES}
    distributions: dict[Metric, Distributions] = {metric: {} for metric in FAMILIES}
    for node, page in pages.items():
        values[SCRAPE_UP][node, ()] = float(page is not None)
        for metric, part, labels, value in _samples(page or b""):
            key = (node, tuple([labels.get(name, "") for name in FAMILIES[metric]]))
            series = values[metric]
            if metric.kind is Kind.HISTOGRAM:
                _add_part(metric, distributions[metric], key, part, labels, value)
            elif metric.kind is Kind.COUNTER:
                series[key] = series.get(key, 0.0) + value
            else:
                # Two processes with one gauge: a controller that was just replaced.
                series[key] = max(series.get(key, value), value)
    return Measurements(values, distributions)


def _samples(page: bytes) -> Iterator[tuple[Metric, Part, dict[str, str], float]]:
    """What we know of a page, which is large (700 kB) and mostly Ray's own affairs."""
    for line in page.split(b"\n"):
        if not line.startswith(_PREFIXES):
            continue
        sample = _SAMPLE.match(line.decode())
        if sample is None:
            continue
        name, labels, value = sample.groups()
        if name in _KNOWN:
            yield *_KNOWN[name], dict(_LABEL.findall(labels or "")), float(value)


def _add_part(
    metric: Metric,
    distributions: Distributions,
    key: Key,
    part: Part,
    labels: Mapping[str, str],
    value: float,
) -> None:
    distribution = distributions.get(key)
    if distribution is None:
        distribution = distributions[key] = Distribution([0] * (len(metric.buckets) + 1))
    if part is Part.SUM:
        distribution.total += value
    else:
        distribution.counts[_bucket(metric, labels.get(BIN, ""))] += int(value)


def _bucket(metric: Metric, bound: str) -> int:
    """The bucket of a bin. Processes of an older release may have had other bounds; and past
    2 000 series of a family the agent adds the rest up in one without labels.
    """
    try:
        return bisect_left(metric.buckets, float(bound))
    except ValueError:
        return len(metric.buckets)
