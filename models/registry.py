"""The index of all artifacts: versions, aliases, lineage, uses; in the platform's database.

Every change is one transaction that runs alone among the registry's writers, and leaves a
row in the audit log. Files are in a :class:`~models.store.Store`; here are only their hashes.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from models import collection
from models.artifact import Manifest
from models.collection import GRACE, Plan, Snapshot, Waste
from models.errors import ConfigError, Conflict, InvalidInput, NotFound, Unavailable
from models.promotion import Measurements
from models.store import Store, Stored
from models.versions import (
    LEGAL,
    Action,
    Alias,
    Ancestor,
    AuditEntry,
    Lineage,
    Move,
    Reference,
    State,
    Use,
    UseKind,
    Version,
    check_alias,
    check_name,
    pick_previous,
)
from state import tables
from state.database import Database
from state.errors import StateMisconfigured, StateUnavailable

T = TypeVar("T")

MAX_PAGE = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[T]):
    items: tuple[T, ...]
    next: str | None
    """Opaque; give it back for what follows. ``None``: this was the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """All versions under one name, in short."""

    name: str
    newest: Version
    versions: int
    aliases: tuple[Alias, ...]


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Registry:
    """Belongs to the event loop that opened ``database``.

    All methods raise :class:`Unavailable` when the database cannot be reached.
    """

    def __init__(self, database: Database, *, now: Callable[[], datetime] = _utc_now) -> None:
        self.database = database
        self._now = now

    # Versions

    async def register(
        self, manifest: Manifest, uri: str, *, by: str, name: str | None = None
    ) -> Version:
        """A new version in staging; the one that is there if this artifact has one already.

        Args:
            uri: where it was published.
            name: default: the manifest's.

        Raises:
            ConfigError: the name cannot be one.
            NotFound: it is not published at ``uri``.
        """
        name = check_name(manifest.name if name is None else name)
        sha256 = manifest.content_sha256
        store = Store.of(uri, sha256)
        now = self._now()
        async with self._write() as c:
            # Under the lock: nobody collects it between this look and the commit.
            if not await asyncio.to_thread(store.has, manifest):
                raise NotFound(f"{uri} is not there, or not all of it; publish it first")
            known = await _artifact(c, sha256)
            if known is None:
                await c.execute(
                    _ARTIFACTS.insert().values(
                        content_sha256=sha256,
                        uri=uri,
                        kind=manifest.kind,
                        manifest=manifest.encode().decode(),
                        size=manifest.size,
                        registered=now,
                    )
                )
                parents = dict.fromkeys(manifest.parents)
                if parents:
                    await c.execute(
                        tables.parents.insert(),
                        [{"artifact": sha256, "parent": parent} for parent in parents],
                    )
            else:  # published again, perhaps elsewhere, perhaps after its files were collected
                await c.execute(
                    _ARTIFACTS.update()
                    .where(_ARTIFACTS.c.content_sha256 == sha256)
                    .values(uri=uri, collected=None)
                )
            there = await _one(c, _VERSIONS.c.name == name, _VERSIONS.c.artifact == sha256)
            if there is not None:
                return there
            newest = await c.scalar(
                sa.select(sa.func.max(_VERSIONS.c.number)).where(_VERSIONS.c.name == name)
            )
            number = (newest or 0) + 1
            await c.execute(
                _VERSIONS.insert().values(
                    name=name,
                    number=number,
                    artifact=sha256,
                    state=State.STAGING,
                    created=now,
                    created_by=by,
                )
            )
            await self._audit(c, by, "register", f"{name}@{number}", artifact=sha256, uri=uri)
            return await _version(c, name, number)

    async def resolve(self, reference: Reference | str) -> Version:
        """The version that a reference means now.

        Raises:
            NotFound: no such name, version or alias, saying which there are.
        """
        async with self._read() as c:
            return await _resolve(c, _parsed(reference))

    async def manifest(self, sha256: str) -> Manifest:
        """Of a registered artifact. Raises NotFound."""
        async with self._read() as c:
            found = await _manifest(c, sha256)
        if found is None:
            raise NotFound(f"no artifact {sha256} is registered")
        return found

    async def models(self, *, limit: int = MAX_PAGE, cursor: str | None = None) -> Page[Model]:
        """By name. Raises InvalidInput: the cursor is none of ours."""
        after = _decode(cursor, 1)
        async with self._read() as c:
            query = sa.select(_VERSIONS.c.name).distinct().order_by(_VERSIONS.c.name)
            if after:
                query = query.where(_VERSIONS.c.name > after[0])
            names = list((await c.scalars(query.limit(_limit(limit) + 1))).all())
            more, names = len(names) > limit, names[:limit]
            versions = await _versions(c, _VERSIONS.c.name.in_(names))
            aliases = await _aliases(c, _ALIASES.c.name.in_(names))
        found = []
        for name in names:
            own = [version for version in versions if version.name == name]
            found.append(
                Model(
                    name=name,
                    newest=own[-1],
                    versions=len(own),
                    aliases=tuple(alias for alias in aliases if alias.name == name),
                )
            )
        return Page(items=tuple(found), next=_encode(names[-1]) if more else None)

    async def versions(
        self, name: str, *, limit: int = MAX_PAGE, cursor: str | None = None
    ) -> Page[Version]:
        """Of one name, the newest first. Raises InvalidInput: the cursor is none of ours."""
        after = _decode(cursor, 1)
        async with self._read() as c:
            query = _SELECT.where(_VERSIONS.c.name == name)
            if after:
                query = query.where(_VERSIONS.c.number < int(after[0]))
            query = query.order_by(_VERSIONS.c.number.desc()).limit(_limit(limit) + 1)
            found = [_as_version(row) for row in await c.execute(query)]
        more, found = len(found) > limit, found[:limit]
        return Page(items=tuple(found), next=_encode(str(found[-1].number)) if more else None)

    async def transition(
        self, reference: Reference | str, state: State, *, by: str, reason: str = ""
    ) -> Version:
        """Move a version to another state.

        Raises:
            NotFound: no such version.
            ConfigError: there is no way from its state to that one, an alias still points
                at what shall be archived, or its files are gone.
        """
        async with self._write() as c:
            version = await _resolve(c, _parsed(reference))
            if state is version.state:
                return version
            if state not in LEGAL[version.state]:
                ways = " or ".join(sorted(LEGAL[version.state]))
                raise ConfigError(
                    f"{version} is {version.state}; it can become {ways}, not {state}"
                )
            if state is State.ARCHIVED:
                holders = [
                    alias.alias
                    for alias in await _aliases(c, _ALIASES.c.name == version.name)
                    if alias.number == version.number
                ]
                if holders:
                    raise ConfigError(
                        f"{version} cannot be archived: {' and '.join(holders)} "
                        "still points at it; promote another first"
                    )
            elif version.collected is not None:
                raise ConfigError(f"the files of {version} are gone; register them again")
            await self._set_state(c, version, state, by, reason)
            return await _version(c, version.name, version.number)

    # Aliases

    async def alias(self, name: str, alias: str) -> Alias:
        """Where it points and its revision, which :meth:`promote` compares; 0 if it never was."""
        async with self._read() as c:
            return await _alias(c, name, alias)

    async def aliases(self, name: str | None = None) -> tuple[Alias, ...]:
        """Those that point somewhere, by name."""
        async with self._read() as c:
            found = await _aliases(c, *([] if name is None else [_ALIASES.c.name == name]))
        return tuple(found)

    async def promote(
        self,
        reference: Reference | str,
        alias: str,
        *,
        expected: int | None,
        by: str,
        reason: str = "",
        approve: bool = False,
        details: Mapping[str, Any] | None = None,
    ) -> Alias:
        """Point ``alias`` at a version, if nobody moved it since it was looked at.

        Args:
            expected: the revision of the alias that the decision was made against; ``None``:
                wherever it points now.
            approve: make it approved first; only what is approved can be champion.
            details: for the audit log: measurements, decision.

        Raises:
            NotFound: no such version.
            Conflict: the alias has moved since.
            ConfigError: the version is archived, its files are gone, or it is not approved
                and ``alias`` is ``champion``.
        """
        check_alias(alias)
        async with self._write() as c:
            version = await _resolve(c, _parsed(reference))
            now = await _alias(c, version.name, alias)
            _unmoved(now, expected)
            if now.number == version.number:
                return now
            if approve and version.state is State.STAGING:
                await self._set_state(c, version, State.APPROVED, by, reason)
                version = await _version(c, version.name, version.number)
            _may_hold(version, alias)
            return await self._move(
                c, now, Action.PROMOTE, version.number, by, reason, details or {}
            )

    async def rollback(
        self, name: str, alias: str, *, expected: int | None, by: str, reason: str = ""
    ) -> Alias:
        """Point ``alias`` at where it pointed before; again: one step further back.

        Raises:
            NotFound: there is no such alias.
            Conflict: it has moved since it had revision ``expected``.
            ConfigError: there is nothing before, or it is archived.
        """
        async with self._write() as c:
            now = await _alias(c, name, alias)
            if now.revision == 0:
                raise NotFound(f"{name} has no alias {alias}")
            _unmoved(now, expected)
            number = pick_previous(await _moves(c, name, alias), str(now))
            if number is not None:
                _may_hold(await _version(c, name, number), alias)
            return await self._move(c, now, Action.ROLLBACK, number, by, reason, {})

    async def remove(
        self, name: str, alias: str, *, expected: int | None, by: str, reason: str = ""
    ) -> Alias:
        """Let ``alias`` point nowhere; a rollback brings it back.

        Raises:
            NotFound: there is no such alias.
            Conflict: it has moved since it had revision ``expected``.
        """
        async with self._write() as c:
            now = await _alias(c, name, alias)
            _unmoved(now, expected)
            if now.number is None:
                raise NotFound(f"{name} has no alias {alias}")
            return await self._move(c, now, Action.REMOVE, None, by, reason, {})

    async def moves(self, name: str, alias: str) -> tuple[Move, ...]:
        """Every change of an alias, in order."""
        async with self._read() as c:
            return tuple(await _moves(c, name, alias))

    # Measurements, uses, lineage

    async def record(self, measurements: Measurements) -> None:
        """Keep what an evaluation found. Raises NotFound: no such artifact is registered."""
        async with self._write() as c:
            if await _artifact(c, measurements.artifact) is None:
                raise NotFound(f"no artifact {measurements.artifact} is registered")
            await c.execute(
                tables.measurements.insert().values(
                    artifact=measurements.artifact,
                    recorded=self._now(),
                    facts=json.loads(measurements.encode()),
                )
            )

    async def measurements(self, sha256: str) -> Measurements | None:
        """The last that were recorded of an artifact."""
        table = tables.measurements
        async with self._read() as c:
            facts = await c.scalar(
                sa.select(table.c.facts)
                .where(table.c.artifact == sha256)
                .order_by(table.c.id.desc())
                .limit(1)
            )
        return None if facts is None else Measurements.decode(json.dumps(facts), sha256)

    async def use(
        self, sha256: str, *, name: str, replica: str = "", kind: UseKind = UseKind.SERVING
    ) -> None:
        """Say that an artifact is in use, and again at least every few hours.

        Args:
            name: the model as served, or the run.
            replica: which of its replicas; each uses one artifact at a time under a name.
        """
        table, now = tables.uses, self._now()
        this = (table.c.kind == kind, table.c.name == name, table.c.replica == replica)
        async with self._write() as c:
            row = (await c.execute(sa.select(table.c.artifact).where(*this))).one_or_none()
            if row is None:
                await c.execute(
                    table.insert().values(
                        kind=kind, name=name, replica=replica, artifact=sha256, since=now, seen=now
                    )
                )
            elif row.artifact == sha256:
                await c.execute(table.update().where(*this).values(seen=now))
            else:
                await c.execute(
                    table.update().where(*this).values(artifact=sha256, since=now, seen=now)
                )

    async def disuse(
        self, *, name: str, replica: str = "", kind: UseKind = UseKind.SERVING
    ) -> None:
        """Say that it is in use no more. Who dies without saying so is forgotten in time."""
        table = tables.uses
        async with self._write() as c:
            await c.execute(
                table.delete().where(
                    table.c.kind == kind, table.c.name == name, table.c.replica == replica
                )
            )

    async def lineage(self, reference: Reference | str) -> Lineage:
        """Everything known about where a version came from and where it went.

        Raises:
            NotFound: no such version.
        """
        uses = tables.uses
        async with self._read() as c:
            version = await _resolve(c, _parsed(reference))
            manifest = await _manifest(c, version.artifact)
            assert manifest is not None
            moves = await _moves(c, version.name)
            children = sa.select(tables.parents.c.artifact).where(
                tables.parents.c.parent == version.artifact
            )
            return Lineage(
                version=version,
                manifest=manifest,
                aliases=tuple(
                    alias
                    for alias in await _aliases(c, _ALIASES.c.name == version.name)
                    if alias.number == version.number
                ),
                moves=tuple(
                    move for move in moves if version.number in (move.number, move.previous)
                ),
                uses=tuple(
                    _as_use(row)
                    for row in await c.execute(
                        sa.select(uses)
                        .where(uses.c.artifact == version.artifact)
                        .order_by(uses.c.kind, uses.c.name, uses.c.replica)
                    )
                ),
                parents=await _ancestors(c, manifest.parents, frozenset({version.artifact})),
                children=tuple(await _versions(c, _VERSIONS.c.artifact.in_(children))),
            )

    async def audit(
        self, *, subject: str | None = None, limit: int = MAX_PAGE, cursor: str | None = None
    ) -> Page[AuditEntry]:
        """The newest first. Raises InvalidInput: the cursor is none of ours."""
        table, after = tables.audit, _decode(cursor, 1)
        query = sa.select(table).order_by(table.c.id.desc()).limit(_limit(limit) + 1)
        if subject is not None:
            query = query.where(table.c.subject == subject)
        if after:
            query = query.where(table.c.id < int(after[0]))
        async with self._read() as c:
            rows = list(await c.execute(query))
        more, rows = len(rows) > limit, rows[:limit]
        found = tuple(
            AuditEntry(
                at=row.at, who=row.who, what=row.what, subject=row.subject, details=row.details
            )
            for row in rows
        )
        return Page(items=found, next=_encode(str(rows[-1].id)) if more else None)

    # Collection

    async def snapshot(self) -> Snapshot:
        """What :func:`models.collection.plan` looks at."""
        async with self._read() as c:
            return await _snapshot(c)

    async def plan(self, stored: Iterable[Stored], *, grace: timedelta = GRACE) -> Plan:
        """Which of the artifacts in a store nobody needs. Changes nothing."""
        listed = tuple(stored)  # before the snapshot
        return collection.plan(await self.snapshot(), listed, self._now(), grace)

    async def collect(
        self, waste: Waste, delete: Callable[[str], None], *, by: str, grace: timedelta = GRACE
    ) -> bool:
        """Let go of one artifact of a plan, unless somebody needs it by now.

        First it is written off, then its files are removed, so that a removal that fails or
        is killed leaves nothing that can be promoted; the next plan finds the rest.

        Args:
            delete: removes the files, given the hash. Called in a thread, while no other
                writer of the registry is at work.

        Returns:
            Whether it was collected.
        """
        sha256 = waste.sha256
        async with self._write() as c:
            now = self._now()
            if sha256 in collection.needs(await _snapshot(c), now, grace):
                return False
            await c.execute(
                _ARTIFACTS.update()
                .where(_ARTIFACTS.c.content_sha256 == sha256)
                .values(collected=now)
            )
            await self._audit(c, by, "collect", sha256, reason=waste.reason)
        async with self._write() as c:
            row = await _artifact(c, sha256)
            if row is not None and row.collected is None:
                return False  # registered again in between
            await asyncio.to_thread(delete, sha256)
        return True

    # Inside a transaction

    async def _set_state(
        self, c: AsyncConnection, version: Version, state: State, by: str, reason: str
    ) -> None:
        await c.execute(
            _VERSIONS.update()
            .where(_VERSIONS.c.name == version.name, _VERSIONS.c.number == version.number)
            .values(state=state)
        )
        await self._audit(
            c, by, "transition", str(version), before=version.state, after=state, reason=reason
        )

    async def _move(
        self,
        c: AsyncConnection,
        now: Alias,
        action: Action,
        number: int | None,
        by: str,
        reason: str,
        details: Mapping[str, Any],
    ) -> Alias:
        moved = Alias(
            name=now.name,
            alias=now.alias,
            number=number,
            revision=now.revision + 1,
            since=self._now(),
            by=by,
        )
        values = {"number": number, "revision": moved.revision, "since": moved.since, "by": by}
        this = {"name": now.name, "alias": now.alias}
        if now.revision == 0:
            await c.execute(_ALIASES.insert().values(**this, **values))
        else:
            await c.execute(
                _ALIASES.update()
                .where(_ALIASES.c.name == now.name, _ALIASES.c.alias == now.alias)
                .values(**values)
            )
        await c.execute(
            tables.alias_moves.insert().values(
                **this,
                revision=moved.revision,
                action=action,
                number=number,
                previous=now.number,
                at=moved.since,
                by=by,
                reason=reason,
            )
        )
        facts = {"before": now.number, "after": number, "reason": reason, **details}
        await self._audit(c, by, action, str(now), **facts)
        return moved

    async def _audit(
        self, c: AsyncConnection, who: str, what: str, subject: str, **details: Any
    ) -> None:
        await c.execute(
            tables.audit.insert().values(
                at=self._now(), who=who, what=what, subject=subject, details=details
            )
        )

    @asynccontextmanager
    async def _read(self) -> AsyncIterator[AsyncConnection]:
        with translated():
            async with self.database.read() as connection:
                yield connection

    @asynccontextmanager
    async def _write(self) -> AsyncIterator[AsyncConnection]:
        with translated():
            async with self.database.write("registry") as connection:
                yield connection


