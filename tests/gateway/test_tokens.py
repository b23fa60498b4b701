from __future__ import annotations

from typing import Any

import httpx
import pytest

from models.errors import UpstreamError
from tests.gateway.fakes import World


async def test_a_prompt_becomes_tokens(client: httpx.AsyncClient) -> None:
    answer = await client.post("/tokenize", json={"model": "smollm2", "prompt": "Hi"})
    assert answer.json() == {"count": 2, "max_model_len": 2048, "tokens": [72, 105]}


async def test_a_conversation_is_read_as_the_chat_route_reads_it(client: httpx.AsyncClient) -> None:
    messages = [
        {"role": "developer", "content": "Be"},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
    ]
    answer = await client.post("/tokenize", json={"model": "smollm2", "messages": messages})
    assert "".join(map(chr, answer.json()["tokens"])) == "<system>Be<user>a"


async def test_tokens_become_text(client: httpx.AsyncClient) -> None:
    answer = await client.post("/detokenize", json={"model": "smollm2", "tokens": [72, 105]})
    assert answer.json() == {"prompt": "Hi"}


MESSAGES = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("path", "fields", "param", "words"),
    [
        ("/tokenize", {}, "prompt", "neither came"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "messages", "both came"),
        ("/tokenize", {"prompt": ""}, "prompt", "at least 1 character"),
        ("/tokenize", {"prompt": "a", "model": "minilm"}, "model", "Use /v1/embeddings"),
        ("/tokenize", {"prompt": "a", "model": "smollm2:poet"}, "model", "ask for 'smollm2'"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": True}, "add_special_tokens", "Unknown"),
        ("/detokenize", {"tokens": []}, "tokens", "at least 1 item"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]", "greater than or equal to 0"),
        ("/detokenize", {"tokens": ["1"]}, "tokens[0]", "valid integer"),
    ],
)
async def test_a_field_at_fault_is_named(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str, words: str
) -> None:
    answer = await client.post(path, json={"model": "smollm2"} | fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_an_unknown_model_and_a_lost_replica(
    client: httpx.AsyncClient, world: World, path: str
) -> None:
    body: dict[str, Any] = {"prompt": "a"} if path == "/tokenize" else {"tokens": [1]}
    unknown = await client.post(path, json=body | {"model": "gpt"})
    assert unknown.status_code == 404
    world.generator.error = UpstreamError("The replica was lost.")
    assert (await client.post(path, json=body | {"model": "smollm2"})).status_code == 502
