"""What is held of a tenant, and its end: ``…/export``, and ``DELETE`` of a tenant (spec C10)."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.gateway.exchange import Exchange
from deployments.gateway.operation import Answers, Call, Operation
from deployments.gateway.responses import enveloped
from deployments.gateway.schemas.base import Nothing
from deployments.gateway.schemas.envelope import Success
from deployments.gateway.schemas.tenant_data import ExportLine, TenantDeleted
from deployments.gateway.services import Services
from deployments.gateway.sse import NDJSON
from deployments.tenants.deletion import Deletion, stores
from deployments.tenants.directory import Directory
from deployments.tenants.export import Line, export
from deployments.tenants.principal import Scope as Right
from models.errors import Conflict, NotFound, PlatformError, StateUnreachable

TENANT = "/admin/v1/tenants/{tenant}"
CHUNK_BYTES = 65_536


def operations(services: Services) -> list[Operation]:
    return [
        Operation(
            "GET",
            TENANT + "/export",
            partial(export_tenant, services),
            answers=Answers(schema=None, streams={NDJSON: ExportLine}, errors=(NotFound, Conflict)),
            summary="All that is held of a tenant, a line each; needs `audit:read`, too.",
            needs=Right.TENANTS_READ,
        ),
        Operation(
            "DELETE",
            TENANT,
            partial(delete_tenant, services),
            answers=Answers(schema=Success[TenantDeleted], errors=(NotFound, Conflict)),
            summary="Revoke a tenant's keys at once, and delete what is held of it.",
            needs=Right.TENANTS_WRITE,
        ),
    ]


async def export_tenant(services: Services, call: Call[Nothing]) -> ASGIApp:
    call.exchange.require(Right.AUDIT_READ)  # its lines of the audit log are in it
    database = _directory(services).database
    lines = export(database, call.path["tenant"], by=call.exchange.subject)
    return Lines(call.exchange, lines)


async def delete_tenant(services: Services, call: Call[Nothing]) -> ASGIApp:
    principal = call.exchange.principal
    deletion = Deletion(
        database=_directory(services).database,
        elsewhere=stores(
            None if services.meter is None else services.meter.counters,
            None if services.cache is None else services.cache.store,
        ),
    )
    done = await deletion.delete(
        call.path["tenant"],
        by=call.exchange.subject,
        caller=None if principal is None or services.authenticator is None else principal.tenant,
    )
    data = {"called": done.called, "removed": done.removed, "renamed": done.renamed}
    return enveloped(services, call.exchange, data)


class Lines:
    """An ASGI response: lines as they come, gathered to pieces of a fair size.

    The header waits for the first, so that what is wrong before it is a real 4xx.
    """

    def __init__(self, exchange: Exchange, lines: AsyncGenerator[Line]) -> None:
        self._exchange = exchange
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()  # so that somebody listens whether the client is still there
        async with aclosing(self._lines) as lines:
            gathered = (await anext(lines)).encode()
            self._exchange.failure_frame = _failure
            headers = [(b"content-type", NDJSON.encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for line in lines:
                gathered += line.encode()
                if len(gathered) >= CHUNK_BYTES:
                    await send({"type": "http.response.body", "body": gathered, "more_body": True})
                    gathered = b""
            await send({"type": "http.response.body", "body": gathered})


def _failure(error: PlatformError) -> bytes:
    """In place of the ``end`` of an export."""
    return orjson.dumps({"kind": "error", "data": {"code": error.code, "message": error.message}})


def _directory(services: Services) -> Directory:
    """Raises StateUnreachable: this gateway has none."""
    if services.directory is None:
        raise StateUnreachable("This gateway has no database of tenants.")
    return services.directory
