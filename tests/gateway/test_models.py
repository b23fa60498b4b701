from __future__ import annotations

import httpx
import pytest


async def test_the_list(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/models")
    body = answer.json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == [
        *("digits", "minilm", "org/model:v1", "smollm2")
    ]
    assert body["data"][3] == {
        "id": "smollm2",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "frontier-run",
        "task": "generate",
        "context": 2048,
    }
    assert "x-next-cursor" not in answer.headers


async def test_pages_there_and_back(client: httpx.AsyncClient) -> None:
    first = await client.get("/v1/models", params={"limit": 3})
    assert "x-prev-cursor" not in first.headers
    last = await client.get(
        "/v1/models", params={"limit": 3, "cursor": first.headers["x-next-cursor"]}
    )
    assert [model["id"] for model in last.json()["data"]] == ["smollm2"]
    assert "x-next-cursor" not in last.headers
    back = await client.get(
        "/v1/models", params={"limit": 3, "cursor": last.headers["x-prev-cursor"]}
    )
    assert back.json() == first.json()


@pytest.mark.parametrize("path", ["org/model:v1", "org%2Fmodel%3Av1"])
async def test_a_name_may_have_slashes_and_colons(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(f"/v1/models/{path}")
    assert answer.json()["id"] == "org/model:v1"


@pytest.mark.parametrize("name", ["nope", "", "a/b"])
async def test_an_unknown_model(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.get(f"/v1/models/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "model"


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=501", "limit"),
        ("limit=", "limit"),
        ("limit=+7", "limit"),
        ("limit=1_0", "limit"),
        ("limit=1.0", "limit"),
        ("limit=" + "9" * 5000, "limit"),
        ("limt=1", "limt"),
        ("cursor=!", "cursor"),
        ("cursor=YWJj", "cursor"),
        ("limit=1&limit=2", None),
        ("cursor=%ff", None),
    ],
)
async def test_a_query_at_fault(client: httpx.AsyncClient, query: str, param: str | None) -> None:
    answer = await client.get(f"/v1/models?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
