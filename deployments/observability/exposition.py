"""The page of the cluster, as Prometheus reads it. Pure.

OpenMetrics is the same page with *exemplars*: beside a bucket, one request that fell into it, by
the id that its log lines and its answer have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from operator import itemgetter
from typing import NamedTuple

from deployments.observability.exemplars import Exemplar, Exemplified
from deployments.observability.merging import FAMILIES, Distributions, Key, Measurements, Values
from deployments.observability.metrics import Kind, Metric

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
TOTAL = "_total"


class Page(NamedTuple):
    content: bytes
    media_type: str


def text(measured: Measurements) -> bytes:
    """In Prometheus' text format (``TEXT``)."""
    lines: list[str] = []
    for metric in FAMILIES:
        lines += _family(metric, metric.name, measured, {})
    lines.append("")
    return "\n".join(lines).encode()


def open_metrics(
    measured: Measurements, exemplars: Mapping[Exemplified, Exemplar], node: str | None
) -> bytes:
    """In the format of OpenMetrics 1.0 (``OPEN_METRICS``).

    Args:
        exemplars: of the process that answers.
        node: on which it runs, ``host:port``; ``None``: unknown, so there are no exemplars.
    """
    lines: list[str] = []
    notes = {
        (metric, (node, tuple(map(_escaped, labels))), bucket): _note(exemplar)
        for (metric, labels, bucket), exemplar in exemplars.items()
        if node is not None
    }
    for metric in FAMILIES:
        counted = metric.kind is Kind.COUNTER  # there a family is called without the ending
        lines += _family(
            metric, metric.name.removesuffix(TOTAL) if counted else metric.name, measured, notes
        )
    lines += ("# EOF", "")
    return "\n".join(lines).encode()


def _family(
    metric: Metric, name: str, measured: Measurements, notes: Mapping[tuple[Metric, Key, int], str]
) -> Iterator[str]:
    yield f"# HELP {name} {metric.help}"
    yield f"# TYPE {name} {metric.kind}"
    yield from _value_lines(metric, measured.values[metric])
    yield from _histogram_lines(metric, measured.distributions[metric], notes)


def _note(exemplar: Exemplar) -> str:
    return (
        f' # {{request_id="{_escaped(exemplar.request_id)}"}} {exemplar.value!r} {exemplar.at:.3f}'
    )


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _value_lines(metric: Metric, series: Values) -> Iterator[str]:
    for key, value in sorted(series.items()):
        yield f"{metric.name}{_braces(metric, key)} {value!r}"


def _histogram_lines(
    metric: Metric, series: Distributions, notes: Mapping[tuple[Metric, Key, int], str]
) -> Iterator[str]:
    les = [*(f'le="{float(bound)}"' for bound in metric.buckets), 'le="+Inf"']
    for key, distribution in sorted(series.items(), key=itemgetter(0)):
        cumulative = list(accumulate(distribution.counts))
        for bucket, (le, count) in enumerate(zip(les, cumulative, strict=True)):
            note = notes.get((metric, key, bucket), "")
            yield f"{metric.name}_bucket{_braces(metric, key, le)} {count}{note}"
        yield f"{metric.name}_sum{_braces(metric, key)} {distribution.total!r}"
        yield f"{metric.name}_count{_braces(metric, key)} {cumulative[-1]}"


def _braces(metric: Metric, key: Key, *more: str) -> str:
    """``{a="x",node="host:port"}``. To Prometheus an empty label is none, so it is left out."""
    node, values = key
    named = zip(FAMILIES[metric], values, strict=True)
    pairs = [f'{name}="{value}"' for name, value in named if value]
    return "{" + ",".join((*pairs, f'node="{node}"', *more)) + "}"
