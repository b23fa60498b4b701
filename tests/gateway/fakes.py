"""Workers that do what a test tells them, and remember what was asked of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

from deployments.caching.cache import ResponseCache
from deployments.caching.identity import with_adapter
from deployments.config import GatewayConfig
from deployments.engines.admission import check_tokens
from deployments.gateway.services import (
    EmbedResult,
    PredictResult,
    PublishedAdapter,
    ServedModel,
    Services,
)
from deployments.observability.events import Event, RequestFinished
from deployments.observability.exposition import TEXT, Page
from deployments.tenants.directory import Directory
from deployments.tenants.identity import Authenticator
from deployments.tenants.meter import Meter
from models.contracts import (
    Conversation,
    Delta,
    FinishReason,
    GenerateRequest,
    Json,
    Prompt,
    Sampling,
    Standing,
    Timings,
    TokenLogprob,
    TopLogprob,
    Usage,
    Versions,
)
from models.errors import NotFound

TIMINGS = Timings(queue_s=0.001, prefill_s=0.002, ttft_s=0.003, decode_s=0.004, total_s=0.007)
NOW = 1_700_000_000.25


@dataclass
class FakeGenerator:
    """Says ``pieces`` for every choice, ``delay_s`` apart, then ends as it is told.

    It keeps the contract of ``Generator``: without ``stream`` one delta a choice.
    """

    pieces: Sequence[str] = ("Hel", "lo", "!")
    delay_s: float = 0.0
    error: BaseException | None = None
    """Raised after ``error_after`` pieces."""
    error_after: int = 0
    prompt_tokens: int = 5
    finish_reason: FinishReason | None = FinishReason.STOP
    answered_by: str | None = "smollm2-1"
    versions: Versions | None = None
    likelihoods: Sequence[float] = (-0.25,) * 4
    """By choice, from the start again: of its tokens."""
    adapter_sha256: str = "a" * 64
    """Of whatever adapter is asked for."""
    requests: list[GenerateRequest] = field(default_factory=list)
    running: int = 0
    cancelled: list[str] = field(default_factory=list)
    """Ids of requests that were closed before their end."""

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.requests.append(request)
        self.running += 1
        ended = False
        try:
            pieces = self.pieces if request.stream else ("".join(self.pieces),)
            for said, piece in enumerate(pieces):
                await asyncio.sleep(self.delay_s)
                if self.error is not None and said >= self.error_after:
                    ended = True
                    raise self.error
                for index in range(request.n):
                    yield Delta(
                        index=index,
                        text=piece,
                        token_ids=(said,),
                        logprobs=_logprobs(request, piece, self.likelihoods[index % 4]),
                        prompt=_prompt(request) if not said else None,
                        versions=self.versions if said == index == 0 else None,
                    )
            for index in range(request.n):
                last = index == request.n - 1
                yield Delta(
                    index=index,
                    finish_reason=self.finish_reason,
                    usage=self._usage(request) if last else None,
                    timings=TIMINGS if last else None,
                    answered_by=self._answered_by(request) if last else None,
                )
            ended = True
        finally:
            self.running -= 1
            if not ended:
                self.cancelled.append(request.id)

    async def tokenize(self, prompt: Prompt) -> Sequence[int]:
        if self.error is not None:
            raise self.error
        if isinstance(prompt, Conversation):
            prompt = "".join(f"<{each.role}>{each.content}" for each in prompt.messages)
        return tuple(map(ord, prompt)) if isinstance(prompt, str) else prompt

    async def detokenize(self, tokens: Sequence[int]) -> str:
        if self.error is not None:
            raise self.error
        check_tokens("tokens", tokens, 0x110000)
        return "".join(map(chr, tokens))

    def _answered_by(self, request: GenerateRequest) -> str | None:
        if self.answered_by is None or request.adapter is None:
            return self.answered_by
        return with_adapter(self.answered_by, self.adapter_sha256)

    def _usage(self, request: GenerateRequest) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=len(self.pieces) * request.n,
            cached_tokens=1,
        )


def _prompt(request: GenerateRequest) -> tuple[TokenLogprob, ...] | None:
    if not request.sampling.prompt_logprobs:
        return None
    texts = request.prompt if isinstance(request.prompt, str) else "#" * len(str(request.prompt))
    return tuple(
        TokenLogprob(token_id=1, token=text, logprob=-1.0 if number else None)
        for number, text in enumerate(texts)
    )


def _logprobs(
    request: GenerateRequest, piece: str, likelihood: float
) -> tuple[TokenLogprob, ...] | None:
    if request.sampling.logprobs is None:
        return None
    top = tuple(
        TopLogprob(token_id=number, token=f"t{number}", logprob=-float("inf") if number else -0.5)
        for number in range(request.sampling.logprobs)
    )
    return (TokenLogprob(token_id=7, token=piece, logprob=likelihood, top=top),)


@dataclass
class FakeEmbedder:
    """The length of a text and its first letter's code are its vector."""

    error: Exception | None = None
    delay_s: float = 0.0
    answered_by: str | None = "minilm-1"
    calls: list[tuple[str, Standing]] = field(default_factory=list)
    cancelled: int = 0

    async def embed(self, inputs: Sequence[str], standing: Standing) -> EmbedResult:
        self.calls += [(text, standing) for text in inputs]
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return EmbedResult(
            vectors=[[float(len(text)), float(ord(text[0])), 0.5] for text in inputs],
            tokens=[len(text.split()) for text in inputs],
            answered_by=self.answered_by,
        )


