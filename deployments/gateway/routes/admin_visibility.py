"""``/admin/v1/models/{model}/visibility``: which tenants a model or an adapter is there for."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from starlette.types import ASGIApp

from deployments.gateway.operation import Answers, Call, Operation
from deployments.gateway.pagination import PAGED, PageQuery, paginate
from deployments.gateway.responses import enveloped
from deployments.gateway.schemas.base import Nothing
from deployments.gateway.schemas.envelope import Success
from deployments.gateway.schemas.visibility import (
    VisibilityData,
    VisibilityList,
    VisibilityRequest,
)
from deployments.gateway.services import Services
from deployments.tenants.principal import Scope
from deployments.tenants.sight import EVERYTHING, ruled
from deployments.tenants.visibility import ALL, Visibility
from models.errors import NotFound, StateUnreachable

RULES = "/admin/v1/visibility"
PATH = "/admin/v1/models/{model:path}/visibility"


def operations(services: Services) -> list[Operation]:
    return [
        Operation(
            "GET",
            RULES,
            partial(list_rules, services),
            takes=PageQuery,
            answers=Answers(schema=Success[VisibilityList], headers=PAGED),
            summary="The models and adapters that not everybody sees, by name.",
            needs=Scope.MODELS_WRITE,
        ),
        Operation(
            "GET",
            PATH,
            partial(show_rule, services),
            answers=Answers(schema=Success[VisibilityData], errors=(NotFound,)),
            summary="Who sees a model or an adapter.",
            needs=Scope.MODELS_WRITE,
        ),
        Operation(
            "PUT",
            PATH,
            partial(set_rule, services),
            takes=VisibilityRequest,
            answers=Answers(schema=Success[VisibilityData], errors=(NotFound,)),
            summary="Who sees a model or an adapter, published or not: everywhere within a second.",
            needs=Scope.MODELS_WRITE,
        ),
    ]


async def list_rules(services: Services, call: Call[PageQuery]) -> ASGIApp:
    rules = await _visibility(services).rules()
    page = paginate(rules, lambda name: name, call.input)
    data = {"models": [_data(name, rules[name]) for name in page.items]}
    return enveloped(services, call.exchange, data, page.headers())


async def show_rule(services: Services, call: Call[Nothing]) -> ASGIApp:
    name = _named(services, call.path["model"])
    rules = await _visibility(services).rules()
    return enveloped(services, call.exchange, _data(name, rules.get(name)))


async def set_rule(services: Services, call: Call[VisibilityRequest]) -> ASGIApp:
    name = _named(services, call.path["model"])
    wanted = call.input.tenants
    tenants = None if wanted == ALL else wanted
    await _visibility(services).show(name, tenants, by=call.exchange.subject)
    return enveloped(services, call.exchange, _data(name, tenants))


def _named(services: Services, name: str) -> str:
    """Raises NotFound: no such model; InvalidInput: no name that a rule could have."""
    model, adapter = services.find(name, EVERYTHING)
    return ruled(model.name, adapter)


def _data(name: str, tenants: Collection[str] | None) -> dict[str, object]:
    return {"model": name, "tenants": ALL if tenants is None else sorted(set(tenants))}


def _visibility(services: Services) -> Visibility:
    """Raises StateUnreachable: this gateway has no database."""
    if services.directory is None:
        raise StateUnreachable("This gateway has no database of tenants.")
    return Visibility(services.directory.database)
