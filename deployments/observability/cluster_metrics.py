"""What ``/metrics`` answers: the measurements of the whole cluster, read from every node.

Any gateway replica gives the same answer. Reading a node keeps its Ray agent busy for some
60 ms, because the agent prints everything Ray knows; so a page is shared by those who ask
at the same time and kept for a second, which is no loss: agents hear news no more often.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import httpx

from deployments.observability.exposition import CONTENT_TYPE, merge

__all__ = ["CONTENT_TYPE", "ClusterMetrics"]

logger = logging.getLogger(__name__)


class ClusterMetrics:
    """Make one a process, on the event loop that uses it."""

    def __init__(
        self,
        endpoints: Callable[[], Sequence[str]],
        *,
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
            timeout_s: how long one node may take; after that it counts as down.
            max_age_s: how old an answer may be.
            endpoints_max_age_s: how old the list of nodes may be.
            clock: seconds, monotonic.
            transport: in place of the network.
        """
        self._list_endpoints = endpoints
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
        self._page = b""
        self._page_expires = float("-inf")
        self._endpoints: Sequence[str] = ()
        self._endpoints_expire = float("-inf")

    async def exposition(self) -> bytes:
        """The cluster's page in Prometheus text format (``CONTENT_TYPE``).

        A node that does not answer has ``frontier_scrape_up`` 0 and no other series.
        """
        async with self._lock:
            if self._clock() >= self._page_expires:
                nodes = await self._nodes()
                pages = await asyncio.gather(*(self._fetch(node) for node in nodes))
                # Some ms of parsing: off the loop that streams tokens.
                self._page = await asyncio.to_thread(merge, dict(zip(nodes, pages, strict=True)))
                self._page_expires = self._clock() + self._max_age_s
            return self._page

    async def close(self) -> None:
        await self._client.aclose()

    async def _nodes(self) -> Sequence[str]:
        if self._clock() >= self._endpoints_expire:
            try:
                async with asyncio.timeout(self._timeout_s):
                    self._endpoints = await asyncio.to_thread(self._list_endpoints)
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
