from __future__ import annotations

import base64
import struct
from typing import Any

import httpx
import pytest

from models.contracts import Priority
from models.errors import InvalidInput
from tests.gateway.fakes import World

PATH = "/v1/embeddings"


def asking(input: Any = "one two", **fields: Any) -> dict[str, Any]:
    return {"model": "minilm", "input": input, **fields}


async def test_an_answer_is_openai_s(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json=asking(["one two", "b"]))
    assert answer.json() == {
        "object": "list",
        "model": "minilm",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [7.0, 111.0, 0.5]},
            {"object": "embedding", "index": 1, "embedding": [1.0, 98.0, 0.5]},
        ],
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }


async def test_base64_is_little_endian_float32(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json=asking("b", encoding_format="base64"))
    [entry] = answer.json()["data"]
    assert struct.unpack("<3f", base64.b64decode(entry["embedding"])) == (1.0, 98.0, 0.5)


async def test_what_the_embedder_is_told(client: httpx.AsyncClient, world: World) -> None:
    await client.post(PATH, json=asking("a", priority="low", dimensions=3, user="u"))
    [(text, standing)] = world.embedder.calls
    assert (text, standing.priority, standing.tenant) == ("a", Priority.LOW, "public")
    assert standing.timeout_s == pytest.approx(world.config.predict_timeout_s, abs=1)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": []}, "input", "at least 1 item"),
        ({"input": ""}, "input", "at least 1 character"),
        ({"input": ["a", ""]}, "input[1]", "at least 1 character"),
        ({"input": [1, 2]}, "input[0]", "valid string"),
        ({"input": None}, "input", "token arrays are not supported"),
        ({"dimensions": 2}, "dimensions", "have 3 and are never cut"),
        ({"encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"model": "smollm2"}, "model", "it does not embed"),
    ],
)
async def test_a_field_at_fault_is_named(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str, words: str
) -> None:
    answer = await client.post(PATH, json={**asking(), **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert words in error["message"]


async def test_the_embedder_s_own_refusal(client: httpx.AsyncClient, world: World) -> None:
    world.embedder.error = InvalidInput("input 0 has 300 tokens; 256 fit.", param="input")
    answer = await client.post(PATH, json=asking())
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")
