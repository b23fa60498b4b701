"""Thin shells: each puts one engine into a Serve replica and does nothing of its own.

Plain classes; ``app.py`` makes deployments of them. Engines are imported where they are
made: a gateway, and whoever builds the application, has no use for torch. In throughput
mode this code runs on the replica's only event loop, so nothing here may block; torch runs
in the engines' threads.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from deployments.config import (
    BatchLimits,
    EmbedModel,
    GenerateModel,
    ModelConfig,
    PlatformConfig,
)
from deployments.engines.batcher import Batcher, predict_each
from deployments.gateway.app import create_app
from deployments.gateway.services import ServedModel, Services
from deployments.observability import logs, ray_metrics
from deployments.observability.cluster_metrics import ClusterMetrics
from deployments.observability.events import BatchRan, Emit, fan_out
from deployments.remote import RemoteEmbedder, RemoteGenerator, readiness
from models.contracts import Delta, GenerateRequest, Json, Predictor, Priority, Sampling
from models.errors import InvalidInput, PlatformError, Timeout
from models.sources import fetch

if TYPE_CHECKING:
    from deployments.engines.embeddings import Embedding


def _observers() -> Emit:
    """Who is told what happens in this process."""
    logs.configure()
    replica = serve.get_replica_context().replica_id.unique_id
    return fan_out(ray_metrics.subscriber(replica=replica), logs.log_failures)


class GeneratorReplica:
    """One engine."""

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        from deployments.engines.engine import Engine

        model = GenerateModel.model_validate(config)
        folder = fetch(model.source, sha256=model.sha256)
        threads = model.engine.threads or max(1, math.floor(model.replicas.cpus))
        engine = model.engine.model_copy(update={"threads": threads})
        self._engine = Engine(name, folder, engine, model.queue, emit=_observers())

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta | PlatformError]:
        """Deltas; a failure comes as the last item."""
        try:
            async for delta in self._engine.generate(request):
                yield delta
        except PlatformError as error:
            yield error

    async def ping(self) -> None:
        """Answers while the replica can take requests."""

    def check_health(self) -> None:
        if not self._engine.alive:
            raise RuntimeError("the engine's thread has ended")

    def __del__(self) -> None:
        if hasattr(self, "_engine"):  # not after a constructor that failed
            self._engine.close()


class Batching(Protocol):
    """The two ways to batch a fixed-cost model, seen from a replica."""

    def configure(self, limits: BatchLimits) -> None: ...

    async def submit(
        self, input: Json, *, tenant: str, priority: Priority, timeout_s: float | None = None
    ) -> Json: ...


class ServeBatching:
    """Ray Serve's own ``@serve.batch``: simple, no priorities, no deadlines, no fairness."""

    def __init__(self, model: str, predictor: Predictor, emit: Emit) -> None:
        self._model = model
        self._predictor = predictor
        self._emit = emit

    def configure(self, limits: BatchLimits) -> None:
        self._predict.set_max_batch_size(limits.max_batch_size)
        self._predict.set_batch_wait_timeout_s(limits.max_wait_s)

    async def submit(
        self, input: Json, *, tenant: str, priority: Priority, timeout_s: float | None = None
    ) -> Json:
        try:
            outcome = await asyncio.wait_for(self._predict(input), timeout_s)
        except TimeoutError:
            raise Timeout(f"{self._model!r} did not answer within {timeout_s} s.") from None
        if isinstance(outcome, PlatformError):
            raise outcome
        return cast("Json", outcome)

    @serve.batch  # type: ignore[untyped-decorator]  # Ray's decorators are untyped
    async def _predict(self, inputs: Sequence[Json]) -> Sequence[Any]:
        began = time.monotonic()
        outcomes = await asyncio.to_thread(predict_each, self._predictor, inputs)
        duration = time.monotonic() - began
        self._emit(BatchRan(model=self._model, rows=len(inputs), duration_s=duration))
        return outcomes


class EmbedderReplica:
    """One sentence encoder behind a batcher; ``user_config`` is its ``BatchLimits``."""

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        from deployments.engines.embeddings import SentenceEncoder

        model = EmbedModel.model_validate(config)
        folder = fetch(model.source, sha256=model.sha256)
        encoder = SentenceEncoder(folder, max_tokens=model.max_tokens, threads=model.threads)
        emit = _observers()
        self._batch_size = model.batcher.max_batch_size
        self._batching: Batching
        if model.batcher.kind == "serve":
            self._batching = ServeBatching(name, encoder, emit)
        else:
            self._batching = Batcher(
                encoder, model=name, limits=model.batcher, queue=model.queue, emit=emit
            )

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """``BatchLimits`` change in place; no replica restarts."""
        limits = BatchLimits.model_validate(user_config)
        self._batch_size = limits.max_batch_size
        self._batching.configure(limits)

    async def embed(
        self, inputs: Sequence[str], priority: Priority, tenant: str, timeout_s: float | None
    ) -> tuple[NDArray[np.float32], int] | PlatformError:
        """Vectors ``[inputs, dimensions]`` float32, and the tokens read; or what went wrong."""
        vectors: list[NDArray[np.float32]] = []
        tokens = 0
        try:
            # A batch at a time, so that one long list cannot fill the waiting room by itself.
            for at in range(0, len(inputs), self._batch_size):
                part = inputs[at : at + self._batch_size]
                for output in await self._submit(part, at, priority, tenant, timeout_s):
                    vectors.append(output["embedding"])
                    tokens += output["tokens"]
        except PlatformError as error:
            return error
        return np.stack(vectors), tokens

    async def _submit(
        self,
        inputs: Sequence[str],
        offset: int,
        priority: Priority,
        tenant: str,
        timeout_s: float | None,
    ) -> list[Embedding]:
        """Embed inputs together; the first error tells which one it was."""

        async def one(index: int, text: str) -> Embedding:
            try:
                output = await self._batching.submit(
                    text, tenant=tenant, priority=priority, timeout_s=timeout_s
                )
            except InvalidInput as error:
                message = f"input {index}: {error.message}"
                raise InvalidInput(message, param="input", details=error.details) from None
            return cast("Embedding", output)

        tasks = [asyncio.ensure_future(one(i, text)) for i, text in enumerate(inputs, offset)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # after an error nobody waits for the others
                task.cancel()

    async def ping(self) -> None:
        """Answers while the replica can take requests."""


class GatewayReplica:
    """One gateway, with a handle to every model of the configuration."""

    def __init__(self, config: Mapping[str, Any], handles: Mapping[str, DeploymentHandle]) -> None:
        self._config = PlatformConfig.model_validate(config)
        self._handles = handles

    def __serve_build_asgi_app__(self) -> ASGIApp:
        started = int(time.time())
        models = {
            name: self._served(name, model, started) for name, model in self._config.models.items()
        }
        return create_app(
            Services(
                models=models,
                config=self._config.gateway,
                emit=_observers(),
                ready=lambda: readiness(self._handles),
                metrics=ClusterMetrics(ray_metrics.node_endpoints).exposition,
            )
        )

    def _served(self, name: str, model: ModelConfig, created: int) -> ServedModel:
        handle = self._handles[name]
        retries = self._config.gateway.start_retries
        if isinstance(model, EmbedModel):
            embedder = RemoteEmbedder(name, handle, retries=retries)
            return ServedModel(name=name, task="embed", created=created, embedder=embedder)
        return ServedModel(
            name=name,
            task="generate",
            created=created,
            generator=RemoteGenerator(name, handle, retries=retries),
            sampling=Sampling(**model.sampling.model_dump()),
            context=model.engine.context,
        )
