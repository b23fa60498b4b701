"""Workers that say their next piece when a test tells them to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from deployments.caching.cache import ResponseCache
from deployments.caching.generator import CachingGenerator
from deployments.caching.reuse import Outcome, Wish
from deployments.gateway.services import EmbedResult
from deployments.observability.events import CacheAsked, Event
from models.contracts import (
    Delta,
    FinishReason,
    GenerateRequest,
    Priority,
    Prompt,
    Sampling,
    Standing,
    Timings,
    Usage,
)
from models.errors import InvalidInput
from state.cache import Bounds, Cache
from state.cache.memory import MemoryCache

PIECES = ("One ", "two ", "three.")
TEXT = "".join(PIECES)
VERSION = "v1"
BOUNDS = Bounds(max_bytes=1_000_000, max_entry_bytes=100_000)
TIMINGS = Timings(queue_s=1, prefill_s=1, ttft_s=2, decode_s=1, total_s=3)


async def settle() -> None:
    """Everything that can happen without anybody's doing has happened."""
    for _ in range(50):
        await asyncio.sleep(0)


def cache_of(store: Cache | None = None) -> tuple[ResponseCache, list[Outcome]]:
    """A cache over a store, and what it told of how it was used."""
    outcomes: list[Outcome] = []

    def emit(event: Event) -> None:
        assert isinstance(event, CacheAsked)
        outcomes.extend([event.outcome] * event.times)

    store = MemoryCache(BOUNDS) if store is None else store
    return ResponseCache(store=store, ttl_s=60, emit=emit), outcomes


@dataclass
class SteppedGenerator:
    """One piece a ``step``; ``fail`` raises in place of the next."""

    pieces: Sequence[str] = PIECES
    answered_by: str | None = VERSION
    requests: list[GenerateRequest] = field(default_factory=list)
    running: int = 0
    cancelled: int = 0
    _steps: list[asyncio.Queue[BaseException | None]] = field(default_factory=list)

    def step(self, error: BaseException | None = None) -> None:
        """To all that run."""
        for queue in self._steps:
            queue.put_nowait(error)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.requests.append(request)
        self.running += 1
        steps: asyncio.Queue[BaseException | None] = asyncio.Queue()
        self._steps.append(steps)
        ended = False
        try:
            for number, piece in enumerate(self.pieces, 1):
                if (error := await steps.get()) is not None:
                    ended = True
                    raise error
                last = number == len(self.pieces)
                for index in range(request.n):
                    end = last and index == request.n - 1
                    yield Delta(
                        index=index,
                        text=piece,
                        token_ids=(number,),
                        finish_reason=FinishReason.STOP if last else None,
                        usage=Usage(prompt_tokens=4, completion_tokens=3) if end else None,
                        timings=TIMINGS if end else None,
                        answered_by=self.answered_by if end else None,
                    )
            ended = True
        finally:
            self._steps.remove(steps)
            self.running -= 1
            self.cancelled += not ended


def asking(
    prompt: Prompt = "count",
    *,
    stream: bool = True,
    tenant: str = "acme",
    priority: Priority = Priority.STANDARD,
    n: int = 1,
    sampling: Sampling | None = None,
    timeout_s: float | None = 30,
) -> GenerateRequest:
    return GenerateRequest(
        id="r",
        model="m",
        prompt=prompt,
        stream=stream,
        tenant=tenant,
        priority=priority,
        n=n,
        sampling=sampling or Sampling(temperature=0),
        timeout_s=timeout_s,
    )


class Caller:
    """Reads a caching generator to its end in a task of its own."""

    def __init__(
        self,
        inner: SteppedGenerator,
        cache: ResponseCache,
        request: GenerateRequest | None = None,
        *,
        wish: Wish | None = None,
        version: str | None = VERSION,
    ) -> None:
        async def version_of(request: GenerateRequest) -> str | None:
            return version

        self.deltas: list[Delta] = []
        self.outcomes: list[Outcome] = []
        self.error: Exception | None = None
        self.left = False
        self._generator = CachingGenerator(
            inner=inner,
            cache=cache,
            wish=Wish() if wish is None else wish,
            version=version_of,
            told=self.outcomes.append,
            revised=self._revise,
        )
        self.task = asyncio.create_task(self._read(request or asking()))

    def _revise(self, was: Outcome, now: Outcome | None) -> None:
        self.outcomes.remove(was)
        if now is not None:
            self.outcomes.append(now)

    @property
    def pays(self) -> bool:
        """The answer was computed for this one, as its last delta tells."""
        return self.deltas[-1].timings is not None

    async def spent(self, request: GenerateRequest) -> Usage | None:
        return await self._generator.spent(request)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def outcome(self) -> Outcome:
        [outcome] = self.outcomes
        return outcome

    async def leave(self) -> None:
        self.left = True
        self.task.cancel()
        await asyncio.wait([self.task])

    async def _read(self, request: GenerateRequest) -> None:
        try:
            async for delta in self._generator.generate(request):
                self.deltas.append(delta)
        except Exception as error:
            self.error = error


@dataclass
class SteppedEmbedder:
    """Answers all calls that wait at a ``step``."""

    answered_by: str | None = VERSION
    calls: list[list[str]] = field(default_factory=list)
    timeouts: list[float | None] = field(default_factory=list)
    cancelled: int = 0
    bad: set[str] = field(default_factory=set)
    """Inputs that are refused, with their place."""
    _waiting: list[asyncio.Future[None]] = field(default_factory=list)

    def step(self, error: Exception | None = None) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)

    async def embed(self, inputs: Sequence[str], standing: Standing) -> EmbedResult:
        self.calls.append(list(inputs))
        self.timeouts.append(standing.timeout_s)
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            await future
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        for index, text in enumerate(inputs):
            if text in self.bad:
                raise InvalidInput(f"input {index}: bad.", details={"index": index})
        return EmbedResult(
            vectors=[[float(len(text)), float(ord(text[0]))] for text in inputs],
            tokens=[len(text) for text in inputs],
            answered_by=self.answered_by,
        )
