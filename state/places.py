"""Where everything lives that outlasts a process: one folder, unless a variable says otherwise.

=====================  ==================================  ==============================
what                   where                               elsewhere
=====================  ==================================  ==============================
home                   ``~/.local/share/frontier-run``     ``FRONTIER_HOME``
database               ``HOME/frontier.db`` (SQLite)       ``FRONTIER_DATABASE``, a URL
counters               ``HOME/counters.db`` (SQLite)       ``FRONTIER_COUNTERS``, a URL
artifacts              ``HOME/artifacts``                  ``FRONTIER_ARTIFACTS``, a folder
                                                           or any fsspec URL
runs                   ``HOME/runs``                       ``FRONTIER_RUNS``, a folder
cache of answers       ``HOME/cache.db`` (SQLite)          ``FRONTIER_CACHE_STORE``, a URL
=====================  ==================================  ==============================

None depends on the working directory, which inside ``ray job submit`` is a copy that goes
away. Nothing is created here: whoever writes makes the folder. (``FRONTIER_CACHE`` is another
thing: the folder of fetched weights, see ``models/sources``.)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    home: Path
    database: str = field(repr=False)
    """A SQLAlchemy URL; it may carry a password."""
    counters: str = field(repr=False)
    """As ``state.counters.open_counters`` takes it; it may carry a password."""
    artifacts: str
    """An absolute folder, or an fsspec URL (``s3://bucket/prefix``)."""
    runs: Path
    cache: str = field(repr=False)
    """A URL that ``state.cache`` knows; it may carry a password."""

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """As the environment says now; an empty variable counts as unset."""
        home = _folder(environ.get("FRONTIER_HOME") or "~/.local/share/frontier-run")
        artifacts = environ.get("FRONTIER_ARTIFACTS") or str(home / "artifacts")
        return cls(
            home=home,
            database=environ.get("FRONTIER_DATABASE") or sqlite_url(home / "frontier.db"),
            counters=environ.get("FRONTIER_COUNTERS") or f"sqlite:///{home / 'counters.db'}",
            artifacts=artifacts if "://" in artifacts else str(_folder(artifacts)),
            runs=_folder(environ.get("FRONTIER_RUNS") or home / "runs"),
            cache=environ.get("FRONTIER_CACHE_STORE") or f"sqlite:///{home / 'cache.db'}",
        )


def sqlite_url(file: Path) -> str:
    return f"sqlite+aiosqlite:///{file}"


def _folder(path: str | Path) -> Path:
    return Path(path).expanduser().absolute()
