"""Who a request is from, and what that lets it do. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from deployments.tenants.sight import EVERYTHING, Sight
from models.errors import Forbidden


class Scope(StrEnum):
    """What a route asks for; each route asks for one, or is public."""

    INFERENCE = "inference"
    """Ask models, and list them."""
    MODELS_WRITE = "models:write"
    """Publish and withdraw adapters."""
    TENANTS_READ = "tenants:read"
    TENANTS_WRITE = "tenants:write"
    """Tenants, keys and plans."""
    AUDIT_READ = "audit:read"
    METRICS_READ = "metrics:read"


class Role(StrEnum):
    ADMIN = "admin"
    OPERATOR = "operator"
    DEVELOPER = "developer"
    AUDITOR = "auditor"


GRANTS: Mapping[Role, frozenset[Scope]] = {
    Role.ADMIN: frozenset(Scope),
    Role.OPERATOR: frozenset(
        {Scope.INFERENCE, Scope.MODELS_WRITE, Scope.TENANTS_READ, Scope.METRICS_READ}
    ),
    Role.DEVELOPER: frozenset({Scope.INFERENCE}),
    Role.AUDITOR: frozenset({Scope.TENANTS_READ, Scope.AUDIT_READ, Scope.METRICS_READ}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    tenant: str
    subject: str
    """``key:ID`` or ``oidc:SUBJECT``; for logs and the audit log, never a secret."""
    role: Role
    scopes: frozenset[Scope]
    plan: str | None = None
    """``None``: without limits."""
    overrides: Mapping[str, float | None] = field(default_factory=dict)
    sight: Sight = EVERYTHING
    """Of the models."""

    def require(self, scope: Scope) -> None:
        """Raises Forbidden, naming what is missing and who has it."""
        if scope in self.scopes:
            return
        roles = ", ".join(role for role, grants in GRANTS.items() if scope in grants)
        raise Forbidden(
            f"{self.subject} may not do this: it needs the scope {scope}, which the roles"
            f" {roles} have.",
            details={"scope": scope},
        )


EVERYBODY = Principal(tenant="public", subject="anyone", role=Role.ADMIN, scopes=GRANTS[Role.ADMIN])
"""Whoever asks a platform that is open, which only a loopback address ever is."""


def granted(role: Role, scopes: frozenset[Scope] | None) -> frozenset[Scope]:
    """What a key of ``role`` may do that was limited to ``scopes``."""
    return GRANTS[role] if scopes is None else GRANTS[role] & scopes
