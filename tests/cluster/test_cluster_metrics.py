"""Events of several processes, through a real Ray cluster, onto one page."""

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from deployments.observability import ray_metrics
from deployments.observability.cluster_metrics import ClusterMetrics
from deployments.observability.events import BatchRan, EngineState
from models.contracts import Priority

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore"),  # Ray's own, at start and stop
]

REPO = Path(__file__).parents[2]
FRESH = {"RAY_metrics_report_interval_ms": "1500", "REPORTER_UPDATE_INTERVAL_MS": "2000"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="obs-") as folder,
    ):
        for name, value in {**FRESH, "RAY_AUTH_MODE": "disabled"}.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]))
        ray.init(
            num_cpus=1,
            include_dashboard=False,
            object_store_memory=80_000_000,
            log_to_driver=False,
            _temp_dir=folder,
        )
        try:
            yield
        finally:
            ray.shutdown()


def start_worker(name: str) -> Any:
    """A process that emits as a replica does."""

    class Worker:  # a local class, so that its code travels with it
        def __init__(self) -> None:
            self._emit = ray_metrics.subscriber(replica=name)

        def work(self, batches: int, running: int) -> None:
            for _ in range(batches):
                self._emit(BatchRan(model="m", rows=3, duration_s=0.04, decode_tokens=3))
            self._emit(EngineState(model="m", running=running, waiting={Priority.VIP: running}))

        def stop(self) -> None:
            self._emit.close()
            ray.actor.exit_actor()

    return ray.remote(num_cpus=0)(Worker).remote()


def samples(page: bytes, name: str) -> dict[str | None, float]:
    """Values by replica (gauges) or ``le`` (buckets)."""
    return {
        sample.labels.get("replica") or sample.labels.get("le"): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
        if sample.name == name
    }


async def eventually(
    metrics: ClusterMetrics, holds: Callable[[bytes], bool], timeout_s: float = 15
) -> float:
    """Seconds until the page is as it should be."""
    start = time.monotonic()
    while not holds(page := (await metrics.page("")).content):
        if time.monotonic() - start > timeout_s:
            lines = [line for line in page.decode().splitlines() if line.startswith("frontier")]
            pytest.fail("the page never became right:\n" + "\n".join(lines))
        await asyncio.sleep(0.1)
    return time.monotonic() - start


@pytest.mark.timeout(180)
async def test_the_page_of_a_cluster(cluster: None) -> None:
    workers = {name: start_worker(name) for name in ("one", "two")}
    metrics = ClusterMetrics(ray_metrics.node_endpoints)
    try:
        await asyncio.to_thread(ray.get, [w.work.remote(10, 1) for w in workers.values()])
        await eventually(
            metrics, lambda page: samples(page, "frontier_step_tokens_total") == {None: 60}
        )
        page = (await metrics.page("")).content
        assert samples(page, "frontier_scrape_up") == {None: 1}
        assert samples(page, "frontier_running_sequences") == {"one": 1, "two": 1}
        assert samples(page, "frontier_step_duration_seconds_count") == {None: 20}
        buckets = samples(page, "frontier_step_duration_seconds_bucket")
        assert buckets["0.03"] == 0
        assert buckets["0.04"] == buckets["+Inf"] == 20
        (total,) = samples(page, "frontier_step_duration_seconds_sum").values()
        assert total == pytest.approx(20 * 0.04), "Ray's own histograms are not exact"
        await eventually(metrics, lambda page: bool(samples(page, "ray_node_cpu_utilization")))

        await asyncio.to_thread(ray.get, workers["one"].work.remote(1, 7))
        age_s = await eventually(
            metrics, lambda page: samples(page, "frontier_running_sequences").get("one") == 7
        )
        assert age_s < 10

        # What the dead have done stays; what they were doing does not.
        workers["one"].stop.remote()
        ray.kill(workers["two"])
        await eventually(
            metrics,
            lambda page: not samples(page, "frontier_running_sequences"),
        )
        assert samples((await metrics.page("")).content, "frontier_step_tokens_total") == {None: 63}
    finally:
        await metrics.close()
