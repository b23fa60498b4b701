"""How the table travels through Ray's exporter, which has no exact histogram.

Ray 2.60 sends bucket counts to the node's agent, which rebuilds every observation in the
middle of its bucket (past the last bound: at twice that bound). So sums come out wrong,
and each observation costs the agent more than a counter does in a whole interval.
Counters are exact: a histogram travels as two of them, of the touched buckets only:

    frontier_x_seconds  →  frontier_x_seconds_bins{…, bin="0.25"}   observations per bucket
                           frontier_x_seconds_sum{…}

``exposition.py`` puts them together again. Ray prefixes names with ``ray_`` and ends the
name of a counter in ``_total`` if it does not already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from deployments.observability.accumulator import Changes
from deployments.observability.metrics import TABLE, Kind, LabelValues, Metric

BIN = "bin"
REPLICA = "replica"
RAY_PREFIX = "ray_"


class Part(Enum):
    """What of its metric a travelling series holds."""

    VALUE = auto()
    BINS = auto()
    SUM = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One call of ray.util.metrics: an increment of a counter or the value of a gauge."""

    kind: Kind
    name: str
    tags: Mapping[str, str]
    amount: float


def encode(changes: Changes, replica: str) -> Iterator[Sample]:
    """Increments of zero are left out: Ray refuses them."""
    for (metric, labels), amount in changes.counters.items():
        if amount > 0:
            yield _increment(metric.name, _tags(metric, labels), amount)
    for (metric, labels), distribution in changes.histograms.items():
        tags = _tags(metric, labels)
        for bound, count in zip((*metric.buckets, float("inf")), distribution.counts, strict=True):
            if count:
                bins = {**tags, BIN: repr(float(bound))}
                yield _increment(f"{metric.name}_bins", bins, count)
        if distribution.total > 0:
            yield _increment(f"{metric.name}_sum", tags, distribution.total)
    for (metric, labels), value in changes.gauges.items():
        tags = {**_tags(metric, labels), REPLICA: replica}
        yield Sample(kind=Kind.GAUGE, name=metric.name, tags=tags, amount=value)


def _increment(name: str, tags: Mapping[str, str], amount: float) -> Sample:
    return Sample(kind=Kind.COUNTER, name=name, tags=tags, amount=amount)


def _tags(metric: Metric, labels: LabelValues) -> dict[str, str]:
    return dict(zip(metric.labels, labels, strict=True))


def _exported() -> Iterator[tuple[str, tuple[Metric, Part]]]:
    for metric in TABLE:
        if metric.kind is Kind.HISTOGRAM:
            yield f"{RAY_PREFIX}{metric.name}_bins_total", (metric, Part.BINS)
            yield f"{RAY_PREFIX}{metric.name}_sum_total", (metric, Part.SUM)
        else:
            yield RAY_PREFIX + metric.name, (metric, Part.VALUE)


EXPORTED: Mapping[str, tuple[Metric, Part]] = dict(_exported())
"""The name on a node's page → what it is a part of."""