@contextmanager
def translated() -> Iterator[None]:
    """What ``state`` raises → what everybody understands."""
    try:
        yield
    except StateUnavailable as error:
        raise Unavailable(str(error)) from error
    except StateMisconfigured as error:
        raise ConfigError(str(error)) from error


@asynccontextmanager
async def open_registry(url: str | None = None) -> AsyncIterator[Registry]:
    """The registry in the database of ``state.places``, or at ``url``.

    Raises:
        Unavailable: it cannot be reached.
        ConfigError: the URL is wrong, or its database not ours to use.
    """
    with translated():
        database = await Database.open(url)
    try:
        yield Registry(database)
    finally:
        await database.close()


_ARTIFACTS, _VERSIONS, _ALIASES = tables.artifacts, tables.versions, tables.aliases
_SELECT = sa.select(
    _VERSIONS, _ARTIFACTS.c.uri, _ARTIFACTS.c.kind, _ARTIFACTS.c.size, _ARTIFACTS.c.collected
).join(_ARTIFACTS, _VERSIONS.c.artifact == _ARTIFACTS.c.content_sha256)


def _parsed(reference: Reference | str) -> Reference:
    return Reference.parse(reference) if isinstance(reference, str) else reference


def _as_version(row: Row[Any]) -> Version:
    return Version(
        name=row.name,
        number=row.number,
        artifact=row.artifact,
        uri=row.uri,
        kind=row.kind,
        size=row.size,
        state=State(row.state),
        created=row.created,
        created_by=row.created_by,
        collected=row.collected,
    )


