"""Which artifacts may go: a pure plan over a snapshot of the registry and the store.

Needed is what a version that is not archived has (so: whatever an alias points at, and
whatever it can be rolled back to), what a replica or a run said it holds, and everything
that a needed artifact was made from. What is younger than the grace period stays, too: its
registration, or its use, may be on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from models.store import Stored
from models.versions import State, Use, Version

GRACE = timedelta(hours=24)
"""Longer than anything takes between publishing and registering."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The registry at one moment."""

    versions: tuple[Version, ...]
    parents: Mapping[str, frozenset[str]]
    """Artifact → those it was made from."""
    aliased: frozenset[str]
    """Artifacts that aliases point at."""
    uses: tuple[Use, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Waste:
    sha256: str
    reason: str
    versions: tuple[Version, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    waste: tuple[Waste, ...]
    needed: Mapping[str, str]
    """Artifact → why it stays."""


def plan(
    snapshot: Snapshot, stored: Iterable[Stored], now: datetime, grace: timedelta = GRACE
) -> Plan:
    """What of ``stored`` nobody needs.

    Args:
        stored: listed *before* the snapshot was taken, so that whatever was published and
            registered in between is not taken for forgotten.
    """
    needed = needs(snapshot, now, grace)
    by_artifact: dict[str, list[Version]] = {}
    for version in snapshot.versions:
        by_artifact.setdefault(version.artifact, []).append(version)
    waste = []
    for found in stored:
        if found.sha256 in needed:
            continue
        if now - found.modified < grace:
            needed = needed | {found.sha256: "it is new"}
            continue
        versions = tuple(by_artifact.get(found.sha256, ()))
        if versions:
            reason = f"archived: {', '.join(map(str, versions))}"
        else:
            reason = "never registered" if found.complete else "never finished"
        waste.append(Waste(sha256=found.sha256, reason=reason, versions=versions))
    return Plan(waste=tuple(waste), needed=needed)


def needs(snapshot: Snapshot, now: datetime, grace: timedelta = GRACE) -> dict[str, str]:
    """Every artifact that must stay → why."""
    why: dict[str, str] = {}
    for artifact in sorted(snapshot.aliased):
        why[artifact] = "an alias points at it"
    for version in snapshot.versions:
        if version.state is not State.ARCHIVED:
            why.setdefault(version.artifact, f"{version} is {version.state}")
    for use in snapshot.uses:
        if now - use.seen < grace:
            why.setdefault(use.artifact, f"{use.kind} by {use.name}")
    left = list(why)
    while left:
        child = left.pop()
        for parent in snapshot.parents.get(child, ()):
            if parent not in why:
                why[parent] = f"{child[:12]} was made from it"
                left.append(parent)
    return why
