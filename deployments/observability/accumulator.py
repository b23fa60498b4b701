"""Measurements added up inside one process, so that an event costs a few dictionary writes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from typing import TypeAlias

from deployments.observability.events import Event
from deployments.observability.metrics import LabelValues, Metric, record

Series: TypeAlias = tuple[Metric, LabelValues]


@dataclass(slots=True)
class Distribution:
    counts: list[int]
    """Observations per bucket, not cumulative; the last bucket has no upper bound."""
    total: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What was added since the last drain; of gauges, every present value."""

    counters: Mapping[Series, float]
    histograms: Mapping[Series, Distribution]
    gauges: Mapping[Series, float]


class Accumulator:
    """A ``Sink`` between two drains. ``emit`` and ``drain`` may be called from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counters: dict[Series, float] = {}
        self._histograms: dict[Series, Distribution] = {}
        self._gauges: dict[Series, float] = {}

    def emit(self, event: Event) -> None:
        with self._lock:
            record(event, self)

    def drain(self) -> Changes:
        with self._lock:
            counters, self._counters = self._counters, {}
            histograms, self._histograms = self._histograms, {}
            return Changes(counters=counters, histograms=histograms, gauges=dict(self._gauges))

    def add(self, counter: Metric, labels: LabelValues, amount: float) -> None:
        series = (counter, labels)
        self._counters[series] = self._counters.get(series, 0.0) + amount

    def observe(self, histogram: Metric, labels: LabelValues, value: float) -> None:
        series = (histogram, labels)
        distribution = self._histograms.get(series)
        if distribution is None:
            distribution = Distribution([0] * (len(histogram.buckets) + 1))
            self._histograms[series] = distribution
        distribution.counts[bisect_left(histogram.buckets, value)] += 1
        distribution.total += value

    def set(self, gauge: Metric, labels: LabelValues, value: float) -> None:
        self._gauges[gauge, labels] = value
