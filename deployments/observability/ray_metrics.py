"""The edge to Ray: what a process counted goes to Ray's exporter, on a timer.

A call into ``ray.util.metrics`` costs several times a dictionary write, and a request makes
ten measurements, so events are added up in the process (``accumulator.py``) and a thread
hands over what changed, twice a second. Ray then reports to the node's agent once every
``RAY_metrics_report_interval_ms``, and the agent drops a gauge that was not set for two
of those intervals: this is why gauges are set again at every turn, and how the gauges of
a dead replica disappear.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from threading import Event as Signal
from threading import Thread

import ray
from ray.util.metrics import Counter, Gauge

from deployments.observability.accumulator import Accumulator
from deployments.observability.events import Event
from deployments.observability.metrics import Kind
from deployments.observability.wire import Sample, encode

logger = logging.getLogger(__name__)


class RayMetrics:
    """A subscriber (``Emit``) whose measurements become Ray metrics.

    Make one a process. Calling it costs a few µs and never blocks on Ray.
    """

    def __init__(self, *, replica: str, flush_interval_s: float) -> None:
        self._accumulator = Accumulator()
        self._replica = replica
        self._interval_s = flush_interval_s
        self._instruments: dict[str, Counter | Gauge] = {}
        self._closing = Signal()
        self._thread = Thread(target=self._run, name="metrics-flush", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        self._accumulator.emit(event)

    def flush(self) -> None:
        """Hand over what was counted since the last time."""
        for sample in encode(self._accumulator.drain(), self._replica):
            self._record(sample)

    def close(self) -> None:
        """Flush what is left, then stop. Ray itself sends it on when the process ends in order."""
        self._closing.set()
        self._thread.join()
        self.flush()

    def _run(self) -> None:
        while not self._closing.wait(self._interval_s):
            try:
                self.flush()
            except Exception:
                # Serving goes on without metrics; the next turn may succeed.
                logger.exception("metrics could not be handed to Ray")

    def _record(self, sample: Sample) -> None:
        instrument = self._instruments.get(sample.name)
        if instrument is None:
            make = Gauge if sample.kind is Kind.GAUGE else Counter
            instrument = make(sample.name, tag_keys=tuple(sample.tags))
            self._instruments[sample.name] = instrument
        if isinstance(instrument, Gauge):
            instrument.set(sample.amount, sample.tags)
        else:
            instrument.inc(sample.amount, sample.tags)


def subscriber(*, replica: str, flush_interval_s: float = 0.5) -> RayMetrics:
    """Start counting in this process.

    Args:
        replica: tells the gauges of several replicas apart. Serve's own name for it is
            ``serve.get_replica_context().replica_id.unique_id``.
        flush_interval_s: not above Ray's report interval, or gauges come and go.
    """
    return RayMetrics(replica=replica, flush_interval_s=flush_interval_s)


def node_endpoints() -> Sequence[str]:
    """``host:port`` of the metrics page of every live node. Asks the GCS, and so blocks."""
    return [
        _host_port(node["NodeManagerAddress"], node["MetricsExportPort"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def own_endpoint() -> str | None:
    """That of the node on which this process runs. Asks the GCS, and so blocks."""
    here = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == here:
            return _host_port(node["NodeManagerAddress"], node["MetricsExportPort"])
    return None


def _host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