@dataclass
class FakePredictor:
    """Wraps each input."""

    error: Exception | None = None
    delay_s: float = 0.0
    version: str | None = "digits@3"
    calls: list[tuple[list[Json], Standing]] = field(default_factory=list)
    called: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: int = 0

    async def predict(self, inputs: Sequence[Json], standing: Standing) -> PredictResult:
        self.calls.append((list(inputs), standing))
        self.called.set()
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return PredictResult(predictions=[{"saw": i} for i in inputs], version=self.version)


@dataclass
class FakeAdapters:
    """A registry of adapters in memory; ``known`` are the versions that exist."""

    found: dict[str, PublishedAdapter] = field(default_factory=dict)
    known: tuple[str, ...] = ("poet",)
    error: Exception | None = None

    def add(self, model: str, name: str, alias: str = "champion") -> PublishedAdapter:
        adapter = PublishedAdapter(
            model=model,
            name=name,
            alias=alias,
            version=f"{name}@1",
            content_sha256="a" * 64,
            created=1_700_000_009,
        )
        self.found[adapter.id] = adapter
        return adapter

    async def published(self) -> Sequence[PublishedAdapter]:
        if self.error is not None:
            raise self.error
        return list(self.found.values())

    async def publish(
        self, model: str, name: str, source: str | None, *, by: str
    ) -> PublishedAdapter:
        if self.error is not None:
            raise self.error
        if name not in self.known:
            raise NotFound(f"There is no {name!r} in the registry.", param="name")
        return self.add(model, name)

    async def withdraw(self, model: str, name: str, *, by: str) -> None:
        if self.found.pop(f"{model}:{name}", None) is None:
            raise NotFound(f"The adapter {name!r} of {model!r} is not published.", param="name")


@dataclass
class Recorder:
    """Subscribes to events."""

    events: list[Event] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    @property
    def finished(self) -> list[RequestFinished]:
        return [event for event in self.events if isinstance(event, RequestFinished)]


@dataclass
class World:
    """A gateway's surroundings. ``services()`` gives the gateway its view of them."""

    generator: FakeGenerator = field(default_factory=FakeGenerator)
    embedder: FakeEmbedder = field(default_factory=FakeEmbedder)
    predictor: FakePredictor = field(default_factory=FakePredictor)
    adapters: FakeAdapters = field(default_factory=FakeAdapters)
    cache: ResponseCache | None = None
    bind_host: str | None = "127.0.0.1"
    directory: Directory | None = None
    authenticator: Authenticator | None = None
    meter: Meter | None = None
    recorder: Recorder = field(default_factory=Recorder)
    config: GatewayConfig = field(default_factory=GatewayConfig)
    sampling: Sampling = field(default_factory=Sampling)
    """The defaults of ``smollm2``."""
    readiness: Mapping[str, bool | str] = field(default_factory=lambda: {"smollm2": True})
    metrics_text: bytes = b"# HELP up x\nup 1\n"

    def services(self) -> Services:
        return Services(
            models={
                "smollm2": ServedModel(
                    name="smollm2",
                    task="generate",
                    generator=self.generator,
                    sampling=self.sampling,
                    created=1_700_000_000,
                    context=2048,
                    version="wheel:smollm2==1",
                    identity="smollm2-1",
                ),
                "org/model:v1": ServedModel(
                    name="org/model:v1",
                    task="generate",
                    generator=self.generator,
                    created=1_700_000_001,
                ),
                "minilm": ServedModel(
                    name="minilm",
                    task="embed",
                    embedder=self.embedder,
                    created=1_700_000_002,
                    version="wheel:minilm==1",
                    identity="minilm-1",
                ),
                "digits": ServedModel(
                    name="digits",
                    task="predict",
                    predictor=self.predictor,
                    max_inputs=4,
                    max_input_bytes=100,
                    created=1_700_000_003,
                ),
            },
            config=self.config,
            emit=self.recorder,
            ready=self._ready,
            metrics=self._metrics,
            adapters=self.adapters,
            cache=self.cache,
            bind_host=self.bind_host,
            directory=self.directory,
            authenticator=self.authenticator,
            meter=self.meter,
            now=lambda: NOW,
        )

    async def _ready(self) -> Mapping[str, bool | str]:
        return self.readiness

    async def _metrics(self, accept: str) -> Page:
        return Page(self.metrics_text, TEXT)
