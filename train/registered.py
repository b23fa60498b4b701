"""Runs and the registry: inputs by reference, held while needed; artifacts under a name."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models.artifact import Manifest
from models.errors import PlatformError
from models.registry import Registry, open_registry
from models.sources import registry as source
from models.store import publish
from models.versions import UseKind

REMIND_EVERY_S = 1800.0
"""A use that nobody repeats is forgotten after some hours."""


def fetch(reference: str) -> Path:
    """A verified local folder of ``NAME@VERSION`` or ``NAME@ALIAS``. Raises PlatformError."""
    return source.folder_of(source.resolve(reference))


def version(reference: str) -> str:
    """``NAME@VERSION`` that ``NAME@ALIAS`` names now. Raises PlatformError."""
    return str(source.resolve(reference))


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


@contextmanager
def held(
    inputs: Mapping[str, str],
    *,
    by: str,
    warn: Callable[[str], None],
    every_s: float = REMIND_EVERY_S,
) -> Iterator[None]:
    """While inside, the registry hears again and again that ``by`` needs its inputs, so that
    nobody collects them; from a local store a run reads them where they lie. Whoever breaks off
    may go on later: the use is forgotten in time, or given up by :func:`release`.

    Args:
        inputs: kind → content hash.
        by: the run or sweep.
        warn: gets a line when the registry cannot be told.
    """
    over = threading.Event()

    async def use(registry: Registry, kind: str, sha256: str) -> None:
        await registry.use(sha256, name=by, replica=kind, kind=UseKind.RUN)

    def remind() -> None:
        while not over.wait(every_s):
            _say(use, inputs, warn)

    if not inputs:
        yield
        return
    _say(use, inputs, warn)
    reminder = threading.Thread(target=remind, name="inputs", daemon=True)
    reminder.start()
    try:
        yield
    finally:
        over.set()
        reminder.join()


def release(inputs: Mapping[str, str], *, by: str, warn: Callable[[str], None]) -> None:
    """Say that ``by`` has ended and needs its inputs no more; see :func:`held`."""

    async def disuse(registry: Registry, kind: str, sha256: str) -> None:
        await registry.disuse(name=by, replica=kind, kind=UseKind.RUN)

    if inputs:
        _say(disuse, inputs, warn)


def _say(
    each: Callable[[Registry, str, str], Coroutine[Any, Any, None]],
    inputs: Mapping[str, str],
    warn: Callable[[str], None],
) -> None:
    async def say() -> None:
        async with open_registry() as registry:
            for kind, sha256 in inputs.items():
                await each(registry, kind, sha256)

    try:
        asyncio.run(say())
    except PlatformError as error:  # it is worth a word, and no reason to lose the run
        warn(f"the registry does not know that this run needs its inputs: {error}")