def _as_use(row: Row[Any]) -> Use:
    return Use(
        kind=UseKind(row.kind),
        name=row.name,
        replica=row.replica,
        artifact=row.artifact,
        since=row.since,
        seen=row.seen,
    )


def _as_alias(row: Row[Any]) -> Alias:
    return Alias(
        name=row.name,
        alias=row.alias,
        number=row.number,
        revision=row.revision,
        since=row.since,
        by=row.by,
    )


async def _versions(c: AsyncConnection, *where: Any) -> list[Version]:
    query = _SELECT.where(*where).order_by(_VERSIONS.c.name, _VERSIONS.c.number)
    return [_as_version(row) for row in await c.execute(query)]


async def _one(c: AsyncConnection, *where: Any) -> Version | None:
    found = await _versions(c, *where)
    return found[0] if found else None


async def _version(c: AsyncConnection, name: str, number: int) -> Version:
    found = await _one(c, _VERSIONS.c.name == name, _VERSIONS.c.number == number)
    if found is None:
        numbers = (
            await c.scalars(
                sa.select(_VERSIONS.c.number)
                .where(_VERSIONS.c.name == name)
                .order_by(_VERSIONS.c.number.desc())
            )
        ).all()
        raise NotFound(await _lacking(c, name, f"version {number}", list(map(str, numbers))))
    return found


