"""``/admin/v1``: tenants, keys, the audit log."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, TypeAlias

from pydantic import Field

from deployments.gateway.schemas.base import Answer, Strict
from deployments.tenants.plans import LimitName
from deployments.tenants.principal import Role, Scope

Amount: TypeAlias = Annotated[float, Field(ge=0, le=1_000_000_000)]
"""More is as good as no limit, and not every store of counters could hold it exactly."""
Overrides: TypeAlias = dict[LimitName, Amount | None]


class TenantRequest(Strict):
    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="Unique, and never changed."
    )
    plan: str = Field(default="free", max_length=128, description="One of `GET /admin/v1/plans`.")
    overrides: Overrides = Field(
        default_factory=dict, description="Of the plan's limits; null: no limit."
    )


class TenantChange(Strict):
    plan: str | None = Field(default=None, max_length=128)
    overrides: Overrides | None = Field(
        default=None, description="In place of all that there were."
    )
    suspended: bool | None = Field(
        default=None, description="True: every request of the tenant is refused."
    )


class TenantData(Answer):
    name: str
    plan: str
    overrides: dict[str, float | None]
    created: datetime
    suspended: datetime | None


class TenantList(Answer):
    tenants: list[TenantData]


class KeyRequest(Strict):
    role: Role = Role.DEVELOPER
    scopes: list[Scope] | None = Field(
        default=None, description="Of those that the role has; default: all of them."
    )
    label: str = Field(default="", max_length=200, description="For people: what it is for.")
    lifetime_s: int | None = Field(
        default=None, ge=60, le=10 * 366 * 86_400, description="Default: it does not expire."
    )


class Rotation(Strict):
    overlap_s: int = Field(
        default=86_400, ge=0, le=30 * 86_400, description="How long the old key goes on working."
    )


class KeyData(Answer):
    id: str
    tenant: str
    label: str
    role: Role
    scopes: list[Scope]
    created: datetime
    expires: datetime | None
    revoked: datetime | None


class IssuedKey(KeyData):
    key: str = Field(description="The key itself. It is shown once, now.")


class KeyList(Answer):
    keys: list[KeyData]


class AuditEntry(Answer):
    id: int
    at: datetime
    who: str
    what: str
    subject: str
    details: dict[str, Any]


class AuditLog(Answer):
    entries: list[AuditEntry]


class PlanData(Answer):
    name: str
    limits: dict[str, float | None]


class PlanList(Answer):
    plans: list[PlanData]
