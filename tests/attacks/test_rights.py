"""Every way in, asked by everybody: who may do what is one table, and nothing is left out of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import pytest
from starlette.routing import BaseRoute, Router, WebSocketRoute

from deployments.gateway.app import create_app
from deployments.gateway.operation import Operation
from deployments.tenants.principal import Role
from tests.attacks.dial import Dial
from tests.gateway.contract import Contract
from tests.gateway.fakes import World
from tests.gateway.test_authentication import Secured, secured

__all__ = ["secured"]

NOBODY = None
"""Who has no key."""
EVERYBODY = frozenset({NOBODY, *Role})
ASKS = frozenset({Role.DEVELOPER, Role.OPERATOR, Role.ADMIN})
OPERATES = frozenset({Role.OPERATOR, Role.ADMIN})
READS = frozenset({Role.AUDITOR, Role.OPERATOR, Role.ADMIN})
AUDITS = frozenset({Role.AUDITOR, Role.ADMIN})
ADMINISTERS = frozenset({Role.ADMIN})
SIGNED = frozenset[Role | None]()
"""No key helps: the body has to be signed, and here it is not."""

MAY: Mapping[str, frozenset[Role | None]] = {
    "POST /v1/chat/completions": ASKS,
    "POST /v1/completions": ASKS,
    "POST /v1/embeddings": ASKS,
    "POST /v1/infer": ASKS,
    "POST /v1/infer/stream": ASKS,
    "WEBSOCKET /v1/infer/ws": ASKS,
    "POST /v1/models/{model}/predict": ASKS,
    "POST /tokenize": ASKS,
    "POST /detokenize": ASKS,
    "GET /v1/models": ASKS,
    "GET /v1/models/{model}": ASKS,
    "GET /healthz": EVERYBODY,
    "GET /readyz": EVERYBODY,
    "GET /openapi.json": EVERYBODY,
    "GET /metrics": READS,
    "GET /admin/v1/models/{model}/adapters": OPERATES,
    "POST /admin/v1/models/{model}/adapters": OPERATES,
    "DELETE /admin/v1/models/{model}/adapters/{name}": OPERATES,
    "GET /admin/v1/visibility": OPERATES,
    "GET /admin/v1/models/{model}/visibility": OPERATES,
    "PUT /admin/v1/models/{model}/visibility": OPERATES,
    "GET /admin/v1/tenants": READS,
    "POST /admin/v1/tenants": ADMINISTERS,
    "GET /admin/v1/tenants/{tenant}": READS,
    "PATCH /admin/v1/tenants/{tenant}": ADMINISTERS,
    "DELETE /admin/v1/tenants/{tenant}": ADMINISTERS,
    "GET /admin/v1/tenants/{tenant}/export": AUDITS,
    "GET /admin/v1/tenants/{tenant}/keys": READS,
    "POST /admin/v1/tenants/{tenant}/keys": ADMINISTERS,
    "POST /admin/v1/keys/{key}/rotate": ADMINISTERS,
    "DELETE /admin/v1/keys/{key}": ADMINISTERS,
    "GET /admin/v1/plans": READS,
    "GET /admin/v1/audit": AUDITS,
    "GET /admin/v1/usage": READS,
    "GET /admin/v1/alerts": READS,
    "GET /admin/v1/webhooks/events": READS,
    "POST /webhooks/ingest": SIGNED,
}
"""A decision for each route. Whoever adds one decides here, too."""
OTHERS = "victim"
"""A tenant that no key is of: whatever an administrator does to it hurts no other call."""
EXAMPLES = {"model": "smollm2", "tenant": OTHERS, "key": "0" * 12}


def ways_in(world: World) -> Iterator[BaseRoute]:
    """Whatever the app's router has, however it got there."""
    app = create_app(world.services())
    while not isinstance(app, Router):
        app = app.app  # type: ignore[attr-defined]  # each policy knows what it stands around
    yield from app.routes


def name_of(route: BaseRoute) -> str:
    if isinstance(route, Operation):
        return f"{route.method} {route.path_format}"
    if isinstance(route, WebSocketRoute):
        return f"WEBSOCKET {route.path_format}"
    return f"{type(route).__name__} {getattr(route, 'path', '')}"


def test_somebody_has_decided_about_every_way_in(world: World) -> None:
    names = [name_of(route) for route in ways_in(world)]
    assert len(set(names)) == len(names)
    undecided, gone = set(names) - MAY.keys(), MAY.keys() - set(names)
    assert not undecided, "decide in MAY who may do this"
    assert not gone, "these are no routes any more"


@pytest.mark.parametrize("who", [NOBODY, *Role])
async def test_it_is_as_decided(secured: Secured, contract: Contract, who: Role | None) -> None:
    await secured.directory.create(OTHERS, plan="free", by="me")
    wrong = {}
    async with secured.client(contract, who) as client:
        for name, may in MAY.items():
            method, path = name.split(" ")
            path = re.sub(r"{(\w+)}", lambda found: EXAMPLES.get(found[1], "x"), path)
            if method == "WEBSOCKET":
                status = await knock(secured, path, who)
            else:
                body = {} if method in ("POST", "PATCH") else None
                status = (await client.request(method, path, json=body)).status_code
            refused = 401 if who is NOBODY or may is SIGNED else 403
            if (status == refused) == (who in may) or (status in (401, 403) and status != refused):
                wrong[name] = status
            assert status != 500, name
    assert wrong == {}


async def knock(secured: Secured, path: str, who: Role | None) -> int:
    """As what HTTP would call it, to open a socket and ask a model."""
    headers = {} if who is NOBODY else {"authorization": f"Bearer {secured.keys[who]}"}
    async with Dial(create_app(secured.world.services()), path, headers) as socket:
        if not socket.opened:
            return 401
        await socket.say({"type": "infer", "id": "a", "model": "smollm2", "prompt": "Hi"})
        told = await socket.hear()
        return 403 if told["event"] == "error" else 200


@pytest.mark.parametrize(
    "path", ["/nothing/here", "/v1/nothing", "/admin", "/admin/v1/", "//healthz"]
)
async def test_who_has_no_key_does_not_even_learn_what_there_is(
    secured: Secured, contract: Contract, path: str
) -> None:
    async with secured.client(contract, NOBODY) as nobody:
        assert (await nobody.get(path)).status_code == 401
        assert (await nobody.request("BREW", path)).status_code == 401
