"""A platform without keys answers this machine only, and its control plane nobody else at all.

HAProxy stands between a client and a gateway, so that every request comes from this machine
as far as TCP can tell. What decides is therefore where HTTP is listened for at all. Of the
control plane, that nobody has forwarded the request from elsewhere, too. In doubt it is refused.

A browser on this machine is not this machine: it lets the page of any site open a socket to us,
and one whose name was bent to 127.0.0.1 send requests. It does say whose page it is (``Origin``).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from deployments.gateway.policies.authentication import POLICY_VIOLATION, is_public
from models.errors import Forbidden

PREFIX = "/admin/"
FORWARDED = frozenset({b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip"})


class Loopback:
    """Args:
    bind_host: the address that HTTP is answered on; ``None``: unknown.
    origins: of pages elsewhere that may ask, as the configuration allows them.
    """

    def __init__(self, app: ASGIApp, bind_host: str | None, origins: Sequence[str] = ()) -> None:
        self.app = app
        self.bind_host = bind_host
        self.origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            below = path.removeprefix(scope.get("root_path", ""))  # the router looks at this
            if not is_public(scope):
                self._check_address()
                if not self._is_ours(scope):
                    raise Forbidden(
                        "This platform is open: it has no keys, so it does not answer the pages of"
                        " other sites. List yours in gateway.cors.allow_origins."
                    )
            if path.startswith(PREFIX) or below.startswith(PREFIX):
                self._check(scope)
        elif scope["type"] == "websocket" and not (self._on_loopback and self._is_ours(scope)):
            await WebSocketClose(POLICY_VIOLATION)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    @property
    def _on_loopback(self) -> bool:
        return self.bind_host is not None and is_loopback(self.bind_host)

    def _is_ours(self, scope: Scope) -> bool:
        """Whether no page asks, or one from this machine, or one that may."""
        given = [str(value, "latin-1") for name, value in scope["headers"] if name == b"origin"]
        return all(
            origin in self.origins or "*" in self.origins or is_loopback(_host_of(origin))
            for origin in given
        )

    def _check_address(self) -> None:
        """Raises :class:`Forbidden` where others than this machine could ask."""
        if not self._on_loopback:
            where = self.bind_host or "an unknown address"
            raise Forbidden(
                f"This platform is open: it has no keys, so it answers on loopback only, and HTTP"
                f" is served on {where}. Set gateway.auth.mode to keys, or http_options.host to"
                " 127.0.0.1."
            )

    def _check(self, scope: Scope) -> None:
        """Raises :class:`Forbidden` unless the request can only be from this machine."""
        if (client := scope.get("client")) is None or not is_loopback(client[0]):
            raise Forbidden(f"{PREFIX} answers on loopback only, and this request is from outside.")
        headers = dict(scope["headers"])
        if found := sorted(FORWARDED & headers.keys()):
            raise Forbidden(
                f"{PREFIX} answers on loopback only, and this request was forwarded"
                f" ({found[0].decode()})."
            )
        host = headers.get(b"host", b"").decode("latin-1")
        if not is_loopback(_without_port(host)):  # a browser that was told that evil.com is here
            raise Forbidden(f"{PREFIX} answers on loopback only, not as {host!r:.80}.")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_of(origin: str) -> str:
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
