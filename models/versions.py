"""What the registry keeps, as frozen messages, and the rules that need no database.

NAME@3          a version            NAME@champion   whatever the alias points at
NAME_3_20260131 the same, in full    NAME            the champion
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Self

from models.artifact import Manifest
from models.errors import ConfigError, NotFound

CHAMPION = "champion"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_FULL = re.compile(r"(?P<name>.+)_(?P<number>[1-9]\d{0,8})_\d{8}")
_ALIAS = re.compile(r"[a-z][a-z0-9-]{0,63}")
_NUMBER = re.compile(r"[1-9]\d{0,8}")


class State(StrEnum):
    STAGING = "staging"
    """Registered; nobody has judged it."""
    APPROVED = "approved"
    """Good enough to be the champion."""
    ARCHIVED = "archived"
    """Out of use; ``gc`` may take its files."""


LEGAL: Mapping[State, frozenset[State]] = {
    State.STAGING: frozenset({State.APPROVED, State.ARCHIVED}),
    State.APPROVED: frozenset({State.STAGING, State.ARCHIVED}),
    State.ARCHIVED: frozenset({State.STAGING}),  # and then judged again
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Which version somebody means; by its number or by an alias."""

    name: str
    number: int | None = None
    alias: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ConfigError saying what a reference looks like."""
        name, at, which = text.partition("@")
        if not at and (full := _FULL.fullmatch(text)) is not None:
            name, which = full["name"], full["number"]
        elif not at:
            which = CHAMPION
        if _NAME.fullmatch(name) is not None:
            if _NUMBER.fullmatch(which) is not None:
                return cls(name=name, number=int(which))
            if _ALIAS.fullmatch(which) is not None:
                return cls(name=name, alias=which)
        raise ConfigError(
            f"{text!r} refers to no version; expected NAME@VERSION or NAME@ALIAS, "
            "as my-model@3 or my-model@champion"
        )

    def __str__(self) -> str:
        return f"{self.name}@{self.alias if self.number is None else self.number}"


def absent(reference: str) -> NotFound:
    """That it names nothing, or nothing for whoever asks, without telling which names there are."""
    return NotFound(f"{reference!r} does not exist, or is out of use.", param="model")


def check_name(name: str) -> str:
    """Raises ConfigError unless a model may be called so."""
    if _NAME.fullmatch(name) is None or _FULL.fullmatch(name) is not None:
        raise ConfigError(
            f"{name!r} cannot name a model; expected letters, digits, '.', '_' and '-', "
            "and not the form NAME_VERSION_DATE of a version"
        )
    return name


def check_alias(alias: str) -> str:
    """Raises ConfigError unless it is one."""
    if _ALIAS.fullmatch(alias) is None:
        raise ConfigError(
            f"{alias!r} cannot be an alias; expected a word of small letters, digits and '-', "
            "as champion"
        )
    return alias


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    name: str
    number: int
    """1, 2, 3 … within the name; never given twice."""
    artifact: str
    """Content hash."""
    uri: str
    kind: str
    size: int
    state: State
    created: datetime
    created_by: str
    collected: datetime | None = None
    """When its files were removed."""

    @property
    def full_name(self) -> str:
        """``family-name_version_date`` (spec H1)."""
        return f"{self.name}_{self.number}_{self.created:%Y%m%d}"

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    name: str
    alias: str
    number: int | None
    """``None``: taken away."""
    revision: int
    """Grows with every move, and is what a compare-and-set compares. 0: it never existed."""
    since: datetime | None
    by: str

    def __str__(self) -> str:
        return f"{self.name}@{self.alias}"


class Action(StrEnum):
    PROMOTE = "promote"
    ROLLBACK = "rollback"
    REMOVE = "remove"


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One change of an alias."""

    name: str
    alias: str
    revision: int
    action: Action
    number: int | None
    """Where it points since."""
    previous: int | None
    at: datetime
    by: str
    reason: str


def positions(moves: Iterable[Move]) -> list[int | None]:
    """Where an alias has been, the present last, with what was rolled back taken out.

    Rolling back twice therefore goes two steps back, as an editor's undo does.

    Args:
        moves: all of one alias, in order.
    """
    stack: list[int | None] = [None]
    for move in moves:
        if move.action is Action.ROLLBACK:
            stack.pop()
        else:
            stack.append(move.number)
    return stack


class UseKind(StrEnum):
    SERVING = "serving"
    """By a replica."""
    RUN = "run"
    """By a training run that starts from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """Somebody holds an artifact, and says so again and again."""

    kind: UseKind
    name: str
    """The model as served, or the run."""
    replica: str
    artifact: str
    since: datetime
    seen: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    at: datetime
    who: str
    what: str
    subject: str
    details: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """Where a version came from and where it went: data → run → artifact → alias → served by."""

    version: Version
    manifest: Manifest
    aliases: tuple[Alias, ...]
    """That point at it now."""
    moves: tuple[Move, ...]
    """That made an alias point at it, or away from it."""
    uses: tuple[Use, ...]
    parents: tuple[Ancestor, ...]
    children: tuple[Version, ...]
    """Versions that were made from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ancestor:
    """An artifact that another was made from."""

    artifact: str
    versions: tuple[Version, ...]
    """Under which it is registered; none: it is not."""
    manifest: Manifest | None
    parents: tuple[Ancestor, ...]


def pick_previous(moves: Sequence[Move], called: str) -> int | None:
    """Where a rollback goes. Raises ConfigError: there is nothing before."""
    stack = positions(moves)
    if len(stack) < 2:
        raise ConfigError(f"{called} has no earlier position to go back to")
    return stack[-2]
