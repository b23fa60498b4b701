"""The end of a tenant: nobody gets in as it any more, and what is personal goes.

    begin     its keys are revoked, it is suspended, and has another name for what is kept
    settle    until every gateway knows; what has been let in by then may finish
    erase     batch by batch, in the database and elsewhere
    finish    its keys and itself go, in one transaction

A crash leaves a tenant whose deletion has begun; to ask again, or the housekeeping of any
gateway, goes on with it. Each step does nothing where it was done before.

What is kept bears the other name, which stands for the tenant in sums and tells nobody who it
was: rows of usage, without who asked, for the accounts; and entries of the audit log, which say
what administrators have done and are kept as long as any other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from deployments.tenants import visibility
from deployments.tenants.audit import note
from deployments.tenants.batches import ROWS, in_batches
from deployments.tenants.directory import as_key, needed_tenant
from deployments.tenants.export import concerns, named
from deployments.tenants.identity import FRESH_S
from deployments.tenants.principal import Role, Scope, granted
from models.errors import Conflict, NotFound
from state import tables
from state.cache import Cache
from state.counters import Counters
from state.database import Database, LazyDatabase

SETTLE_S = FRESH_S + 0.2
"""After this no gateway lets anything in for a tenant that was suspended."""
BY = "housekeeping"
"""Who finishes what was begun, in the audit log."""

Forget: TypeAlias = Callable[[str], Awaitable[int]]
"""Takes a tenant; forgets what some store has of it, and says how much that was."""


def stores(counters: Counters | None, cache: Cache | None) -> dict[str, Forget]:
    """What has something of tenants beside the database."""
    found: dict[str, Forget] = {}
    if counters is not None:
        found["counters"] = counters.drop
    if cache is not None:
        found["cache_entries"] = cache.drop
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Deleted:
    called: str
    """Its name in what is kept."""
    removed: Mapping[str, int]
    """Rows and entries, by kind."""
    renamed: Mapping[str, int]
    """Rows that are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """Belongs to the event loop of ``database``.

    Args:
        elsewhere: as of ``stores``.
        sleep: seconds.
    """

    database: Database | LazyDatabase
    elsewhere: Mapping[str, Forget]
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def delete(self, tenant: str, *, by: str, caller: str | None = None) -> Deleted:
        """Returns when nothing is left.

        Args:
            caller: the tenant of whoever asks.

        Raises:
            NotFound: there is no such tenant.
            Conflict: it is the caller's own, or the last that has an administrator's key.
            StateUnavailable: something is out of reach; what is done is done, and the rest is
                done later.
        """
        called = await self._begin(tenant, by=by, caller=caller)
        await self.sleep(SETTLE_S)
        removed, renamed = await self._erase(tenant, called)
        removed["keys"] = await self._finish(tenant, called, by, {**removed, **renamed})
        return Deleted(called=called, removed=removed, renamed=renamed)

    async def resume(self) -> int:
        """Finish what was begun and not finished; how many tenants that were."""
        begun = tables.tenants.c.deleted_as.is_not(None)
        async with self.database.read() as c:
            names = (await c.scalars(sa.select(tables.tenants.c.name).where(begun))).all()
        for name in names:
            with suppress(NotFound):  # another gateway was at it, too
                await self.delete(name, by=BY)
        return len(names)

    async def held(self, tenant: str) -> Mapping[str, int]:
        """How much a deletion would remove or rename in the database. Raises NotFound."""
        counted = {
            "keys": tables.api_keys,
            "idempotency": tables.idempotency,
            "webhook_events": tables.webhook_events,
            "alerts": tables.alerts,
            "usage": tables.usage,
        }
        async with self.database.read() as c:
            await needed_tenant(c, tenant)
            found = {}
            for kind, table in counted.items():
                rows = sa.select(sa.func.count()).select_from(table)
                found[kind] = await c.scalar(rows.where(table.c.tenant == tenant)) or 0
        return found

    async def _begin(self, tenant: str, *, by: str, caller: str | None) -> str:
        """Raises NotFound, Conflict as ``delete`` does."""
        tenants, keys, now = tables.tenants, tables.api_keys, datetime.now(UTC)
        async with self.database.write("tenants") as c:
            found = await needed_tenant(c, tenant)
            if found.deleted_as is not None:
                return found.deleted_as
            if tenant == caller:
                raise Conflict(
                    f"{tenant!r} is the tenant that you ask as, and would be gone before it is"
                    " deleted; use a key of another tenant.",
                    param="tenant",
                )
            await _refuse_last_administrator(c, tenant, now)
            called = f"(deleted {token_hex(6)})"  # no tenant can be called so
            gone = {"suspended": found.suspended or now, "deleted_as": called}
            await c.execute(tenants.update().where(tenants.c.name == tenant).values(gone))
            await c.execute(
                keys.update()
                .where(keys.c.tenant == tenant, keys.c.revoked.is_(None))
                .values(revoked=now)
            )
            await note(c, by, "tenant.delete", called)
        return called

    async def _erase(self, tenant: str, called: str) -> tuple[dict[str, int], dict[str, int]]:
        removed: dict[str, int] = {}
        renamed: dict[str, int] = {}
        for kind, table in (
            ("idempotency", tables.idempotency),
            ("webhook_events", tables.webhook_events),
            ("alerts", tables.alerts),
        ):
            removed[kind] = await in_batches(self.database, table, table.c.tenant == tenant)
        for kind, forget in self.elsewhere.items():
            removed[kind] = int(await forget(tenant))
        usage = tables.usage
        renamed["usage"] = await in_batches(
            self.database, usage, usage.c.tenant == tenant, untraceable(called)
        )
        renamed["audit"] = await self._rename_in_audit(tenant, called)
        return removed, renamed

    async def _rename_in_audit(self, tenant: str, called: str) -> int:
        """Few are the tenant's and none says so in a column: all are looked through."""
        audit = tables.audit
        total, last = 0, 0
        while True:
            async with self.database.write("batches") as c:
                page = sa.select(audit).where(audit.c.id > last).order_by(audit.c.id).limit(ROWS)
                entries = [named(row) for row in (await c.execute(page)).mappings()]
                for entry in entries:
                    if concerns(entry, tenant):
                        await c.execute(
                            audit.update()
                            .where(audit.c.id == entry["id"])
                            .values(renamed_entry(entry, tenant, called))
                        )
                        total += 1
            if len(entries) < ROWS:
                return total
            last = entries[-1]["id"]

    async def _finish(self, tenant: str, called: str, by: str, told: Mapping[str, int]) -> int:
        tenants, keys = tables.tenants, tables.api_keys
        async with self.database.write("tenants") as c:
            await visibility.forget(c, tenant)
            count = (await c.execute(keys.delete().where(keys.c.tenant == tenant))).rowcount
            gone = await c.execute(
                tenants.delete().where(tenants.c.name == tenant, tenants.c.deleted_as == called)
            )
            if gone.rowcount:  # else another has finished it
                await note(c, by, "tenant.deleted", called, **told, keys=count)
        return count


