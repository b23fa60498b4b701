"""From the credential of a request to its principal, as the directory has it within a second.

What was found is kept for a moment and looked up again before it is too old, beside the
requests that use it: a key in use costs its requests no time, and one that is revoked is
refused everywhere within ``FRESH_S``. What cannot be looked up in time is refused as
unavailable, never as unauthorised, and never let through.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Generic, Protocol, TypeVar

from deployments.tenants.directory import Directory, Key, Tenant
from deployments.tenants.keys import Peppers, id_of
from deployments.tenants.principal import Principal, granted
from models.errors import Forbidden, Unauthorized
from state.errors import StateUnavailable
from state.patience import REQUEST_S

logger = logging.getLogger(__name__)

V = TypeVar("V")

FRESH_S = 0.8
"""How old an answer of the directory may be."""
RENEW_S = 0.4
"""From this age on it is asked again, while the old answer still holds."""
PATIENCE_S = REQUEST_S
"""How long it may take to answer."""
REMEMBERED = 10_000
"""Credentials, right and wrong; the one unused for longest is forgotten first."""

NOBODYS = "0" * 64
"""A digest that no key has."""
BAD = (
    "The API key is not valid: it is mistyped, expired or revoked. Send a valid one as"
    " `Authorization: Bearer fr_…`."
)


class Authenticator(Protocol):
    async def principal(self, credential: str) -> Principal:
        """Whose ``credential`` this is.

        Raises:
            Unauthorized: nobody's.
            Forbidden: of a tenant that is suspended.
            StateUnavailable: it cannot be told now.
        """
        ...


class KeyAuthenticator:
    """Of API keys.

    Args:
        clock: seconds, never running backwards.
        now: the time of day.
    """

    def __init__(
        self,
        directory: Directory,
        peppers: Peppers,
        *,
        clock: Callable[[], float],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._peppers = peppers
        self._now = now
        self._found: Fresh[tuple[Key, Tenant] | None] = Fresh(directory.find, clock=clock)

    async def principal(self, credential: str) -> Principal:
        id_ = id_of(credential)
        if id_ is None:
            raise Unauthorized(BAD)
        found = await self._found.get(id_)
        # The hash is compared first, and for a key that nobody has, too: who does not know the
        # secret learns nothing of the key, and not whether there is one.
        fits = self._peppers.fits(credential, NOBODYS if found is None else found[0].digest)
        if found is None or not fits:
            raise Unauthorized(BAD)
        key, tenant = found
        if not key.live(self._now()):
            raise Unauthorized(BAD)
        return as_principal(tenant, f"key:{key.id}", key)


def as_principal(tenant: Tenant, subject: str, key: Key) -> Principal:
    """Raises Forbidden: the tenant is suspended."""
    refuse_suspended(tenant)
    return Principal(
        tenant=tenant.name,
        subject=subject,
        role=key.role,
        scopes=granted(key.role, key.scopes),
        plan=tenant.plan,
        overrides=tenant.overrides,
    )


def refuse_suspended(tenant: Tenant) -> None:
    if tenant.suspended is not None:
        raise Forbidden(f"The tenant {tenant.name!r} is suspended; ask who runs this platform.")


@dataclass(slots=True)
class _Kept(Generic[V]):
    value: V
    asked: float
    """When the question was put, not when it was answered."""


class Fresh(Generic[V]):
    """Answers by name, none older than ``FRESH_S``; one question at a time for each name."""

    def __init__(
        self, look_up: Callable[[str], Awaitable[V]], *, clock: Callable[[], float]
    ) -> None:
        self._look_up = look_up
        self._clock = clock
        self._kept: OrderedDict[str, _Kept[V]] = OrderedDict()
        self._asking: dict[str, asyncio.Task[V]] = {}

    async def get(self, name: str) -> V:
        """Raises StateUnavailable, and whatever the look-up raises."""
        kept = self._kept.get(name)
        age = FRESH_S if kept is None else self._clock() - kept.asked
        if kept is None or age >= FRESH_S:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    return await asyncio.shield(self._ask(name))
            except TimeoutError:
                raise StateUnavailable(
                    f"the directory did not answer within {PATIENCE_S} s"
                ) from None
        self._kept.move_to_end(name)
        if age >= RENEW_S:
            self._ask(name)
        return kept.value

    def _ask(self, name: str) -> asyncio.Task[V]:
        task = self._asking.get(name)
        if task is None:
            task = self._asking[name] = asyncio.create_task(self._answer(name))
            task.add_done_callback(lambda done: self._told(name, done))
        return task

    async def _answer(self, name: str) -> V:
        asked = self._clock()
        value = await self._look_up(name)
        self._kept[name] = _Kept(value, asked)
        self._kept.move_to_end(name)
        if len(self._kept) > REMEMBERED:
            self._kept.popitem(last=False)
        return value

    def _told(self, name: str, task: asyncio.Task[V]) -> None:
        del self._asking[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.debug("looking up %s: %s", name, error)  # whoever waited has been told
