"""Adapters by name in every generating route, and the admin routes that publish them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from deployments.gateway.app import create_app, routes
from deployments.gateway.policies.loopback import PREFIX
from models.errors import Conflict, InvalidInput, NotFound, Unavailable
from tests.gateway.contract import events
from tests.gateway.fakes import World

PATH = "/admin/v1/models/smollm2/adapters"
LOCAL = {"host": "localhost:8000"}


def chatting(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], **fields}


async def test_a_name_is_split_for_the_engine_and_whole_for_the_client(
    client: httpx.AsyncClient, world: World
) -> None:
    name = "smollm2:my-adapter@champion"
    chat = await client.post("/v1/chat/completions", json=chatting(name))
    completion = await client.post("/v1/completions", json={"model": name, "prompt": "a"})
    infer = await client.post("/v1/infer", json={"model": name, "prompt": "a"})
    stream = await client.post("/v1/infer/stream", json={"model": name, "prompt": "a"})
    for request in world.generator.requests:
        assert (request.model, request.adapter) == ("smollm2", "my-adapter@champion")
    assert len(world.generator.requests) == 4
    assert chat.json()["model"] == completion.json()["model"] == name
    assert infer.json()["data"]["model"] == events(stream.text)[-1][1]["model"] == name
    for event in world.recorder.finished:
        assert event.model == "smollm2", "labels of metrics are names of the configuration"


async def test_a_configured_name_with_a_colon_is_no_adapter(
    client: httpx.AsyncClient, world: World
) -> None:
    await client.post("/v1/chat/completions", json=chatting("org/model:v1"))
    [request] = world.generator.requests
    assert (request.model, request.adapter) == ("org/model:v1", None)


@pytest.mark.parametrize(
    "name", ["smollm2:", "smollm2:a:b", "smollm2:a/b", "smollm2:a@", "smollm2:@x", "nope:a", ":a"]
)
async def test_a_name_that_cannot_be(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.post("/v1/chat/completions", json=chatting(name))
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "model"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_adapter_that_the_engine_does_not_find(
    client: httpx.AsyncClient, world: World, stream: bool
) -> None:
    world.generator.error = NotFound("The adapter 'x' does not exist.", param="model")
    answer = await client.post("/v1/chat/completions", json=chatting("smollm2:x", stream=stream))
    assert answer.status_code == 404


async def test_only_models_that_generate_have_adapters(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/embeddings", json={"model": "minilm:x", "input": "a"})
    assert answer.status_code == 404
    answer = await client.post(
        "/admin/v1/models/minilm/adapters", json={"name": "poet"}, headers=LOCAL
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "INVALID_INPUT")
    answer = await client.get("/admin/v1/models/smollm2:x/adapters", headers=LOCAL)
    assert answer.status_code == 404


async def test_the_list_of_models_has_them(client: httpx.AsyncClient, world: World) -> None:
    world.adapters.add("smollm2", "poet")
    world.adapters.add("smollm2", "poet", "candidate")
    names = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
    assert names == [
        *("digits", "minilm", "org/model:v1", "smollm2"),
        *("smollm2:poet", "smollm2:poet@candidate"),
    ]
    answer = await client.get("/v1/models/smollm2:poet@candidate")
    assert answer.json() == {
        "id": "smollm2:poet@candidate",
        "object": "model",
        "created": 1_700_000_009,
        "owned_by": "frontier-run",
        "task": "generate",
        "context": 2048,
    }
    assert (await client.get("/v1/models/smollm2:critic")).status_code == 404


async def test_models_are_listed_without_the_registry(
    client: httpx.AsyncClient, world: World
) -> None:
    world.adapters.error = Unavailable("down")
    assert len((await client.get("/v1/models")).json()["data"]) == 4
    assert (await client.get("/v1/models/smollm2")).status_code == 200
    assert (await client.get("/v1/models/smollm2:poet")).status_code == 503


async def test_published_and_withdrawn(client: httpx.AsyncClient) -> None:
    client.headers.update(LOCAL)
    answer = await client.post(PATH, json={"name": "poet"})
    assert answer.json()["data"] == {
        "id": "smollm2:poet",
        "model": "smollm2",
        "name": "poet",
        "alias": "champion",
        "version": "poet@1",
        "content_sha256": "a" * 64,
        "created": 1_700_000_009,
    }
    listed = await client.get(PATH)
    assert listed.json()["data"] == {"adapters": [answer.json()["data"]]}
    gone = await client.delete(f"{PATH}/poet")
    assert gone.json()["data"] == {"model": "smollm2", "name": "poet"}
    assert (await client.get(PATH)).json()["data"] == {"adapters": []}
    assert (await client.delete(f"{PATH}/poet")).status_code == 404


async def test_pages(client: httpx.AsyncClient, world: World) -> None:
    client.headers.update(LOCAL)
    for name in "cab":
        world.adapters.add("smollm2", name)
    world.adapters.add("org/model:v1", "other")
    first = await client.get(PATH, params={"limit": 2})
    assert [a["name"] for a in first.json()["data"]["adapters"]] == ["a", "b"]
    cursor = first.headers["x-next-cursor"]
    last = await client.get(PATH, params={"limit": 2, "cursor": cursor})
    assert [a["name"] for a in last.json()["data"]["adapters"]] == ["c"]
    assert "x-next-cursor" not in last.headers


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"name": "a b"}, 400, "name"),
        ({"name": "../x"}, 400, "name"),
        ({}, 400, "name"),
        ({"name": "poet", "sauce": "x"}, 400, "sauce"),
        ({"name": "nobody"}, 404, "name"),
    ],
)
async def test_a_publication_at_fault(
    client: httpx.AsyncClient, body: dict[str, str], status: int, param: str
) -> None:
    answer = await client.post(PATH, json=body, headers=LOCAL)
    error = answer.json()["error"]
    assert (answer.status_code, error["details"]["param"]) == (status, param)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidInput("rank 512 does not fit"), 400),
        (Conflict("moved meanwhile"), 409),
        (Unavailable("down"), 503),
    ],
)
async def test_what_the_registry_raises(
    client: httpx.AsyncClient, world: World, error: Any, status: int
) -> None:
    world.adapters.error = error
    answer = await client.post(PATH, json={"name": "poet"}, headers=LOCAL)
    assert answer.status_code == status


async def test_a_method_that_is_not_there_names_all_that_are(client: httpx.AsyncClient) -> None:
    answer = await client.put(PATH, json={}, headers=LOCAL)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, POST")


# --- who may ------------------------------------------------------------------------------


def test_every_admin_route_is_behind_the_policy() -> None:
    for operation in routes(World().services()):
        assert operation.path.startswith(PREFIX) == ("admin" in operation.path)


async def call(world: World, *, client: Any = ("127.0.0.1", 1), **headers: str) -> int:
    transport = httpx.ASGITransport(create_app(world.services()), client=client)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        answer = await http.get(PATH, headers=LOCAL | headers)
    if answer.status_code != 200:
        assert answer.json()["error"]["code"] == "FORBIDDEN"
    return answer.status_code


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
async def test_loopback_is_answered(host: str) -> None:
    assert await call(World(bind_host=host)) == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "", None])
async def test_other_addresses_are_not(host: str | None) -> None:
    assert await call(World(bind_host=host)) == 403


@pytest.mark.parametrize("name", ["x-forwarded-for", "forwarded", "via", "x-real-ip"])
async def test_nothing_that_was_forwarded(name: str) -> None:
    assert await call(World(), **{name: "127.0.0.1"}) == 403


async def test_no_other_machine() -> None:
    assert await call(World(), client=("10.0.0.7", 1)) == 403


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("localhost", 200),
        ("evil.com", 403),
        ("localhost.evil.com:8000", 403),
        ("", 403),
    ],
)
async def test_no_name_that_was_bent_to_this_machine(host: str, status: int) -> None:
    assert await call(World(), host=host) == status
