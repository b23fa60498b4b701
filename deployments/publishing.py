"""Which adapters the models answer with, and how an operator changes that over HTTP.

An adapter is a version in the registry whose artifact holds PEFT's ``adapter_config.json``.
It is published as long as an alias points at it, and so are the versions beside it, by their
numbers; the bare name means the champion. The registry is all there is to tell: every replica
follows it by itself.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from deployments.catalogue import ADAPTER_FILE, Catalogue
from deployments.gateway.services import PublishedAdapter
from models import artifact
from models.artifact import Manifest
from models.errors import ConfigError, InvalidInput, NotFound, PlatformError, Unavailable
from models.registry import Registry
from models.sources.registry import SCHEME, in_use
from models.store import Store
from models.versions import CHAMPION, Alias, Reference, Version
from state.errors import StateUnavailable
from state.patience import SERVER_S, promptly

FIRST_LIST_S = 5.0
"""For a list where there is no older one: opening the registry is slower than asking it."""


class RegistryAdapters:
    """``deployments.gateway.services.Adapters`` over the registry.

    Args:
        sources: of the models that generate, as configured.
        try_on: has a replica of a model load NAME@NUMBER, and raises what is wrong with it.
        refresh_s: how old a list may be.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        sources: Mapping[str, str],
        try_on: Callable[[str, str], Awaitable[None]],
        *,
        refresh_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalogue = catalogue
        self._bases = {model: base_of(source) for model, source in sources.items()}
        self._try_on = try_on
        self._refresh_s = refresh_s
        self._clock = clock
        self._list: Sequence[PublishedAdapter] | None = None
        self._listed = -math.inf
        self._listing = asyncio.Lock()

    async def published(self) -> Sequence[PublishedAdapter]:
        """See ``Adapters``."""
        async with self._listing:
            if self._clock() - self._listed > self._refresh_s:
                patience_s = FIRST_LIST_S if self._list is None else SERVER_S
                try:
                    self._list = await promptly(
                        self._published(), within_s=patience_s, what="the registry"
                    )
                except (PlatformError, StateUnavailable) as error:
                    if self._list is None:
                        raise Unavailable(str(error), retry_after=self._refresh_s) from error
                self._listed = self._clock()
            return self._list or ()

    async def publish(
        self, model: str, name: str, source: str | None, *, by: str
    ) -> PublishedAdapter:
        """See ``Adapters``."""
        try:
            registry = await self._catalogue.registry()
            before = await registry.alias(name, CHAMPION)
            version = await self._version(registry, name, source, by)
            if ADAPTER_FILE not in (await self._catalogue.manifest(version.artifact)).files:
                raise InvalidInput(
                    f"{version} is a {version.kind} without {ADAPTER_FILE}; expected a LoRA"
                    " adapter as PEFT saves it."
                )
            await self._try_on(model, str(version))
            alias = await registry.promote(
                str(version),
                CHAMPION,
                expected=before.revision,
                by=by,
                reason=f"published for {model}, unmeasured",
                approve=True,
            )
        except ConfigError as error:
            raise InvalidInput(error.message) from error
        self._listed = -math.inf
        return _published(model, alias, version)

    async def withdraw(self, model: str, name: str, *, by: str) -> None:
        """See ``Adapters``."""
        self._listed = -math.inf
        if not any(a.model == model and a.name == name for a in await self.published()):
            raise NotFound(
                f"The adapter {name!r:.200} of {model!r} is not published.", param="name"
            )
        registry = await self._catalogue.registry()
        for alias in await registry.aliases(name):
            await registry.remove(
                name, alias.alias, expected=alias.revision, by=by, reason=f"withdrawn from {model}"
            )
        self._listed = -math.inf

    async def _version(self, registry: Registry, name: str, source: str | None, by: str) -> Version:
        """What shall be published, as a version of ``name``."""
        if source is None:
            newest = (await registry.versions(name, limit=1)).items
            if not newest:
                raise NotFound(
                    f"The registry has no {name!r:.200}; register it, or give its source.",
                    param="name",
                )
            return in_use(newest[0])
        if source.startswith(SCHEME):
            found = in_use(await registry.resolve(Reference.parse(source.removeprefix(SCHEME))))
            if found.name == name:
                return found
            manifest = await self._catalogue.manifest(found.artifact)
            return await registry.register(manifest, found.uri, by=by, name=name)
        folder = Path(source.removeprefix("path:"))
        if not folder.is_absolute() or "\0" in source:
            raise InvalidInput(
                f"source is {source!r:.200}; expected {SCHEME}NAME@VERSION_OR_ALIAS, or the"
                " absolute path of a sealed artifact's folder.",
                param="source",
            )
        manifest = await asyncio.to_thread(artifact.verify, folder)
        uri = await asyncio.to_thread(lambda: Store().publish(folder))
        return await registry.register(manifest, uri, by=by, name=name)

    async def _published(self) -> list[PublishedAdapter]:
        registry = await self._catalogue.registry()
        aliases = await registry.aliases()
        if not aliases:
            return []
        versions = {
            (version.name, version.number): version
            for version in (await registry.snapshot()).versions
        }
        found = []
        for alias in aliases:
            version = versions.get((alias.name, alias.number or 0))
            if version is None or version.collected is not None:
                continue  # moved since, or gone
            manifest = await self._catalogue.manifest(version.artifact)
            if ADAPTER_FILE in manifest.files:
                trained_on = trained_base(manifest)
                found += [
                    _published(model, alias, version)
                    for model, base in self._bases.items()
                    if trained_on in (None, base)
                ]
        return found


def _published(model: str, alias: Alias, version: Version) -> PublishedAdapter:
    return PublishedAdapter(
        model=model,
        name=version.name,
        alias=alias.alias,
        version=str(version),
        content_sha256=version.artifact,
        created=int(version.created.timestamp()),
    )


def trained_base(manifest: Manifest) -> str | None:
    """The model that an adapter was trained on, as far as its run wrote that down."""
    match manifest.config:
        case {"model": {"source": str(source)}}:
            return base_of(source)
    return None


def base_of(source: str) -> str:
    """A source without its version: the model that it is some release of."""
    scheme, _, rest = source.partition(":")
    if scheme in ("hf", "registry"):
        return f"{scheme}:{rest.partition('@')[0]}"
    if scheme == "wheel":
        return f"{scheme}:{rest.partition('==')[0].lower().replace('_', '-')}"
    return str(Path(source.removeprefix("path:")).expanduser().absolute())