async def _resolve(c: AsyncConnection, reference: Reference) -> Version:
    if reference.number is not None:
        return await _version(c, reference.name, reference.number)
    assert reference.alias is not None
    number = (await _alias(c, reference.name, reference.alias)).number
    if number is None:
        aliases = [alias.alias for alias in await _aliases(c, _ALIASES.c.name == reference.name)]
        raise NotFound(await _lacking(c, reference.name, f"alias {reference.alias}", aliases))
    return await _version(c, reference.name, number)


async def _lacking(c: AsyncConnection, name: str, what: str, there: Sequence[str]) -> str:
    if await c.scalar(sa.select(_VERSIONS.c.number).where(_VERSIONS.c.name == name).limit(1)):
        known = (
            f"it has {', '.join(there[:8])}{' …' if there[8:] else ''}" if there else "it has none"
        )
        return f"{name} has no {what}; {known}"
    names = (
        await c.scalars(sa.select(_VERSIONS.c.name).distinct().order_by(_VERSIONS.c.name))
    ).all()
    known = (
        f"there are {', '.join(names[:8])}{' …' if names[8:] else ''}" if names else "it is empty"
    )
    return f"the registry has no model {name}; {known}"


async def _alias(c: AsyncConnection, name: str, alias: str) -> Alias:
    row = (
        await c.execute(
            sa.select(_ALIASES).where(_ALIASES.c.name == name, _ALIASES.c.alias == alias)
        )
    ).one_or_none()
    if row is None:
        return Alias(name=name, alias=alias, number=None, revision=0, since=None, by="")
    return _as_alias(row)


