"""``POST /v1/completions``, in OpenAI's words: raw prompts, one or a batch of them."""

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
from deployments.gateway.schemas.completions import (
    CompletionAnswer,
    CompletionChunk,
    CompletionRequest,
)
from deployments.gateway.services import Services
from deployments.gateway.sse import SSE
from deployments.gateway.streaming import POSITION_DOC, StreamedResponse, wants_place
from models.contracts import Delta, TokenLogprob


def operations(services: Services) -> list[Operation]:
    return [
        Operation(
            "POST",
            "/v1/completions",
            partial(create, services),
            takes=CompletionRequest,
            answers=Answers(
                schema=CompletionAnswer,
                streams={SSE: CompletionChunk},
                headers=X_CACHE,
                errors=MODEL_ERRORS,
            ),
            headers=POSITION_DOC,
            summary="Continuations of raw prompts, whole or as a stream of chunks.",
        )
    ]


async def create(services: Services, call: Call[CompletionRequest]) -> ASGIApp:
    request, exchange = call.input, call.exchange
    include_usage = request.wants_usage_chunk
    stream = bool(request.stream)
    generation = Generation(
        services,
        exchange,
        model=request.model,
        prompts=request.prompts,
        sampling=request.as_sampling(services.model(request.model, exchange.sight).sampling),
        n=request.choices,
        stream=stream,
        priority=request.waiting_room,
        tell_place=stream and wants_place(call.headers),
    )
    if stream:
        chunk = partial(identity, "cmpl", "text_completion", exchange, services.now())
        encoder = Chunks(chunk, ChunkChoice(), include_usage=include_usage)
        return StreamedResponse(services, exchange, generation, encoder)
    choices = await collect(generation)
    answer = identity("cmpl", "text_completion", exchange, services.now())
    answer["choices"] = [_choice(index, choice) for index, choice in enumerate(choices)]
    answer["usage"] = usage_of(exchange)
    return json_response(answer, server_timing(services, exchange))


class ChunkChoice:
    """Remembers how much text each choice has had: logprobs tell where their token begins."""

    def __init__(self) -> None:
        self._offsets: defaultdict[int, int] = defaultdict(int)

    def __call__(self, delta: Delta) -> dict[str, object] | None:
        if not delta.text and delta.finish_reason is None and delta.logprobs is None:
            return None
        offset = self._offsets[delta.index]
        self._offsets[delta.index] += len(delta.text)
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": _logprobs(delta.logprobs, offset),
            "finish_reason": delta.finish_reason,
        }


def _choice(index: int, choice: Choice) -> dict[str, object]:
    return {
        "index": index,
        "text": choice.text,
        "logprobs": _logprobs(choice.logprobs, 0),
        "finish_reason": choice.finish_reason,
    }


def _logprobs(tokens: Sequence[TokenLogprob] | None, offset: int) -> dict[str, object] | None:
    if not tokens:
        return None
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.token)
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [finite(token.logprob) for token in tokens],
        "top_logprobs": [{top.token: finite(top.logprob) for top in token.top} for token in tokens],
        "text_offset": offsets,
    }
