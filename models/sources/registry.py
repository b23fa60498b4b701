"""``registry:NAME[@VERSION_OR_ALIAS]``: an artifact that the registry knows, by its hash.

The reference is looked up at each fetch; what it names is copied to this node once, under
its content hash, and verified byte for byte. Without ``@`` the champion is meant.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from models.errors import ConfigError, NotFound
from models.registry import open_registry
from models.store import fetch
from models.versions import Reference, State, Version

SCHEME = "registry:"

T = TypeVar("T")


def resolve(reference: str) -> Version:
    """What ``NAME[@VERSION_OR_ALIAS]`` names now. Blocks; works beside a running event loop.

    Raises:
        ConfigError: it is no reference, or the database is not ours to use.
        NotFound: the registry has no such version, or it is archived.
        Unavailable: the registry cannot be reached.
    """
    return _run(_resolve(Reference.parse(reference)))


def folder_of(version: Version, *, sha256: str | None = None, cache: Path | None = None) -> Path:
    """A verified local folder of a version's artifact.

    Args:
        sha256: the content hash that the artifact must have.

    Raises:
        ConfigError: another hash, or the artifact does not verify.
        NotFound: its files are gone.
        Unavailable: the store cannot be reached, or the disk is full.
    """
    if sha256 is not None and version.artifact != sha256:
        raise ConfigError(
            f"{SCHEME}{version} has content sha256 {version.artifact}, expected {sha256}; "
            "name a version instead of an alias, or give that sha256"
        )
    return fetch(version.uri, cache=cache)


async def _resolve(reference: Reference) -> Version:
    async with open_registry() as registry:
        return in_use(await registry.resolve(reference))


def in_use(version: Version) -> Version:
    """Raises NotFound for a version that nobody should serve any more."""
    if version.state is State.ARCHIVED or version.collected is not None:
        raise NotFound(f"{version} is archived; name another version")
    return version


def _run(work: Coroutine[Any, Any, T]) -> T:
    """In a loop and a thread of its own: the caller may be on a loop that runs."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