def untraceable(called: str) -> dict[str, Any]:
    """A row of usage that is kept for the accounts: when, which model, how much."""
    nobody = {"subject": "", "request_id": "", "adapter": None, "adapter_version": None}
    return {"tenant": called, **nobody}


def renamed_entry(entry: Mapping[str, Any], tenant: str, called: str) -> dict[str, Any]:
    """What changes in a row of the audit log that concerns ``tenant``. Pure."""
    details = dict(entry["details"])
    if details.get("tenant") == tenant:
        details["tenant"] = called
    if isinstance(details.get("tenants"), list):
        details["tenants"] = [called if name == tenant else name for name in details["tenants"]]
    about = entry["what"].startswith("tenant.") and entry["subject"] == tenant
    return {"subject": called if about else entry["subject"], "details": details}


async def _refuse_last_administrator(c: AsyncConnection, tenant: str, now: datetime) -> None:
    """Raises Conflict: afterwards nobody could administer the platform over HTTP."""
    keys, tenants = tables.api_keys, tables.tenants
    living = (
        sa.select(keys)
        .join(tenants)
        .where(keys.c.role == Role.ADMIN, keys.c.revoked.is_(None), tenants.c.suspended.is_(None))
    )
    able = {
        key.tenant
        for key in map(as_key, await c.execute(living))
        if key.live(now) and Scope.TENANTS_WRITE in granted(key.role, key.scopes)
    }
    if able == {tenant}:
        raise Conflict(
            f"{tenant!r} has the only keys that can administer this platform; issue one to another"
            " tenant first.",
            param="tenant",
        )
