"""The end of a tenant, also where it is cut off in the middle."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.tenants import batches, ledger
from deployments.tenants import deletion as module
from deployments.tenants.deletion import SETTLE_S, Deletion, stores
from deployments.tenants.directory import Directory
from deployments.tenants.export import concerns
from deployments.tenants.identity import FRESH_S, KeyAuthenticator
from deployments.tenants.keys import Peppers
from deployments.tenants.ledger import By
from deployments.tenants.principal import Role, Scope
from deployments.tenants.visibility import Visibility
from models.errors import Conflict, NotFound, Unauthorized
from state.cache import Bounds
from state.cache.memory import MemoryCache
from state.counters import Demand, Limit, Strategy
from state.counters.memory import MemoryCounters
from state.errors import StateUnavailable
from tests.tenants.things import contents, settle_in, use

TOKENS = Limit(name="tokens", strategy=Strategy.FIXED_WINDOW, amount=10, window_ms=60_000)


async def at_once(_: float) -> None:
    """In place of the time that gateways need to hear of it."""


def deleting(directory: Directory, **elsewhere: Callable[[str], Awaitable[int]]) -> Deletion:
    return Deletion(database=directory.database, elsewhere=elsewhere, sleep=at_once)


async def report(directory: Directory) -> dict[str, Any]:
    lines = await ledger.report(directory.database, by=[By.TENANT])
    return {line["tenant"]: line["requests"] for line in lines}


async def named(directory: Directory, *names: str) -> list[str]:
    """Tables in which any of these names stands anywhere."""
    return [
        table
        for table, rows in (await contents(directory.database)).items()
        if any(name in json.dumps(rows, default=str) for name in names)
    ]


async def test_nothing_is_left_that_names_it(directory: Directory) -> None:
    await settle_in(directory, "acme")
    await settle_in(directory, "other")
    others = [key.id for key in await directory.keys("other")]
    done = await deleting(directory).delete("acme", by="me")
    assert done.removed == {"keys": 2, "idempotency": 1, "webhook_events": 1, "alerts": 1}
    assert done.renamed == {"usage": 3, "audit": 4}
    # The name of an adapter is the platform's; but the rule of it is nobody's any more.
    assert await named(directory, '"acme"', "request of acme", "bob@acme", "shop of acme") == []
    assert (await Visibility(directory.database).rules())["smollm2:acme-bot"] == set()
    assert [key.id for key in await directory.keys("other")] == others
    assert await report(directory) == {done.called: 3, "other": 3}, "the sums stay right"
    with pytest.raises(NotFound):
        await directory.tenant("acme")
    with pytest.raises(NotFound):
        await deleting(directory).delete("acme", by="me")


async def test_what_is_in_the_audit_log_names_nobody(directory: Directory) -> None:
    await settle_in(directory, "acme")
    done = await deleting(directory).delete("acme", by="key:5")
    entries = await directory.audit()
    assert [(entry.who, entry.what, entry.subject) for entry in entries[:2]] == [
        ("key:5", "tenant.deleted", done.called),
        ("key:5", "tenant.delete", done.called),
    ]
    assert dict(entries[0].details) == {**done.removed, **done.renamed}
    created = entries[-1]
    assert (created.what, created.subject) == ("tenant.create", done.called)
    assert created.details["plan"] == "pro", "what was done stays told"
    issued = next(entry for entry in entries if entry.what == "key.issue")
    assert issued.details["tenant"] == done.called


async def test_a_name_is_free_again(directory: Directory) -> None:
    await settle_in(directory, "acme")
    done = await deleting(directory).delete("acme", by="me")
    await directory.create("acme", plan="free", by="me")
    again = await deleting(directory).delete("acme", by="me")
    assert again.called != done.called
    assert again.removed == {"keys": 0, "idempotency": 0, "webhook_events": 0, "alerts": 0}


async def test_other_stores_forget_it_too(directory: Directory) -> None:
    await directory.create("acme", plan="free", by="me")
    counters = MemoryCounters(lambda: 1_700_000_000.0)
    cache = MemoryCache(Bounds(max_bytes=10**6, max_entry_bytes=10**6))
    demands = [Demand(limit=TOKENS, amount=10)]
    for tenant in ("acme", "other"):
        await counters.reserve(tenant, "a", demands, ttl_s=60)
        await cache.put(tenant, {"one": b"1", "two": b"2"}, ttl_s=60)
    done = await deleting(directory, **stores(counters, cache)).delete("acme", by="me")
    assert (done.removed["counters"], done.removed["cache_entries"]) == (1, 2)
    assert await cache.get("acme", ["one"]) == [None]
    assert await cache.get("other", ["one"]) == [b"1"]
    assert (await counters.levels("acme", [TOKENS]))[0].remaining == 10
    assert (await counters.levels("other", [TOKENS]))[0].remaining == 0


async def test_its_keys_are_refused_before_anything_goes(
    directory: Directory, peppers: Peppers
) -> None:
    await directory.create("acme", plan="free", by="me")
    _, minted = await directory.issue("acme", by="me")
    now = 100.0
    keys = KeyAuthenticator(directory, peppers, clock=lambda: now)
    await keys.principal(minted.text)
    asked: list[float] = []

    async def meanwhile(pause_s: float) -> None:
        nonlocal now
        asked.append(pause_s)
        now += pause_s
        with pytest.raises(Unauthorized):
            await keys.principal(minted.text)
        for attempt in (
            directory.issue("acme", by="me"),
            directory.change("acme", suspended=False, by="me"),
            directory.create("acme", plan="free", by="me"),
        ):
            with pytest.raises(Conflict):
                await attempt

    deletion = Deletion(database=directory.database, elsewhere={}, sleep=meanwhile)
    await deletion.delete("acme", by="me")
    assert asked == [SETTLE_S]
    assert SETTLE_S > FRESH_S


async def test_nobody_saws_off_the_branch(directory: Directory) -> None:
    for name in ("staff", "acme", "spare"):
        await directory.create(name, plan="free", by="me")
    await directory.issue("staff", role=Role.ADMIN, by="me")
    less = frozenset({Scope.INFERENCE})
    await directory.issue("spare", role=Role.ADMIN, scopes=less, by="me")
    dead, _ = await directory.issue("spare", role=Role.ADMIN, by="me")
    await directory.revoke(dead.id, by="me")
    with pytest.raises(Conflict, match="the only keys that can administer"):
        await deleting(directory).delete("staff", by="me")
    await deleting(directory).delete("acme", by="me", caller="staff")
    await directory.issue("spare", role=Role.ADMIN, by="me")
    with pytest.raises(Conflict, match="the tenant that you ask as"):
        await deleting(directory).delete("staff", by="me", caller="staff")
    await deleting(directory).delete("staff", by="me", caller="spare")
    assert [tenant.name for tenant in await directory.tenants()] == ["spare"]


async def test_a_suspended_administrator_does_not_count(directory: Directory) -> None:
    for name in ("one", "two"):
        await directory.create(name, plan="free", by="me")
        await directory.issue(name, role=Role.ADMIN, by="me")
    await directory.change("two", suspended=True, by="me")
    with pytest.raises(Conflict, match="the only keys"):
        await deleting(directory).delete("one", by="me")
    await deleting(directory).delete("two", by="me")


async def test_what_is_held_is_counted_without_deleting(directory: Directory) -> None:
    await settle_in(directory, "acme")
    before = await contents(directory.database)
    held = await deleting(directory).held("acme")
    assert held == {"keys": 2, "idempotency": 1, "webhook_events": 1, "alerts": 1, "usage": 3}
    assert await contents(directory.database) == before
    with pytest.raises(NotFound):
        await deleting(directory).held("nobody")


async def test_long_tables_go_in_batches(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "PAUSE_S", 0)
    monkeypatch.setattr(module, "ROWS", 3)
    await settle_in(directory, "acme", uses=20)
    for _ in range(20):
        await directory.change("acme", plan="pro", by="me")
    done = await deleting(directory).delete("acme", by="me")
    assert done.renamed == {"usage": 20, "audit": 24}
    assert await named(directory, '"acme"') == []


class Crash(BaseException):
    """The power fails."""


@pytest.mark.parametrize("at", range(8))
async def test_a_crash_anywhere_is_gone_on_from(
    directory: Directory, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each transaction that a deletion takes, with all of those before it committed."""
    await settle_in(directory, "acme")
    await settle_in(directory, "other")
    write, count = directory.database.write, 0

    @asynccontextmanager
    async def failing(alone: str | None = None) -> Any:
        nonlocal count
        count += 1
        if count == at + 1:
            raise Crash
        async with write(alone) as c:
            yield c

    deletion = deleting(directory)
    with monkeypatch.context() as patched:
        patched.setattr(directory.database, "write", failing)
        try:
            await deletion.delete("acme", by="me")
        except Crash:
            crashed = True
        else:
            crashed = False
    assert crashed == (at < 7), "a deletion takes seven transactions; teach this test the others"
    if crashed and at > 0:
        assert (await directory.tenant("acme")).deleted_as is not None
        assert await deletion.resume() == 1
    elif crashed:
        assert (await directory.tenant("acme")).suspended is None, "nothing has begun"
        await deletion.delete("acme", by="me")
    assert await deletion.resume() == 0
    assert await named(directory, '"acme"', "request of acme", "bob@acme") == []
    whats = [entry.what for entry in await directory.audit()]
    assert (whats.count("tenant.delete"), whats.count("tenant.deleted")) == (1, 1)
    requests = await report(directory)
    assert len(requests) == 2, "one name stands for it, however often it was begun"
    assert sum(requests.values()) == 6


