"""Tenants and keys on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from deployments.tenants.directory import Directory
from deployments.tenants.keys import id_of
from deployments.tenants.principal import Role, Scope
from models.errors import Conflict, InvalidInput, NotFound

HOUR = timedelta(hours=1)


async def test_a_tenant(directory: Directory) -> None:
    made = await directory.create("acme", plan="free", overrides={"x": 1.5, "y": None}, by="me")
    assert await directory.tenant("acme") == made
    changed = await directory.change("acme", plan="pro", by="me")
    assert (changed.plan, changed.overrides) == ("pro", {"x": 1.5, "y": None})
    assert (await directory.change("acme", suspended=True, by="me")).suspended is not None
    assert (await directory.change("acme", suspended=False, overrides={}, by="me")) == (
        await directory.tenant("acme")
    )
    await directory.create("ab", plan="free", by="me")
    assert [tenant.name for tenant in await directory.tenants()] == ["ab", "acme"]


async def test_names_are_taken_once_and_are_plain(directory: Directory) -> None:
    await directory.create("acme", plan="free", by="me")
    with pytest.raises(Conflict, match="'acme' already"):
        await directory.create("acme", plan="pro", by="me")
    for name in ("", "Acme", "a b", "-a", "a" * 64, "a/../b"):
        with pytest.raises(InvalidInput, match="cannot be the name"):
            await directory.create(name, plan="free", by="me")
    with pytest.raises(NotFound, match="no tenant 'other'"):
        await directory.tenant("other")


async def test_one_of_many_at_once_makes_it(directory: Directory) -> None:
    made = await asyncio.gather(
        *(directory.create("acme", plan="free", by=str(n)) for n in range(5)),
        return_exceptions=True,
    )
    assert sum(isinstance(each, Conflict) for each in made) == 4


async def test_a_key_is_found_by_its_id_and_fits(directory: Directory) -> None:
    await directory.create("acme", plan="free", by="me")
    key, minted = await directory.issue(
        "acme",
        role=Role.OPERATOR,
        scopes=frozenset({Scope.INFERENCE}),
        label="for tests",
        lifetime=HOUR,
        by="me",
    )
    found = await directory.find(id_of(minted.text) or "")
    assert found is not None
    assert found[0] == key
    assert found[1].name == "acme"
    assert directory.peppers.fits(minted.text, key.digest)
    assert key.expires == key.created + HOUR
    assert await directory.find("000000000000") is None
    assert minted.text not in str(found)


async def test_keys_of_nobody(directory: Directory) -> None:
    with pytest.raises(NotFound, match="no tenant"):
        await directory.issue("acme", by="me")
    with pytest.raises(NotFound, match="no tenant"):
        await directory.keys("acme")
    for attempt in (directory.revoke("ab", by="me"), directory.rotate("ab", overlap=HOUR, by="me")):
        with pytest.raises(NotFound, match="no key 'ab'"):
            await attempt


async def test_a_revoked_key_is_dead_and_stays_so(directory: Directory) -> None:
    await directory.create("acme", plan="free", by="me")
    key, _ = await directory.issue("acme", by="me")
    assert key.live(datetime.now(UTC))
    revoked = await directory.revoke(key.id, by="me")
    assert not revoked.live(datetime.now(UTC))
    assert (await directory.revoke(key.id, by="me")).revoked == revoked.revoked
    with pytest.raises(Conflict, match="revoked or has expired"):
        await directory.rotate(key.id, overlap=HOUR, by="me")


async def test_a_rotated_key_overlaps_with_its_successor(directory: Directory) -> None:
    await directory.create("acme", plan="free", by="me")
    old, _ = await directory.issue(
        "acme", role=Role.AUDITOR, label="x", lifetime=timedelta(days=90), by="me"
    )
    new, _ = await directory.rotate(old.id, overlap=HOUR, by="me")
    assert (new.role, new.label, new.tenant) == (Role.AUDITOR, "x", "acme")
    assert new.expires == new.created + timedelta(days=90)
    before, after = sorted(await directory.keys("acme"), key=lambda key: key.created)
    assert after == new
    now = datetime.now(UTC)
    assert before.live(now)
    assert not before.live(now + HOUR)
    again, _ = await directory.rotate(new.id, overlap=timedelta(days=900), by="me")
    stored = {key.id: key for key in await directory.keys("acme")}
    assert stored[new.id].expires == new.expires, "an overlap never prolongs a key"
    assert again.id in stored


async def test_every_change_is_in_the_audit_log(directory: Directory) -> None:
    await directory.create("acme", plan="free", by="alice")
    key, minted = await directory.issue("acme", by="bob")
    await directory.rotate(key.id, overlap=HOUR, by="carol")
    await directory.revoke(key.id, by="dave")
    await directory.revoke(key.id, by="dave again")
    await directory.change("acme", suspended=True, by="erin")
    entries = await directory.audit()
    assert [(entry.who, entry.what) for entry in entries] == [
        ("erin", "tenant.change"),
        ("dave", "key.revoke"),
        ("carol", "key.rotate"),
        ("carol", "key.issue"),
        ("bob", "key.issue"),
        ("alice", "tenant.create"),
    ]
    assert minted.text not in str(entries)
    assert [entry.who for entry in await directory.audit(before=entries[1].id, limit=2)] == [
        "carol",
        "carol",
    ]
    newer = await directory.audit(after=entries[3].id, limit=2)
    assert [entry.id for entry in newer] == [entries[1].id, entries[2].id]
