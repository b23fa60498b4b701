"""``POST /v1/models/{model}/predict``: a trained artifact, in its own terms."""

from __future__ import annotations

from functools import partial

import orjson
from starlette.types import ASGIApp

from deployments.gateway.admission import metered
from deployments.gateway.operation import MODEL_ERRORS, Answers, Call, Operation
from deployments.gateway.responses import enveloped
from deployments.gateway.schemas.envelope import Success
from deployments.gateway.schemas.predict import PredictData, PredictRequest
from deployments.gateway.services import ServedModel, Services
from deployments.gateway.standing import standing
from deployments.tenants.meter import Work
from models.contracts import Json, Versions
from models.errors import InvalidInput, PayloadTooLarge

PATH = "/v1/models/{model}/predict"


def operations(services: Services) -> list[Operation]:
    return [
        Operation(
            "POST",
            PATH,
            partial(predict, services),
            takes=PredictRequest,
            answers=Answers(schema=Success[PredictData], errors=MODEL_ERRORS),
            summary="What a trained model says of each input; in batches with other requests.",
        )
    ]


async def predict(services: Services, call: Call[PredictRequest]) -> ASGIApp:
    request, exchange = call.input, call.exchange
    name = call.path["model"]
    predictor = services.predictor(name, exchange.sight)
    exchange.model, exchange.priority = name, request.priority
    inputs = request.rows
    served = services.model(name, exchange.sight)
    exchange.versions = Versions(model=served.version)
    _check_size(served, inputs)
    guard = services.guardrails.of_plan(exchange.plan)
    inquiry = exchange.inquiry(services.emit)
    inputs = [
        await guard.value(value, param=f"inputs[{index}]", inquiry=inquiry)
        for index, value in enumerate(inputs)
    ]
    async with metered(services, exchange, Work()):
        result = await predictor.predict(inputs, standing(services, exchange))
        exchange.versions = Versions(model=result.version or served.version)
    data = {"predictions": result.predictions, "model": name, "version": result.version}
    return enveloped(services, exchange, data)


def _check_size(model: ServedModel, inputs: list[Json]) -> None:
    """Raises :class:`InvalidInput` naming the limit, and the input that passes it."""
    if len(inputs) > model.max_inputs:
        raise InvalidInput(
            f"inputs has {len(inputs)} entries; {model.name!r} takes {model.max_inputs} in one"
            " request. Send fewer at a time.",
            param="inputs",
        )
    for index, value in enumerate(inputs):
        size = len(orjson.dumps(value))
        if size > model.max_input_bytes:
            raise PayloadTooLarge(
                f"inputs[{index}] has {size} bytes; {model.name!r} takes"
                f" {model.max_input_bytes} at most.",
                param=f"inputs[{index}]",
                details={"index": index},
            )
