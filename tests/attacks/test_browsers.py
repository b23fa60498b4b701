"""Pages of other sites in a browser on the machine where an open platform runs.

They reach 127.0.0.1 as well as its user does. What keeps them out: they cannot send JSON without
asking first, and what they can do without it (sockets; names bent to this machine) tells whose
page it is.
"""

from __future__ import annotations

import httpx
import pytest

from deployments.config import Cors, GatewayConfig
from deployments.gateway.app import create_app
from tests.attacks.dial import Dial
from tests.gateway.asgi import BASE
from tests.gateway.fakes import World
from tests.gateway.test_chat import PATH as CHAT
from tests.gateway.test_chat import asking

SOCKET = "/v1/infer/ws"
OTHERS = (
    "https://evil.example",
    "http://localhost.evil.example",
    "http://127.0.0.1.evil.example:8000",
    "http://evil.example:8000",
    "null",
    "",
    "file://",
    "http://[::1",
    "http://localhost@evil.example",
)
OURS = (
    "http://localhost:3000",
    "http://127.0.0.1:8000",
    "http://[::1]:8000",
    "https://app.example",
)


@pytest.fixture
def world() -> World:
    return World(config=GatewayConfig(cors=Cors(allow_origins=("https://app.example",))))


async def asks(world: World, origin: str | None) -> int:
    headers = {} if origin is None else {"origin": origin}
    transport = httpx.ASGITransport(create_app(world.services()))
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
        answer = await client.post(CHAT, json=asking(), headers=headers)
        return answer.status_code


async def opens(world: World, origin: str | None) -> bool:
    headers = {} if origin is None else {"origin": origin}
    async with Dial(create_app(world.services()), SOCKET, headers) as socket:
        return socket.opened


@pytest.mark.parametrize("origin", OTHERS)
async def test_a_page_of_another_site_asks_nothing(world: World, origin: str) -> None:
    assert await asks(world, origin) == 403
    assert not await opens(world, origin)
    assert world.generator.requests == []


@pytest.mark.parametrize("origin", [None, *OURS])
async def test_who_is_here_or_is_allowed_asks(world: World, origin: str | None) -> None:
    assert await asks(world, origin) == 200
    assert await opens(world, origin)


async def test_everybody_may_be_allowed() -> None:
    world = World(config=GatewayConfig(cors=Cors(allow_origins=("*",))))
    assert await asks(world, "https://evil.example") == 200
    assert await opens(world, "https://evil.example")


async def test_probes_are_answered_whoever_asks(world: World) -> None:
    transport = httpx.ASGITransport(create_app(world.services()))
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
        answer = await client.get("/healthz", headers={"origin": "https://evil.example"})
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
async def test_what_a_page_may_send_without_asking_is_not_taken(
    world: World, content_type: str
) -> None:
    """A form can be made to look like JSON, but not to say that it is."""
    transport = httpx.ASGITransport(create_app(world.services()))
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
        answer = await client.post(
            CHAT,
            content=httpx.Request("POST", BASE, json=asking()).content,
            headers={"content-type": content_type},
        )
        assert answer.status_code == 415
    assert world.generator.requests == []
