"""Which artifact answers: the registry says it, by the name that requests use."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deployments.evaluation.run import Identify
from models.artifact import is_hash
from models.errors import ConfigError, NotFound
from models.registry import open_registry


@asynccontextmanager
async def identifier(model: str, artifact: str | None) -> AsyncIterator[Identify]:
    """How to find out what answers to ``model``.

    Args:
        model: as requests name it; ``MODEL:ADAPTER[@WHICH]`` names the adapter by itself,
            and a predictor's answers name their version.
        artifact: its content hash, if the caller knows better.

    Raises:
        ConfigError: ``artifact`` is no hash.
        Unavailable: the registry is out of reach.
    """
    if artifact is not None:
        if not is_hash(artifact):
            raise ConfigError(f"--artifact is {artifact!r}; expected 64 hexadecimal digits")

        async def given(version: str | None) -> str:
            return artifact

        yield given
        return
    adapter = model.partition(":")[2]
    async with open_registry() as registry:

        async def found(version: str | None) -> str:
            if not (reference := version or adapter):
                raise ConfigError(
                    f"{model} is not from the registry, so nobody knows its artifact; give its"
                    " content hash with --artifact"
                )
            try:
                return (await registry.resolve(reference)).artifact
            except NotFound as error:
                raise ConfigError(
                    f"{model}: {error.message}; use the registry that the model is served from,"
                    " or give its content hash with --artifact"
                ) from None

        yield found
