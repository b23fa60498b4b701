"""``/admin/v1/tenants/{tenant}/export``, and what a deletion tells."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from deployments.gateway.schemas.base import Answer


class ExportLine(Answer):
    kind: Literal[
        "tenant",
        "key",
        "visibility",
        "usage",
        "alert",
        "idempotency",
        "webhook_event",
        "audit",
        "end",
        "error",
    ] = Field(description="The last line is `end`; of an export that broke off, `error` or none.")
    data: dict[str, Any]


class TenantDeleted(Answer):
    called: str = Field(description="The name in place of the tenant's in what is kept.")
    removed: dict[str, int] = Field(description="Rows and entries that are gone, by kind.")
    renamed: dict[str, int] = Field(
        description="Rows that are kept without the tenant's name, or who asked."
    )
