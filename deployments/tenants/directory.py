"""Tenants and their keys, in the platform's database; every change is in the audit log.

A key is shown once, when it is made. Rotating one makes a successor and lets the old one
live for a while, so that nobody is locked out in between.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from deployments.tenants.audit import note
from deployments.tenants.keys import Minted, Peppers, mint
from deployments.tenants.principal import Role, Scope
from models.errors import Conflict, InvalidInput, NotFound
from state import tables
from state.database import Database, LazyDatabase
from state.pages import newest_first

_TENANTS, _KEYS = tables.tenants, tables.api_keys
TENANT = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
KEYS_A_TENANT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    name: str
    plan: str
    overrides: Mapping[str, float | None]
    """Of the plan's limits, by name; ``None``: no limit."""
    created: datetime
    suspended: datetime | None = None
    deleted_as: str | None = None
    """Its deletion has begun (``deletion.py``): what is kept of it is called so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    id: str
    tenant: str
    label: str
    role: Role
    scopes: frozenset[Scope] | None
    """``None``: all that the role may."""
    created: datetime
    expires: datetime | None = None
    revoked: datetime | None = None
    digest: str = field(repr=False)

    def live(self, now: datetime) -> bool:
        return self.revoked is None and (self.expires is None or now < self.expires)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the audit log."""

    id: int
    at: datetime
    who: str
    what: str
    subject: str
    details: Mapping[str, Any]


class Directory:
    """Belongs to the event loop of ``database``.

    Every change takes ``by``: who makes it, for the audit log. All methods raise
    ``StateUnavailable`` when the database cannot be reached.
    """

    def __init__(self, database: Database | LazyDatabase, peppers: Peppers) -> None:
        self.database = database
        self.peppers = peppers

    # Tenants

    async def create(
        self,
        name: str,
        *,
        plan: str,
        overrides: Mapping[str, float | None] | None = None,
        by: str,
    ) -> Tenant:
        """Raises InvalidInput: no name for a tenant; Conflict: there is one of that name."""
        if not TENANT.fullmatch(name):
            raise InvalidInput(
                f"{name!r:.80} cannot be the name of a tenant; expected up to 63 lower-case"
                " letters, digits, dots, dashes and underscores.",
                param="name",
            )
        made = Tenant(name=name, plan=plan, overrides=dict(overrides or {}), created=_now())
        async with self.database.write("tenants") as c:
            if await _tenant(c, name) is not None:
                raise Conflict(f"There is a tenant {name!r} already.", param="name")
            await c.execute(
                _TENANTS.insert().values(
                    name=name, plan=plan, overrides=made.overrides, created=made.created
                )
            )
            await note(c, by, "tenant.create", name, plan=plan, overrides=made.overrides)
        return made

    async def change(
        self,
        name: str,
        *,
        plan: str | None = None,
        overrides: Mapping[str, float | None] | None = None,
        suspended: bool | None = None,
        by: str,
    ) -> Tenant:
        """Change what is given. Raises NotFound; Conflict: it is being deleted."""
        values: dict[str, Any] = {}
        if plan is not None:
            values["plan"] = plan
        if overrides is not None:
            values["overrides"] = dict(overrides)
        async with self.database.write("tenants") as c:
            before = await lasting_tenant(c, name)
            if suspended is not None:
                values["suspended"] = (before.suspended or _now()) if suspended else None
            if values:
                await c.execute(_TENANTS.update().where(_TENANTS.c.name == name).values(values))
                told = {key: str(v) if isinstance(v, datetime) else v for key, v in values.items()}
                await note(c, by, "tenant.change", name, **told)
            return await needed_tenant(c, name)

    async def tenant(self, name: str) -> Tenant:
        """Raises NotFound."""
        async with self.database.read() as c:
            return await needed_tenant(c, name)

    async def tenants(self) -> Sequence[Tenant]:
        """By name."""
        async with self.database.read() as c:
            rows = await c.execute(sa.select(_TENANTS).order_by(_TENANTS.c.name))
            return [_as_tenant(row) for row in rows]

    # Keys

    async def issue(
        self,
        tenant: str,
        *,
        role: Role = Role.DEVELOPER,
        scopes: frozenset[Scope] | None = None,
        label: str = "",
        lifetime: timedelta | None = None,
        by: str,
    ) -> tuple[Key, Minted]:
        """A new key, and its text, which cannot be had again.

        Raises:
            NotFound: no such tenant.
            Conflict: it is being deleted, or has more keys than anybody can look after.
        """
        async with self.database.write("tenants") as c:
            await lasting_tenant(c, tenant)
            count = await c.scalar(
                sa.select(sa.func.count()).select_from(_KEYS).where(_KEYS.c.tenant == tenant)
            )
            if (count or 0) >= KEYS_A_TENANT:
                raise Conflict(
                    f"{tenant!r} has {count} keys, living and dead, and no more are made; dead ones"
                    " are forgotten after gateway.retention.dead_keys_days."
                )
            return await self._insert(
                c, tenant, role=role, scopes=scopes, label=label, lifetime=lifetime, by=by
            )

    async def rotate(self, id_: str, *, overlap: timedelta, by: str) -> tuple[Key, Minted]:
        """A successor with the same rights; the old key lives on for ``overlap`` at most.

        Raises:
            NotFound: no such key.
            Conflict: it is revoked or has expired.
        """
        async with self.database.write("tenants") as c:
            old = await _needed_key(c, id_)
            now = _now()
            if not old.live(now):
                raise Conflict(f"The key {id_} is revoked or has expired; issue a new one.")
            lifetime = None if old.expires is None else old.expires - old.created
            made = await self._insert(
                c,
                old.tenant,
                role=old.role,
                scopes=old.scopes,
                label=old.label,
                lifetime=lifetime,
                by=by,
            )
            end = min(filter(None, (now + overlap, old.expires)))
            await c.execute(_KEYS.update().where(_KEYS.c.id == id_).values(expires=end))
            await note(c, by, "key.rotate", id_, successor=made[0].id, until=str(end))
            return made

    async def revoke(self, id_: str, *, by: str) -> Key:
        """At once; nothing happens to one that is revoked already. Raises NotFound."""
        async with self.database.write("tenants") as c:
            key = await _needed_key(c, id_)
            if key.revoked is None:
                await c.execute(_KEYS.update().where(_KEYS.c.id == id_).values(revoked=_now()))
                await note(c, by, "key.revoke", id_, tenant=key.tenant)
            return await _needed_key(c, id_)

    async def keys(self, tenant: str) -> Sequence[Key]:
        """By id, living and dead. Raises NotFound: no such tenant."""
        async with self.database.read() as c:
            await needed_tenant(c, tenant)
            rows = await c.execute(
                sa.select(_KEYS).where(_KEYS.c.tenant == tenant).order_by(_KEYS.c.id)
            )
            return [as_key(row) for row in rows]

    async def find(self, id_: str) -> tuple[Key, Tenant] | None:
        """Of a key that somebody shows; ``None``: there is none of that id. Asked in one statement,
        so that time does not tell whether there is one.
        """
        both = sa.select(_KEYS, _TENANTS).join(_TENANTS, _TENANTS.c.name == _KEYS.c.tenant)
        async with self.database.read() as c:
            row = (await c.execute(both.where(_KEYS.c.id == id_))).one_or_none()
        if row is None:
            return None
        key = dict(zip(_KEYS.c.keys(), row, strict=False))
        tenant = dict(zip(_TENANTS.c.keys(), row[len(key) :], strict=True))
        return _made_key(key), Tenant(**tenant)

    # The audit log

    async def audit(
        self, *, before: int | None = None, after: int | None = None, limit: int = 100
    ) -> Sequence[Entry]:
        """The newest first: from the newest on, or the ones next to an entry on either side."""
        log = tables.audit
        rows = await newest_first(
            self.database, sa.select(log), log.c.id, before=before, after=after, limit=limit
        )
        return [Entry(**row._mapping) for row in rows]

    async def _insert(
        self,
        c: AsyncConnection,
        tenant: str,
        *,
        role: Role,
        scopes: frozenset[Scope] | None,
        label: str,
        lifetime: timedelta | None,
        by: str,
    ) -> tuple[Key, Minted]:
        minted, now = mint(), _now()
        key = Key(
            id=minted.id,
            tenant=tenant,
            label=label,
            role=role,
            scopes=scopes,
            created=now,
            expires=None if lifetime is None else now + lifetime,
            digest=self.peppers.digest(minted.text),
        )
        listed = None if scopes is None else sorted(scopes)
        await c.execute(
            _KEYS.insert().values(
                id=key.id,
                tenant=tenant,
                digest=key.digest,
                label=label,
                role=role,
                scopes=listed,
                created=now,
                expires=key.expires,
            )
        )
        await note(c, by, "key.issue", key.id, tenant=tenant, role=role, scopes=listed)
        return key, minted


