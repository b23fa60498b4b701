"""Models behind a Ray Serve handle, spoken to as if they were local.

Errors cross as values: a replica sends a ``PlatformError`` as its last item and it is
raised here, so that the reason survives the hop without Ray's traceback around it.

A replica that dies before its first output costs nothing but time: the request goes to
another one. After the first output it cannot be repeated, and the client is told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextvars import Context
from functools import partial
from itertools import count
from typing import Any

from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.gateway.services import EmbedResult, PredictResult
from models.contracts import Delta, GenerateRequest, Json, Prompt, Standing, Usage, sum_of
from models.errors import InternalError, Overloaded, PlatformError, Unavailable, UpstreamError
from state.errors import StateUnavailable
from state.patience import SERVER_S, promptly

logger = logging.getLogger(__name__)

RETRY_DELAY_S = 0.2
"""Doubled at each further attempt; the router waits for a replica by itself."""
EMBED_CALL_INPUTS = 256
"""Inputs a call carries: Serve's messages between deployments hold 4 MB."""
GATHER_S = 0.02
"""How long to wait for others that leave, before the replicas are asked."""
SPENT_S = 2.0
"""How long the replicas may take to say what they have done."""
READY_TIMEOUT_S = 2.0
"""Of a model; for state see ``state/patience.py``."""


def plain(handle: DeploymentHandle) -> DeploymentHandle:
    """One whose messages are pickled by C alone. What we send has importable types, and Ray's
    cloudpickle, which could send more, takes twice as long.
    """
    return handle.options(request_serialization="pickle", response_serialization="pickle")


class RemoteGenerator:
    """A ``Generator`` over the replicas of one deployment.

    Args:
        handle: of a ``GeneratorReplica``.
        retries: further attempts when a replica is lost before its first output.
    """

    def __init__(self, name: str, handle: DeploymentHandle, *, retries: int) -> None:
        self._name = name
        self._handle = handle
        self._generate = handle.options(stream=True).generate
        self._answer = handle.answer
        self._retries = retries
        self._ask = partial(ask, name, retries)
        self._leaving: dict[str, asyncio.Future[Usage | None]] = {}
        self._asking: set[asyncio.Task[None]] = set()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """See ``models.contracts.Generator``.

        What is not streamed comes in one message: a stream of messages costs gateway and replica
        about twice as much, even where there is only one.
        """
        begun = False
        for attempt in count():
            call = (self._generate if request.stream else self._answer).remote(request)
            try:
                async for item in call if request.stream else _whole(call):
                    if isinstance(item, PlatformError):
                        raise item
                    begun = begun or item.place is None  # to wait is to have had nothing yet
                    yield item
                return
            except (asyncio.CancelledError, GeneratorExit, TaskCancelledError):
                call.cancel()
                raise
            except Exception as error:
                await try_again(self._name, error, attempt, 0 if begun else self._retries)

    async def spent(self, request: GenerateRequest) -> Usage | None:
        """See ``models.contracts.Accountable``.

        Serve does not say which replica a request went to, so all are asked, at once for all
        the clients that leave together.
        """
        if request.receipt is None:
            return None
        answer = self._leaving.get(request.receipt)
        if answer is None:
            answer = asyncio.get_running_loop().create_future()
            if not self._leaving:
                task = asyncio.create_task(self._ask_for_all(), context=Context())
                self._asking.add(task)
                task.add_done_callback(self._asking.discard)
            self._leaving[request.receipt] = answer
        return await asyncio.shield(answer)

    async def tokenize(self, prompt: Prompt) -> Sequence[int]:
        """See ``models.contracts.Tokenizes``."""
        tokens: Sequence[int] = await self._ask(self._handle.tokenize, prompt)
        return tokens

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """See ``models.contracts.Tokenizes``."""
        text: str = await self._ask(self._handle.detokenize, tokens)
        return text

    async def _ask_for_all(self) -> None:
        await asyncio.sleep(GATHER_S)
        leaving, self._leaving = self._leaving, {}
        told: list[list[Usage | None]] = []
        try:
            asked = self._handle.broadcast("spent", list(leaving))
            answers = await asked.results_async(timeout_s=SPENT_S, return_exceptions=True)
            told = [answer for answer in answers if isinstance(answer, list)]
        except Exception as error:
            logger.warning("%s does not say what it did: %r", self._name, error)
        finally:
            for index, answer in enumerate(leaving.values()):
                if not answer.done():
                    answer.set_result(total([each[index] for each in told]))


async def _whole(call: Awaitable[Sequence[Delta | PlatformError]]) -> AsyncIterator[Any]:
    for item in await call:
        yield item


def total(told: Sequence[Usage | None]) -> Usage | None:
    """What several replicas have done under one receipt; ``None``: nobody knows of it."""
    known = [usage for usage in told if usage is not None]
    return sum_of(known) if known else None


