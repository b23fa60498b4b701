"""``GET /admin/v1/alerts``: what somebody was told of, and when."""

from __future__ import annotations

from functools import partial

from starlette.types import ASGIApp

from deployments.gateway.operation import Answers, Call, Operation
from deployments.gateway.pagination import PAGED, newest_first
from deployments.gateway.responses import enveloped
from deployments.gateway.schemas.alerts import AlertList, AlertsQuery
from deployments.gateway.schemas.envelope import Success
from deployments.gateway.services import Services
from deployments.tenants import alerts
from deployments.tenants.principal import Scope
from models.errors import StateUnreachable


def operations(services: Services) -> list[Operation]:
    return [
        Operation(
            "GET",
            "/admin/v1/alerts",
            partial(list_alerts, services),
            takes=AlertsQuery,
            answers=Answers(schema=Success[AlertList], headers=PAGED),
            summary="Budgets that reached 50, 80 and 100 percent; the newest first.",
            needs=Scope.TENANTS_READ,
        )
    ]


async def list_alerts(services: Services, call: Call[AlertsQuery]) -> ASGIApp:
    if services.directory is None:
        raise StateUnreachable("This gateway has no database of alerts.")
    log = partial(alerts.raised, services.directory.database, tenant=call.input.tenant)
    page = await newest_first(log, call.input)
    return enveloped(services, call.exchange, {"alerts": page.items}, page.headers())