async def _aliases(c: AsyncConnection, *where: Any) -> list[Alias]:
    query = (
        sa.select(_ALIASES)
        .where(_ALIASES.c.number.is_not(None), *where)
        .order_by(_ALIASES.c.name, _ALIASES.c.alias)
    )
    return [_as_alias(row) for row in await c.execute(query)]


async def _moves(c: AsyncConnection, name: str, alias: str | None = None) -> list[Move]:
    table = tables.alias_moves
    query = sa.select(table).where(table.c.name == name).order_by(table.c.alias, table.c.revision)
    if alias is not None:
        query = query.where(table.c.alias == alias)
    return [
        Move(
            name=row.name,
            alias=row.alias,
            revision=row.revision,
            action=Action(row.action),
            number=row.number,
            previous=row.previous,
            at=row.at,
            by=row.by,
            reason=row.reason,
        )
        for row in await c.execute(query)
    ]


async def _manifest(c: AsyncConnection, sha256: str) -> Manifest | None:
    text = await c.scalar(
        sa.select(_ARTIFACTS.c.manifest).where(_ARTIFACTS.c.content_sha256 == sha256)
    )
    return None if text is None else Manifest.decode(text, f"the registry's {sha256[:12]}")


async def _artifact(c: AsyncConnection, sha256: str) -> Row[Any] | None:
    query = sa.select(_ARTIFACTS).where(_ARTIFACTS.c.content_sha256 == sha256)
    return (await c.execute(query)).one_or_none()


