"""What ``/metrics`` answers: the measurements of the whole cluster, read from every node.

Any gateway replica gives the same answer. Reading a node keeps its Ray agent busy for some
60 ms, because the agent prints everything Ray knows; so a page is shared by those who ask
at the same time and kept for a second, which is no loss: agents hear news no more often.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

import httpx

from deployments.observability.exemplars import Exemplar, Exemplified
from deployments.observability.exposition import OPEN_METRICS, TEXT, Page, open_metrics, text
from deployments.observability.merging import Measurements, merge

logger = logging.getLogger(__name__)


class ClusterMetrics:
    """Make one a process, on the event loop that uses it."""

    def __init__(
        self,
        endpoints: Callable[[], Sequence[str]],
        *,
        exemplars: Callable[[], Mapping[Exemplified, Exemplar]] = dict,
        home: Callable[[], str | None] = lambda: None,
        timeout_s: float = 2.0,
        max_age_s: float = 1.0,
        endpoints_max_age_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            endpoints: lists ``host:port`` of each live node's page; may block, and runs in a
                thread (``ray_metrics.node_endpoints``).
            exemplars: of this process.
            home: which of the nodes this process is on; may block, too.
            timeout_s: how long one node may take; after that it counts as down.
            max_age_s: how old an answer may be.
            endpoints_max_age_s: how old the list of nodes may be.
            clock: seconds, monotonic.
            transport: in place of the network.
        """
        self._list_endpoints = endpoints
        self._exemplars = exemplars
        self._find_home = home
        self._home: str | None = None
        self._timeout_s = timeout_s
        self._max_age_s = max_age_s
        self._endpoints_max_age_s = endpoints_max_age_s
        self._clock = clock
        # Cluster addresses never go through a proxy, and compressing between
        # neighbours costs more than it saves.
        self._client = httpx.AsyncClient(
            timeout=timeout_s,
            trust_env=False,
            headers={"accept-encoding": "identity"},
            transport=transport,
        )
        self._lock = asyncio.Lock()
        self._measured: Measurements | None = None
        self._measured_expires = float("-inf")
        self._pages: dict[str, Page] = {}
        self._endpoints: Sequence[str] = ()
        self._endpoints_expire = float("-inf")

    async def page(self, accept: str) -> Page:
        """The cluster's page in Prometheus' text format, or in OpenMetrics for who accepts that.

        A node that does not answer has ``frontier_scrape_up`` 0 and no other series.

        Args:
            accept: the header of that name.
        """
        kind = OPEN_METRICS if "application/openmetrics-text" in accept else TEXT
        async with self._lock:
            if self._measured is None or self._clock() >= self._measured_expires:
                nodes = await self._nodes()
                pages = await asyncio.gather(*(self._fetch(node) for node in nodes))
                # Some ms of parsing: off the loop that streams tokens.
                self._measured = await asyncio.to_thread(
                    merge, dict(zip(nodes, pages, strict=True))
                )
                self._measured_expires = self._clock() + self._max_age_s
                self._pages.clear()
            if kind not in self._pages:
                self._pages[kind] = Page(
                    await asyncio.to_thread(self._printed, self._measured, kind), kind
                )
            return self._pages[kind]

    def _printed(self, measured: Measurements, kind: str) -> bytes:
        if kind == TEXT:
            return text(measured)
        return open_metrics(measured, self._exemplars(), self._home)

    async def close(self) -> None:
        await self._client.aclose()

    async def _nodes(self) -> Sequence[str]:
        if self._clock() >= self._endpoints_expire:
            try:
                async with asyncio.timeout(self._timeout_s):
                    self._endpoints = await asyncio.to_thread(self._list_endpoints)
                    self._home = await asyncio.to_thread(self._find_home)
            except Exception:
                # Without the GCS the nodes that we know can still be read.
                logger.warning("the list of nodes could not be renewed", exc_info=True)
            self._endpoints_expire = self._clock() + self._endpoints_max_age_s
        return self._endpoints

    async def _fetch(self, node: str) -> bytes | None:
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._client.get(f"http://{node}/metrics")
                response.raise_for_status()
                return response.content
        except Exception as error:
            # Whatever is wrong with a node, the others are still worth reading.
            logger.warning("no metrics from node %s: %r", node, error)
            return None
