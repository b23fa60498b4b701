"""Data that recipes share, and the record of what a run learned from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from train import disk

NAME = "data.json"

_run: ContextVar[Path | None] = ContextVar("run", default=None)


@contextmanager
def recorded_in(out: Path | None) -> Iterator[None]:
    """While inside, what is recorded belongs to the run in ``out``."""
    token = _run.set(out)
    try:
        yield
    finally:
        _run.reset(token)


def record(name: str, *, sha256: str, licence: str, rows: int, description: str = "") -> None:
    """Write down a source of data, for the run directory, the artifact and its data card.

    Called by whatever reads the data; outside of a run it does nothing.

    Args:
        sha256: of the data as used, so that another version of it is seen.
        licence: SPDX.
        description: for the data card, where configuration chooses the data; what is always the
            same is described by ``Recipe.data``.
    """
    out = _run.get()
    if out is not None:
        sources = {each["name"]: each for each in recorded(out)}
        sources[name] = {
            "name": name,
            "sha256": sha256,
            "licence": licence,
            "rows": rows,
            "description": description,
        }
        disk.write_json(out / NAME, list(sources.values()))


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
