"""``GET /admin/v1/usage``: what was used and what it cost, as JSON or CSV."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp

from deployments.gateway.operation import Answers, Call, Operation
from deployments.gateway.pagination import PAGED, not_of_this_list, read_page
from deployments.gateway.responses import enveloped
from deployments.gateway.schemas.envelope import Success
from deployments.gateway.schemas.usage import UsageQuery, UsageReport
from deployments.gateway.services import Services
from deployments.tenants import ledger
from deployments.tenants.ledger import By, as_csv, priced
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
            answers=Answers(schema=Success[UsageReport], headers=PAGED, other=(CSV,)),
            summary="Requests, tokens and cost by day, model and tenant; as CSV if `Accept` asks:"
            " all of it, unless the query has a `limit`.",
            needs=Scope.TENANTS_READ,
        )
    ]


async def show_usage(services: Services, call: Call[UsageQuery]) -> ASGIApp:
    asked = call.input
    if services.directory is None:
        raise StateUnreachable("This gateway has no database of usage.")
    by = list(dict.fromkeys(By(each) for each in asked.by.split(",")))
    report = partial(
        ledger.report,
        services.directory.database,
        by=by,
        tenant=asked.tenant,
        since=asked.since,
        until=asked.until,
    )
    table = CSV in call.headers.get("accept", "")
    if table and not {"limit", "cursor"} & asked.model_fields_set:
        return Response(as_csv(priced(await report())), media_type=CSV)

    async def read(key: str | None, *, forward: bool, limit: int) -> Sequence[Mapping[str, Any]]:
        place = None if key is None else _place(key, by)
        after, before = (place, None) if forward else (None, place)
        return await report(after=after, before=before, limit=limit)

    page = await read_page(read, lambda line: json.dumps(ledger.place(line, by)), asked)
    lines = priced(page.items)
    if table:
        return Response(as_csv(lines), media_type=CSV, headers=page.headers())
    told = {"currency": services.config.currency, "lines": lines}
    return enveloped(services, call.exchange, told, page.headers())


def _place(key: str, by: Sequence[By]) -> list[str]:
    """Raises InvalidInput: it is of a list with other lines."""
    try:
        place = json.loads(key)
        if isinstance(place, list) and [type(each) for each in place] == [str] * len(by):
            "".join(place).encode()
            if not any("\0" in each for each in place):  # no database knows such text
                return place
    except (ValueError, RecursionError):
        pass
    raise not_of_this_list()
