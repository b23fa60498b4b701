"""``POST /v1/embeddings``, in OpenAI's words."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from starlette.types import ASGIApp

from deployments.gateway.admission import metered
from deployments.gateway.metering import bound
from deployments.gateway.operation import MODEL_ERRORS, Answers, Call, Operation
from deployments.gateway.remembering import X_CACHE, remembering_embedder
from deployments.gateway.responses import json_response
from deployments.gateway.schemas.embeddings import EmbeddingAnswer, EmbeddingRequest
from deployments.gateway.services import Services
from deployments.gateway.standing import standing
from models.contracts import Priority, Usage, Versions
from models.errors import InvalidInput

PATH = "/v1/embeddings"


def operations(services: Services) -> list[Operation]:
    return [
        Operation(
            "POST",
            PATH,
            partial(create, services),
            takes=EmbeddingRequest,
            answers=Answers(schema=EmbeddingAnswer, headers=X_CACHE, errors=MODEL_ERRORS),
            summary="One vector for each text.",
        )
    ]


async def create(services: Services, call: Call[EmbeddingRequest]) -> ASGIApp:
    request, exchange = call.input, call.exchange
    embedder = remembering_embedder(services, exchange, request.model)
    exchange.model = request.model
    version = services.model(request.model, exchange.sight).version
    exchange.versions = Versions(model=version)
    exchange.priority = request.priority or Priority.STANDARD
    guard = services.guardrails.of_plan(exchange.plan)
    texts = await guard.each(request.texts, param="input", inquiry=exchange.inquiry(services.emit))
    async with metered(services, exchange, bound(texts, n=1, max_tokens=0, context=None)):
        result = await embedder.embed(texts, standing(services, exchange))
        exchange.versions = Versions(model=result.version or version)
        exchange.usage = Usage(prompt_tokens=result.prompt_tokens, completion_tokens=0)
        exchange.remembered = Usage(prompt_tokens=result.remembered_tokens, completion_tokens=0)
    width = len(result.vectors[0])
    if request.dimensions not in (None, width):
        raise InvalidInput(
            f"dimensions is {request.dimensions}, but the vectors of {request.model!r} have"
            f" {width} and are never cut; leave it out.",
            param="dimensions",
        )
    vectors: Sequence[object] = result.vectors
    if request.encoding_format == "base64":
        vectors = [_base64(vector) for vector in result.vectors]
    return json_response(
        {
            "object": "list",
            "model": request.model,
            "data": [
                {"object": "embedding", "index": index, "embedding": vector}
                for index, vector in enumerate(vectors)
            ],
            "usage": {
                "prompt_tokens": result.prompt_tokens,
                "total_tokens": result.prompt_tokens,
            },
        }
    )


def _base64(vector: Sequence[float] | NDArray[np.float32]) -> str:
    """Little-endian 32-bit floats, as OpenAI's client unpacks them."""
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode("ascii")
