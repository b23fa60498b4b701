"""What every store of counters does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from state.counters.limits import Demand, Level, Limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """The answer to a wish to reserve."""

    allowed: bool
    levels: tuple[Level, ...]
    """One a demand, in order: after the reservation, or as it was where it is refused."""


class Counters(Protocol):
    """All methods raise ``StateUnavailable`` when the store is out of reach."""

    async def reserve(
        self, owner: str, lease: str, demands: Sequence[Demand], *, ttl_s: float
    ) -> Reservation:
        """Take all of ``demands``, or nothing.

        Args:
            owner: whose limits these are: a tenant, or a key of one.
            lease: a name nobody has used before, or whose lease has expired. The same one again is
                refused a second reservation: it is answered as if it had been made, and charged
                once.
            ttl_s: when it expires unless it is renewed or settled.
        """
        ...

    async def settle(self, owner: str, lease: str, used: Mapping[str, int]) -> bool:
        """End a lease.

        Args:
            used: by the limit's name; limits that are not named were used as reserved.

        Returns:
            False if there is none, because it was settled before or has expired.
        """
        ...

    async def renew(self, owner: str, lease: str, *, ttl_s: float) -> bool:
        """The lease lives for ``ttl_s`` from now; False if there is none."""
        ...

    async def levels(self, owner: str, limits: Sequence[Limit]) -> tuple[Level, ...]:
        """Where limits stand."""
        ...

    async def spent(self, owner: str, limit: Limit) -> Level:
        """Where a limit stands without what running leases hold: what was settled, and what was
        reserved by those that have expired.
        """
        ...

    async def drop(self, owner: str) -> bool:
        """Forget all that is the owner's, running leases too; whether there was anything."""
        ...

    async def ping(self) -> None:
        """Raises StateUnavailable unless it answers."""
        ...

    async def close(self) -> None: ...
