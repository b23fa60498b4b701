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
from functools import partial
from itertools import count
from typing import Any

from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.gateway.services import EmbedResult, PredictResult
from models.contracts import Delta, GenerateRequest, Json, Priority
from models.errors import InternalError, Overloaded, PlatformError, Unavailable, UpstreamError

logger = logging.getLogger(__name__)

RETRY_DELAY_S = 0.2
"""Doubled at each further attempt; the router waits for a replica by itself."""
EMBED_CALL_INPUTS = 256
"""Inputs a call carries: Serve's messages between deployments hold 4 MB."""
READY_TIMEOUT_S = 2.0


class RemoteGenerator:
    """A ``Generator`` over the replicas of one deployment.

    Args:
        handle: of a ``GeneratorReplica``.
        retries: further attempts when a replica is lost before its first output.
    """

    def __init__(self, name: str, handle: DeploymentHandle, *, retries: int) -> None:
        self._name = name
        self._generate = handle.options(stream=True).generate
        self._retries = retries

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """See ``models.contracts.Generator``."""
        begun = False
        for attempt in count():
            stream = self._generate.remote(request)
            try:
                async for item in stream:
                    if isinstance(item, PlatformError):
                        raise item
                    begun = True
                    yield item
                return
            except (asyncio.CancelledError, GeneratorExit, TaskCancelledError):
                stream.cancel()
                raise
            except Exception as error:
                await try_again(self._name, error, attempt, 0 if begun else self._retries)


class RemoteEmbedder:
    """An ``Embedder`` over the replicas of one deployment."""

    def __init__(self, name: str, handle: DeploymentHandle, *, retries: int) -> None:
        self._embed = handle.embed
        self._ask = partial(ask, name, retries)

    async def embed(
        self, inputs: Sequence[str], *, priority: Priority, tenant: str, timeout_s: float | None
    ) -> EmbedResult:
        """See ``deployments.gateway.services.Embedder``."""
        parts = [
            inputs[at : at + EMBED_CALL_INPUTS] for at in range(0, len(inputs), EMBED_CALL_INPUTS)
        ]
        results: list[EmbedResult] = await asyncio.gather(
            *(self._ask(self._embed, list(part), priority, tenant, timeout_s) for part in parts)
        )
        answered_by = {result.answered_by for result in results}  # each by some replica
        return EmbedResult(
            vectors=[vector for result in results for vector in result.vectors],
            tokens=[tokens for result in results for tokens in result.tokens],
            answered_by=answered_by.pop() if len(answered_by) == 1 else None,
        )


class RemotePredictor:
    """A ``BatchPredictor`` over the replicas of one deployment."""

    def __init__(self, name: str, handle: DeploymentHandle, *, retries: int) -> None:
        self._predict = handle.predict
        self._ask = partial(ask, name, retries)

    async def predict(
        self, inputs: Sequence[Json], *, priority: Priority, tenant: str, timeout_s: float | None
    ) -> PredictResult:
        """One call, however many inputs: all of them are answered by one version."""
        outputs, version = await self._ask(self._predict, list(inputs), priority, tenant, timeout_s)
        return PredictResult(predictions=outputs, version=version)


async def ask(name: str, retries: int, method: DeploymentHandle, *args: Any) -> Any:
    """What a replica answers to a call that may be repeated.

    Raises:
        PlatformError: the one that it sent, or what went wrong on the way.
    """
    for attempt in count():
        try:
            answer = await method.remote(*args)
            break
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

    async def told(ping: Callable[[], Awaitable[None]], late: str, failed: str) -> bool | str:
        try:
            await asyncio.wait_for(ping(), READY_TIMEOUT_S)
        except TimeoutError:
            return f"{late} within {READY_TIMEOUT_S:.0f} s"
        except Exception as error:
            return f"{failed}: {type(error).__name__}"
        return True

    asked = {
        **{
            name: told(
                partial(_ping, handle),
                "it may still be loading: no replica answered",
                "its replica failed",
            )
            for name, handle in handles.items()
        },
        **{name: told(ping, "it did not answer", "out of reach") for name, ping in state.items()},
    }
    answers = await asyncio.gather(*asked.values())
    return dict(zip(asked, answers, strict=True))


async def _ping(handle: DeploymentHandle) -> None:
    await handle.ping.remote()
