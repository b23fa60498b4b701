"""Which tenants may see a model, in the platform's database; gateways look within a second."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from deployments.tenants.audit import note
from deployments.tenants.identity import Authenticator, Fresh
from deployments.tenants.principal import Principal, Scope
from deployments.tenants.sight import Rules, Sight
from models.errors import NotFound
from state import tables
from state.database import Database, LazyDatabase

_RULES, _TENANTS = tables.model_visibility, tables.tenants
ALL = "all"


@dataclass(frozen=True, slots=True)
class Visibility:
    """Belongs to the event loop of ``database``. All methods raise ``StateUnavailable`` when it
    cannot be reached.
    """

    database: Database | LazyDatabase

    async def rules(self) -> Rules:
        async with self.database.read() as c:
            return {row.model: frozenset(row.tenants) for row in await c.execute(sa.select(_RULES))}

    async def show(self, name: str, tenants: Collection[str] | None, *, by: str) -> None:
        """Let these tenants see ``name`` and nobody else; ``None``: everybody.

        Operators and administrators always do.

        Raises:
            NotFound: there is no such tenant.
        """
        listed = None if tenants is None else sorted(set(tenants))
        # With the tenants: one that is being deleted is in no list afterwards.
        async with self.database.write("tenants") as c:
            await _check_tenants(c, listed or ())
            await c.execute(_RULES.delete().where(_RULES.c.model == name))
            if listed is not None:
                await c.execute(
                    _RULES.insert().values(model=name, tenants=listed, changed=datetime.now(UTC))
                )
            told = ALL if listed is None else listed
            await note(c, by, "model.visibility", name, tenants=told)


async def forget(c: AsyncConnection, tenant: str) -> int:
    """Take a tenant out of all rules; how many those were.

    A rule that is left with nobody stays one: it must not become everybody's.
    """
    changed = 0
    for row in (await c.execute(sa.select(_RULES))).all():
        if tenant in row.tenants:
            left = [each for each in row.tenants if each != tenant]
            await c.execute(
                _RULES.update()
                .where(_RULES.c.model == row.model)
                .values(tenants=left, changed=datetime.now(UTC))
            )
            changed += 1
    return changed


async def _check_tenants(c: AsyncConnection, names: Sequence[str]) -> None:
    """A name that is mistyped would hide a model from the one it was meant for."""
    known = set(
        await c.scalars(
            sa.select(_TENANTS.c.name).where(
                _TENANTS.c.name.in_(names), _TENANTS.c.deleted_as.is_(None)
            )
        )
    )
    if missing := [name for name in names if name not in known]:
        raise NotFound(f"There is no tenant {missing[0]!r:.80}.", param="tenants")


class WithSight:
    """See ``Authenticator``; with each principal comes what it may see.

    Who publishes adapters sees all: so one can be hidden before it is there.

    Args:
        clock: seconds, never running backwards.
    """

    def __init__(
        self, inner: Authenticator, visibility: Visibility, *, clock: Callable[[], float]
    ) -> None:
        self._inner = inner
        self._rules: Fresh[Rules] = Fresh(lambda _: visibility.rules(), clock=clock)

    async def principal(self, credential: str) -> Principal:
        principal = await self._inner.principal(credential)
        if Scope.MODELS_WRITE in principal.scopes:
            return principal
        rules = await self._rules.get("models")
        return replace(principal, sight=Sight(rules, principal.tenant)) if rules else principal
