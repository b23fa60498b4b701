"""Pages of anything: nothing twice, nothing left out, whatever comes and goes meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from deployments.gateway.pagination import Cursor, Page, PageQuery, newest_first, paginate
from models.errors import InvalidInput

KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
SETS = st.sets(KEYS, max_size=20)
LIMITS = st.integers(1, 7)
FEW = settings(max_examples=50)


def page(keys: set[str], limit: int, cursor: Cursor | None = None) -> Page[str]:
    query = PageQuery(limit=limit, cursor=cursor.encode() if cursor else None)
    return paginate(keys, lambda key: key, query)


@given(SETS, LIMITS)
@FEW
def test_a_walk_sees_everything_once_in_order(keys: set[str], limit: int) -> None:
    forward: list[str] = []
    current = page(keys, limit)
    assert current.previous is None
    forward += current.items
    while current.next is not None:
        current = page(keys, limit, current.next)
        assert 1 <= len(current.items) <= limit
        forward += current.items
    assert forward == sorted(keys)
    backward = list(reversed(current.items))
    while current.previous is not None:
        current = page(keys, limit, current.previous)
        backward += reversed(current.items)
    assert backward == sorted(keys, reverse=True)


@given(SETS, LIMITS, st.lists(st.tuples(SETS, SETS), max_size=10))
@FEW
def test_what_stays_is_seen_once_while_others_come_and_go(
    keys: set[str], limit: int, changes: list[tuple[set[str], set[str]]]
) -> None:
    stays = set(keys)
    current = page(keys, limit)
    seen = list(current.items)
    for come, gone in changes:
        if current.next is None:
            break
        keys = (keys | come) - gone
        stays -= gone
        current = page(keys, limit, current.next)
        seen += current.items
    assert seen == sorted(set(seen))
    passed = {key for key in stays if current.next is None or key <= current.next.key}
    assert passed <= set(seen)


@given(KEYS, st.booleans())
@FEW
def test_a_cursor_survives_the_wire(key: str, forward: bool) -> None:
    cursor = Cursor(key, forward=forward)
    text = cursor.encode()
    assert text.isascii()
    assert not set(text) & set("+/= ,")
    assert Cursor.decode(text) == cursor


@given(st.text(max_size=20))
@FEW
def test_any_other_text_is_refused_or_ours(text: str) -> None:
    try:
        cursor = Cursor.decode(text)
    except InvalidInput:
        return
    assert cursor == Cursor.decode(cursor.encode())


def test_the_limit_has_a_limit() -> None:
    assert PageQuery().limit == 500
    for limit in ("0", "501", "-1", "1e2", "٣", ""):
        with pytest.raises(ValidationError):
            PageQuery.model_validate_strings({"limit": limit})


@dataclass(frozen=True)
class Line:
    id: int


def log_page(ids: set[int], limit: int, cursor: Cursor | None = None) -> Page[Line]:
    async def log(
        *, before: int | None = None, after: int | None = None, limit: int = 100
    ) -> Sequence[Line]:
        falling = sorted(ids, reverse=True)
        if after is not None:
            return [Line(id_) for id_ in falling if id_ > after][-limit:]
        return [Line(id_) for id_ in falling if before is None or id_ < before][:limit]

    query = PageQuery(limit=limit, cursor=cursor.encode() if cursor else None)
    return asyncio.run(newest_first(log, query))


@given(st.sets(st.integers(1, 10**17), max_size=12), LIMITS)
@FEW
def test_a_walk_through_a_log_sees_everything_once_and_back(ids: set[int], limit: int) -> None:
    current = log_page(ids, limit)
    assert current.previous is None
    past = [line.id for line in current.items]
    while current.next is not None:
        current = log_page(ids, limit, current.next)
        assert 1 <= len(current.items) <= limit
        past += [line.id for line in current.items]
    assert past == sorted(ids, reverse=True)
    back = [line.id for line in reversed(current.items)]
    while current.previous is not None:
        current = log_page(ids, limit, current.previous)
        back += [line.id for line in reversed(current.items)]
    assert back == sorted(ids)


@pytest.mark.parametrize("key", ["", "a", "-1", "1.0", "9" * 19])
def test_a_cursor_of_another_list_is_refused(key: str) -> None:
    with pytest.raises(InvalidInput, match="not of this list"):
        log_page({1}, 1, Cursor(key, forward=True))
