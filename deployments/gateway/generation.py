"""A generating request at work: its generator calls, and their deltas as they come.

    handler ── iterates ──> Generation <── pump (one task a prompt) <── generator

A pump takes what its generator yields without waiting for the client, so whatever has
gathered while the client was being written to goes out in one piece. What it can gather is
bounded by ``max_tokens``. Leaving the ``async with`` closes every generator, which frees
its slot in the engine.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Self, cast

from deployments.gateway.admission import admit, extend, was_refused
from deployments.gateway.exchange import Exchange
from deployments.gateway.metering import bound, prompt_tokens, used
from deployments.gateway.remembering import remembering_generator
from deployments.gateway.services import ServedModel, Services
from deployments.gateway.standing import standing
from deployments.tenants.meter import Admission, Work
from deployments.tenants.sight import EVERYTHING, Sight
from models.contracts import (
    NO_USAGE,
    Accountable,
    Delta,
    FinishReason,
    GenerateRequest,
    Place,
    Priority,
    Prompt,
    Sampling,
    TokenLogprob,
    Usage,
    Versions,
    sum_of,
)
from models.errors import InvalidInput, Underestimated, UpstreamError
from models.unique import unique

MOST_TOKENS = 8192
"""That an answer may have where neither the request nor the model's entry says."""


@dataclass(slots=True)
class Choice:
    """One continuation, as far as it has come."""

    text: str = ""
    prompt: Sequence[TokenLogprob] = ()
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        if delta.prompt is not None:
            self.prompt = delta.prompt
        if delta.logprobs:
            self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason


@dataclass(slots=True)
class Likelihood:
    """Of the tokens of one choice."""

    sum: float = 0.0
    count: int = 0

    def add(self, logprobs: Iterable[TokenLogprob]) -> None:
        for token in logprobs:
            self.sum += token.logprob or 0.0
            self.count += 1

    @property
    def mean(self) -> float:
        return self.sum / self.count if self.count else -math.inf


