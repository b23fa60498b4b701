"""Runs and the registry: inputs by reference, artifacts under a name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from models.artifact import Manifest
from models.errors import PlatformError
from models.registry import Registry, open_registry
from models.sources import registry as source
from models.store import publish
from models.versions import UseKind
from train.events import Event, Reported, RunEnded, RunStarted

REMIND_EVERY_S = 1800.0
"""A use that nobody repeats is forgotten after some hours."""


def fetch(reference: str) -> Path:
    """A verified local folder of ``NAME@VERSION`` or ``NAME@ALIAS``. Raises PlatformError."""
    return source.folder_of(source.resolve(reference))


def register(folder: Path, manifest: Manifest, *, by: str, name: str | None = None) -> str:
    """Publish the artifact in ``folder`` and give it a version; ``NAME@NUMBER``.

    Raises:
        PlatformError: the store or the database cannot be reached, or ``name`` is none.
    """
    uri = publish(folder)

    async def give_version() -> str:
        async with open_registry() as registry:
            return str(await registry.register(manifest, uri, by=by, name=name))

    return asyncio.run(give_version())


class Holding:
    """Says that a run needs its inputs, so that nobody collects them meanwhile.

    Args:
        inputs: kind → content hash, of those that came from the registry.
    """

    def __init__(
        self,
        inputs: Mapping[str, str],
        warn: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inputs, self._warn, self._clock = inputs, warn, clock
        self._run = ""
        self._next = 0.0

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._run = event.run
                self._say(self._use)
            case Reported() if self._clock() >= self._next:
                self._say(self._use)
            case RunEnded() if self._run:
                self._say(self._disuse)

    def _say(self, each: Callable[[Registry, str, str], Coroutine[Any, Any, None]]) -> None:
        async def say() -> None:
            async with open_registry() as registry:
                for kind, sha256 in self._inputs.items():
                    await each(registry, kind, sha256)

        self._next = self._clock() + REMIND_EVERY_S
        try:
            asyncio.run(say())
        except PlatformError as error:  # the run has its own copy and goes on
            self._warn(f"the registry does not know that this run needs its inputs: {error}")

    async def _use(self, registry: Registry, kind: str, sha256: str) -> None:
        await registry.use(sha256, name=self._run, replica=kind, kind=UseKind.RUN)

    async def _disuse(self, registry: Registry, kind: str, sha256: str) -> None:
        await registry.disuse(name=self._run, replica=kind, kind=UseKind.RUN)
