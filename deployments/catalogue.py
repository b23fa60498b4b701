"""The registry as replicas see it: asked beside the requests, and never missed for long.

Opened when it is first needed and again after it failed. What is served goes on being
served while the registry is out of reach; only what is new cannot be found then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path

from deployments.config import FixedCostModel, GenerateModel
from deployments.engines.pointer import Version
from models import store
from models.artifact import Manifest
from models.errors import ConfigError, NotFound
from models.registry import Registry, open_registry
from models.sources import fetch
from models.sources.folder import check
from models.sources.registry import SCHEME, in_use, resolve
from models.sources.registry import folder_of as folder_of_registered
from models.versions import Reference, absent
from models.versions import Version as Registered

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_config.json"
"""PEFT's."""
FIRST_BEAT_S = 2.0
"""After a start or an exchange: soon, but beside the first requests."""


class Catalogue:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._opened: Registry | None = None
        self._opening = asyncio.Lock()
        self._manifests: dict[str, Manifest] = {}

    async def registry(self) -> Registry:
        """Raises Unavailable, ConfigError."""
        async with self._opening:
            if self._opened is None:
                self._opened = await self._stack.enter_async_context(open_registry())
            return self._opened

    async def look_up(self, reference: str) -> Version:
        """What ``NAME[@VERSION_OR_ALIAS]`` names now.

        Raises:
            NotFound: nothing, or what is archived; without telling which names there are.
            Unavailable, ConfigError: the registry is out of reach.
        """
        try:
            parsed = Reference.parse(reference)
        except ConfigError as error:
            raise NotFound(error.message, param="model") from None
        try:
            return as_version(in_use(await (await self.registry()).resolve(parsed)))
        except NotFound:
            raise absent(reference) from None

    async def published_adapter(self, reference: str) -> Version:
        """As ``look_up``, and it is an adapter that somebody has published: an alias points at it,
        or at another version of its name.

        Raises:
            NotFound, Unavailable, ConfigError: as ``look_up``.
        """
        found = await self.look_up(reference)
        assert found.content_sha256 is not None
        if ADAPTER_FILE not in (await self.manifest(found.content_sha256)).files:
            raise absent(reference)
        meant = Reference.parse(reference)
        if meant.alias is None and not await (await self.registry()).aliases(meant.name):
            raise absent(reference)
        return found

    async def manifest(self, sha256: str) -> Manifest:
        """Of a registered artifact. Raises NotFound, Unavailable, ConfigError."""
        if sha256 not in self._manifests:  # they never change
            self._manifests[sha256] = await (await self.registry()).manifest(sha256)
        return self._manifests[sha256]

    async def close(self) -> None:
        await self._stack.aclose()


def located(model: GenerateModel | FixedCostModel) -> tuple[Version, Path]:
    """What a model's source names now, and a folder with it. Blocks.

    Raises:
        ConfigError, NotFound, Unavailable: it cannot be had, or is not what ``sha256`` says.
    """
    if model.source.startswith(SCHEME):
        registered = resolve(model.source.removeprefix(SCHEME))
        folder = folder_of_registered(registered, sha256=model.sha256)
        if model.task != "predict":
            check(folder, model.source)
        return as_version(registered), folder
    return Version(content_sha256=None), fetch(model.source, sha256=model.sha256)


def as_version(registered: Registered) -> Version:
    return Version(content_sha256=registered.artifact, name=str(registered), uri=registered.uri)


def folder_of(version: Version) -> Path:
    """Its artifact, verified. Blocks.

    Raises:
        ConfigError, NotFound, Unavailable: as ``models.store.fetch``.
    """
    return store.fetch(version.uri)


async def keep_telling(
    catalogue: Catalogue,
    served: Callable[[], Iterable[tuple[str, Version]]],
    *,
    replica: str,
    every_s: float,
) -> None:
    """Write down again and again what a replica serves. Never returns, never raises; cancel it.

    Args:
        served: names as requests call them, each with the version that answers.
    """
    told: dict[str, str | None] = {}
    complaint = ""
    left_s = 0.0
    while True:
        await asyncio.sleep(FIRST_BEAT_S)
        left_s -= FIRST_BEAT_S
        now = {name: version.content_sha256 for name, version in served()}
        if now == told and left_s > 0:
            continue
        try:
            registry = await catalogue.registry()
            for name, sha256 in now.items():
                if sha256 is not None:
                    await registry.use(sha256, name=name, replica=replica)
        except Exception as error:
            if (said := f"{type(error).__name__}: {error}") != complaint:
                logger.warning("the registry does not hear what is served: %s", said)
            complaint, told, left_s = said, now, every_s  # and not sooner: it is in trouble
            continue
        told, left_s, complaint = now, every_s, ""
