"""``python -m state``: the database from the command line.

``upgrade`` brings it to this release, as every process does by itself when it starts;
``current`` says where it is; ``revise`` is for developers who changed ``state/tables.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from alembic import command
from sqlalchemy.engine import Connection

from state import migrations
from state.database import Database
from state.errors import StateError
from state.places import sqlite_url


async def _upgrade(arguments: argparse.Namespace) -> None:
    async with await Database.open(arguments.database) as database:
        print(f"{database.called}: revision {migrations.head()}")


async def _current(arguments: argparse.Namespace) -> None:
    async with await Database.open(arguments.database, migrate=False) as database:
        async with database.read() as connection:
            found = await connection.run_sync(migrations.revision_of)
        print(f"{database.called}: revision {found}, this release has {migrations.head()}")


async def _revise(arguments: argparse.Namespace) -> None:
    """Write what leads from the newest migration to ``state/tables.py``; read it, and edit."""

    def revise(connection: Connection) -> None:
        told = migrations.config()
        told.attributes["connection"] = connection
        number = len(migrations.known()) + 1
        command.revision(told, arguments.why, autogenerate=True, rev_id=f"r{number:04}")

    with tempfile.TemporaryDirectory() as folder:
        async with (
            await Database.open(sqlite_url(Path(folder, "scratch.db"))) as database,
            database.write() as connection,
        ):
            await connection.run_sync(revise)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m state",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name, run, told in (
        ("upgrade", _upgrade, "bring the tables to this release"),
        ("current", _current, "say which revision the tables have"),
    ):
        one = commands.add_parser(name, help=told, description=told)
        one.add_argument(
            "--database", metavar="URL", help="default: $FRONTIER_DATABASE or FRONTIER_HOME's file"
        )
        one.set_defaults(run=run)
    revise = commands.add_parser(
        "revise",
        help="write a migration to the present state/tables.py",
        description=_revise.__doc__,
    )
    revise.add_argument("why", metavar="WHY", help="what changes, in a few words")
    revise.set_defaults(run=_revise)
    return top


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    try:
        asyncio.run(arguments.run(arguments))
    except StateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
