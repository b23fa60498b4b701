"""Tool calls through the gateway: OpenAI's fields to a grammar, and text to OpenAI's fields."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from openai import OpenAI

from deployments.config import GatewayConfig, GuardrailsConfig
from models.contracts import ChatMessage, Conversation, FinishReason, Tool, ToolCall
from models.tool_calls import Allowed, written
from tests.gateway.contract import chunks
from tests.gateway.fakes import World
from tests.gateway.server import LiveServer
from tests.gateway.test_chat import PATH, asking
from tests.gateway.test_guardrails import a_client

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city.", "parameters": CITY},
}
NOON: dict[str, Any] = {"type": "function", "function": {"name": "noon"}}
TOOLS = [WEATHER, NOON]
ROME = written(ToolCall(id="", name="weather", arguments='{"city": "Rome"}'))
SAID = f"I ask.\n{ROME}\n" + written(ToolCall(id="", name="noon", arguments="{}"))


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def call(id_: str = "c1", arguments: str = "{}", **fields: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"id": id_, "type": "function", "function": function, **fields}


async def allowed(client: httpx.AsyncClient, world: World, **fields: Any) -> Allowed:
    answer = await client.post(PATH, json=asking(**fields))
    assert answer.status_code == 200, answer.text
    grammar = world.generator.requests[-1].sampling.grammar
    assert grammar is not None
    return Allowed.of(grammar)


# --- the request ----------------------------------------------------------------------------


async def test_what_an_answer_may_be(client: httpx.AsyncClient, world: World) -> None:
    both = {"weather": CITY, "noon": NOTHING}
    for fields, expected in (
        ({}, Allowed(tools=both, required=False, parallel=True)),
        ({"tool_choice": "auto"}, Allowed(tools=both, required=False, parallel=True)),
        ({"tool_choice": "required"}, Allowed(tools=both, required=True, parallel=True)),
        ({"parallel_tool_calls": False}, Allowed(tools=both, required=False, parallel=False)),
        (
            {"tool_choice": named("noon")},
            Allowed(tools={"noon": NOTHING}, required=True, parallel=False),
        ),
        (
            {"response_format": {"type": "json_object"}},
            Allowed(tools=both, required=False, parallel=True, answer={"type": "object"}),
        ),
    ):
        assert await allowed(client, world, tools=TOOLS, **fields) == expected
    shown = world.generator.requests[-1].prompt
    assert isinstance(shown, Conversation)
    assert shown.tools == (
        Tool(name="weather", description="Of a city.", parameters=json.dumps(CITY)),
        Tool(name="noon", description=None, parameters=json.dumps(NOTHING)),
    )


async def test_none_is_as_if_there_were_no_tools(client: httpx.AsyncClient, world: World) -> None:
    world.generator.pieces = (SAID,)
    answer = await client.post(PATH, json=asking(tools=TOOLS, tool_choice="none"))
    [request] = world.generator.requests
    assert request.sampling.grammar is None
    assert request.prompt == Conversation((ChatMessage(role="user", content="hi"),))
    assert answer.json()["choices"][0]["message"]["content"] == SAID


async def test_calls_and_results_are_told_to_the_model(
    client: httpx.AsyncClient, world: World
) -> None:
    said = [
        {"role": "assistant", "tool_calls": [call("a", '{"city": "Rome"}')]},
        {"role": "tool", "tool_call_id": "a", "content": "sunny"},
    ]
    assert (await client.post(PATH, json=asking(messages=said))).status_code == 200
    asked = ToolCall(id="a", name="weather", arguments='{"city": "Rome"}')
    assert world.generator.requests[0].prompt == Conversation(
        (
            ChatMessage(role="assistant", content="", tool_calls=(asked,)),
            ChatMessage(role="tool", content="sunny", tool_call_id="a"),
        )
    )


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": []}, "tools", "at least 1 item"),
        ({"tools": [NOON, NOON]}, "tools", "more than one function 'noon'"),
        ({"tools": [named("a b")]}, "tools[0].function.name", "match pattern"),
        ({"tools": [{"type": "x", "function": {}}]}, "tools[0].type", "'function'"),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"type": "string"}},
                    }
                ]
            },
            "tools[0].function.parameters",
            "the schema of an object",
        ),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice", "'required'"),
        ({"tools": TOOLS, "tool_choice": 1}, "tool_choice", "an object that names a function"),
        ({"tools": TOOLS, "tool_choice": named("x")}, "tool_choice", "the tools are weather, noon"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tool_choice": named("x")}, "tool_choice", "there are no tools"),
        (
            {"tools": TOOLS, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "give one",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"title": "x" * 65_536}},
                    }
                ]
            },
            "tools",
            "at most 65536",
        ),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages[0].tool_call_id",
            "is required",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]},
            "messages[0].tool_call_id",
            "left out of role 'user'",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [call()]}]},
            "messages[0].tool_calls",
            "left out of role 'user'",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [call(arguments="[]")]}]},
            "messages[0].tool_calls[0].function.arguments",
            "a JSON object, as text",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [call(arguments="[" * 60_000)]}]},
            "messages[0].tool_calls[0].function.arguments",
            "a JSON object, as text",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": []}]},
            "messages[0].tool_calls",
            "at least 1 item",
        ),
    ],
)
async def test_a_field_at_fault_is_named(
    client: httpx.AsyncClient, world: World, fields: dict[str, Any], param: str, words: str
) -> None:
    answer = await client.post(PATH, json=asking(**fields))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert not world.generator.requests


# --- the answer -----------------------------------------------------------------------------


async def test_calls_are_told_apart_from_text(client: httpx.AsyncClient, world: World) -> None:
    world.generator.pieces = (SAID,)
    answer = await client.post(PATH, json=asking(tools=TOOLS, n=2))
    for choice in answer.json()["choices"]:
        message = choice["message"]
        assert message["content"] == "I ask."
        assert [each["function"] for each in message["tool_calls"]] == [
            {"name": "weather", "arguments": '{"city": "Rome"}'},
            {"name": "noon", "arguments": "{}"},
        ]
        assert choice["finish_reason"] == "tool_calls"
    ids = [each["id"] for c in answer.json()["choices"] for each in c["message"]["tool_calls"]]
    assert len(set(ids)) == 4


async def test_only_calls_are_no_content(client: httpx.AsyncClient, world: World) -> None:
    world.generator.pieces = (ROME,)
    answer = await client.post(PATH, json=asking(tools=TOOLS))
    assert answer.json()["choices"][0]["message"]["content"] is None


async def test_text_is_as_without_tools(client: httpx.AsyncClient, world: World) -> None:
    answer = await client.post(PATH, json=asking(tools=TOOLS))
    [choice] = answer.json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello!", "refusal": None}
    assert choice["finish_reason"] == "stop"


async def test_what_is_cut_off_says_so(client: httpx.AsyncClient, world: World) -> None:
    world.generator.pieces = (ROME[:-20],)
    world.generator.finish_reason = FinishReason.LENGTH
    answer = await client.post(PATH, json=asking(tools=TOOLS))
    [choice] = answer.json()["choices"]
    [asked] = choice["message"]["tool_calls"]
    assert '{"city": "Rome"}'.startswith(asked["function"]["arguments"])
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_official_client_puts_a_stream_together(
    server: LiveServer, world: World, size: int
) -> None:
    world.generator.pieces = [SAID[at : at + size] for at in range(0, len(SAID), size)]
    with (
        OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
        client.chat.completions.stream(
            model="smollm2",
            messages=[{"role": "user", "content": "hi"}],
            tools=TOOLS,  # type: ignore[arg-type]
            n=2,
        ) as stream,
    ):
        for _ in stream:
            pass
        choices = stream.get_final_completion().choices
    for choice in choices:
        assert choice.message.content == "I ask."
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls is not None
        first, second = choice.message.tool_calls
        assert (first.function.name, first.function.arguments) == ("weather", '{"city": "Rome"}')
        assert (second.function.name, second.function.arguments) == ("noon", "{}")
        assert first.id != second.id


async def test_arguments_are_streamed(client: httpx.AsyncClient, world: World) -> None:
    world.generator.pieces = list(ROME)
    answer = await client.post(PATH, json=asking(tools=TOOLS, stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks(answer.text)]
    pieces = [piece for delta in deltas for piece in delta.get("tool_calls", ())]
    assert pieces[0]["function"] == {"name": "weather", "arguments": ""}
    assert [piece["function"] for piece in pieces[1:]] == [
        {"arguments": letter} for letter in '{"city": "Rome"}'
    ]


@pytest.fixture
def masking() -> World:
    return World(
        config=GatewayConfig(
            guardrails=GuardrailsConfig.model_validate({"pii": {"email": {"output": "mask"}}})
        )
    )


async def test_guardrails_see_arguments(masking: World) -> None:
    secret = written(ToolCall(id="", name="weather", arguments='{"city": "a@b.co"}'))
    masking.generator.pieces = list(secret)
    async with a_client(masking) as client:
        for stream in (False, True):
            answer = await client.post(PATH, json=asking(tools=TOOLS, stream=stream))
            assert "[EMAIL]" in answer.text
            assert "a@b" not in answer.text