async def test_a_store_that_is_away_is_asked_again(directory: Directory) -> None:
    await settle_in(directory, "acme")
    away = True

    async def drop(tenant: str) -> int:
        if away:
            raise StateUnavailable("redis is away")
        return 5

    deletion = deleting(directory, counters=drop)
    with pytest.raises(StateUnavailable):
        await deletion.delete("acme", by="me")
    with pytest.raises(StateUnavailable):
        await deletion.resume()
    away = False
    assert await deletion.resume() == 1
    with pytest.raises(NotFound):
        await directory.tenant("acme")


async def test_two_that_delete_at_once(directory: Directory) -> None:
    await settle_in(directory, "acme", uses=30)
    done = await asyncio.gather(
        *(deleting(directory).delete("acme", by=str(number)) for number in range(3)),
        return_exceptions=True,
    )
    assert all(isinstance(each, NotFound | module.Deleted) for each in done)
    assert await named(directory, '"acme"') == []
    whats = [entry.what for entry in await directory.audit()]
    assert (whats.count("tenant.delete"), whats.count("tenant.deleted")) == (1, 1)


NAMES = st.sampled_from(["acme", "pro", "other", "tenant"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    what=st.sampled_from(["tenant.create", "key.issue", "model.visibility", "register"]),
    subject=NAMES,
    details=st.fixed_dictionaries(
        {}, optional={"tenant": NAMES, "plan": NAMES, "tenants": st.lists(NAMES) | st.just("all")}
    ),
)
def test_only_names_of_tenants_are_renamed(
    what: str, subject: str, details: dict[str, Any]
) -> None:
    entry = {"what": what, "subject": subject, "details": details}
    changed = module.renamed_entry(entry, "pro", "X")
    assert not concerns({**entry, **changed}, "pro")
    assert changed["details"].get("plan") == details.get("plan"), "a plan of that name is a plan"
    if not concerns(entry, "pro"):
        assert changed == {"subject": subject, "details": details}
    back = module.renamed_entry({**entry, **changed}, "X", "pro")
    assert back == {"subject": subject, "details": details}


async def test_usage_that_comes_late(directory: Directory) -> None:
    """Of a request that was running: see ``retention.late``."""
    await settle_in(directory, "acme")
    await deleting(directory).delete("acme", by="me")
    await use(directory.database, "acme")
    assert (await report(directory))["acme"] == 1
