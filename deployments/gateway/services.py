"""All that the gateway needs from elsewhere, in one value that ``create_app`` is given."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from deployments.config import GatewayConfig
from deployments.guardrails.guard import Guardrails
from deployments.observability.events import Emit
from deployments.observability.exposition import Page
from deployments.tenants.directory import Directory
from deployments.tenants.idempotency import IdempotencyRecords
from deployments.tenants.identity import Authenticator
from deployments.tenants.meter import Meter
from deployments.tenants.sight import EVERYTHING, Sight
from deployments.webhooks.inbox import Inbox
from deployments.webhooks.sources import Sources
from models.contracts import Delta, GenerateRequest, Generator, Json, Sampling, Standing
from models.errors import InvalidInput, NotFound, Unavailable
from models.versions import absent

if TYPE_CHECKING:  # what caches embeddings speaks of them in the words of this file
    from deployments.caching.cache import ResponseCache

T = TypeVar("T")

Task: TypeAlias = Literal["generate", "embed", "predict"]
WAYS: Mapping[Task, tuple[str, str]] = {
    "generate": ("generates", "/v1/chat/completions"),
    "embed": ("embeds", "/v1/embeddings"),
    "predict": ("predicts", "/v1/models/NAME/predict"),
}
"""What a model of each task does, and where it is asked to."""
ADAPTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9][A-Za-z0-9._-]*)?")
CHAMPION = "champion"


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedResult:
    vectors: Sequence[Sequence[float] | NDArray[np.float32]]
    """One for each input, in order."""
    tokens: Sequence[int]
    """Read of each input, in order."""
    answered_by: str | None = None
    """As of ``models.contracts.Delta``."""
    version: str | None = None
    """As of ``models.contracts.Versions``."""
    remembered_tokens: int = 0
    """Of ``tokens``, those that nobody read for this call."""

    @property
    def prompt_tokens(self) -> int:
        return sum(self.tokens)


class Embedder(Protocol):
    async def embed(self, inputs: Sequence[str], standing: Standing) -> EmbedResult:
        """Embed every input; cancelling the call frees what it holds.

        Raises:
            models.errors.PlatformError: as ``Generator.generate`` does.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictResult:
    predictions: Sequence[Json]
    """One for each input, in order, all of one version."""
    version: str | None
    """NAME@VERSION in the registry; ``None`` of a model that is not from there."""


