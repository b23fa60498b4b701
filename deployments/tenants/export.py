"""All that the platform holds of a tenant, line by line, as of one moment.

Without the hashes of keys, which are nobody's to have, and the answers that are kept for an
``Idempotency-Key``, of which it says that they are there. Nothing is gathered before it goes
out, so an export of any size takes the same memory.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from deployments.tenants.audit import note
from deployments.tenants.directory import lasting_tenant
from state import tables
from state.database import Database, LazyDatabase

ROWS = 100
"""Read ahead of whoever takes the lines; of webhook events, whose payloads are long, fewer."""
EVENT_ROWS = 8
KINDS = (
    *("tenant", "key", "visibility", "usage", "alert", "idempotency", "webhook_event", "audit"),
    "end",
)


@dataclass(frozen=True, slots=True)
class Line:
    kind: str
    """One of ``KINDS``; the last is ``end``: an export without it is not whole."""
    data: Mapping[str, Any]

    def encode(self) -> bytes:
        """JSON and the end of the line, in ASCII: no line break of any kind inside."""
        told = {"kind": self.kind, "data": self.data}
        return json.dumps(told, default=_plain, separators=(",", ":")).encode("ascii") + b"\n"


async def export(
    database: Database | LazyDatabase, tenant: str, *, by: str
) -> AsyncGenerator[Line]:
    """Whoever asks is in the audit log before the first line.

    Raises:
        NotFound: there is no such tenant.
        Conflict: it is being deleted.
        StateUnavailable: the database is out of reach.
    """
    async with database.write("tenants") as c:
        await lasting_tenant(c, tenant)
        await note(c, by, "tenant.export", tenant)
    lines = 0
    async with database.read() as c, aclosing(_held(c, tenant)) as held:
        async for line in held:
            lines += 1
            yield line
    yield Line("end", {"lines": lines})


async def _held(c: AsyncConnection, tenant: str) -> AsyncGenerator[Line]:
    told = await _tenant(c, tenant)
    yield Line("tenant", told)
    keys = set()
    async for key in _rows(c, tables.api_keys, tenant, without={"digest"}):
        keys.add(key["id"])
        yield Line("key", key)
    rules = tables.model_visibility
    for rule in (await c.execute(sa.select(rules).order_by(rules.c.model))).mappings():
        if tenant in rule["tenants"]:  # who else may see it is nobody else's business
            yield Line("visibility", {"model": rule["model"], "changed": rule["changed"]})
    async for row in _rows(c, tables.usage, tenant, without={"day"}):
        yield Line("usage", row)
    async for row in _rows(c, tables.alerts, tenant, without={"entry"}):
        yield Line("alert", row)
    kept = tables.idempotency
    size = sa.func.length(kept.c.body).label("body_bytes")
    secret = {"owner", "headers", "body"}
    async for row in _rows(c, kept, tenant, without=secret, also=[size]):
        yield Line("idempotency", row)
    async for row in _rows(c, tables.webhook_events, tenant, rows=EVENT_ROWS):
        yield Line("webhook_event", row)
    actors = {f"key:{id_}" for id_ in keys} | await _subjects(c, tenant)
    audit = tables.audit
    entries = await c.stream(
        sa.select(audit).order_by(audit.c.id).execution_options(yield_per=ROWS)
    )
    async for found in entries.mappings():
        entry = named(found)
        about = concerns(entry, tenant) or entry["subject"] in keys
        if about or entry["who"] in actors:
            yield Line("audit", {**entry, "details": _own(entry["details"], tenant, about)})


def concerns(entry: Mapping[str, Any], tenant: str) -> bool:
    """Whether a row of the audit log names a tenant. Pure."""
    details = entry["details"]
    listed = details.get("tenants")
    return (
        (entry["what"].startswith("tenant.") and entry["subject"] == tenant)
        or details.get("tenant") == tenant
        or (isinstance(listed, list) and tenant in listed)
    )


def _own(details: Mapping[str, Any], tenant: str, about: bool) -> Mapping[str, Any]:
    """What of it is the tenant's: not what its keys did to others, nor who else sees a model."""
    if not about:
        return {}
    return {**details, "tenants": [tenant]} if "tenants" in details else details


def named(row: sa.RowMapping) -> dict[str, Any]:
    """SQLAlchemy's names are a kind of text of their own."""
    return {str(name): value for name, value in row.items()}


async def _tenant(c: AsyncConnection, name: str) -> dict[str, Any]:
    wanted = sa.select(tables.tenants).where(tables.tenants.c.name == name)
    return named((await c.execute(wanted)).mappings().one())


async def _rows(
    c: AsyncConnection,
    table: sa.Table,
    tenant: str,
    *,
    without: Collection[str] = (),
    also: Collection[sa.ColumnElement[Any]] = (),
    rows: int = ROWS,
) -> AsyncGenerator[dict[str, Any]]:
    columns = [column for column in table.c if column.name not in without]
    wanted = (
        sa.select(*columns, *also).where(table.c.tenant == tenant).execution_options(yield_per=rows)
    )
    found = await c.stream(wanted)
    async for row in found.mappings():
        yield named(row)


async def _subjects(c: AsyncConnection, tenant: str) -> set[str]:
    """People and keys that have asked models for the tenant."""
    usage = tables.usage
    found = await c.scalars(sa.select(usage.c.subject).where(usage.c.tenant == tenant).distinct())
    return {subject for subject in found if subject}


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is nothing that an export has")
