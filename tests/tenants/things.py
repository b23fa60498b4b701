"""Something of a tenant in every table that can have it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from deployments.observability.events import BudgetReached, RequestFinished
from deployments.tenants import alerts
from deployments.tenants.directory import Directory
from deployments.tenants.idempotency import Answer, IdempotencyRecords, Lease
from deployments.tenants.ledger import row
from deployments.tenants.visibility import Visibility
from deployments.webhooks.inbox import Delivery, Inbox
from models.contracts import Usage, Versions
from state import tables
from state.database import Database, LazyDatabase

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
SECRET_ANSWER = b"the answer that was kept"


def finished(tenant: str, subject: str, *, adapter: str | None = None) -> RequestFinished:
    return RequestFinished(
        request_id=f"request of {tenant}",
        route="/v1/chat/completions",
        method="POST",
        status=200,
        code=None,
        duration_s=1,
        model="smollm2",
        adapter=adapter,
        tenant=tenant,
        subject=subject,
        versions=Versions(model="smollm2@1", adapter=None if adapter is None else f"{adapter}@1"),
        usage=Usage(prompt_tokens=5, completion_tokens=7),
        cost=3,
    )


async def use(
    database: Database | LazyDatabase, tenant: str, *, subject: str = "key:1", at: datetime = NOW
) -> None:
    """A row of usage."""
    event = finished(tenant, subject, adapter=f"{tenant}-bot")
    async with database.write() as c:
        await c.execute(tables.usage.insert().values(row(event, at.timestamp())))


async def settle_in(directory: Directory, tenant: str, *, uses: int = 3) -> str:
    """A tenant with all that one can have. Returns the id of its key."""
    await directory.create(tenant, plan="pro", overrides={"tokens_per_day": 5}, by="me")
    key, _ = await directory.issue(tenant, label=f"the shop of {tenant}", by="me")
    await directory.rotate(key.id, overlap=timedelta(hours=1), by="me")
    database = directory.database
    await Visibility(database).show(f"smollm2:{tenant}-bot", [tenant], by="me")
    for number in range(uses):
        await use(database, tenant, subject=f"key:{key.id}" if number else f"oidc:bob@{tenant}")
    records = IdempotencyRecords(database, ttl_s=3600, now=NOW.timestamp)
    lease = await records.begin(tenant, "order-1", "f" * 64)
    assert isinstance(lease, Lease)
    await records.finish(lease, Answer(status=200, headers=[("a", "b")], body=SECRET_ANSWER))
    delivery = Delivery(
        tenant=tenant,
        source="stripe",
        key="evt",
        event_id="evt",
        type="paid",
        payload=f'{{"customer": "{tenant}",\n "amount": 1.10}}',
        body_sha256="b" * 64,
        signed=NOW,
    )
    await Inbox(database, dedupe_s=3600).accept(delivery, at=NOW)
    reached = BudgetReached(tenant=tenant, share=0.5)
    async with database.write() as c:
        await c.execute(tables.alerts.insert().values(alerts.row(reached, NOW.timestamp())))
    return key.id


async def contents(database: Database | LazyDatabase) -> dict[str, list[dict[str, Any]]]:
    """All rows of all tables."""
    async with database.read() as c:
        return {
            table.name: [dict(each) for each in (await c.execute(sa.select(table))).mappings()]
            for table in tables.metadata.sorted_tables
        }
