"""The document is OpenAPI 3.1, tells the truth, and leaves nothing out."""

from __future__ import annotations

from typing import Any

import httpx
import orjson
import pytest
from jsonschema import Draft202012Validator

from deployments.gateway.app import routes
from deployments.gateway.schemas.chat import ChatRequest
from tests.gateway.contract import Contract
from tests.gateway.fakes import World
from tests.gateway.test_chat import asking

TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture
async def document(client: httpx.AsyncClient) -> dict[str, Any]:
    answer = await client.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    loaded: dict[str, Any] = orjson.loads(answer.content)
    return loaded


def every(node: Any, key: str) -> list[Any]:
    """All values of ``key``, at any depth."""
    if isinstance(node, list):
        return [found for item in node for found in every(item, key)]
    if not isinstance(node, dict):
        return []
    here = [node[key]] if key in node else []
    return here + [found for value in node.values() for found in every(value, key)]


async def test_every_route_is_there(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    described = {
        (method.upper(), path)
        for path, operations in document["paths"].items()
        for method in operations
    }
    served = {(route.method, route.path_format) for route in routes(World().services())}
    assert described == served | {("GET", "/openapi.json")}


async def test_every_schema_is_json_schema_and_every_reference_leads_somewhere(
    document: dict[str, Any],
) -> None:
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    for reference in every(document, "$ref"):
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]


async def test_operations_have_names_of_their_own(document: dict[str, Any]) -> None:
    ids = every(document["paths"], "operationId")
    assert len(ids) == len(set(ids))


async def test_errors_are_documented_with_their_shape(document: dict[str, Any]) -> None:
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    statuses = [200, 400, 401, 403, 404, 405, 408, 409, 413, 414, 415, 429, 500, 502, 503, 504]
    assert sorted(map(int, chat)) == statuses
    assert "OVERLOADED" in chat["429"]["description"]
    assert "Retry-After" in chat["429"]["headers"]
    schema = chat["400"]["content"]["application/json"]["schema"]
    assert schema["$ref"].endswith("/OpenAIErrorAnswer")
    infer = document["paths"]["/v1/infer"]["post"]["responses"]
    assert infer["400"]["content"]["application/json"]["schema"]["$ref"].endswith("/Failure")
    assert "404" not in document["paths"]["/healthz"]["get"]["responses"]


@pytest.mark.parametrize(
    "body",
    [
        asking(),
        asking(stop=["a"], logit_bias={"5": 1}, stream_options={"include_usage": True}),
        asking(temperature=3),
        asking(zzz=1),
        asking(stop=7),
        asking(tools=[]),
        asking(tools=[TOOL]),
        asking(tools=[{"type": "function", "function": {"name": "a b"}}]),
        asking(tools=[TOOL], tool_choice="required"),
        asking(tools=[TOOL], tool_choice="maybe"),
        asking(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "f"}}),
        asking(tools=[TOOL], tool_choice={"type": "function"}),
        asking(response_format={"type": "json_object"}),
        asking(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}),
        asking(response_format={"type": "json_schema", "json_schema": {"name": "a"}}),
        asking(structured_outputs={"choice": ["a"]}),
        asking(messages=[{"role": "user", "content": []}]),
        {},
    ],
)
def test_the_document_and_the_server_agree_on_what_is_valid(
    contract: Contract, body: dict[str, Any]
) -> None:
    operation = contract.operation("POST", "/v1/chat/completions")
    assert operation is not None
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    root = {**schema, "components": contract.document["components"]}
    documented = Draft202012Validator(root).is_valid(body)
    try:
        ChatRequest.model_validate_json(orjson.dumps(body))
    except ValueError:
        assert not documented
    else:
        assert documented
