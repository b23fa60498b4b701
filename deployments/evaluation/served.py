"""Which artifact answers: the registry says it, by the name that requests use."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from deployments.evaluation.run import Identify
from models.artifact import is_hash
from models.errors import ConfigError, NotFound
from models.registry import Registry, open_registry
from models.versions import Version


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is to be measured."""

    model: str
    """As requests shall name it."""
    identify: Identify


@asynccontextmanager
async def candidate(model: str, artifact: str | None) -> AsyncIterator[Candidate]:
    """What ``model`` means, and how to find out what answers to it.

    Args:
        model: as requests name it. ``MODEL:ADAPTER[@WHICH]`` names the adapter by itself, and is
            asked for by its number: replicas follow an alias that has just moved a moment
            later, and would be measured with what it named before. A predictor's answers name
            their version.
        artifact: its content hash, if the caller knows better.

    Raises:
        ConfigError: ``artifact`` is no hash, or the registry does not know the adapter.
        Unavailable: the registry is out of reach.
    """
    if artifact is not None:
        if not is_hash(artifact):
            raise ConfigError(f"--artifact is {artifact!r}; expected 64 hexadecimal digits")

        async def given(version: str | None) -> str:
            return artifact

        yield Candidate(model, given)
        return
    base, _, adapter = model.partition(":")
    async with open_registry() as registry:
        if adapter:
            adapter = str(await _registered(registry, adapter, model))
            model = f"{base}:{adapter}"

        async def found(version: str | None) -> str:
            if not (reference := version or adapter):
                raise ConfigError(
                    f"{model} is not from the registry, so nobody knows its artifact; give its"
                    " content hash with --artifact"
                )
            return (await _registered(registry, reference, model)).artifact

        yield Candidate(model, found)


async def _registered(registry: Registry, reference: str, model: str) -> Version:
    try:
        return await registry.resolve(reference)
    except NotFound as error:
        raise ConfigError(
            f"{model}: {error.message}; use the registry that the model is served from,"
            " or give its content hash with --artifact"
        ) from None