def _now() -> datetime:
    return datetime.now(UTC)


async def _tenant(c: AsyncConnection, name: str) -> Tenant | None:
    row = (await c.execute(sa.select(_TENANTS).where(_TENANTS.c.name == name))).one_or_none()
    return None if row is None else _as_tenant(row)


async def needed_tenant(c: AsyncConnection, name: str) -> Tenant:
    found = await _tenant(c, name)
    if found is None:
        raise NotFound(f"There is no tenant {name!r:.80}.", param="tenant")
    return found


async def lasting_tenant(c: AsyncConnection, name: str) -> Tenant:
    """One that may be changed. Raises NotFound; Conflict: it is being deleted."""
    found = await needed_tenant(c, name)
    if found.deleted_as is not None:
        raise Conflict(
            f"The tenant {name!r} is being deleted; nothing about it can be changed any more.",
            param="tenant",
        )
    return found


async def _key(c: AsyncConnection, id_: str) -> Key | None:
    row = (await c.execute(sa.select(_KEYS).where(_KEYS.c.id == id_))).one_or_none()
    return None if row is None else as_key(row)


async def _needed_key(c: AsyncConnection, id_: str) -> Key:
    found = await _key(c, id_)
    if found is None:
        raise NotFound(f"There is no key {id_!r:.80}; a key's id is between its underscores.")
    return found


def _as_tenant(row: Row[Any]) -> Tenant:
    return Tenant(**row._mapping)


def as_key(row: Row[Any]) -> Key:
    return _made_key(dict(row._mapping))


def _made_key(told: dict[str, Any]) -> Key:
    told["role"] = Role(told["role"])
    if told["scopes"] is not None:
        told["scopes"] = frozenset(Scope(scope) for scope in told["scopes"])
    return Key(**told)
