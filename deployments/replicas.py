"""Thin shells: each puts one engine into a Serve replica and does nothing of its own.

Plain classes; ``app.py`` makes deployments of them. Engines are imported where they are
made: a gateway, and whoever builds the application, has no use for torch. In throughput
mode this code runs on the replica's only event loop, so nothing here may block; torch runs
in the engines' threads.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from deployments.caching.cache import opened
from deployments.caching.identity import identity, version_name, with_adapter
from deployments.catalogue import Catalogue, folder_of, keep_telling, located
from deployments.config import (
    BatchLimits,
    EmbedModel,
    GenerateModel,
    ModelConfig,
    PlatformConfig,
    PredictModel,
    RegistryConfig,
    Replicas,
)
from deployments.engines.batcher import Batcher, predict_each
from deployments.engines.following import Batching, Following
from deployments.engines.pointer import Pointers, Version
from deployments.gateway.app import create_app
from deployments.gateway.services import EmbedResult, ServedModel, Services
from deployments.observability import logs, ray_metrics
from deployments.observability.cluster_metrics import ClusterMetrics
from deployments.observability.events import (
    BatchFailed,
    BatchRan,
    Emit,
    GenerationFinished,
    fan_out,
)
from deployments.observability.exemplars import Exemplars
from deployments.observability.traces import Traces
from deployments.publishing import RegistryAdapters
from deployments.remote import (
    RemoteEmbedder,
    RemoteGenerator,
    RemotePredictor,
    ask,
    bind_host,
    plain,
    readiness,
)
from deployments.tenants.alerts import Alerts
from deployments.tenants.deletion import Deletion, stores
from deployments.tenants.directory import Directory
from deployments.tenants.entrance import authenticator
from deployments.tenants.idempotency import IdempotencyRecords
from deployments.tenants.keys import Peppers
from deployments.tenants.ledger import Ledger
from deployments.tenants.meter import Meter
from deployments.tenants.retention import Retention, keep_house
from deployments.webhooks.inbox import Inbox
from deployments.webhooks.sources import Sources
from models import artifact
from models.contracts import (
    Delta,
    GenerateRequest,
    Json,
    Predictor,
    Prompt,
    Sampling,
    Standing,
    Usage,
    Versions,
)
from models.errors import InternalError, InvalidInput, NotFound, PlatformError, Timeout
from models.sources.registry import SCHEME
from state.counters import Strategy, open_counters
from state.database import LazyDatabase
from state.patience import SERVER_S
from state.places import Places

if TYPE_CHECKING:
    from deployments.engines.embeddings import Embedding

T = TypeVar("T")

logger = logging.getLogger(__name__)


def _observers() -> Emit:
    """Who is told what happens in this process."""
    logs.configure()
    return fan_out(ray_metrics.subscriber(replica=_replica()), logs.log_failures, Traces())


def _replica() -> str:
    name: str = serve.get_replica_context().replica_id.unique_id
    return name


def _in_background(*work: Coroutine[Any, Any, None]) -> list[asyncio.Task[None]]:
    """Ray runs constructors on the replica's event loop."""
    loop = asyncio.get_running_loop()
    return [loop.create_task(one) for one in work]


def _told(name: str, error: Exception) -> PlatformError:
    """What is said of an error. One that nobody foresaw is logged here and goes no further: Serve
    would log it, too, and all that it quotes.
    """
    if isinstance(error, PlatformError):
        return error
    logger.error("%s failed on a request", name, exc_info=error)
    return InternalError(f"{name} failed unexpectedly.")


async def _or_told(name: str, work: Awaitable[T]) -> T | PlatformError:
    """What ``work`` gives, or what is said of its failure: Ray would wrap what is raised."""
    try:
        return await work
    except Exception as error:
        return _told(name, error)


def _threads(asked: int | None, replicas: Replicas) -> int:
    """Of torch. Without a word from the configuration as many as Ray has set processors aside."""
    return asked or max(1, math.floor(replicas.cpus))


