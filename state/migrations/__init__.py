"""Changes of the tables, release by release (Alembic). One file a change, in ``versions/``.

A database only goes forward: to take a release back, restore the backup made before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.engine import Connection

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

# Alembic is imported where it works: most commands and tests never open a database.


def config() -> Config:
    from alembic.config import Config

    made = Config()
    here = str(Path(__file__).parent)
    made.set_main_option("script_location", here.replace("%", "%%"))
    made.set_main_option("path_separator", "os")
    return made


@cache
def _scripts() -> ScriptDirectory:
    from alembic.script import ScriptDirectory

    return ScriptDirectory.from_config(config())


@cache
def head() -> str:
    """The revision that this release expects."""
    found = _scripts().get_current_head()
    assert found is not None
    return found


def revisions() -> Sequence[str]:
    """From the first to the head."""
    return [script.revision for script in _scripts().walk_revisions()][::-1]


@cache
def known() -> frozenset[str]:
    return frozenset(revisions())


def revision_of(connection: Connection) -> str | None:
    """``None``: no tables yet."""
    from alembic.runtime.migration import MigrationContext

    return MigrationContext.configure(connection).get_current_revision()


def upgrade(connection: Connection, to: str = "head") -> None:
    """Inside the transaction of ``connection``: all of it happens or nothing."""
    from alembic import command

    told = config()
    told.attributes["connection"] = connection
    command.upgrade(told, to)