async def _ancestors(
    c: AsyncConnection, parents: Iterable[str], below: frozenset[str]
) -> tuple[Ancestor, ...]:
    found = []
    for parent in parents:
        if parent in below:
            continue  # hashes cannot form a circle, but rows from elsewhere might
        manifest = await _manifest(c, parent)
        found.append(
            Ancestor(
                artifact=parent,
                versions=tuple(await _versions(c, _VERSIONS.c.artifact == parent)),
                manifest=manifest,
                parents=()
                if manifest is None
                else await _ancestors(c, manifest.parents, below | {parent}),
            )
        )
    return tuple(found)


async def _snapshot(c: AsyncConnection) -> Snapshot:
    versions = tuple(await _versions(c))
    by_number = {(version.name, version.number): version.artifact for version in versions}
    parents: dict[str, set[str]] = {}
    for row in await c.execute(sa.select(tables.parents)):
        parents.setdefault(row.artifact, set()).add(row.parent)
    return Snapshot(
        versions=versions,
        parents={artifact: frozenset(found) for artifact, found in parents.items()},
        aliased=frozenset(
            by_number[alias.name, alias.number]
            for alias in await _aliases(c)
            if alias.number is not None
        ),
        uses=tuple(_as_use(row) for row in await c.execute(sa.select(tables.uses))),
    )


def _unmoved(now: Alias, expected: int | None) -> None:
    if expected is not None and now.revision != expected:
        where = "nowhere" if now.number is None else f"at version {now.number}"
        raise Conflict(
            f"{now} was moved by {now.by} in the meantime and points {where}; "
            "look again, then decide again"
        )


def _may_hold(version: Version, alias: str) -> None:
    if version.collected is not None:
        raise ConfigError(f"the files of {version} are gone; register them again")
    if version.state is State.ARCHIVED:
        raise ConfigError(f"{version} is archived; make it staging first")
    if alias == "champion" and version.state is not State.APPROVED:
        raise ConfigError(f"{version} is {version.state}; only what is approved can be champion")


def _limit(limit: int) -> int:
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidInput(f"limit is {limit}; expected 1 to {MAX_PAGE}", param="limit")
    return limit


def _encode(*key: str) -> str:
    return base64.urlsafe_b64encode(json.dumps(key).encode()).decode().rstrip("=")


def _decode(cursor: str | None, parts: int) -> list[str]:
    if cursor is None:
        return []
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        key = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        if not (
            isinstance(key, list) and len(key) == parts and all(isinstance(k, str) for k in key)
        ):
            raise ValueError
    except (ValueError, UnicodeError, binascii.Error):
        raise InvalidInput(
            f"cursor {cursor!r:.80} is not one that was given out; start again without it",
            param="cursor",
        ) from None
    return key
