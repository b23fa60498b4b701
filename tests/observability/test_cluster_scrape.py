"""Reading the nodes: who is asked, how often, and what a sick node does to the page."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import httpx
import pytest

from deployments.observability.cluster_metrics import ClusterMetrics
from deployments.observability.exemplars import Exemplar
from deployments.observability.exposition import OPEN_METRICS, TEXT
from deployments.observability.metrics import STEP_SECONDS

PAGE = """ray_node_cpu_count{ip="x"} 2.0
ray_frontier_step_duration_seconds_bins_total{model="m",bin="0.001"} 1.0
"""


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeNodes(httpx.AsyncBaseTransport):
    """A network of nodes, each with two CPUs, that answer after a delay."""

    def __init__(self, *names: str, delay_s: float = 0.0) -> None:
        self.names, self.delay_s = names, delay_s
        self.served = 0
        self.sick: dict[str, Exception | int | float] = {}
        """What a node does instead: raise, answer with a status, or take so many seconds."""

    def endpoints(self) -> Sequence[str]:
        return self.names

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.served += 1
        assert request.url.path == "/metrics"
        sickness = self.sick.get(request.url.netloc.decode(), self.delay_s)
        if isinstance(sickness, Exception):
            raise sickness
        if isinstance(sickness, int):
            return httpx.Response(sickness)
        await asyncio.sleep(sickness)
        return httpx.Response(200, text=PAGE)


@asynccontextmanager
async def cluster(
    nodes: FakeNodes,
    endpoints: Callable[[], Sequence[str]] | None = None,
    clock: FakeClock | None = None,
) -> AsyncIterator[ClusterMetrics]:
    metrics = ClusterMetrics(
        endpoints or nodes.endpoints,
        timeout_s=0.1,
        clock=clock or FakeClock(),
        transport=nodes,
        exemplars=lambda: {(STEP_SECONDS, ("m",), 0): Exemplar("req-1", 0.0005, 1.0)},
        home=lambda: "a:1",
    )
    try:
        yield metrics
    finally:
        await metrics.close()


async def test_every_node_is_on_the_page() -> None:
    async with cluster(FakeNodes("a:1", "b:1")) as metrics:
        page = (await metrics.page("")).content
    assert b'ray_node_cpu_count{node="a:1"} 2.0' in page
    assert b'ray_node_cpu_count{node="b:1"} 2.0' in page


@pytest.mark.parametrize("sickness", [httpx.ConnectError("no"), OverflowError("port"), 500, 60.0])
async def test_a_sick_node_does_not_fail_the_scrape(sickness: Exception | int | float) -> None:
    nodes = FakeNodes("a:1", "b:1")
    nodes.sick["b:1"] = sickness
    async with cluster(nodes) as metrics:
        page = (await metrics.page("")).content
    assert b'frontier_scrape_up{node="a:1"} 1.0' in page
    assert b'frontier_scrape_up{node="b:1"} 0.0' in page
    assert b'ray_node_cpu_count{node="a:1"} 2.0' in page


async def test_a_page_is_shared_and_kept_for_a_second() -> None:
    nodes, clock = FakeNodes("a:1", delay_s=0.01), FakeClock()
    async with cluster(nodes, clock=clock) as metrics:
        await asyncio.gather(*(metrics.page("") for _ in range(20)))
        clock.now += 0.9
        await metrics.page("")
        assert nodes.served == 1
        clock.now += 0.2
        await metrics.page("")
        assert nodes.served == 2


async def test_the_list_of_nodes_outlives_the_one_who_keeps_it() -> None:
    clock, lists = FakeClock(), 0

    def endpoints() -> Sequence[str]:
        nonlocal lists
        lists += 1
        if lists > 1:
            raise RuntimeError("the GCS is gone")
        return ["a:1"]

    async with cluster(FakeNodes(), endpoints=endpoints, clock=clock) as metrics:
        for _ in range(3):
            assert b"ray_node_cpu_count{" in (await metrics.page("")).content
            clock.now += 2
        assert lists == 1, "the list is kept for some seconds"
        assert b"ray_node_cpu_count{" in (await metrics.page("")).content
        assert lists == 2


async def test_a_caller_who_leaves_does_not_harm_the_others() -> None:
    async with cluster(FakeNodes("a:1", delay_s=0.02)) as metrics:
        first = asyncio.create_task(metrics.page(""))
        second = asyncio.create_task(metrics.page(""))
        await asyncio.sleep(0.01)
        first.cancel()
        assert b"ray_node_cpu_count{" in (await second).content


async def test_who_accepts_open_metrics_sees_a_request_beside_its_bucket() -> None:
    prometheus = (
        "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"
    )
    nodes = FakeNodes("a:1", "b:1")
    async with cluster(nodes) as metrics:
        page, plain = await metrics.page(prometheus), await metrics.page("text/plain")
    assert (page.media_type, plain.media_type) == (OPEN_METRICS, TEXT)
    assert nodes.served == 2, "both are of one reading"
    noted = [line for line in page.content.decode().splitlines() if "req-1" in line]
    bucket = f'{STEP_SECONDS.name}_bucket{{model="m",node="a:1",le="0.001"}}'
    assert noted == [f'{bucket} 1 # {{request_id="req-1"}} 0.0005 1.000']
    assert b"req-1" not in plain.content
