"""The control plane answers this machine only, as long as there are no keys.

HAProxy stands between a client and a gateway, so that every request comes from this machine
as far as TCP can tell. What decides is therefore where HTTP is listened for at all, and that
nobody has forwarded the request from elsewhere. In doubt it is refused.
"""

from __future__ import annotations

import ipaddress

from starlette.types import ASGIApp, Receive, Scope, Send

from models.errors import Forbidden

PREFIX = "/admin/"
FORWARDED = frozenset({b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip"})


class Loopback:
    """``bind_host``: the address that HTTP is answered on; ``None``: unknown."""

    def __init__(self, app: ASGIApp, bind_host: str | None) -> None:
        self.app = app
        self.bind_host = bind_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            below = path.removeprefix(scope.get("root_path", ""))  # the router looks at this
            if path.startswith(PREFIX) or below.startswith(PREFIX):
                self._check(scope)
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raises :class:`Forbidden` unless the request can only be from this machine."""
        if self.bind_host is None or not is_loopback(self.bind_host):
            where = self.bind_host or "an unknown address"
            raise Forbidden(
                f"{PREFIX} answers on loopback only, and HTTP is served on {where}. Set"
                " http_options.host to 127.0.0.1, or use python -m models on the machine."
            )
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


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