class Generation:
    """The calls for ``prompts``. Choices are numbered through, ``n`` for each prompt.

    Input is checked on entering the ``async with``, output before anybody sees it.

    A check of the input may send all of it to another model than the one that was asked.

    Args:
        rank: tell how likely each choice is (``likelihood``), also where guardrails hide logprobs.

    Raises:
        NotFound, InvalidInput: there is no such model, or it does not generate; or the plan
            does not allow what is asked for.
    """

    def __init__(
        self,
        services: Services,
        exchange: Exchange,
        *,
        model: str,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        n: int = 1,
        rank: bool = False,
        stream: bool,
        priority: Priority,
        tell_place: bool = False,
    ) -> None:
        self._services = services
        self._exchange = exchange
        served, adapter = self._aim(model, exchange.sight)
        exchange.priority = priority
        self._guard = services.guardrails.of_plan(exchange.plan)
        self._inquiry = exchange.inquiry(services.emit)
        sampling = self._guard.sampling(sampling, served.sampling, self._inquiry)
        self._likelihoods = [Likelihood() for _ in range(n * len(prompts))] if rank else None
        self._tells_logprobs = sampling.logprobs is not None
        if rank and sampling.logprobs is None:
            sampling = replace(sampling, logprobs=0)
        self.choices = exchange.choices = n * len(prompts)
        exchange.calls = len(prompts)
        stands = standing(services, exchange)
        self._requests = [
            GenerateRequest(
                id=exchange.id if len(prompts) == 1 else f"{exchange.id}-{number}",
                model=served.name,
                adapter=adapter,
                prompt=prompt,
                sampling=sampling,
                n=n,
                stream=stream,
                tenant=stands.tenant,
                weight=stands.weight,
                priority=stands.priority,
                timeout_s=stands.timeout_s,
                tell_place=tell_place and number == len(prompts) - 1,  # the last to be served
            )
            for number, prompt in enumerate(prompts)
        ]
        self._tell_place = tell_place
        self._place: Place | None = None
        self._extending = asyncio.Lock()
        self._open: dict[int, GenerateRequest] = {}
        """Calls that were made and have not come to their end, by the number of their prompt."""
        self._stream = stream
        self._admission: Admission | None = None
        self._seen = 0
        self._outputs = self._guard.output(self.choices, self._inquiry)
        self._pumps: list[asyncio.Task[None]] = []
        self._running = len(prompts)
        self._unfinished = self.choices
        self._ready: list[Delta] = []
        self._error: Exception | None = None
        self._news: asyncio.Future[None] | None = None

    def _aim(self, model: str, sight: Sight) -> tuple[ServedModel, str | None]:
        """Ask ``model``; it is named in the answer and pays. Raises NotFound, InvalidInput."""
        self._generator = remembering_generator(self._services, self._exchange, model, sight)
        served, adapter = self._services.find(model, sight)
        self._exchange.model, self._exchange.adapter = served.name, adapter
        self._exchange.versions = Versions(model=served.version)
        self._context = served.context
        return served, adapter

    async def __aenter__(self) -> Self:
        """Raises InvalidInput, Unavailable, QuotaExceeded, StateUnavailable: no generator has been
        called.
        """
        requests = [await self._guarded(request) for request in self._requests]
        if self._inquiry.reroute_to is not None:
            # where the configuration sends it, which need not be for everybody to ask for
            served, adapter = self._aim(self._inquiry.reroute_to, EVERYTHING)
            requests = [
                replace(request, model=served.name, adapter=adapter) for request in requests
            ]
        sampling = requests[0].sampling
        most = sampling.max_tokens or sampling.token_cap or self._context
        if most is None and self._services.meter is not None:  # what is reserved must hold
            sampling = replace(sampling, token_cap=MOST_TOKENS)
            requests = [replace(request, sampling=sampling) for request in requests]
        work = bound(
            [request.prompt for request in requests],
            n=requests[0].n,
            max_tokens=most or MOST_TOKENS,
            context=self._context,
        )
        self._admission = await admit(self._services, self._exchange, work)
        if self._admission is not None:
            requests = [self._billed(request) for request in requests]
        self._pumps = [
            asyncio.create_task(self._pump(number, request))
            for number, request in enumerate(requests)
        ]
        return self

    async def _guarded(self, request: GenerateRequest) -> GenerateRequest:
        prompt = await self._guard.prompt(request.prompt, self._inquiry)
        return request if prompt is request.prompt else replace(request, prompt=prompt)

    def _billed(self, request: GenerateRequest) -> GenerateRequest:
        """One whose engine keeps to what was reserved, and can be asked what it has done."""
        most = prompt_tokens(request.prompt, context=self._context)
        return replace(request, max_prompt_tokens=most, receipt=unique(24))

    async def __aexit__(self, *_: object) -> None:
        running = [pump for pump in self._pumps if not pump.done()]
        if not running and not self._unfinished:
            self._settle(None)  # as nearly all do
            return
        for pump in running:
            pump.cancel()
        await uninterrupted(self._end(running))

    async def _end(self, running: Sequence[asyncio.Task[None]]) -> None:
        told: Usage | None = None
        try:
            if running:
                await asyncio.wait(running)
            told = await self._told()
        finally:
            self._settle(told)

    async def _told(self) -> Usage | None:
        """What was used of a request that came to an early end; ``None``: nobody can tell."""
        never_begun = was_refused(self._error) and not self._seen
        if self._admission is None or not self._unfinished or never_begun:
            return None
        if not isinstance(self._generator, Accountable):
            return None
        told = await asyncio.gather(*map(self._generator.spent, self._open.values()))
        known = [usage for usage in told if usage is not None]
        if len(known) < len(told):
            return None
        return sum_of([*known, self._exchange.usage or NO_USAGE])

    def _settle(self, told: Usage | None) -> None:
        """Pay for what was used, whatever has ended the request.

        Args:
            told: by the engines, where they had to be asked.
        """
        meter, admission = self._services.meter, self._admission
        if meter is None or admission is None:
            return
        complete = not self._unfinished
        spent = used(
            admission.reserved if self._exchange.worked else Work(),
            usage=self._exchange.usage if complete else told,
            remembered=self._exchange.remembered,
            seen=self._seen if self._exchange.worked else 0,
            streamed=self._stream,
            refused=was_refused(self._error),
        )
        self._exchange.cost = meter.settle(admission, spent)
        if not complete and spent.tokens:
            paid = Usage(
                prompt_tokens=spent.prompt_tokens, completion_tokens=spent.completion_tokens
            )
            self._exchange.usage = told or sum_of([paid, self._exchange.remembered])

    async def ready(self) -> list[Delta] | None:
        """All deltas that are there, waiting for the first; ``None`` when all is said.

        Empty when :meth:`nudge` ended the wait.

        Raises:
            PlatformError: what a generator raised, after what it yielded before.
        """
        said = self._ready or self._place is not None
        if not said and self._running and self._error is None:
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        if self._ready:
            deltas, self._ready = self._ready, []
            return deltas
        if self._error is not None:
            raise self._error
        if self._running:
            return []
        if self._unfinished:
            raise UpstreamError("The model stopped before its answer was complete; try again.")
        return None

    def likelihood(self, choice: int) -> float:
        """The mean logarithm of its tokens' probabilities, where choices are ranked."""
        assert self._likelihoods is not None
        return self._likelihoods[choice].mean

    def nudge(self) -> None:
        """End the wait of :meth:`ready`."""
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def place(self) -> Place | None:
        """Where the request stands, if that has changed since it was asked for last."""
        place, self._place = self._place, None
        return place

    async def _pump(self, number: int, request: GenerateRequest) -> None:
        try:
            try:
                await self._take(number, request)
            except Underestimated as error:  # and nothing was begun
                self._open.pop(number, None)
                await self._take(number, await self._extended(request, error))
        except Exception as error:
            self._error = self._error or error
        finally:
            self._running -= 1
            self.nudge()

    async def _take(self, number: int, request: GenerateRequest) -> None:
        first_choice = number * request.n
        self._open[number] = request
        # The contract cancels by closing, so what generates can be closed.
        source = cast("AsyncGenerator[Delta]", self._generator.generate(request))
        async with aclosing(source) as deltas:
            async for delta in deltas:
                if delta.place is not None:
                    if self._tell_place:  # who joins another's call hears of its place, too
                        self._place = delta.place
                        self.nudge()
                    continue
                if delta.versions is not None:
                    self._exchange.versions = delta.versions
                self._seen += len(delta.token_ids)
                if delta.finish_reason is not None:
                    self._unfinished -= 1
                    self._exchange.account(delta)
                if delta.usage is not None:
                    self._open.pop(number, None)
                if first_choice:
                    delta = replace(delta, index=first_choice + delta.index)
                if self._likelihoods is not None and delta.logprobs:
                    self._likelihoods[delta.index].add(delta.logprobs)
                    if not self._tells_logprobs:
                        delta = replace(delta, logprobs=None)
                self._tell(delta)

    async def _extended(self, request: GenerateRequest, error: Underestimated) -> GenerateRequest:
        """The same call, once its true number of tokens is reserved.

        Raises:
            QuotaExceeded, StateUnavailable: it cannot be.
            Underestimated: nothing was reserved, or the engine changes its mind.
        """
        needed = error.details.get("prompt_tokens")
        if self._admission is None or request.max_prompt_tokens is None:
            raise error
        if not isinstance(needed, int) or needed <= request.max_prompt_tokens:
            raise error
        async with self._extending:
            self._admission = await extend(
                self._services,
                self._exchange,
                self._admission,
                needed - request.max_prompt_tokens,
            )
        return replace(request, max_prompt_tokens=needed, receipt=unique(24))

    def _tell(self, delta: Delta) -> None:
        """Raises InvalidInput: a guardrail ends the answer here."""
        shown: Delta | None = delta
        refused: InvalidInput | None = None
        if self._outputs:
            shown, refused = self._outputs[delta.index].shown(delta)
        if shown is not None:
            self._ready.append(shown)
            self.nudge()
        if refused is not None:
            raise refused


async def uninterrupted(work: Coroutine[Any, Any, None]) -> None:
    """Run it to its end, which is near. Who leaves is cancelled by us, and by the server too.

    Raises:
        CancelledError: once it is done.
    """
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled


async def collect(generation: Generation) -> list[Choice]:
    """Every choice, whole.

    Raises:
        PlatformError: what a generator raised; nothing goes on running.
    """
    choices = [Choice() for _ in range(generation.choices)]
    async with generation:
        while (deltas := await generation.ready()) is not None:
            for delta in deltas:
                choices[delta.index].add(delta)
    return choices
