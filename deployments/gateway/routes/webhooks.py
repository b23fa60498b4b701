"""``POST /webhooks/ingest``: signed deliveries, each kept once (spec C4); and the list of them.

The route is public as far as API keys go: the signature is its authentication, and is
verified on the body as it came, before anything parses it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import cast

import orjson
from starlette.datastructures import Headers
from starlette.types import ASGIApp

from deployments.gateway.operation import Answers, Call, Operation, Repeat
from deployments.gateway.pagination import PAGED, PageQuery, newest_first
from deployments.gateway.responses import enveloped
from deployments.gateway.schemas.envelope import Success
from deployments.gateway.schemas.webhooks import (
    WebhookAccepted,
    WebhookEvents,
    WebhookRequest,
)
from deployments.gateway.services import Services
from deployments.tenants.principal import Scope
from deployments.webhooks.inbox import Delivery, Event, Inbox
from deployments.webhooks.signature import HEADER, Signature
from deployments.webhooks.sources import DEFAULT, Source
from models.errors import Conflict, Forbidden, InvalidInput, NotFound, StateUnreachable

PATH = "/webhooks/ingest"
SOURCE = "X-Webhook-Source"
KEY = "Idempotency-Key"

_KEY = re.compile(r"[!-~]{1,255}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Genuine:
    """A body that its source has signed, whatever it says."""

    source: Source
    signed: datetime
    body_sha256: str


def operations(services: Services) -> list[Operation]:
    return [
        Operation(
            "POST",
            PATH,
            partial(ingest, services),
            takes=WebhookRequest,
            verify=partial(verify, services),
            headers={
                SOURCE: f"Who delivers, as this platform calls it; default: `{DEFAULT}`.",
                KEY: "The same for every attempt of one delivery; default: the body's `id`.",
            },
            answers=Answers(
                schema=Success[WebhookAccepted],
                errors=(Conflict, Forbidden, NotFound, StateUnreachable),
            ),
            summary="Take a signed event; it is stored before the answer, and stored once.",
            needs=None,
            repeat=Repeat.LEFT_TO_ROUTE,  # before the signature is checked nobody has a tenant
        ),
        Operation(
            "GET",
            "/admin/v1/webhooks/events",
            partial(list_events, services),
            takes=PageQuery,
            answers=Answers(schema=Success[WebhookEvents], headers=PAGED),
            summary="The events that webhooks brought; the newest first.",
            needs=Scope.TENANTS_READ,
        ),
    ]


def verify(services: Services, headers: Headers, body: bytes) -> Genuine:
    """Raises Unauthorized: not signed by its source, or not now; NotFound: no such source."""
    signature = Signature.parse(",".join(headers.getlist(HEADER)))
    source = services.webhook_sources.find(headers.get(SOURCE, DEFAULT))
    signature.verify(
        body,
        source.secrets(),
        now=services.now(),
        window_s=services.config.webhooks.window_s,
    )
    return Genuine(
        source=source,
        signed=datetime.fromtimestamp(signature.seconds, UTC),
        body_sha256=hashlib.sha256(body).hexdigest(),
    )


async def ingest(services: Services, call: Call[WebhookRequest]) -> ASGIApp:
    genuine = cast("Genuine", call.verified)
    call.exchange.tenant = genuine.source.tenant
    event, duplicate = await _inbox(services).accept(
        Delivery(
            tenant=genuine.source.tenant,
            source=genuine.source.name,
            key=_key(call),
            event_id=call.input.id,
            type=call.input.type,
            payload=call.input.payload,
            body_sha256=genuine.body_sha256,
            signed=genuine.signed,
        ),
        at=datetime.fromtimestamp(services.now(), UTC),
    )
    data = {"id": event.event_id, "duplicate": duplicate, "received": event.received}
    return enveloped(services, call.exchange, data)


async def list_events(services: Services, call: Call[PageQuery]) -> ASGIApp:
    page = await newest_first(_inbox(services).events, call.input)
    data = {"events": [_event(event) for event in page.items]}
    return enveloped(services, call.exchange, data, page.headers())


def _key(call: Call[WebhookRequest]) -> str:
    """Raises InvalidInput: it is no key."""
    given = ",".join(call.headers.getlist(KEY))
    if KEY not in call.headers:
        return call.input.id
    if _KEY.fullmatch(given) is None:
        raise InvalidInput(
            f"{KEY} is {given!r:.80}; expected 1 to 255 visible ASCII characters.", param=KEY
        )
    return given


def _inbox(services: Services) -> Inbox:
    """Raises StateUnreachable: this gateway has none."""
    if services.inbox is None:
        raise StateUnreachable("This gateway has no database to keep webhooks in.")
    return services.inbox


def _event(event: Event) -> dict[str, object]:
    return {
        "id": event.id,
        "tenant": event.tenant,
        "source": event.source,
        "key": event.key,
        "event_id": event.event_id,
        "type": event.type,
        "payload": orjson.Fragment(event.payload),
        "body_sha256": event.body_sha256,
        "signed": event.signed,
        "received": event.received,
    }