class BatchPredictor(Protocol):
    async def predict(self, inputs: Sequence[Json], standing: Standing) -> PredictResult:
        """Predict for every input; cancelling the call frees what it holds.

        Raises:
            models.errors.PlatformError: as ``Generator.generate`` does; ``InvalidInput`` names
                the input.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One name in ``/v1/models``. The task says which of the three workers is there."""

    name: str
    task: Task
    created: int
    """Unix seconds."""
    generator: Generator | None = None
    embedder: Embedder | None = None
    predictor: BatchPredictor | None = None
    max_inputs: int = 256
    max_input_bytes: int = 65_536
    sampling: Sampling = field(default_factory=Sampling)
    """What holds for whatever a request leaves open."""
    context: int | None = None
    """Tokens of prompt and output together, where the model has such a limit."""
    owned_by: str = "frontier-run"
    version: str | None = None
    """As of ``models.contracts.Versions``, where the configuration says; else an answer may."""
    identity: str | None = None
    """A name for exactly what answers, without an adapter; ``None``: it may change unnoticed,
    so its answers are not cached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedAdapter:
    """A LoRA adapter that a model answers with when it is asked for as ``id``."""

    model: str
    name: str
    alias: str
    """``champion`` is what the bare name means."""
    version: str
    """NAME@VERSION."""
    content_sha256: str
    created: int
    """Unix seconds."""

    @property
    def id(self) -> str:
        """What a request writes as its model."""
        bare = f"{self.model}:{self.name}"
        return bare if self.alias == CHAMPION else f"{bare}@{self.alias}"


class Adapters(Protocol):
    """The adapters of the models that generate, as the registry has them."""

    async def published(self) -> Sequence[PublishedAdapter]:
        """All, in any order, at most a few seconds old.

        Raises:
            Unavailable: the registry is out of reach and never was within it.
        """
        ...

    async def publish(
        self, model: str, name: str, source: str | None, *, by: str
    ) -> PublishedAdapter:
        """Make a version the champion of ``name``, once ``model`` has shown that it runs it.

        Args:
            source: ``registry:NAME@VERSION_OR_ALIAS``, or the folder of a sealed artifact,
                which is registered first; ``None``: the newest version of ``name``.
            by: who does so, for the audit log.

        Raises:
            InvalidInput, NotFound: no such source, or no adapter of this model.
            Unavailable: the registry or the model is out of reach.
        """
        ...

    async def withdraw(self, model: str, name: str, *, by: str) -> None:
        """No longer answer with ``name``. Its versions stay in the registry.

        Raises:
            NotFound: it is not published.
            Unavailable: the registry is out of reach.
        """
        ...


class NoAdapters:
    """Of a gateway without a registry."""

    async def published(self) -> Sequence[PublishedAdapter]:
        return ()

    async def publish(
        self, model: str, name: str, source: str | None, *, by: str
    ) -> PublishedAdapter:
        raise Unavailable("There is no registry here that could publish adapters.")

    async def withdraw(self, model: str, name: str, *, by: str) -> None:
        raise NotFound(f"The adapter {name!r} of {model!r} is not published.", param="name")


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    models: Mapping[str, ServedModel]
    config: GatewayConfig
    emit: Emit
    ready: Callable[[], Awaitable[Mapping[str, bool | str]]]
    """Each component: True, or why it is not ready."""
    metrics: Callable[[str], Awaitable[Page]]
    """The page of the whole cluster for Prometheus, by what is accepted."""
    adapters: Adapters = field(default_factory=NoAdapters)
    directory: Directory | None = None
    """Tenants and keys; ``None``: a gateway without a database."""
    idempotency: IdempotencyRecords | None = None
    """``None``: ``Idempotency-Key`` means nothing here."""
    authenticator: Authenticator | None = None
    """``None``: the platform is open, to this machine only."""
    meter: Meter | None = None
    """``None``: nothing is counted, and nobody has limits."""
    webhook_sources: Sources = field(default_factory=Sources)
    """Who may deliver webhooks."""
    inbox: Inbox | None = None
    """Of webhooks; ``None``: a gateway without a database."""
    cache: ResponseCache | None = None
    """``None``: every answer is computed."""
    close: Callable[[], Awaitable[None]] | None = None
    """Called when the gateway stops, after its last answer: for what is not written yet."""
    bind_host: str | None = None
    """The address that HTTP is answered on; ``None``: unknown."""
    echoes_ids: bool = False
    """Whether the server under the gateway sends the id of a request back by itself."""
    clock: Callable[[], float] = time.monotonic
    """Seconds, for durations."""
    now: Callable[[], float] = time.time
    """Unix seconds, for timestamps."""
    guardrails: Guardrails = field(init=False)
    """As the configuration has them: a gateway cannot be made without."""

    def __post_init__(self) -> None:
        embedder = partial(self.embedder, sight=EVERYTHING)  # checks are the platform's own
        object.__setattr__(self, "guardrails", Guardrails.of(self.config, embedder))

    def seen(self, sight: Sight) -> Mapping[str, ServedModel]:
        """The models that are there for somebody who sees no more than that."""
        if not sight.rules:
            return self.models
        return {name: model for name, model in self.models.items() if sight.sees(name)}

    def find(self, name: str, sight: Sight) -> tuple[ServedModel, str | None]:
        """The model that ``name`` means, and the adapter: ``MODEL``, ``MODEL:ADAPTER[@VERSION]``.

        Whether there is such an adapter is for the model to say.

        Raises:
            NotFound: with the names that exist. A model that is not seen does not.
        """
        models = self.seen(sight)
        if model := models.get(name):
            return model, None
        base, _, adapter = name.partition(":")
        model = models.get(base)
        if model is not None and model.task == "generate" and ADAPTER.fullmatch(adapter):
            return model, adapter
        served = ", ".join(sorted(models))
        raise NotFound(
            f"The model {name!r:.256} does not exist. Served here: {served}.", param="model"
        )

    def model(self, name: str, sight: Sight) -> ServedModel:
        """Raises :class:`NotFound` with the names that exist."""
        return self.find(name, sight)[0]

    def generator(self, name: str, sight: Sight) -> Generator:
        """The worker behind a model that generates; see ``_worker``.

        Of an adapter that is not seen, one that says what the model says of one that is not there.
        """
        model, adapter = self.find(name, sight)
        worker = _worker(model, model.generator, "it cannot generate")
        return worker if sight.sees(model.name, adapter) else NotThere()

    def embedder(self, name: str, sight: Sight) -> Embedder:
        """The worker behind a model that embeds; see ``_worker``."""
        model = self.model(name, sight)
        return _worker(model, model.embedder, "it does not embed")

    def predictor(self, name: str, sight: Sight) -> BatchPredictor:
        """The worker behind a model that predicts; see ``_worker``."""
        model = self.model(name, sight)
        return _worker(model, model.predictor, "it does not predict")


class NotThere:
    """A ``Generator`` in place of an adapter that whoever asks may not see.

    It refuses where a model does, after all that a request has to pass before: neither the
    answer, nor its headers, nor what was counted tells it from an adapter that nobody made.
    """

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        raise absent(request.adapter or request.model)
        yield Delta(index=0)  # what makes it a generator


def _worker(model: ServedModel, worker: T | None, cannot: str) -> T:
    """Raises :class:`InvalidInput` if the model does something else."""
    if worker is not None:
        return worker
    does, where = WAYS[model.task]
    route = where.replace("NAME", model.name)
    raise InvalidInput(f"The model {model.name!r} {does}; {cannot}. Use {route}.", param="model")
