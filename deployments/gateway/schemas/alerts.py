"""``GET /admin/v1/alerts``."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from deployments.gateway.pagination import PageQuery
from deployments.gateway.schemas.base import Answer


class AlertsQuery(PageQuery):
    tenant: str | None = Field(default=None, max_length=128)


class AlertData(Answer):
    id: int = Field(description="The later, the larger.")
    at: datetime
    tenant: str
    kind: str = Field(description="`budget`: of the tenant's plan, each month anew.")
    period: str = Field(description="The month, in UTC.")
    threshold: int = Field(description="Percent of the budget that are used, or reserved.")


class AlertList(Answer):
    alerts: list[AlertData]
