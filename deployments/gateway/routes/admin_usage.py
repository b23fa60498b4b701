"""``GET /admin/v1/usage``: what was used and what it cost, as JSON or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp

from deployments.gateway.operation import Answers, Call, Operation
from deployments.gateway.responses import enveloped
from deployments.gateway.schemas.envelope import Success
from deployments.gateway.schemas.usage import UsageQuery, UsageReport
from deployments.gateway.services import Services
from deployments.tenants import ledger
from deployments.tenants.ledger import By
from deployments.tenants.plans import MICRO
from deployments.tenants.principal import Scope
from models.errors import StateUnreachable

CSV = "text/csv"


def operations(services: Services) -> list[Operation]:
    return [
        Operation(
            "GET",
            "/admin/v1/usage",
            partial(show_usage, services),
            takes=UsageQuery,
            answers=Answers(schema=Success[UsageReport], other=(CSV,)),
            summary="Requests, tokens and cost by day, model and tenant; CSV if `Accept` asks.",
            needs=Scope.TENANTS_READ,
        )
    ]


async def show_usage(services: Services, call: Call[UsageQuery]) -> ASGIApp:
    asked = call.input
    if services.directory is None:
        raise StateUnreachable("This gateway has no database of usage.")
    by = list(dict.fromkeys(By(each) for each in asked.by.split(",")))
    found = await ledger.report(
        services.directory.database,
        by=by,
        tenant=asked.tenant,
        since=asked.since,
        until=asked.until,
    )
    lines = [{**line, "cost": line["cost"] / MICRO} for line in found]
    if CSV in call.headers.get("accept", ""):
        return Response(as_csv(lines), media_type=CSV)
    report = {"currency": services.config.currency, "lines": lines}
    return enveloped(services, call.exchange, report)


def as_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    """With a header, if there are lines."""
    text = io.StringIO()
    if lines:
        writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return text.getvalue()
