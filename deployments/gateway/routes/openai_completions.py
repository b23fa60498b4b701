"""``POST /v1/completions``, in OpenAI's words: raw prompts, one or a batch of them."""

from __future__ import annotations

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
from deployments.tenants.sight import Sight
from models.contracts import Conversation, Delta, Prompt, Tokenizes, TokenLogprob
from models.errors import InvalidInput


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
    prompts, drawn = request.prompts, request.drawn
    generation = Generation(
        services,
        exchange,
        model=request.model,
        prompts=prompts,
        sampling=request.as_sampling(services.model(request.model, exchange.sight).sampling),
        n=drawn,
        rank=drawn > request.choices,
        stream=stream,
        priority=request.waiting_room,
        tell_place=stream and wants_place(call.headers),
    )
    echoes = [""] * len(prompts)
    if request.echo:
        echoes = [await _echo(services, request.model, exchange.sight, each) for each in prompts]
    if stream:
        chunk = partial(identity, "cmpl", "text_completion", exchange, services.now())
        encoder = Chunks(chunk, ChunkChoice(echoes, drawn), include_usage=include_usage)
        return StreamedResponse(services, exchange, generation, encoder)
    choices = await collect(generation)
    best = [*range(len(choices))]
    if drawn > request.choices:
        best.sort(key=lambda index: (index // drawn, -generation.likelihood(index)))
        best = [each for rank, each in enumerate(best) if rank % drawn < request.choices]
    answer = identity("cmpl", "text_completion", exchange, services.now())
    answer["choices"] = [
        _choice(place, choices[index], echoes[index // drawn]) for place, index in enumerate(best)
    ]
    answer["usage"] = usage_of(exchange)
    return json_response(answer, server_timing(services, exchange))


async def _echo(services: Services, name: str, sight: Sight, prompt: Prompt) -> str:
    """A prompt as text.

    Raises:
        InvalidInput: it has tokens that the model does not have, or cannot tell.
    """
    if isinstance(prompt, str):
        return prompt
    assert not isinstance(prompt, Conversation)
    reader = services.generator(services.model(name, sight).name, sight)
    if not isinstance(reader, Tokenizes):
        raise InvalidInput("The model cannot tell the text of tokens; send text.", param="echo")
    return await reader.detokenize(prompt)


class ChunkChoice:
    """Remembers how much text each choice has had: logprobs tell where their token begins.

    Args:
        echoes: what goes before the answers to each prompt.
        n: choices of each prompt.
    """

    def __init__(self, echoes: Sequence[str], n: int) -> None:
        self._echoes = echoes
        self._n = n
        self._offsets: dict[int, int] = {}

    def __call__(self, delta: Delta) -> dict[str, object] | None:
        text, logprobs = delta.text, (*(delta.prompt or ()), *(delta.logprobs or ()))
        offset = self._offsets.get(delta.index)
        if offset is None:
            offset, text = 0, self._echoes[delta.index // self._n] + text
        if not text and delta.finish_reason is None and delta.logprobs is None:
            return None
        self._offsets[delta.index] = offset + len(text)
        return {
            "index": delta.index,
            "text": text,
            "logprobs": _logprobs(logprobs, offset),
            "finish_reason": delta.finish_reason,
        }


def _choice(index: int, choice: Choice, echo: str) -> dict[str, object]:
    return {
        "index": index,
        "text": echo + choice.text,
        "logprobs": _logprobs((*choice.prompt, *choice.logprobs), 0),
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
        "top_logprobs": [
            None if token.logprob is None else {top.token: finite(top.logprob) for top in token.top}
            for token in tokens
        ],
        "text_offset": offsets,
    }
