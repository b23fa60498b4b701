"""Models behind a Ray Serve handle, spoken to as if they were local.

Errors cross as values: a replica sends a ``PlatformError`` as its last item and it is
raised here, so that the reason survives the hop without Ray's traceback around it.

A replica that dies before its first output costs nothing but time: the request goes to
another one. After the first output it cannot be repeated, and the client is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.gateway.services import EmbedResult
from models.contracts import Delta, GenerateRequest, Priority
from models.errors import InternalError, Overloaded, PlatformError, Unavailable, UpstreamError

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
        self._name = name
        self._embed = handle.embed
        self._retries = retries

    async def embed(
        self, inputs: Sequence[str], *, priority: Priority, tenant: str, timeout_s: float | None
    ) -> EmbedResult:
        """See ``deployments.gateway.services.Embedder``."""
        parts = [
            inputs[at : at + EMBED_CALL_INPUTS] for at in range(0, len(inputs), EMBED_CALL_INPUTS)
        ]
        results: list[tuple[NDArray[np.float32], int]] = await asyncio.gather(
            *(self._call(part, priority, tenant, timeout_s) for part in parts)
        )
        return EmbedResult(
            vectors=[vector for vectors, _ in results for vector in vectors],
            prompt_tokens=sum(tokens for _, tokens in results),
        )

    async def _call(
        self, inputs: Sequence[str], priority: Priority, tenant: str, timeout_s: float | None
    ) -> Any:
        for attempt in count():
            try:
                answer = await self._embed.remote(list(inputs), priority, tenant, timeout_s)
                break
            except Exception as error:
                await try_again(self._name, error, attempt, self._retries)
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


async def readiness(handles: Mapping[str, DeploymentHandle]) -> Mapping[str, bool | str]:
    """Ask one replica of each model; True, or why it is not ready."""

    async def ask(handle: DeploymentHandle) -> bool | str:
        try:
            await asyncio.wait_for(_ping(handle), READY_TIMEOUT_S)
        except TimeoutError:
            return f"no replica answered within {READY_TIMEOUT_S:.0f} s; it may still be loading"
        except Exception as error:
            return f"its replica failed: {type(error).__name__}"
        return True

    answers = await asyncio.gather(*(ask(handle) for handle in handles.values()))
    return dict(zip(handles, answers, strict=True))


async def _ping(handle: DeploymentHandle) -> None:
    await handle.ping.remote()
