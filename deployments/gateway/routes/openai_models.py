"""``GET /v1/models`` and ``GET /v1/models/{model}``."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

from starlette.types import ASGIApp

from deployments.gateway.operation import Answers, Call, Operation
from deployments.gateway.pagination import PAGED, PageQuery, paginate
from deployments.gateway.responses import json_response
from deployments.gateway.schemas.base import Nothing
from deployments.gateway.schemas.catalogue import ModelAnswer, ModelList
from deployments.gateway.services import PublishedAdapter, ServedModel, Services
from deployments.tenants.sight import Sight
from models.errors import NotFound, Unavailable


def operations(services: Services) -> list[Operation]:
    return [
        Operation(
            "GET",
            "/v1/models",
            partial(list_models, services),
            takes=PageQuery,
            answers=Answers(
                schema=ModelList,
                headers=PAGED,
            ),
            summary="The models that are served, and their published adapters, by name.",
        ),
        Operation(
            "GET",
            "/v1/models/{model:path}",
            partial(show_model, services),
            answers=Answers(schema=ModelAnswer, errors=(NotFound, Unavailable)),
            summary="One model.",
        ),
    ]


async def list_models(services: Services, call: Call[PageQuery]) -> ASGIApp:
    sight = call.exchange.sight
    entries = [_entry(model) for model in services.seen(sight).values()]
    with suppress(Unavailable):  # the models are served without the registry, too
        entries += [_adapter(services, each) for each in await _published(services, sight)]
    page = paginate(entries, lambda entry: str(entry["id"]), call.input)
    return json_response({"object": "list", "data": page.items}, page.headers())


async def show_model(services: Services, call: Call[Nothing]) -> ASGIApp:
    name = call.path["model"]
    sight = call.exchange.sight
    model, adapter = services.find(name, sight)
    call.exchange.model, call.exchange.adapter = model.name, adapter
    if adapter is None:
        return json_response(_entry(model))
    for published in await _published(services, sight):
        if published.id == name:
            return json_response(_adapter(services, published))
    raise NotFound(f"The model {name!r:.256} is not published; see /v1/models.", param="model")


async def _published(services: Services, sight: Sight) -> list[PublishedAdapter]:
    """Raises Unavailable."""
    found = await services.adapters.published()
    return [each for each in found if sight.sees(each.model, each.name)]


def _adapter(services: Services, adapter: PublishedAdapter) -> dict[str, object]:
    """As its model's, since it answers wherever that does."""
    entry = _entry(services.models[adapter.model])
    return entry | {"id": adapter.id, "created": adapter.created}


def _entry(model: ServedModel) -> dict[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": model.owned_by,
        "task": model.task,
        "context": model.context,
    }
