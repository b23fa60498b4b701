from __future__ import annotations

from typing import Any

import httpx
import pytest

from models.contracts import ChatMessage, Conversation, Grammar, GrammarKind, Priority, Sampling
from tests.gateway.contract import chunks, data_lines
from tests.gateway.fakes import World

PATH = "/v1/chat/completions"


def asking(**fields: Any) -> dict[str, Any]:
    return {"model": "smollm2", "messages": [{"role": "user", "content": "hi"}], **fields}


async def test_an_answer_is_openai_s(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json=asking(), headers={"x-request-id": "abc"})
    assert answer.json() == {
        "id": "chatcmpl-abc",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "smollm2",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello!", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 3,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }


async def test_the_time_is_accounted_for_in_a_header(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json=asking())
    shares = answer.headers["server-timing"]
    assert shares.startswith("queue;dur=1.00, prefill;dur=2.00, decode;dur=4.00, gateway;dur=")


async def test_every_field_reaches_the_generator(client: httpx.AsyncClient, world: World) -> None:
    sampling: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.2,
        "seed": 7,
        "ignore_eos": True,
    }
    await client.post(
        PATH,
        json=asking(
            messages=[
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]},
                {"role": "assistant", "content": "c", "refusal": None},
            ],
            max_completion_tokens=12,
            logit_bias={"50": -100, "7": 2.5},
            stop=["\n", "END"],
            stop_token_ids=[1, 2],
            logprobs=True,
            top_logprobs=3,
            n=2,
            priority="vip",
            **sampling,
        ),
    )
    [request] = world.generator.requests
    assert request.prompt == Conversation(
        (
            ChatMessage(role="system", content="Be brief."),
            ChatMessage(role="user", content="a\nb"),
            ChatMessage(role="assistant", content="c"),
        )
    )
    assert request.sampling == Sampling(
        max_tokens=12,
        logit_bias={50: -100.0, 7: 2.5},
        stop=("\n", "END"),
        stop_token_ids=(1, 2),
        logprobs=3,
        **sampling,
    )
    assert (request.n, request.priority, request.stream) == (2, Priority.VIP, False)
    assert request.timeout_s == pytest.approx(world.config.request_timeout_s, abs=1)


async def test_fields_left_out_or_null_are_the_defaults(
    client: httpx.AsyncClient, world: World
) -> None:
    nulls = dict.fromkeys(("temperature", "stop", "n", "seed", "stream", "priority", "tools"))
    await client.post(PATH, json=asking())
    await client.post(PATH, json=asking(**nulls))
    left_out, null = world.generator.requests
    assert left_out.sampling == null.sampling == Sampling()
    assert left_out.priority == null.priority == Priority.STANDARD


def json_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        (
            {"response_format": {"type": "json_object"}},
            Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object"}'),
        ),
        (
            {"response_format": json_format({"type": "null"})},
            Grammar(GrammarKind.JSON_SCHEMA, '{"type": "null"}'),
        ),
        ({"structured_outputs": {"regex": "a+"}}, Grammar(GrammarKind.REGEX, "a+")),
        ({"structured_outputs": {"grammar": "start: "}}, Grammar(GrammarKind.LARK, "start: ")),
        (
            {"structured_outputs": {"choice": ["yes", 'n"o']}},
            Grammar(GrammarKind.LARK, 'start: "yes" | "n\\"o"'),
        ),
    ],
)
async def test_what_the_answer_has_to_be(
    client: httpx.AsyncClient, world: World, fields: dict[str, Any], grammar: Grammar | None
) -> None:
    assert (await client.post(PATH, json=asking(**fields))).status_code == 200
    assert world.generator.requests[0].sampling.grammar == grammar


async def test_harmless_fields_are_accepted(client: httpx.AsyncClient) -> None:
    answer = await client.post(
        PATH,
        json=asking(
            user="u",
            metadata={"a": "b"},
            store=False,
            service_tier="auto",
            safety_identifier="s",
            prompt_cache_key="k",
            parallel_tool_calls=True,
            response_format={"type": "text"},
            modalities=["text"],
        ),
    )
    assert answer.status_code == 200


async def test_the_request_id_is_the_generator_s(client: httpx.AsyncClient, world: World) -> None:
    await client.post(PATH, json=asking(), headers={"x-request-id": "mine"})
    assert world.generator.requests[0].id == "mine"


async def test_logprobs(client: httpx.AsyncClient, world: World) -> None:
    world.generator.pieces = ("é",)
    answer = await client.post(PATH, json=asking(logprobs=True, top_logprobs=2))
    [token] = answer.json()["choices"][0]["logprobs"]["content"]
    assert (token["token"], token["logprob"], token["bytes"]) == ("é", -0.25, [195, 169])
    assert [top["logprob"] for top in token["top_logprobs"]] == [-0.5, -9999.0]


