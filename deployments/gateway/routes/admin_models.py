"""``/admin/v1/models/{model}/adapters``: which LoRA adapters a model answers with."""

from __future__ import annotations

from functools import partial

from starlette.types import ASGIApp

from deployments.gateway.operation import Answers, Call, Operation
from deployments.gateway.pagination import PAGED, PageQuery, paginate
from deployments.gateway.responses import enveloped
from deployments.gateway.schemas.adapters import (
    AdapterData,
    AdapterList,
    AdapterRequest,
    Withdrawn,
)
from deployments.gateway.schemas.base import Nothing
from deployments.gateway.schemas.envelope import Success
from deployments.gateway.services import PublishedAdapter, Services
from deployments.tenants.principal import Scope as Right
from deployments.tenants.sight import EVERYTHING
from models.errors import Conflict, Forbidden, NotFound, Overloaded, Unavailable, UpstreamError

PATH = "/admin/v1/models/{model}/adapters"
ERRORS = (Conflict, Forbidden, NotFound, Overloaded, Unavailable, UpstreamError)


def operations(services: Services) -> list[Operation]:
    return [
        Operation(
            "GET",
            PATH,
            partial(list_adapters, services),
            takes=PageQuery,
            answers=Answers(
                schema=Success[AdapterList],
                headers=PAGED,
                errors=ERRORS,
            ),
            summary="The published adapters of a model, by name.",
            needs=Right.MODELS_WRITE,
        ),
        Operation(
            "POST",
            PATH,
            partial(publish, services),
            takes=AdapterRequest,
            answers=Answers(schema=Success[AdapterData], errors=ERRORS),
            summary="Publish an adapter: all replicas answer with it within seconds.",
            needs=Right.MODELS_WRITE,
        ),
        Operation(
            "DELETE",
            PATH + "/{name}",
            partial(withdraw, services),
            answers=Answers(schema=Success[Withdrawn], errors=ERRORS),
            summary="Withdraw an adapter; its versions stay in the registry.",
            needs=Right.MODELS_WRITE,
        ),
    ]


async def list_adapters(services: Services, call: Call[PageQuery]) -> ASGIApp:
    model = _generating(services, call.path["model"])
    published = [a for a in await services.adapters.published() if a.model == model]
    page = paginate(published, lambda adapter: adapter.id, call.input)
    data = {"adapters": [_data(adapter) for adapter in page.items]}
    return enveloped(services, call.exchange, data, page.headers())


async def publish(services: Services, call: Call[AdapterRequest]) -> ASGIApp:
    model = _generating(services, call.path["model"])
    request = call.input
    adapter = await services.adapters.publish(
        model, request.name, request.source, by=call.exchange.subject
    )
    return enveloped(services, call.exchange, _data(adapter))


async def withdraw(services: Services, call: Call[Nothing]) -> ASGIApp:
    model, name = _generating(services, call.path["model"]), call.path["name"]
    await services.adapters.withdraw(model, name, by=call.exchange.subject)
    return enveloped(services, call.exchange, {"model": model, "name": name})


def _generating(services: Services, name: str) -> str:
    """Raises NotFound, or InvalidInput for a model that does not generate."""
    services.generator(name, EVERYTHING)
    model, adapter = services.find(name, EVERYTHING)
    if adapter is not None:
        raise NotFound(f"{name!r:.256} is an adapter; adapters belong to models.", param="model")
    return model.name


def _data(adapter: PublishedAdapter) -> dict[str, object]:
    return {
        "id": adapter.id,
        "model": adapter.model,
        "name": adapter.name,
        "alias": adapter.alias,
        "version": adapter.version,
        "content_sha256": adapter.content_sha256,
        "created": adapter.created,
    }
