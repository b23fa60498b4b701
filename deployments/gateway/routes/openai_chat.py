"""``POST /v1/chat/completions``, in OpenAI's words."""

from __future__ import annotations

from collections import defaultdict
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
from models.contracts import Delta, FinishReason, TokenLogprob, TopLogprob
from models.tool_calls import Piece, Reader
from models.unique import unique


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
        choice = ChunkChoice(may_call=request.may_call)
        encoder = Chunks(chunk, choice, include_usage=include_usage)
        return StreamedResponse(services, exchange, generation, encoder)
    choices = await collect(generation)
    answer = identity("chatcmpl", "chat.completion", exchange, services.now())
    answer["choices"] = [
        _choice(index, choice, may_call=request.may_call) for index, choice in enumerate(choices)
    ]
    answer["usage"] = usage_of(exchange)
    return json_response(answer, server_timing(services, exchange))


class ChunkChoice:
    """Tells the role of a choice once, with its first delta.

    Args:
        may_call: its text may have tool calls in it.
    """

    def __init__(self, *, may_call: bool) -> None:
        self._begun: set[int] = set()
        self._readers: defaultdict[int, Reader] | None = defaultdict(Reader) if may_call else None

    def __call__(self, delta: Delta) -> dict[str, object] | None:
        text, last = delta.text, delta.finish_reason is not None
        reason: str | None = delta.finish_reason
        said: dict[str, object] = {}
        if self._readers is not None:
            reader = self._readers[delta.index]
            text, pieces = reader.push(text, last=last)
            if pieces:
                said["tool_calls"] = [_piece(piece) for piece in pieces]
            reason = _reason(delta.finish_reason, reader)
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            content = None if said and not text else text
            said |= {"role": "assistant", "content": content}
        elif text:
            said["content"] = text
        elif not said and not last and delta.logprobs is None:
            return None
        return {
            "index": delta.index,
            "delta": said,
            "logprobs": _logprobs(delta.logprobs),
            "finish_reason": reason,
        }


def _choice(index: int, choice: Choice, *, may_call: bool) -> dict[str, object]:
    message: dict[str, object] = {"role": "assistant", "content": choice.text, "refusal": None}
    reason: str | None = choice.finish_reason
    if may_call:
        reader = Reader()
        content, pieces = reader.push(choice.text, last=True)
        reason = _reason(choice.finish_reason, reader)
        message["content"] = content
        if pieces:
            message["content"] = content or None
            message["tool_calls"] = [_call(piece) for piece in pieces]
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(choice.logprobs),
        "finish_reason": reason,
    }


def _reason(reason: FinishReason | None, reader: Reader) -> str | None:
    return "tool_calls" if reason is FinishReason.STOP and reader.calls else reason


def _call(piece: Piece) -> dict[str, object]:
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"id": f"call_{unique(24)}", "type": "function", "function": function}


def _piece(piece: Piece) -> dict[str, object]:
    if piece.name is not None:
        return {"index": piece.index, **_call(piece)}
    return {"index": piece.index, "function": {"arguments": piece.arguments}}


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
