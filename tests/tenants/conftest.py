"""A directory over a database of each kind."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from deployments.tenants.directory import Directory
from deployments.tenants.keys import Peppers
from state.database import Database
from tests.databases import database_url, postgres, postgres_url

__all__ = ["database_url", "postgres", "postgres_url"]


@pytest.fixture
def peppers() -> Peppers:
    return Peppers.of({"FRONTIER_KEY_SECRETS": "a secret of the tests"})


@pytest.fixture
async def directory(database_url: str, peppers: Peppers) -> AsyncIterator[Directory]:
    async with await Database.open(database_url) as database:
        yield Directory(database, peppers)
