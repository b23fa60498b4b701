"""Whose request this is. Every route asks, but for the few that are listed as public.

A platform without keys is open: everybody who reaches it may do everything. That is why it
then answers this machine only (``loopback.py``).
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from deployments.gateway.exchange import exchange_of
from deployments.tenants.identity import Authenticator
from deployments.tenants.principal import EVERYBODY, Principal
from models.errors import PlatformError, Unauthorized
from state.errors import StateError
from state.patience import Patience

PUBLIC = frozenset({"/healthz", "/readyz", "/openapi.json", "/webhooks/ingest"})
"""The last one is authenticated by its signature (``routes/webhooks.py``)."""
MISSING = "Send an API key: `Authorization: Bearer fr_…`. Who runs this platform issues them."
POLICY_VIOLATION = 1008
TRY_AGAIN_LATER = 1013


class Authentication:
    """``authenticator``: ``None`` where the platform is open."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator | None) -> None:
        self.app = app
        self.authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or is_public(scope):
            await self.app(scope, receive, send)
            return
        exchange = exchange_of(scope)
        try:
            exchange.belongs_to(await identify(scope, self.authenticator, exchange.patience))
        except (PlatformError, StateError) as error:
            if scope["type"] != "websocket":
                raise
            code = TRY_AGAIN_LATER if isinstance(error, StateError) else POLICY_VIOLATION
            await WebSocketClose(code)(scope, receive, send)
            return
        await self.app(scope, receive, send)


async def identify(
    scope: Scope, authenticator: Authenticator | None, patience: Patience
) -> Principal:
    """Who sends what comes on this connection.

    Raises:
        Unauthorized, Forbidden, StateUnavailable: as ``Authenticator.principal``.
    """
    if authenticator is None:
        return EVERYBODY
    credential = _credential(scope)
    async with patience.waiting("the directory of tenants"):
        return await authenticator.principal(credential)


def is_public(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["path"] in PUBLIC


def _credential(scope: Scope) -> str:
    """Raises Unauthorized: there is none, or more than one."""
    found = []
    for name, value in scope["headers"]:
        if name == b"authorization":
            kind, _, rest = value.partition(b" ")
            if kind.lower() == b"bearer":
                found.append(rest.strip())
        elif name == b"x-api-key":
            found.append(value.strip())
    if not found:
        raise Unauthorized(MISSING)
    if len(set(found)) > 1:
        raise Unauthorized("The request has several credentials; send one.")
    return str(found[0], "latin-1")
