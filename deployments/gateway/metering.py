"""What a generating request may need at most, and what it turns out to have used. Pure.

The gateway has no tokenizer. A byte-level vocabulary makes at most one token of a byte, so the
bytes of a prompt bound its tokens, and a chat template adds some of its own. What is reserved
too much is given back as soon as the engine has told. Should a prompt have more tokens all
the same, because a template adds more or a tokenizer takes a character apart, its engine does
not begin with it: it says how many there are, and they are reserved first
(``models.errors.Underestimated``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from deployments.tenants.meter import Work
from models.contracts import NO_USAGE, Conversation, Prompt, Usage

TEMPLATE_TOKENS = 64
"""That a template may add by itself: a beginning, a system message of its own."""
MESSAGE_TOKENS = 16
"""That it may add to a message: role and separators."""
TOOLS_TOKENS = 256
"""That it may add where there are tools: what calling one looks like."""
CALL_TOKENS = 64
"""That it may add to a tool or a call."""


def bound(prompts: Sequence[Prompt], *, n: int, max_tokens: int, context: int | None) -> Work:
    """What ``prompts`` with ``n`` answers each can need.

    Args:
        context: tokens of prompt and answer together, where that is known.
    """
    most = math.inf if context is None else context
    return Work(
        prompt_tokens=sum(prompt_tokens(prompt, context=context) for prompt in prompts),
        completion_tokens=len(prompts) * n * int(min(most, max_tokens)),
    )


def prompt_tokens(prompt: Prompt, *, context: int | None) -> int:
    """What is reserved for it."""
    found = prompt_bound(prompt)
    return found if context is None else min(context, found)


def prompt_bound(prompt: Prompt) -> int:
    if isinstance(prompt, str):
        return len(prompt.encode("utf-8", "replace")) + 2
    if not isinstance(prompt, Conversation):
        return len(prompt)
    found = TEMPLATE_TOKENS + sum(
        MESSAGE_TOKENS + _bytes(each.role, each.content) for each in prompt.messages
    )
    calls = [call for each in prompt.messages for call in each.tool_calls]
    found += sum(CALL_TOKENS + _bytes(call.name, call.arguments) for call in calls)
    if prompt.tools:
        found += TOOLS_TOKENS
    found += sum(
        CALL_TOKENS + _bytes(tool.name, tool.description or "", tool.parameters)
        for tool in prompt.tools
    )
    return found


def _bytes(*texts: str) -> int:
    return len("".join(texts).encode("utf-8", "replace"))


def used(
    reserved: Work,
    *,
    usage: Usage | None,
    seen: int,
    streamed: bool,
    refused: bool,
    remembered: Usage = NO_USAGE,
) -> Work:
    """What is to be paid for.

    Args:
        usage: the engine's own account; ``None`` if the request did not come to its end.
        remembered: the part of it that was computed for another request, which pays for it.
        seen: tokens of answers that have reached the gateway.
        streamed: whether tokens reach it as they are made.
        refused: the engine let the request go before it had made anything of it.
    """
    if usage is not None:
        return Work(
            prompt_tokens=usage.prompt_tokens - remembered.prompt_tokens,
            completion_tokens=usage.completion_tokens - remembered.completion_tokens,
        )
    if refused and not seen:
        return Work()
    if streamed:
        return Work(prompt_tokens=reserved.prompt_tokens, completion_tokens=seen)
    return reserved  # it was worked on, and nobody has counted how much
