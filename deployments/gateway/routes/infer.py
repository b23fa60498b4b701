"""``POST /v1/infer`` and ``POST /v1/infer/stream`` (spec A1, A2)."""

from __future__ import annotations

from functools import partial

from starlette.types import ASGIApp

from deployments.gateway.exchange import Exchange
from deployments.gateway.generation import Generation, collect
from deployments.gateway.operation import MODEL_ERRORS, Answers, Call, Operation
from deployments.gateway.remembering import X_CACHE
from deployments.gateway.responses import enveloped, server_timing
from deployments.gateway.routes.infer_events import InferEvents, InferLines, summary
from deployments.gateway.schemas.envelope import Success
from deployments.gateway.schemas.infer import InferData, InferEvent, InferRequest
from deployments.gateway.services import Services
from deployments.gateway.sse import NDJSON, SSE
from deployments.gateway.streaming import POSITION_DOC, StreamedResponse, wants_place


def operations(services: Services) -> list[Operation]:
    return [
        Operation(
            "POST",
            "/v1/infer",
            partial(infer, services),
            takes=InferRequest,
            answers=Answers(schema=Success[InferData], headers=X_CACHE, errors=MODEL_ERRORS),
            summary="One prompt, one whole answer.",
        ),
        Operation(
            "POST",
            "/v1/infer/stream",
            partial(stream, services),
            takes=InferRequest,
            answers=Answers(
                schema=None,
                streams={SSE: InferEvent, NDJSON: InferEvent},
                headers=X_CACHE,
                errors=MODEL_ERRORS,
            ),
            headers=POSITION_DOC,
            summary="One prompt, its answer as it comes: SSE, or NDJSON if `Accept` asks for it.",
        ),
    ]


def start(
    services: Services,
    exchange: Exchange,
    request: InferRequest,
    *,
    stream: bool,
    tell_place: bool = False,
) -> Generation:
    return Generation(
        services,
        exchange,
        model=request.model,
        prompts=[request.as_prompt],
        sampling=request.params.sampling(services.model(request.model, exchange.sight).sampling),
        stream=stream,
        priority=request.priority,
        tell_place=tell_place,
    )


async def infer(services: Services, call: Call[InferRequest]) -> ASGIApp:
    exchange = call.exchange
    [choice] = await collect(start(services, exchange, call.input, stream=False))
    data = summary(services, exchange, choice.finish_reason) | {"output": choice.text}
    return enveloped(services, exchange, data, server_timing(services, exchange))


async def stream(services: Services, call: Call[InferRequest]) -> ASGIApp:
    exchange = call.exchange
    encoder = InferLines if NDJSON in call.headers.get("accept", "") else InferEvents
    tell_place = wants_place(call.headers)
    generation = start(services, exchange, call.input, stream=True, tell_place=tell_place)
    return StreamedResponse(services, exchange, generation, encoder(services, exchange))
