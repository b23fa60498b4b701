"""What every store of cached answers does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

ENTRY_BYTES = 256
"""Counted for an entry on top of its value: about what its key and the bookkeeping take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    max_bytes: int
    """Of all entries of all owners together."""
    max_entry_bytes: int
    """Of one value; a longer one is not kept."""

    def fits(self, value: bytes) -> bool:
        return len(value) <= self.max_entry_bytes and size(value) <= self.max_bytes


def size(value: bytes) -> int:
    """What an entry counts for."""
    return len(value) + ENTRY_BYTES


class Cache(Protocol):
    """Values by owner and key, until they expire or make room for others.

    All methods raise ``StateUnavailable`` when the store is out of reach; ``Lenient`` makes a
    miss of that.
    """

    async def get(self, owner: str, keys: Sequence[str]) -> list[bytes | None]:
        """One for each key, in order; ``None``: not there. What is found counts as used now."""
        ...

    async def put(self, owner: str, entries: Mapping[str, bytes], *, ttl_s: float) -> None:
        """Keep ``entries`` in place of what was there under their keys.

        One that is too long is left out, and what was there under its key goes, too.
        """
        ...

    async def drop(self, owner: str) -> int:
        """Forget all that is the owner's; how many entries there were, expired ones included."""
        ...

    async def ping(self) -> None:
        """Raises StateUnavailable unless it answers."""
        ...

    async def close(self) -> None: ...
