"""Cursor pagination over anything with a unique, ordered key (spec A7): of what is in memory
(``paginate``), of a list in the database (``read_page``), and of a log there (``newest_first``).

A cursor says "after this key" or "before this key", not "page 3": entries that come or go
between two calls neither repeat others nor hide them.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Generic, Protocol, Self, TypeVar

from pydantic import BeforeValidator, Field

from deployments.gateway.schemas.base import Strict
from models.errors import InvalidInput

Item = TypeVar("Item")
Listed = TypeVar("Listed", covariant=True)
MAX_LIMIT = 500
PAGED = {
    "X-Next-Cursor": "Where the next page begins; absent on the last.",
    "X-Prev-Cursor": "Where the previous page ends; absent on the first.",
}
"""For the OpenAPI document."""


def _decimal(text: object) -> object:
    """Of a number in a query. Python's ``int`` would take " 7", "+7" and "7_0" too."""
    if not isinstance(text, str):
        return text
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ValueError("should be a whole number")
    return int(text)


class PageQuery(Strict):
    limit: Annotated[int, BeforeValidator(_decimal)] = Field(default=MAX_LIMIT, ge=1, le=MAX_LIMIT)
    cursor: str | None = Field(
        default=None, max_length=2048, description="From `X-Next-Cursor` or `X-Prev-Cursor`."
    )


@dataclass(frozen=True, slots=True)
class Cursor:
    key: str
    forward: bool
    """True: what comes after ``key``; False: what comes before it."""

    def encode(self) -> str:
        raw = (">" if self.forward else "<") + self.key
        return base64.urlsafe_b64encode(raw.encode()).decode("ascii").rstrip("=")

    @classmethod
    def decode(cls, text: str) -> Self:
        """Raises :class:`InvalidInput`: it is none of ours."""
        try:
            padded = text.encode("ascii") + b"=" * (-len(text) % 4)
            raw = base64.b64decode(padded, altchars=b"-_", validate=True).decode("utf-8")
        except (binascii.Error, UnicodeError):
            raw = ""
        if raw[:1] not in ("<", ">"):
            raise InvalidInput(
                f"cursor {text!r:.80} is not one that this server gave out;"
                " start again without it.",
                param="cursor",
            )
        return cls(raw[1:], forward=raw[0] == ">")


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    items: list[Item]
    """In ascending order of their keys, whichever way the page was reached."""
    previous: Cursor | None
    next: Cursor | None

    def headers(self) -> dict[str, str]:
        headers = {}
        if self.next is not None:
            headers["x-next-cursor"] = self.next.encode()
        if self.previous is not None:
            headers["x-prev-cursor"] = self.previous.encode()
        return headers


def paginate(items: Iterable[Item], key: Callable[[Item], str], query: PageQuery) -> Page[Item]:
    """The page of ``items`` that ``query`` asks for.

    Raises:
        InvalidInput: the cursor is none of ours.
    """
    ordered = sorted(items, key=key)
    cursor = None if query.cursor is None else Cursor.decode(query.cursor)
    if cursor is None or cursor.forward:
        begin = 0 if cursor is None else sum(key(item) <= cursor.key for item in ordered)
        end = min(begin + query.limit, len(ordered))
    else:
        end = sum(key(item) < cursor.key for item in ordered)
        begin = max(0, end - query.limit)
    page = ordered[begin:end]
    return Page(
        page,
        previous=Cursor(key(page[0]), forward=False) if page and begin > 0 else None,
        next=Cursor(key(page[-1]), forward=True) if page and end < len(ordered) else None,
    )


class Side(Protocol[Listed]):
    async def __call__(self, key: str | None, *, forward: bool, limit: int) -> Sequence[Listed]:
        """In the order of the list: from its beginning on, or the ones next to a key on a side."""
        ...


async def read_page(read: Side[Item], key: Callable[[Item], str], query: PageQuery) -> Page[Item]:
    """The page of a list in the database that ``query`` asks for.

    Raises:
        InvalidInput: the cursor is none of ours.
    """
    cursor = None if query.cursor is None else Cursor.decode(query.cursor)
    forward = cursor is None or cursor.forward
    given = None if cursor is None else cursor.key
    found = list(await read(given, forward=forward, limit=query.limit + 1))
    beyond = len(found) > query.limit
    items = found[: query.limit] if forward else found[-query.limit :]
    earlier, later = (cursor is not None, beyond) if forward else (beyond, True)
    return Page(
        items,
        previous=Cursor(key(items[0]), forward=False) if items and earlier else None,
        next=Cursor(key(items[-1]), forward=True) if items and later else None,
    )


class Numbered(Protocol):
    @property
    def id(self) -> int: ...


Line = TypeVar("Line", bound=Numbered, covariant=True)


class Log(Protocol[Line]):
    async def __call__(
        self, *, before: int | None = None, after: int | None = None, limit: int = 100
    ) -> Sequence[Line]:
        """The newest first: from the newest on, or the ones next to a line on either side."""
        ...


async def newest_first(log: Log[Line], query: PageQuery) -> Page[Line]:
    """The page of a log that ``query`` asks for. Forward is further into the past.

    Raises:
        InvalidInput: the cursor is none of ours.
    """

    async def read(key: str | None, *, forward: bool, limit: int) -> Sequence[Line]:
        if key is not None and (not key.isdecimal() or len(key) > 18):
            raise not_of_this_list()
        if forward:
            return await log(before=None if key is None else int(key), limit=limit)
        return await log(after=None if key is None else int(key), limit=limit)

    return await read_page(read, _number, query)


def _number(line: Numbered) -> str:
    return str(line.id)


def not_of_this_list() -> InvalidInput:
    return InvalidInput("cursor is not of this list; start again without it.", param="cursor")
