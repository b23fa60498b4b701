"""What commands have in common: who speaks, where to, and in which form."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeAlias

from pydantic_core import to_jsonable_python

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def say(line: str) -> None:
    """To the person, beside the output."""
    print(line, file=sys.stderr, flush=True)


def show_json(value: Any) -> None:
    print(json.dumps(to_jsonable_python(value), indent=1, ensure_ascii=False))


def show_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        print("  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)).rstrip())


@dataclass(frozen=True, slots=True)
class Tree:
    """A line and what hangs from it."""

    text: str
    branches: Sequence[Tree] = ()

    def lines(self, first: str = "", rest: str = "") -> Iterable[str]:
        yield first + self.text
        for place, branch in enumerate(self.branches):
            last = place == len(self.branches) - 1
            yield from branch.lines(
                rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  ")
            )


def myself() -> str:
    """Who acts, for the audit log: ``user@machine``."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without a name for its user
        user = str(os.getuid())
    return f"{user}@{platform.node()}"


def size(count: int) -> str:
    """Of ``count`` bytes, for a person."""
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} GB"


def when(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"


def ago(moment: datetime) -> str:
    seconds = max(0, (datetime.now(UTC) - moment).total_seconds())
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