class GeneratorReplica:
    """One engine, and the adapters that the registry has for it.

    The engine knows adapters as NAME@NUMBER, which never change; what an alias means is
    looked up here, and a version is in memory before the alias moves to it.
    """

    def __init__(self, name: str, config: Mapping[str, Any], registry: Mapping[str, Any]) -> None:
        from deployments.engines.engine import Engine

        model = GenerateModel.model_validate(config)
        self._name = name
        self._identity = identity(model)
        self._version, folder = located(model)
        self._called = self._version.name or version_name(model)
        self._catalogue = Catalogue()
        self._found: dict[str, Version] = {}
        threads = _threads(model.engine.threads, model.replicas)
        engine = model.engine.model_copy(update={"threads": threads})
        self._emit = _observers()
        self._engine = Engine(
            name, folder, engine, model.queue, resolve=self._adapter_folder, emit=self._emit
        )
        rhythm = RegistryConfig.model_validate(registry)
        self._adapters = Pointers(self._look_up, self._preload, refresh_s=rhythm.refresh_s)
        self._tasks = _in_background(
            self._follow(rhythm.refresh_s),
            keep_telling(
                self._catalogue, self._served, replica=_replica(), every_s=rhythm.heartbeat_s
            ),
        )

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta | PlatformError]:
        """Deltas; a failure comes as the last item."""
        logs.on_behalf_of.set(request)  # Serve answers each call in a task of its own
        try:
            answered_by, versions = self._identity, Versions(model=self._called)
            if request.adapter is not None:
                version = await self._adapters.get(request.adapter)
                request = replace(request, adapter=version.name)
                versions = versions._replace(adapter=version.name)
                if answered_by is not None and version.content_sha256 is not None:
                    answered_by = with_adapter(answered_by, version.content_sha256)
            begun = False
            async for delta in self._engine.generate(request):
                if not begun and delta.place is None:
                    begun, delta = True, replace(delta, versions=versions)
                if delta.usage is not None:
                    delta = replace(delta, answered_by=answered_by)
                    self._finished(request, delta)
                yield delta
        except Exception as error:
            yield _told(self._name, error)

    def _finished(self, request: GenerateRequest, last: Delta) -> None:
        if last.usage is not None and last.timings is not None:
            self._emit(
                GenerationFinished(request_id=request.id, usage=last.usage, timings=last.timings)
            )

    async def answer(self, request: GenerateRequest) -> list[Delta | PlatformError]:
        """All that ``generate`` yields, for those who want nothing before its end."""
        return [item async for item in self.generate(request)]

    async def tokenize(self, prompt: Prompt) -> Sequence[int] | PlatformError:
        """See ``models.contracts.Tokenizes``."""
        return await _or_told(self._name, self._engine.tokenize(prompt))

    async def detokenize(self, tokens: Sequence[int]) -> str | PlatformError:
        """See ``models.contracts.Tokenizes``."""
        return await _or_told(self._name, self._engine.detokenize(tokens))

    async def spent(self, receipts: Sequence[str]) -> list[Usage | None]:
        """What was done for requests whose clients have left; ``None``: not here, or not known."""
        return list(await asyncio.gather(*(self._engine.accounts.spent(each) for each in receipts)))

    async def try_adapter(self, reference: str) -> PlatformError | None:
        """Load an adapter, to see whether this model can answer with it; or what is wrong."""

        async def load() -> None:
            await self._preload(self._found_as(await self._catalogue.look_up(reference)))

        return await _or_told(self._name, load())

    async def ping(self) -> None:
        """Answers while the replica can take requests."""

    def check_health(self) -> None:
        if not self._engine.alive:
            raise RuntimeError("the engine's thread has ended")

    async def _look_up(self, reference: str) -> Version:
        return self._found_as(await self._catalogue.published_adapter(reference))

    def _found_as(self, version: Version) -> Version:
        assert version.name is not None
        self._found[version.name] = version
        return version

    def _adapter_folder(self, name: str) -> Path:
        """In one of the engine's own threads."""
        return folder_of(self._found[name])

    async def _preload(self, version: Version) -> None:
        assert version.name is not None
        folder = await asyncio.to_thread(folder_of, version)
        await asyncio.to_thread(self._engine.load_adapter, version.name, folder)

    async def _follow(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            await self._adapters.refresh()
            meant = {version.name for version in self._adapters.versions()}
            for adapter in self._engine.adapters():
                if adapter.name not in meant and not adapter.in_use:
                    with suppress(NotFound):
                        self._engine.unload_adapter(adapter.name)

    def _served(self) -> Iterable[tuple[str, Version]]:
        if self._version.content_sha256 is not None:
            yield self._name, self._version
        for version in self._adapters.versions():
            yield f"{self._name}:{version.name}", version

    def __del__(self) -> None:
        if hasattr(self, "_engine"):  # not after a constructor that failed
            self._engine.close()


class ServeBatching:
    """Ray Serve's own ``@serve.batch``: simple, no priorities, no deadlines, no fairness."""

    def __init__(self, model: str, predictor: Predictor, emit: Emit) -> None:
        self._model = model
        self._predictor = predictor
        self._emit = emit

    def configure(self, limits: BatchLimits) -> None:
        self._predict.set_max_batch_size(limits.max_batch_size)
        self._predict.set_batch_wait_timeout_s(limits.max_wait_s)

    async def close(self) -> None:
        del self._predictor  # Serve's batching keeps what it decorates for as long as the process

    async def submit(self, input: Json, standing: Standing) -> Json:
        try:
            outcome = await asyncio.wait_for(self._predict(input), standing.timeout_s)
        except TimeoutError:
            waited = f"within {standing.timeout_s} s"
            raise Timeout(f"{self._model!r} did not answer {waited}.") from None
        if isinstance(outcome, PlatformError):
            raise outcome
        return cast("Json", outcome)

    @serve.batch  # type: ignore[untyped-decorator]  # Ray's decorators are untyped
    async def _predict(self, inputs: Sequence[Json]) -> Sequence[Any]:
        began = time.monotonic()
        try:
            outcomes = await asyncio.to_thread(predict_each, self._predictor, inputs)
        except Exception as error:  # Serve would log it, with all that it says
            told = f"{type(error).__name__}: {error}"
            self._emit(BatchFailed(model=self._model, rows=len(inputs), error=told))
            failed = f"{self._model!r} failed on the batch this request was in."
            return [InternalError(failed) for _ in inputs]
        duration = time.monotonic() - began
        self._emit(BatchRan(model=self._model, rows=len(inputs), duration_s=duration))
        return outcomes


FixedCost: TypeAlias = EmbedModel | PredictModel
FIXED_COST: TypeAdapter[FixedCost] = TypeAdapter(FixedCost)


class PredictorReplica:
    """One fixed-cost model behind a batcher; ``user_config`` is its ``BatchLimits``."""

    def __init__(self, name: str, config: Mapping[str, Any], registry: Mapping[str, Any]) -> None:
        self._name = name
        self._model = FIXED_COST.validate_python(config)
        self._identity = identity(self._model) if isinstance(self._model, EmbedModel) else None
        self._emit = _observers()
        self._catalogue = Catalogue()
        version, folder = located(self._model)
        reference = self._model.source.removeprefix(SCHEME)
        self._following = Following(
            version,
            self._batching(folder),
            self._model.batcher,
            look_up=partial(self._catalogue.look_up, reference),
            load=self._load,
        )
        rhythm = RegistryConfig.model_validate(registry)
        self._tasks: list[asyncio.Task[None]] = []
        if version.name is not None:
            self._tasks += _in_background(
                keep_telling(
                    self._catalogue, self._served, replica=_replica(), every_s=rhythm.heartbeat_s
                )
            )
            if self._model.sha256 is None:
                self._tasks += _in_background(self._following.follow(rhythm.refresh_s))

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """``BatchLimits`` change in place; no replica restarts."""
        self._following.configure(BatchLimits.model_validate(user_config))

    async def predict(
        self, inputs: Sequence[Json], standing: Standing
    ) -> tuple[list[Json], str | None] | PlatformError:
        """Outputs, and the version that all of them come from; or what went wrong."""
        return await _or_told(self._name, self._predicted(inputs, standing))

    async def _predicted(
        self, inputs: Sequence[Json], standing: Standing
    ) -> tuple[list[Json], str | None]:
        outputs: list[Json] = []
        with self._following.pinned() as (version, batching):
            # A batch at a time, so that one long list cannot fill the waiting room by itself.
            size = self._following.limits.max_batch_size
            for at in range(0, len(inputs), size):
                part = inputs[at : at + size]
                outputs += await self._submit(batching, part, at, standing)
        return outputs, version.name

    async def embed(self, inputs: Sequence[str], standing: Standing) -> EmbedResult | PlatformError:
        """Vectors as ``[inputs, dimensions]`` float32; or what went wrong."""
        answer = await self.predict(inputs, standing)
        if isinstance(answer, PlatformError):
            return answer
        outputs = cast("list[Embedding]", answer[0])
        vectors = np.stack([output["embedding"] for output in outputs])
        return EmbedResult(
            vectors=cast("Sequence[NDArray[np.float32]]", vectors),
            tokens=[output["tokens"] for output in outputs],
            answered_by=self._identity,
            version=answer[1],
        )

    async def _submit(
        self, batching: Batching, inputs: Sequence[Json], offset: int, standing: Standing
    ) -> list[Json]:
        """Predict for inputs together; the first error tells which one it was."""

        async def one(index: int, input: Json) -> Json:
            try:
                return await batching.submit(input, standing)
            except InvalidInput as error:
                embeds = self._model.task == "embed"
                raise InvalidInput(
                    f"input {index}: {error.message}",
                    param="input" if embeds else f"inputs[{index}]",
                    details=error.details | {"index": index},
                ) from None

        tasks = [asyncio.ensure_future(one(i, input)) for i, input in enumerate(inputs, offset)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # after an error nobody waits for the others
                task.cancel()

    async def ping(self) -> None:
        """Answers while the replica can take requests."""

    def _load(self, version: Version) -> Batching:
        return self._batching(folder_of(version))

    def _batching(self, folder: Path) -> Batching:
        predictor = _predictor(self._model, folder)
        if self._model.batcher.kind == "serve":
            return ServeBatching(self._name, predictor, self._emit)
        return Batcher(
            predictor,
            model=self._name,
            limits=self._model.batcher,
            queue=self._model.queue,
            emit=self._emit,
        )

    def _served(self) -> Iterable[tuple[str, Version]]:
        yield self._name, self._following.version


def _predictor(model: FixedCost, folder: Path) -> Predictor:
    threads = _threads(model.threads, model.replicas)
    if isinstance(model, EmbedModel):
        from deployments.engines.embeddings import SentenceEncoder

        return SentenceEncoder(folder, max_tokens=model.max_tokens, threads=threads)
    predictor = artifact.load(folder)
    if torch := sys.modules.get("torch"):  # not all predictors use it
        torch.set_num_threads(threads)
    return predictor


OPEN = (
    "Open: whoever reaches this gateway may do everything. gateway.auth.mode: keys in the"
    " configuration, or FRONTIER_AUTH=keys, asks for keys."
)
"""Said by each gateway: ``serve run`` and ``serve deploy`` have no launcher that says it."""

COLLECT_AFTER = (5_000, 20, 50)
"""When a gateway looks for cycles, as ``gc.set_threshold`` takes it. What a request makes is gone
when it is answered: Python's usual 700 look at the requests under way again and again, and find
nothing, for a twentieth of the time."""


SETTLE_S = 5.0
"""How long a gateway that ends may take to settle what its requests have used."""


class GatewayReplica:
    """One gateway, with a handle to every model of the configuration."""

    def __init__(self, config: Mapping[str, Any], handles: Mapping[str, DeploymentHandle]) -> None:
        gc.set_threshold(*COLLECT_AFTER)
        self._config = PlatformConfig.model_validate(config)
        self._handles = {name: plain(handle) for name, handle in handles.items()}
        self._database = LazyDatabase(patience_s=SERVER_S)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        started = int(time.time())
        config, peppers, database = self._config.gateway, Peppers.of(), self._database
        directory = Directory(database, peppers)
        sources = Sources.of(config.webhooks)
        inbox = Inbox(database, dedupe_s=config.webhooks.dedupe_s)
        counters = open_counters(Places.of().counters)
        entrance = authenticator(config.auth, directory, peppers)
        ledger = Ledger(database, now=time.time, clock=time.monotonic)
        idempotency = IdempotencyRecords(database, ttl_s=config.idempotency.ttl_s)

        exemplars = Exemplars()
        emit, state = fan_out(_observers(), exemplars), {"database": database.ping}
        if entrance is None:  # nobody has limits, and nobody is to pay
            logger.warning(OPEN)
        else:
            alerts = Alerts(database=database, now=time.time, emit=emit)
            emit = fan_out(emit, ledger, alerts)
            state["counters"] = counters.ping
        meter = Meter(
            counters=counters,
            plans=config.plans,
            strategy=Strategy(config.quota_strategy),
            prices=config.prices,
            emit=emit,
            check=ledger.check,
        )

        async def close() -> None:
            with suppress(TimeoutError):  # what is left expires with its lease
                await asyncio.wait_for(meter.close(), SETTLE_S)
            await asyncio.gather(ledger.close(), idempotency.close())

        cache = opened(config.cache, emit)
        elsewhere = stores(counters, None if cache is None else cache.store)
        self._tasks = _in_background(
            inbox.keep_forgetting(),
            keep_house(
                Retention(database=database, config=config.retention),
                Deletion(database=database, elsewhere=elsewhere),
                every_s=config.retention.every_s,
            ),
        )
        models = {
            name: self._served(name, model, started) for name, model in self._config.models.items()
        }
        return create_app(
            Services(
                models=models,
                config=config,
                emit=emit,
                ready=lambda: readiness(self._handles, state),
                metrics=ClusterMetrics(
                    ray_metrics.node_endpoints,
                    exemplars=exemplars.last,
                    home=ray_metrics.own_endpoint,
                ).page,
                adapters=RegistryAdapters(
                    Catalogue(),
                    self._generating(),
                    self._try_adapter,
                    refresh_s=self._config.registry.refresh_s,
                ),
                directory=directory,
                idempotency=idempotency,
                authenticator=entrance,
                meter=meter,
                webhook_sources=sources,
                inbox=inbox,
                cache=cache,
                bind_host=bind_host(),
                echoes_ids=True,
                close=close,
            )
        )

    def _generating(self) -> dict[str, str]:
        """The sources of the models that generate."""
        return {
            name: model.source
            for name, model in self._config.models.items()
            if isinstance(model, GenerateModel)
        }

    async def _try_adapter(self, model: str, reference: str) -> None:
        """Raises what a replica finds wrong with an adapter."""
        retries = self._config.gateway.start_retries
        await ask(model, retries, self._handles[model].try_adapter, reference)

    def _served(self, name: str, model: ModelConfig, created: int) -> ServedModel:
        handle = self._handles[name]
        retries = self._config.gateway.start_retries
        if isinstance(model, EmbedModel):
            embedder = RemoteEmbedder(name, handle, retries=retries)
            return ServedModel(
                name=name,
                task="embed",
                created=created,
                embedder=embedder,
                version=version_name(model),
                identity=identity(model),
            )
        if isinstance(model, PredictModel):
            return ServedModel(
                name=name,
                task="predict",
                created=created,
                predictor=RemotePredictor(name, handle, retries=retries),
                max_inputs=model.max_inputs,
                max_input_bytes=model.max_input_bytes,
                version=version_name(model),
            )
        return ServedModel(
            name=name,
            task="generate",
            created=created,
            generator=RemoteGenerator(name, handle, retries=retries),
            sampling=Sampling(**model.sampling.model_dump()),
            context=model.engine.context,
            version=version_name(model),
            identity=identity(model),
        )
