"""Data that recipes share, and the record of what a run learned from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from models.errors import ConfigError
from train import disk

NAME = "data.json"

Part: TypeAlias = Literal["test", "validation"]
"""What a model is measured on: ``validation`` is cut off what there is to learn from, and the test
part stays unseen. Choose a configuration by it, then measure once on ``test``.
"""


@dataclass(frozen=True, slots=True)
class _Reader:
    out: Path
    goes_on: bool


_reader: ContextVar[_Reader | None] = ContextVar("reader", default=None)
"""The run that reads."""


@contextmanager
def recorded_in(out: Path | None, *, goes_on: bool = False) -> Iterator[None]:
    """While inside, what is recorded belongs to the run in ``out``.

    Args:
        goes_on: it has learned from what was recorded before.
    """
    token = _reader.set(None if out is None else _Reader(out, goes_on))
    try:
        yield
    finally:
        _reader.reset(token)


def record(name: str, *, sha256: str, licence: str, rows: int, description: str = "") -> None:
    """Write down a source of data, for the run directory, the artifact and its data card.

    Called by whatever reads the data; outside of a run it does nothing.

    Args:
        sha256: of the data as used, so that another version of it is seen.
        licence: SPDX.
        description: for the data card, where configuration chooses the data; what is always the
            same is described by ``Recipe.data``.

    Raises:
        ConfigError: the run began with other data of this name.
    """
    run = _reader.get()
    if run is not None:
        sources = {each["name"]: each for each in recorded(run.out)}
        before = sources.get(name, {}).get("sha256", sha256)
        if run.goes_on and before != sha256:
            raise ConfigError(
                f"{name} has changed since this run began (content {before[:12]}, now"
                f" {sha256[:12]}); put it back to go on, or begin a new run"
            )
        sources[name] = {
            "name": name,
            "sha256": sha256,
            "licence": licence,
            "rows": rows,
            "description": description,
        }
        disk.write_json(run.out / NAME, list(sources.values()))


def recorded(out: Path) -> list[dict[str, Any]]:
    """What the run in ``out`` has written down."""
    try:
        found: list[dict[str, Any]] = json.loads((out / NAME).read_text())
    except FileNotFoundError:
        return []
    return found


def description(out: Path) -> str:
    """What the sources say of themselves; nothing if they leave it to the recipe."""
    return "; ".join(
        f"{each['description']} ({each['rows']:,} rows)"
        for each in recorded(out)
        if each.get("description")
    )


def combined_sha256(out: Path) -> str:
    """One hash for all sources; nothing if none was written down."""
    hashes = sorted(each["sha256"] for each in recorded(out))
    if len(hashes) <= 1:
        return "".join(hashes)
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()