async def test_logprobs_without_alternatives(client: httpx.AsyncClient, world: World) -> None:
    answer = await client.post(PATH, json=asking(logprobs=True))
    assert world.generator.requests[0].sampling.logprobs == 0
    assert answer.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_a_stream(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json=asking(stream=True))
    assert answer.headers["content-type"] == "text/event-stream"
    assert data_lines(answer.text)[-1] == "[DONE]"
    received = chunks(answer.text)
    assert {chunk["object"] for chunk in received} == {"chat.completion.chunk"}
    assert all("usage" not in chunk for chunk in received)
    choices = [chunk["choices"][0] for chunk in received]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": "Hel"},
        {"content": "lo"},
        {"content": "!"},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]


async def test_a_stream_of_several_choices_with_usage_and_logprobs(
    client: httpx.AsyncClient,
) -> None:
    answer = await client.post(
        PATH, json=asking(stream=True, n=2, logprobs=True, stream_options={"include_usage": True})
    )
    *told, last = chunks(answer.text)
    for index in (0, 1):
        choices = [c["choices"][0] for c in told if c["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == "Hello!"
        assert choices[0]["delta"]["role"] == "assistant"
        assert [c["logprobs"]["content"][0]["token"] for c in choices[:-1]] == ["Hel", "lo", "!"]
    assert all(chunk["usage"] is None for chunk in told)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 11


async def test_a_delta_without_news_is_not_sent(client: httpx.AsyncClient, world: World) -> None:
    world.generator.pieces = ("a", "", "b")
    answer = await client.post(PATH, json=asking(stream=True))
    contents = [chunk["choices"][0]["delta"].get("content") for chunk in chunks(answer.text)]
    assert contents == ["a", "b", None]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tempurature": 1}, "tempurature", "did you mean 'temperature'?"),
        ({"zzz": 1}, "zzz", "Unknown field 'zzz'; known here:"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0 (given: -0.1)"),
        ({"temperature": "1"}, "temperature", "should be a valid number (given: '1')"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"seed": 2**70}, "seed", "less than"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": [""]}, "stop[0]", "at least 1 character"),
        ({"stop": 7}, "stop", "a string or a list of at most 4 strings"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a", "valid integer"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
        ({"priority": 1}, "priority", "'vip', 'standard' or 'low'"),
        ({"priority": "high"}, "priority", "'vip', 'standard' or 'low' (given: 'high')"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "wizard", "content": ""}]}, "messages[0].role", "'assistant'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
        (
            {"messages": [{"role": "user", "content": None}]},
            "messages[0].content",
            "is required",
        ),
        (
            {"messages": [{"role": "user", "content": 1}]},
            "messages[0].content",
            "a string or a list of text parts",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": ""}]}]},
            "messages[0].content[0].type",
            "should be 'text' (given: 'image_url')",
        ),
        (
            {"messages": [{"role": "user", "content": "", "nmae": ""}]},
            "messages[0].nmae",
            "did you mean 'name'?",
        ),
        ({"functions": [{}]}, "functions", "is not supported: use `tools`"),
        ({"audio": {}}, "audio", "is not supported"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "is not supported"),
        ({"response_format": {"type": "xml"}}, "response_format", "'json_schema'"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
            "is required",
        ),
        (
            {"response_format": json_format({"enum": ["x" * 65_536]})},
            "response_format",
            "at most 65536",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "one of"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "give one",
        ),
        ({"modalities": ["audio"]}, "modalities[0]", "should be 'text'"),
        ({"store": True}, "store", "should be false (given: True)"),
        ({"service_tier": "flex"}, "service_tier", "'auto' or 'default'"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only for a request"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "Unknown field"),
        ({"top_logprobs": 2}, "top_logprobs", "only for a request with 'logprobs': true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "give one"),
        ({"model": ""}, "model", "at least 1 character"),
    ],
)
async def test_a_field_at_fault_is_named(
    client: httpx.AsyncClient, world: World, fields: dict[str, Any], param: str, words: str
) -> None:
    answer = await client.post(PATH, json=asking(**fields))
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["param"], error["type"], error["code"]) == (
        param,
        "invalid_request_error",
        "INVALID_INPUT",
    )
    assert words in error["message"]
    assert world.generator.requests == []


async def test_several_mistakes_are_counted(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json=asking(top_p=7, n=0, seed="x"))
    assert answer.json()["error"]["message"].endswith("; and 2 more.")


async def test_an_unknown_model_is_told_which_exist(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json=asking(model="gpt"))
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["param"] == "model"
    assert error["message"] == (
        "The model 'gpt' does not exist. Served here: digits, minilm, org/model:v1, smollm2."
    )


async def test_a_model_that_embeds_does_not_chat(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json=asking(model="minilm"))
    assert answer.status_code == 400
    assert "Use /v1/embeddings" in answer.json()["error"]["message"]
