"""``POST /v1/chat/completions``, in OpenAI's words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from starlette.types import ASGIApp

from deployments.gateway.generation import Choice, Generation, collect
from deployments.gateway.operation import MODEL_ERRORS, Answers, Call, Operation
from deployments.gateway.remembering import X_CACHE
from deployments.gateway.responses import json_response, server_timing
from deployments.gateway.routes.openai_answers import Chunks, finite, identity, usage_of
from deployments.gateway.schemas.chat import ChatAnswer, ChatChunk, ChatRequest
from deployments.gateway.services import Services
from deployments.gateway.sse import SSE
from deployments.gateway.streaming import POSITION_DOC, StreamedResponse, wants_place
from models.contracts import Delta, TokenLogprob, TopLogprob


def operations(services: Services) -> list[Operation]:
    return [
        Operation(
            "POST",
            "/v1/chat/completions",
            partial(create, services),
            takes=ChatRequest,
            answers=Answers(
                schema=ChatAnswer, streams={SSE: ChatChunk}, headers=X_CACHE, errors=MODEL_ERRORS
            ),
            headers=POSITION_DOC,
            summary="The next message of a conversation, whole or as a stream of chunks.",
        )
    ]


async def create(services: Services, call: Call[ChatRequest]) -> ASGIApp:
    request, exchange = call.input, call.exchange
    include_usage = request.wants_usage_chunk
    stream = bool(request.stream)
    generation = Generation(
        services,
        exchange,
        model=request.model,
        prompts=[request.conversation],
        sampling=request.as_sampling(services.model(request.model, exchange.sight).sampling),
        n=request.choices,
        stream=stream,
        priority=request.waiting_room,
        tell_place=stream and wants_place(call.headers),
    )
    if stream:
        chunk = partial(identity, "chatcmpl", "chat.completion.chunk", exchange, services.now())
        encoder = Chunks(chunk, ChunkChoice(), include_usage=include_usage)
        return StreamedResponse(services, exchange, generation, encoder)
    choices = await collect(generation)
    answer = identity("chatcmpl", "chat.completion", exchange, services.now())
    answer["choices"] = [_choice(index, choice) for index, choice in enumerate(choices)]
    answer["usage"] = usage_of(exchange)
    return json_response(answer, server_timing(services, exchange))


class ChunkChoice:
    """Tells the role of a choice once, with its first delta."""

    def __init__(self) -> None:
        self._begun: set[int] = set()

    def __call__(self, delta: Delta) -> dict[str, object] | None:
        content: dict[str, str] = {}
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            content = {"role": "assistant", "content": delta.text}
        elif delta.text:
            content = {"content": delta.text}
        elif delta.finish_reason is None and delta.logprobs is None:
            return None
        return {
            "index": delta.index,
            "delta": content,
            "logprobs": _logprobs(delta.logprobs),
            "finish_reason": delta.finish_reason,
        }


def _choice(index: int, choice: Choice) -> dict[str, object]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": _logprobs(choice.logprobs),
        "finish_reason": choice.finish_reason,
    }


def _logprobs(tokens: Sequence[TokenLogprob] | None) -> dict[str, object] | None:
    if not tokens:
        return None
    return {
        "content": [
            {**_token(token), "top_logprobs": [_token(top) for top in token.top]}
            for token in tokens
        ]
    }


def _token(token: TokenLogprob | TopLogprob) -> dict[str, object]:
    return {
        "token": token.token,
        "logprob": finite(token.logprob),
        "bytes": list(token.token.encode("utf-8", "replace")),
    }
