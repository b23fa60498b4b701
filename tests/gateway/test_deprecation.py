"""What will go away says so: in its answers, errors included, and in the document."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from deployments.config import DeprecationsConfig, GatewayConfig, parse
from deployments.gateway.app import create_app, routes
from deployments.gateway.openapi import document
from deployments.tenants.idempotency import IdempotencyRecords
from models.errors import ConfigError, Overloaded
from state.database import Database
from state.places import sqlite_url
from tests.gateway.asgi import BASE
from tests.gateway.contract import Contract
from tests.gateway.fakes import World
from tests.gateway.test_chat import PATH as CHAT
from tests.gateway.test_chat import asking as chatting
from tests.gateway.test_infer import PATH as INFER
from tests.gateway.test_infer import asking

TABLE = {
    "routes": {
        INFER: {"since": "2026-11-01", "sunset": "2027-05-01", "successor": CHAT},
        "/v1/models/{model}/predict": {"since": "2026-11-01", "successor": "/v2/{model}"},
        "/v1/models": {"since": "2026-12-24"},
    },
    "fields": {CHAT: {"seed": {"since": "2026-10-01"}, "user": {"since": "2026-10-02"}}},
    "models": {"smollm2": {"since": "2026-11-02", "sunset": "2027-04-01", "successor": "smollm3"}},
}
ROUTE = (
    '299 - "/v1/infer is deprecated as of 2026-11-01 and goes away on 2027-05-01;'
    ' use /v1/chat/completions"'
)
MODEL = (
    '299 - "the model smollm2 is deprecated as of 2026-11-02 and goes away on 2027-04-01;'
    ' use smollm3"'
)
OTHER = "org/model:v1"
NAMES = ("deprecation", "sunset", "warning", "link")


@pytest.fixture
def world() -> World:
    return World(config=GatewayConfig(deprecations=DeprecationsConfig.model_validate(TABLE)))


@pytest.fixture
def contract(world: World) -> Contract:
    return Contract(document(routes(world.services())))


def told(answer: httpx.Response) -> dict[str, list[str]]:
    found = {name: answer.headers.get_list(name) for name in NAMES}
    return {name: values for name, values in found.items() if values}


async def test_a_route(client: httpx.AsyncClient) -> None:
    answer = await client.post(INFER, json=asking(model=OTHER))
    assert answer.status_code == 200
    assert told(answer) == {
        "deprecation": ["@1793491200"],
        "sunset": ["Sat, 01 May 2027 00:00:00 GMT"],
        "warning": [ROUTE],
        "link": [f'<{CHAT}>; rel="successor-version"'],
    }


async def test_a_route_of_which_little_is_known(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/models")
    assert told(answer) == {
        "deprecation": ["@1798070400"],
        "warning": ['299 - "/v1/models is deprecated as of 2026-12-24"'],
    }


async def test_a_template_is_no_link(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/models/digits/predict", json={"inputs": [1]})
    assert answer.status_code == 200
    assert "link" not in told(answer)
    assert "use /v2/{model}" in answer.headers["warning"]


async def test_a_model(client: httpx.AsyncClient) -> None:
    answer = await client.post(CHAT, json=chatting())
    assert told(answer) == {
        "deprecation": ["@1793577600"],
        "sunset": ["Thu, 01 Apr 2027 00:00:00 GMT"],
        "warning": [MODEL],
        "link": ['</v1/models/smollm3>; rel="successor-version"'],
    }


@pytest.mark.parametrize(
    ("fields", "warned"),
    [({}, []), ({"seed": 1}, ["seed"]), ({"user": "u", "seed": 1}, ["seed", "user"])],
)
async def test_a_field_that_is_set(
    client: httpx.AsyncClient, fields: dict[str, Any], warned: list[str]
) -> None:
    answer = await client.post(CHAT, json=chatting(model=OTHER, **fields))
    assert answer.status_code == 200
    warnings = answer.headers.get_list("warning")
    assert [warning.split()[4] for warning in warnings] == warned
    assert ("deprecation" in answer.headers) is bool(warned)


async def test_all_at_once_gives_the_earliest_dates(client: httpx.AsyncClient) -> None:
    answer = await client.post(INFER, json=asking())
    assert told(answer)["warning"] == [ROUTE, MODEL]
    assert told(answer)["deprecation"] == ["@1793491200"]  # the route's
    assert told(answer)["sunset"] == ["Thu, 01 Apr 2027 00:00:00 GMT"]  # the model's
    assert len(told(answer)["link"]) == 2


async def test_streams_and_errors_say_it_too(client: httpx.AsyncClient, world: World) -> None:
    assert told(await client.post(CHAT, json=chatting(stream=True)))["warning"] == [MODEL]
    assert told(await client.post(INFER, json={}))["warning"] == [ROUTE]
    world.generator.error = Overloaded("full", retry_after=1)
    refused = await client.post(CHAT, json=chatting())
    assert (refused.status_code, told(refused)["warning"]) == (429, [MODEL])


@pytest.mark.parametrize("path", ["/healthz", "/v1/models/minilm", "/nowhere"])
async def test_all_else_says_nothing(client: httpx.AsyncClient, path: str) -> None:
    assert told(await client.get(path)) == {}


async def test_who_asks_again_is_told_again(world: World, tmp_path: Path) -> None:
    async with await Database.open(sqlite_url(tmp_path / "frontier.db")) as database:
        records = IdempotencyRecords(database, ttl_s=60)
        app = create_app(replace(world.services(), idempotency=records))
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url=BASE, headers={"idempotency-key": "k"}
        ) as client:
            first, again = [await client.post(INFER, json=asking()) for _ in range(2)]
    assert told(first)["warning"] == [ROUTE, MODEL]
    assert again.headers["idempotent-replayed"] == "true"
    assert ROUTE in told(again)["warning"]


def test_the_document_says_it(contract: Contract) -> None:
    paths = contract.document["paths"]
    deprecated = {
        (method, path)
        for path, operations in paths.items()
        for method, operation in operations.items()
        if operation.get("deprecated")
    }
    assert deprecated == {
        ("post", INFER),
        ("post", "/v1/models/{model}/predict"),
        ("get", "/v1/models"),
    }
    schema = paths[CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"] == {"seed": {"deprecated": True}, "user": {"deprecated": True}}
    root = {**schema, "components": contract.document["components"]}
    assert Draft202012Validator(root).is_valid(chatting(seed=1))
    assert not Draft202012Validator(root).is_valid(chatting(seed="one"))
    headers = paths[INFER]["post"]["responses"]["200"]["headers"]
    assert {"Deprecation", "Sunset", "Warning", "Link"} <= headers.keys()


def test_a_deprecated_query_parameter() -> None:
    table = {"fields": {"/v1/models": {"limit": {"since": "2026-11-01"}}}}
    world = World(config=GatewayConfig(deprecations=DeprecationsConfig.model_validate(table)))
    parameters = document(routes(world.services()))["paths"]["/v1/models"]["get"]["parameters"]
    marked = {each["name"] for each in parameters if each.get("deprecated")}
    assert marked == {"limit"}


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"routes": {"/v1/nope": {"since": "2026-11-01"}}}, "no route '/v1/nope'; expected one of"),
        ({"fields": {"/v1/nope": {}}}, "no route '/v1/nope'"),
        ({"fields": {CHAT: {"sede": {"since": "2026-11-01"}}}}, "takes no 'sede'; expected one of"),
    ],
)
def test_what_there_is_not_cannot_be_deprecated(table: dict[str, Any], says: str) -> None:
    config = GatewayConfig(deprecations=DeprecationsConfig.model_validate(table))
    with pytest.raises(ConfigError, match=says):
        create_app(World(config=config).services())


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"models": {"x": {"since": "2026-11-01"}}}, "names x, served here are m"),
        ({"models": {"m": {"since": "2026-11-01", "sunset": "2026-10-31"}}}, "is before since"),
        ({"models": {"m": {"since": "soon"}}}, "since"),
        ({"models": {"m": {}}}, "since"),
        ({"models": {"m": {"since": "2026-11-01", "successor": 'a"b'}}}, "pattern"),
    ],
)
def test_a_mistake_in_the_table_is_named(table: dict[str, Any], says: str) -> None:
    model = {"task": "generate", "source": "./m"}
    with pytest.raises(ConfigError, match=says):
        parse({"models": {"m": model}, "gateway": {"deprecations": table}})
