"""Tools in a conversation: how a model is told of them, and the grammar that holds it to its word.

A chat template that knows Hermes' form is used as it is. To other models, tools, calls and results
are told as text of ordinary messages, in the words Qwen 2.5's template has for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

from models.contracts import ChatMessage, Conversation, Grammar, Tool, ToolCall
from models.tool_calls import BEGIN, BETWEEN, END, MIDDLE, MOST_CALLS, TRIGGER, Allowed, written

INSTRUCTIONS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
RESULT = "<tool_response>\n{}\n</tool_response>"


def for_template(
    conversation: Conversation, template: object
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools as a chat template takes them.

    Args:
        template: or several, by name.
    """
    if TRIGGER in str(template):
        tools = [_told(tool) for tool in conversation.tools]
        return [_message(message) for message in conversation.messages], tools or None
    messages = list(_in_words(conversation.messages))
    if conversation.tools:
        signatures = "\n".join([json.dumps(_told(tool)) for tool in conversation.tools])
        told = INSTRUCTIONS.format(tools=signatures)
        if messages and messages[0].role == "system":
            first = messages.pop(0)
            told = f"{first.content}\n\n{told}"
        messages.insert(0, ChatMessage(role="system", content=told))
    return [_message(message) for message in messages], None


def lark(grammar: Grammar, options: Mapping[str, object]) -> str:
    """The grammar of :class:`Allowed`, in llguidance's dialect of Lark.

    Args:
        options: of the JSON in it.
    """
    allowed = Allowed.of(grammar)
    calls = f"call ({_quoted(BETWEEN)} call){{0,{MOST_CALLS - 1}}}" if allowed.parallel else "call"
    begun = calls.removeprefix("call")
    rules = [
        f"call_{number}: {_quoted(BEGIN.removeprefix(TRIGGER) + json.dumps(name) + MIDDLE)}"
        f" {_json(schema, options)} {_quoted(END)}"
        for number, (name, schema) in enumerate(allowed.tools.items())
    ]
    rules.append(f"call: {_quoted(TRIGGER)} body")
    rules.append("body: " + " | ".join(f"call_{number}" for number in range(len(rules) - 1)))
    if allowed.required:
        rules.append(f"start: {calls}")
    elif allowed.answer is not None:
        rules.append(f"start: {calls} | {_json(allowed.answer, options)}")
    else:  # where the trigger comes, a call has begun
        rules.append(f"start: TEXT | talk body{begun}")
        rules.append(f"talk[lazy]: /(.|\\n)*{TRIGGER}/")
        rules.append("TEXT: /(.|\\n)*/")
    return "\n".join(["%llguidance {}", *rules])


def _json(schema: Mapping[str, Any], options: Mapping[str, object]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


def _quoted(text: str) -> str:
    return json.dumps(text)


def _told(tool: Tool) -> dict[str, Any]:
    said: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        said["description"] = tool.description
    return {"type": "function", "function": {**said, "parameters": _parsed(tool.parameters)}}


def _message(message: ChatMessage) -> dict[str, Any]:
    said: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        said["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        said["tool_call_id"] = message.tool_call_id
    return said


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": _parsed(call.arguments)}
    return {"id": call.id, "type": "function", "function": function}


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:  # a guardrail has masked a part of it
        return text


def _in_words(messages: Iterable[ChatMessage]) -> Iterator[ChatMessage]:
    """Calls as their assistant has written them, results that follow one another as one message of
    the user's.
    """
    for is_result, several in groupby(messages, lambda message: message.role == "tool"):
        if is_result:
            results = [RESULT.format(message.content) for message in several]
            yield ChatMessage(role="user", content="\n".join(results))
            continue
        for message in several:
            calls = [written(call) for call in message.tool_calls]
            said = [message.content, *calls] if message.content else calls
            yield replace(message, content="\n".join(said), tool_calls=())
