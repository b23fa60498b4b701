"""``/admin/v1``: tenants, their keys, plans, and the audit log of every change."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from functools import partial

from starlette.types import ASGIApp

from deployments.gateway.exchange import Exchange
from deployments.gateway.operation import Answers, Call, Operation, Repeat
from deployments.gateway.pagination import PAGED, Page, PageQuery, newest_first, paginate
from deployments.gateway.responses import enveloped
from deployments.gateway.schemas.base import Nothing
from deployments.gateway.schemas.envelope import Success
from deployments.gateway.schemas.tenants import (
    AuditLog,
    IssuedKey,
    KeyData,
    KeyList,
    KeyRequest,
    PlanList,
    Rotation,
    TenantChange,
    TenantData,
    TenantList,
    TenantRequest,
)
from deployments.gateway.services import Services
from deployments.tenants.directory import Directory, Entry, Key, Tenant
from deployments.tenants.plans import LimitName
from deployments.tenants.principal import Scope, granted
from models.errors import Conflict, Forbidden, InvalidInput, NotFound, StateUnreachable

TENANTS = "/admin/v1/tenants"
TENANT = TENANTS + "/{tenant}"
KEYS = TENANT + "/keys"


def operations(services: Services) -> list[Operation]:
    read, write = Scope.TENANTS_READ, Scope.TENANTS_WRITE
    return [
        Operation(
            "GET",
            TENANTS,
            partial(list_tenants, services),
            takes=PageQuery,
            answers=Answers(schema=Success[TenantList], headers=PAGED),
            summary="All tenants, by name.",
            needs=read,
        ),
        Operation(
            "POST",
            TENANTS,
            partial(create_tenant, services),
            takes=TenantRequest,
            answers=Answers(schema=Success[TenantData], errors=(Conflict,)),
            summary="A new tenant.",
            needs=write,
        ),
        Operation(
            "GET",
            TENANT,
            partial(show_tenant, services),
            answers=Answers(schema=Success[TenantData], errors=(NotFound,)),
            summary="One tenant.",
            needs=read,
        ),
        Operation(
            "PATCH",
            TENANT,
            partial(change_tenant, services),
            takes=TenantChange,
            answers=Answers(schema=Success[TenantData], errors=(NotFound,)),
            summary="Another plan, other limits, or suspended: everywhere within a second.",
            needs=write,
        ),
        Operation(
            "GET",
            KEYS,
            partial(list_keys, services),
            takes=PageQuery,
            answers=Answers(schema=Success[KeyList], headers=PAGED, errors=(NotFound,)),
            summary="The keys of a tenant, living and dead, without their secrets.",
            needs=read,
        ),
        Operation(
            "POST",
            KEYS,
            partial(issue_key, services),
            takes=KeyRequest,
            answers=Answers(schema=Success[IssuedKey], errors=(NotFound, Conflict)),
            summary="A new key. Its text is in this answer and nowhere else.",
            needs=write,
            repeat=Repeat.REFUSED,
        ),
        Operation(
            "POST",
            "/admin/v1/keys/{key}/rotate",
            partial(rotate_key, services),
            takes=Rotation,
            answers=Answers(schema=Success[IssuedKey], errors=(NotFound, Conflict)),
            summary="A successor with the same rights; the old key works on for a while.",
            needs=write,
            repeat=Repeat.REFUSED,
        ),
        Operation(
            "DELETE",
            "/admin/v1/keys/{key}",
            partial(revoke_key, services),
            answers=Answers(schema=Success[KeyData], errors=(NotFound,)),
            summary="Revoke a key: everywhere within a second.",
            needs=write,
        ),
        Operation(
            "GET",
            "/admin/v1/plans",
            partial(list_plans, services),
            takes=PageQuery,
            answers=Answers(schema=Success[PlanList], headers=PAGED),
            summary="The plans, as they are configured, by name.",
            needs=read,
        ),
        Operation(
            "GET",
            "/admin/v1/audit",
            partial(list_audit, services),
            takes=PageQuery,
            answers=Answers(schema=Success[AuditLog], headers=PAGED),
            summary="Who changed what, and when; the newest first.",
            needs=Scope.AUDIT_READ,
        ),
    ]


async def list_tenants(services: Services, call: Call[PageQuery]) -> ASGIApp:
    page = paginate(await _directory(services).tenants(), lambda one: one.name, call.input)
    data = {"tenants": [_tenant(one) for one in page.items]}
    return enveloped(services, call.exchange, data, page.headers())


async def create_tenant(services: Services, call: Call[TenantRequest]) -> ASGIApp:
    wanted = call.input
    _check_plan(services, wanted.plan)
    made = await _directory(services).create(
        wanted.name, plan=wanted.plan, overrides=_plain(wanted.overrides), by=call.exchange.subject
    )
    return enveloped(services, call.exchange, _tenant(made))


async def show_tenant(services: Services, call: Call[Nothing]) -> ASGIApp:
    found = await _directory(services).tenant(call.path["tenant"])
    return enveloped(services, call.exchange, _tenant(found))


async def change_tenant(services: Services, call: Call[TenantChange]) -> ASGIApp:
    wanted = call.input
    if wanted.plan is not None:
        _check_plan(services, wanted.plan)
    changed = await _directory(services).change(
        call.path["tenant"],
        plan=wanted.plan,
        overrides=None if wanted.overrides is None else _plain(wanted.overrides),
        suspended=wanted.suspended,
        by=call.exchange.subject,
    )
    return enveloped(services, call.exchange, _tenant(changed))


async def list_keys(services: Services, call: Call[PageQuery]) -> ASGIApp:
    keys = await _directory(services).keys(call.path["tenant"])
    page = paginate(keys, lambda key: key.id, call.input)
    data = {"keys": [_key(key) for key in page.items]}
    return enveloped(services, call.exchange, data, page.headers())


async def issue_key(services: Services, call: Call[KeyRequest]) -> ASGIApp:
    wanted = call.input
    scopes = None if wanted.scopes is None else frozenset(wanted.scopes)
    if scopes is not None and (beyond := scopes - granted(wanted.role, None)):
        raise InvalidInput(
            f"The role {wanted.role} does not have {', '.join(sorted(beyond))}.", param="scopes"
        )
    _check_gives_what_it_has(call.exchange, granted(wanted.role, scopes))
    key, minted = await _directory(services).issue(
        call.path["tenant"],
        role=wanted.role,
        scopes=scopes,
        label=wanted.label,
        lifetime=None if wanted.lifetime_s is None else timedelta(seconds=wanted.lifetime_s),
        by=call.exchange.subject,
    )
    return enveloped(services, call.exchange, {**_key(key), "key": minted.text})


async def rotate_key(services: Services, call: Call[Rotation]) -> ASGIApp:
    directory = _directory(services)
    if (found := await directory.find(call.path["key"])) is not None:
        old, _ = found
        _check_gives_what_it_has(call.exchange, granted(old.role, old.scopes))
    key, minted = await directory.rotate(
        call.path["key"],
        overlap=timedelta(seconds=call.input.overlap_s),
        by=call.exchange.subject,
    )
    return enveloped(services, call.exchange, {**_key(key), "key": minted.text})


async def revoke_key(services: Services, call: Call[Nothing]) -> ASGIApp:
    key = await _directory(services).revoke(call.path["key"], by=call.exchange.subject)
    return enveloped(services, call.exchange, _key(key))


async def list_plans(services: Services, call: Call[PageQuery]) -> ASGIApp:
    plans = services.config.plans
    page = paginate(plans, lambda name: name, call.input)
    data = [{"name": name, "limits": dict(plans[name].limits)} for name in page.items]
    return enveloped(services, call.exchange, {"plans": data}, page.headers())


async def list_audit(services: Services, call: Call[PageQuery]) -> ASGIApp:
    page = await audit_page(_directory(services), call.input)
    data = {"entries": [_entry(entry) for entry in page.items]}
    return enveloped(services, call.exchange, data, page.headers())


async def audit_page(directory: Directory, query: PageQuery) -> Page[Entry]:
    """See ``newest_first``."""
    return await newest_first(directory.audit, query)


def _directory(services: Services) -> Directory:
    """Raises StateUnreachable: this gateway has none."""
    if services.directory is None:
        raise StateUnreachable("This gateway has no database of tenants.")
    return services.directory


def _check_gives_what_it_has(exchange: Exchange, rights: frozenset[Scope]) -> None:
    """Raises Forbidden: a key that is limited to some rights would make itself one that is not."""
    may = exchange.principal.scopes if exchange.principal is not None else frozenset()
    if beyond := rights - may:
        raise Forbidden(
            f"{exchange.subject} can give no rights that it does not have:"
            f" {', '.join(sorted(beyond))}.",
            details={"scopes": sorted(beyond)},
        )


def _check_plan(services: Services, name: str) -> None:
    if name not in services.config.plans:
        known = ", ".join(services.config.plans)
        raise InvalidInput(f"There is no plan {name!r:.80}; there are {known}.", param="plan")


def _plain(overrides: Mapping[LimitName, float | None]) -> dict[str, float | None]:
    return {str(name): amount for name, amount in overrides.items()}


def _tenant(tenant: Tenant) -> dict[str, object]:
    return {
        "name": tenant.name,
        "plan": tenant.plan,
        "overrides": tenant.overrides,
        "created": tenant.created,
        "suspended": tenant.suspended,
    }


def _key(key: Key) -> dict[str, object]:
    return {
        "id": key.id,
        "tenant": key.tenant,
        "label": key.label,
        "role": key.role,
        "scopes": sorted(granted(key.role, key.scopes)),
        "created": key.created,
        "expires": key.expires,
        "revoked": key.revoked,
    }


def _entry(entry: Entry) -> dict[str, object]:
    return {
        "id": entry.id,
        "at": entry.at,
        "who": entry.who,
        "what": entry.what,
        "subject": entry.subject,
        "details": entry.details,
    }
