"""A database of each kind."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from state.database import Database
from tests.databases import database_url, postgres, postgres_url

__all__ = ["database_url", "postgres", "postgres_url"]


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with await Database.open(database_url) as opened:
        yield opened
