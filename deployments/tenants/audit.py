"""The audit log: one row for each change of the control plane, in the transaction that makes it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from state import tables


async def note(c: AsyncConnection, who: str, what: str, subject: str, **details: Any) -> None:
    await c.execute(
        tables.audit.insert().values(
            at=datetime.now(UTC), who=who, what=what, subject=subject, details=details
        )
    )
