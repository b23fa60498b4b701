"""``POST /tokenize`` and ``POST /detokenize``: how a model reads a prompt."""

from __future__ import annotations

from functools import partial

from starlette.types import ASGIApp

from deployments.gateway.admission import metered
from deployments.gateway.operation import MODEL_ERRORS, Answers, Call, Operation
from deployments.gateway.responses import json_response
from deployments.gateway.schemas.tokens import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
)
from deployments.gateway.services import ServedModel, Services
from deployments.tenants.meter import Work
from deployments.tenants.sight import Sight
from models.contracts import Tokenizes
from models.errors import InvalidInput


def operations(services: Services) -> list[Operation]:
    return [
        Operation(
            "POST",
            "/tokenize",
            partial(tokenize, services),
            takes=TokenizeRequest,
            answers=Answers(schema=TokenizeAnswer, errors=MODEL_ERRORS),
            summary="The tokens of a prompt or a conversation, as the model would read it.",
        ),
        Operation(
            "POST",
            "/detokenize",
            partial(detokenize, services),
            takes=DetokenizeRequest,
            answers=Answers(schema=DetokenizeAnswer, errors=MODEL_ERRORS),
            summary="The text of tokens, special ones included.",
        ),
    ]


async def tokenize(services: Services, call: Call[TokenizeRequest]) -> ASGIApp:
    request, exchange = call.input, call.exchange
    prompt = request.asked
    model, worker = _reader(services, request.model, exchange.sight)
    exchange.model = model.name
    async with metered(services, exchange, Work()):
        tokens = await worker.tokenize(prompt)
    return json_response({"count": len(tokens), "max_model_len": model.context, "tokens": tokens})


async def detokenize(services: Services, call: Call[DetokenizeRequest]) -> ASGIApp:
    request, exchange = call.input, call.exchange
    model, worker = _reader(services, request.model, exchange.sight)
    exchange.model = model.name
    async with metered(services, exchange, Work()):
        text = await worker.detokenize(request.tokens)
    return json_response({"prompt": text})


def _reader(services: Services, name: str, sight: Sight) -> tuple[ServedModel, Tokenizes]:
    """Raises :class:`InvalidInput` where there is no tokenizer to ask, ``NotFound`` no model."""
    model, adapter = services.find(name, sight)
    worker = services.generator(model.name, sight)
    if adapter is not None:
        raise InvalidInput(
            f"Adapters read as their model does; ask for {model.name!r}.", param="model"
        )
    if not isinstance(worker, Tokenizes):
        raise InvalidInput(f"The model {name!r} does not tell its tokens.", param="model")
    return model, worker
