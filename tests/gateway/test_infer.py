from __future__ import annotations

from typing import Any

import httpx
import orjson
import pytest

from models.contracts import ChatMessage, Conversation, Priority, Sampling
from models.errors import UpstreamError
from tests.gateway.contract import events
from tests.gateway.fakes import NOW, World

PATH = "/v1/infer"
STREAM = "/v1/infer/stream"
SUMMARY = {
    "id": "abc",
    "model": "smollm2",
    "usage": {"prompt_tokens": 5, "completion_tokens": 3, "cached_tokens": 1},
    "finish_reason": "stop",
    "timings": {
        "queue_ms": 1.0,
        "prefill_ms": 2.0,
        "ttft_ms": 3.0,
        "decode_ms": 4.0,
        "total_ms": 7.0,
    },
}


def asking(**fields: Any) -> dict[str, Any]:
    return {"model": "smollm2", "prompt": "hi", **fields}


async def test_an_answer_comes_in_the_envelope(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json=asking(), headers={"x-request-id": "abc"})
    body = answer.json()
    assert body["data"].pop("latency_ms") >= 0
    assert body == {
        "success": True,
        "data": {**SUMMARY, "output": "Hello!"},
        "error": None,
        "timestamp": "2023-11-14T22:13:20.250+00:00",
        "request_id": "abc",
    }
    assert NOW == 1_700_000_000.25


async def test_a_prompt_is_a_user_s_message_unless_raw(
    client: httpx.AsyncClient, world: World
) -> None:
    await client.post(PATH, json=asking())
    await client.post(PATH, json=asking(params={"raw": True, "seed": 3}, priority="low"))
    chat, raw = world.generator.requests
    assert chat.prompt == Conversation((ChatMessage(role="user", content="hi"),))
    assert raw.prompt == "hi"
    assert raw.sampling == Sampling(seed=3)
    assert (chat.priority, raw.priority) == (Priority.STANDARD, Priority.LOW)


async def test_a_stream_of_server_sent_events(client: httpx.AsyncClient) -> None:
    answer = await client.post(STREAM, json=asking(), headers={"x-request-id": "abc"})
    *tokens, (name, data) = events(answer.text)
    assert tokens == [("token", {"text": text}) for text in ("Hel", "lo", "!")]
    assert name == "done"
    assert data.pop("latency_ms") >= 0
    assert data == SUMMARY


async def test_a_stream_of_lines(client: httpx.AsyncClient) -> None:
    answer = await client.post(STREAM, json=asking(), headers={"accept": "application/x-ndjson"})
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [orjson.loads(line) for line in answer.text.splitlines()]
    assert [line["event"] for line in lines] == ["token", "token", "token", "done"]
    assert "".join(line["data"]["text"] for line in lines[:-1]) == "Hello!"


@pytest.mark.parametrize("accept", ["text/event-stream", "application/x-ndjson"])
async def test_a_failure_in_mid_stream_is_its_last_event(
    client: httpx.AsyncClient, world: World, accept: str
) -> None:
    world.generator.error = UpstreamError("the replica was lost")
    world.generator.error_after = 2
    answer = await client.post(STREAM, json=asking(), headers={"accept": accept})
    assert answer.status_code == 200
    if accept == "text/event-stream":
        told = events(answer.text)
    else:
        told = [(line["event"], line["data"]) for line in map(orjson.loads, answer.iter_lines())]
    assert [name for name, _ in told] == ["token", "token", "error"]
    assert told[-1][1]["error"] == {
        "code": "UPSTREAM_ERROR",
        "message": "the replica was lost",
        "details": {},
    }


@pytest.mark.parametrize("path", [PATH, STREAM])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"params": {"tempurature": 1}}, "params.tempurature"),
        ({"params": {"n": 2}}, "params.n"),
        ({"params": {"temperature": 3}}, "params.temperature"),
        ({"params": None}, "params"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"stream": True}, "stream"),
    ],
)
async def test_a_field_at_fault_is_named(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str
) -> None:
    answer = await client.post(path, json=asking(**fields))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "INVALID_INPUT")
    assert error["details"]["param"] == param


async def test_all_mistakes_are_in_the_details(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json={"prompt": 7, "modle": "smollm2"})
    mistakes = answer.json()["error"]["details"]["mistakes"]
    assert mistakes == [
        "model is required.",
        "prompt should be a valid string (given: 7).",
        "Unknown field 'modle'; did you mean 'model'?",
    ]
