"""From a key to its principal: fresh within a second, and never let through in doubt."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta

import pytest

from deployments.tenants import identity
from deployments.tenants.directory import Directory
from deployments.tenants.identity import FRESH_S, RENEW_S, Fresh, KeyAuthenticator
from deployments.tenants.keys import Peppers
from deployments.tenants.principal import GRANTS, Role, Scope
from models.errors import Forbidden, Unauthorized
from state.errors import StateUnavailable


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def keys(directory: Directory, peppers: Peppers, clock: Clock) -> KeyAuthenticator:
    await directory.create("acme", plan="pro", overrides={"tokens_per_day": 5}, by="me")
    return KeyAuthenticator(directory, peppers, clock=clock)


async def test_a_key_is_a_principal(keys: KeyAuthenticator, directory: Directory) -> None:
    key, minted = await directory.issue("acme", role=Role.OPERATOR, by="me")
    principal = await keys.principal(minted.text)
    assert principal.tenant == "acme"
    assert principal.subject == f"key:{key.id}"
    assert principal.scopes == GRANTS[Role.OPERATOR]
    assert (principal.plan, principal.overrides) == ("pro", {"tokens_per_day": 5})
    principal.require(Scope.MODELS_WRITE)
    with pytest.raises(Forbidden, match=r"tenants:write.*admin"):
        principal.require(Scope.TENANTS_WRITE)


async def test_a_key_may_have_less_than_its_role(
    keys: KeyAuthenticator, directory: Directory
) -> None:
    scopes = frozenset({Scope.INFERENCE, Scope.TENANTS_WRITE})
    _, minted = await directory.issue("acme", role=Role.DEVELOPER, scopes=scopes, by="me")
    assert (await keys.principal(minted.text)).scopes == {Scope.INFERENCE}


async def test_what_is_no_key_is_refused_alike(
    keys: KeyAuthenticator, directory: Directory
) -> None:
    key, minted = await directory.issue("acme", by="me")
    forged = f"fr_{key.id}_{'0' * 40}"
    unknown = f"fr_{'0' * 12}_{minted.text[-40:]}"
    messages = set()
    for credential in (forged, unknown, minted.text + " ", minted.text.upper(), "", "x" * 5000):
        with pytest.raises(Unauthorized) as told:
            await keys.principal(credential)
        messages.add(told.value.message)
    assert len(messages) == 1


async def test_an_expired_key_is_refused(
    directory: Directory, peppers: Peppers, clock: Clock
) -> None:
    await directory.create("acme", plan="pro", by="me")
    key, minted = await directory.issue("acme", lifetime=timedelta(days=1), by="me")
    assert key.expires is not None
    now = key.expires - timedelta(seconds=1)
    keys = KeyAuthenticator(directory, peppers, clock=clock, now=lambda: now)
    await keys.principal(minted.text)
    now = key.expires
    with pytest.raises(Unauthorized):
        await keys.principal(minted.text)


async def test_both_keys_are_taken_while_they_overlap_and_then_the_successor_alone(
    directory: Directory, peppers: Peppers, clock: Clock
) -> None:
    await directory.create("acme", plan="pro", by="me")
    old, text = await directory.issue("acme", by="me")
    new, successor = await directory.rotate(old.id, overlap=timedelta(hours=1), by="me")
    end = new.created + timedelta(hours=1)
    now = new.created
    keys = KeyAuthenticator(directory, peppers, clock=clock, now=lambda: now)

    async def subjects() -> list[str]:
        found = []
        for minted in (text, successor):
            with suppress(Unauthorized):
                found.append((await keys.principal(minted.text)).subject)
        return found

    both, alone = [f"key:{old.id}", f"key:{new.id}"], [f"key:{new.id}"]
    assert await subjects() == both
    now = end - timedelta(seconds=1)
    assert await subjects() == both
    now = end
    assert await subjects() == alone
    now = end + timedelta(days=365)
    assert await subjects() == alone


async def test_a_key_that_is_rotated_without_overlap_is_refused_within_a_second(
    keys: KeyAuthenticator, directory: Directory, clock: Clock
) -> None:
    old, text = await directory.issue("acme", by="me")
    await keys.principal(text.text)
    await directory.rotate(old.id, overlap=timedelta(0), by="me")
    clock.now += FRESH_S + 0.01
    with pytest.raises(Unauthorized):
        await keys.principal(text.text)


async def test_what_changes_holds_within_a_second(
    keys: KeyAuthenticator, directory: Directory, clock: Clock
) -> None:
    key, minted = await directory.issue("acme", by="me")
    await keys.principal(minted.text)
    await directory.change("acme", suspended=True, by="me")
    clock.now += FRESH_S + 0.01
    with pytest.raises(Forbidden, match="'acme' is suspended"):
        await keys.principal(minted.text)
    await directory.change("acme", suspended=False, by="me")
    clock.now += FRESH_S + 0.01
    await keys.principal(minted.text)
    await directory.revoke(key.id, by="me")
    clock.now += FRESH_S + 0.01
    with pytest.raises(Unauthorized):
        await keys.principal(minted.text)


def counting(clock: Clock) -> tuple[list[str], Callable[[str], Awaitable[str]]]:
    asked: list[str] = []

    async def look_up(name: str) -> str:
        asked.append(name)
        return f"{name} {clock.now:g}"

    return asked, look_up


async def test_a_name_in_use_is_asked_for_beside_its_requests(clock: Clock) -> None:
    asked, look_up = counting(clock)
    fresh = Fresh(look_up, clock=clock)
    assert await fresh.get("a") == "a 100"
    clock.now += RENEW_S - 0.01
    assert await fresh.get("a") == "a 100"
    assert asked == ["a"]
    clock.now += 0.02
    assert await fresh.get("a") == "a 100", "at once, while it is asked again"
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert asked == ["a", "a"]
    assert await fresh.get("a") == f"a {clock.now:g}"


async def test_many_at_once_ask_once(clock: Clock) -> None:
    asked, look_up = counting(clock)
    fresh = Fresh(look_up, clock=clock)
    assert len(set(await asyncio.gather(*(fresh.get("a") for _ in range(50))))) == 1
    assert asked == ["a"]


async def test_without_an_answer_nobody_gets_through(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "PATIENCE_S", 0.05)
    down, hangs = False, asyncio.Event()

    async def look_up(name: str) -> str:
        if name == "hangs":
            await hangs.wait()
        if down:
            raise StateUnavailable("the database is down")
        return name

    fresh = Fresh(look_up, clock=clock)
    with pytest.raises(StateUnavailable, match="did not answer within"):
        await fresh.get("hangs")
    assert await fresh.get("a") == "a"
    down = True
    clock.now += RENEW_S + 0.01
    assert await fresh.get("a") == "a", "still fresh enough"
    clock.now += FRESH_S - RENEW_S + 0.01
    with pytest.raises(StateUnavailable, match="database is down"):
        await fresh.get("a")
    down = False
    assert await fresh.get("a") == "a", "it heals by itself"
    hangs.set()


async def test_what_is_remembered_is_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "REMEMBERED", 3)
    asked, look_up = counting(clock)
    fresh = Fresh(look_up, clock=clock)
    for name in "abcada":
        await fresh.get(name)
    assert asked == ["a", "b", "c", "d"]
    await fresh.get("b")
    assert asked[-1] == "b", "the one unused for longest was forgotten"
