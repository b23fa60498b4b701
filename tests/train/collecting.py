"""The registry of ``FRONTIER_HOME`` as somebody else sees and cleans it."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from models import __main__ as models
from models.registry import open_registry
from models.store import Store
from models.versions import State, Use

WEEK_S = 7 * 86_400


def uses() -> list[Use]:
    """What the registry knows to be needed."""

    async def look() -> list[Use]:
        async with open_registry() as registry:
            return list((await registry.snapshot()).uses)

    return asyncio.run(look())


def archive_and_collect(reference: str) -> bool:
    """Take a version out of use, pretend that it is old, and collect what nobody needs; whether
    its files are still there.
    """

    async def archive() -> str:
        async with open_registry() as registry:
            version = await registry.resolve(reference)
            for alias in await registry.aliases(version.name):
                if alias.number is not None:
                    await registry.remove(
                        version.name, alias.alias, expected=alias.revision, by="test"
                    )
            if version.state is not State.ARCHIVED:
                await registry.transition(reference, State.ARCHIVED, by="test")
            return version.artifact

    folder = Path(Store().uri(asyncio.run(archive())).removeprefix("file://"))
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - WEEK_S,) * 2)
    assert models.main(["gc", "--yes"]) == 0
    return folder.is_dir()
