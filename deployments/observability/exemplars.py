"""The last request of this process in each bucket of each histogram, to look at one of the slow.

A request's id is no label: it would make a series of each. It goes beside a bucket, as an exemplar
of OpenMetrics. A page has those of the gateway replica that answered it; the next one is answered
by another.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from deployments.observability.events import Event, RequestFinished
from deployments.observability.metrics import LabelValues, Metric, record

LONGEST = 128 - len("request_id")
"""Characters of an id: OpenMetrics gives the labels of an exemplar 128, their names included."""


class Exemplar(NamedTuple):
    request_id: str
    value: float
    at: float
    """Unix seconds."""


Exemplified: TypeAlias = tuple[Metric, LabelValues, int]
"""A histogram, its labels, and the number of the bucket."""


class Exemplars:
    """A subscriber (``Emit``), and the ``Sink`` of what it hears. For one thread."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._request_id = ""
        self._last: dict[Exemplified, Exemplar] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, RequestFinished) and len(event.request_id) <= LONGEST:
            self._request_id = event.request_id
            record(event, self)

    def last(self) -> dict[Exemplified, Exemplar]:
        """A copy. There are never more than there are buckets in all series."""
        return self._last.copy()

    def observe(self, histogram: Metric, labels: LabelValues, value: float) -> None:
        bucket = bisect_left(histogram.buckets, value)
        self._last[histogram, labels, bucket] = Exemplar(self._request_id, value, self._clock())

    def add(self, counter: Metric, labels: LabelValues, amount: float) -> None:
        """Counts have no exemplars."""

    def set(self, gauge: Metric, labels: LabelValues, value: float) -> None:
        """Gauges have none."""