class RemoteEmbedder:
    """An ``Embedder`` over the replicas of one deployment."""

    def __init__(self, name: str, handle: DeploymentHandle, *, retries: int) -> None:
        self._embed = handle.embed
        self._ask = partial(ask, name, retries)

    async def embed(self, inputs: Sequence[str], standing: Standing) -> EmbedResult:
        """See ``deployments.gateway.services.Embedder``."""
        parts = [
            inputs[at : at + EMBED_CALL_INPUTS] for at in range(0, len(inputs), EMBED_CALL_INPUTS)
        ]
        calls = [
            asyncio.ensure_future(self._ask(self._embed, list(part), standing)) for part in parts
        ]
        try:
            results: list[EmbedResult] = await asyncio.gather(*calls)
        finally:
            for call in calls:  # the others, when one has failed
                call.cancel()
        answered_by = {result.answered_by for result in results}  # each by some replica
        versions = {result.version for result in results}
        return EmbedResult(
            vectors=[vector for result in results for vector in result.vectors],
            tokens=[tokens for result in results for tokens in result.tokens],
            answered_by=answered_by.pop() if len(answered_by) == 1 else None,
            version=versions.pop() if len(versions) == 1 else None,
        )


class RemotePredictor:
    """A ``BatchPredictor`` over the replicas of one deployment."""

    def __init__(self, name: str, handle: DeploymentHandle, *, retries: int) -> None:
        self._predict = handle.predict
        self._ask = partial(ask, name, retries)

    async def predict(self, inputs: Sequence[Json], standing: Standing) -> PredictResult:
        """One call, however many inputs: all of them are answered by one version."""
        outputs, version = await self._ask(self._predict, list(inputs), standing)
        return PredictResult(predictions=outputs, version=version)


async def ask(name: str, retries: int, method: DeploymentHandle, *args: Any) -> Any:
    """What a replica answers to a call that may be repeated.

    Raises:
        PlatformError: the one that it sent, or what went wrong on the way.
    """
    for attempt in count():
        call = method.remote(*args)
        try:
            answer = await call
            break
        except asyncio.CancelledError:
            call.cancel()  # Ray goes on with what nobody awaits
            raise
        except Exception as error:
            await try_again(name, error, attempt, retries)
    if isinstance(answer, PlatformError):
        raise answer
    return answer


async def try_again(name: str, error: Exception, attempt: int, retries: int) -> None:
    """Return when the call that ended in ``error`` should be made again, on another replica.

    Args:
        attempt: how many were made before it.
        retries: how many may be made after the first; 0 once there was output.

    Raises:
        PlatformError: what went wrong, in our own terms, if there is no point in it.
    """
    failure = translate(name, error)
    if attempt >= retries or not isinstance(failure, UpstreamError):
        raise failure from error
    await asyncio.sleep(RETRY_DELAY_S * 2**attempt)


def translate(name: str, error: Exception) -> PlatformError:
    """What Ray raised, in our own terms. ``UpstreamError`` means that a replica was lost."""
    if isinstance(error, PlatformError):
        return error
    if isinstance(error, BackPressureError):
        return Overloaded(f"{name} takes no more requests now.", retry_after=error.retry_after_s)
    if isinstance(error, DeploymentUnavailableError):
        return Unavailable(f"{name} is not being served; its deployment failed.", retry_after=10)
    cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else None
    if isinstance(error, RayActorError) or isinstance(cause, RayActorError):
        return UpstreamError(f"The replica of {name} that was answering was lost.")
    return InternalError(f"{name} failed unexpectedly.")


def bind_host() -> str | None:
    """The address that Serve answers HTTP on, on every node; ``None`` if it cannot be told."""
    from ray.serve.context import _get_global_client

    try:
        host = _get_global_client().http_config.host
    except Exception as error:
        logger.warning("the address of HTTP is unknown: %r", error)
        return None
    return host if isinstance(host, str) else None


async def readiness(
    handles: Mapping[str, DeploymentHandle],
    state: Mapping[str, Callable[[], Awaitable[None]]],
) -> Mapping[str, bool | str]:
    """Ask one replica of each model, and each part of the state; True, or why it is not ready."""

    async def model(handle: DeploymentHandle) -> bool | str:
        try:
            await asyncio.wait_for(_ping(handle), READY_TIMEOUT_S)
        except TimeoutError:
            return f"it may still be loading: no replica answered within {READY_TIMEOUT_S:.0f} s"
        except Exception as error:
            return f"its replica failed: {type(error).__name__}"
        return True

    async def store(name: str, ping: Callable[[], Awaitable[None]]) -> bool | str:
        async def pinged() -> None:
            await ping()

        try:
            await promptly(pinged(), within_s=SERVER_S, what=name)
        except StateUnavailable as error:
            return f"out of reach: {error}"
        except Exception as error:
            return f"out of reach: {type(error).__name__}"
        return True

    asked = {
        **{name: model(handle) for name, handle in handles.items()},
        **{name: store(name, ping) for name, ping in state.items()},
    }
    answers = await asyncio.gather(*asked.values())
    return dict(zip(asked, answers, strict=True))


async def _ping(handle: DeploymentHandle) -> None:
    await handle.ping.remote()
