"""Rules in the database, and gateways that look at them within a second."""

from __future__ import annotations

import pytest

from deployments.config import AuthConfig, OidcConfig
from deployments.tenants.directory import Directory
from deployments.tenants.entrance import authenticator
from deployments.tenants.identity import FRESH_S, KeyAuthenticator
from deployments.tenants.keys import Peppers
from deployments.tenants.principal import Role, Scope
from deployments.tenants.visibility import Visibility, WithSight, forget
from models.errors import NotFound
from state.errors import StateUnavailable


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def visibility(directory: Directory) -> Visibility:
    for name in ("acme", "other"):
        await directory.create(name, plan="free", by="me")
    return Visibility(directory.database)


async def test_a_rule_is_set_changed_and_lifted(visibility: Visibility) -> None:
    assert await visibility.rules() == {}
    await visibility.show("smollm2:poet", ["other", "acme", "acme"], by="me")
    await visibility.show("minilm", [], by="me")
    assert await visibility.rules() == {"smollm2:poet": {"acme", "other"}, "minilm": set()}
    await visibility.show("smollm2:poet", ["acme"], by="me")
    await visibility.show("minilm", None, by="me")
    assert await visibility.rules() == {"smollm2:poet": {"acme"}}


async def test_a_tenant_that_nobody_made_is_a_mistake(
    visibility: Visibility, directory: Directory
) -> None:
    with pytest.raises(NotFound, match="no tenant 'acne'"):
        await visibility.show("smollm2", ["acme", "acne"], by="me")
    assert await visibility.rules() == {}
    assert (await directory.audit(limit=1))[0].what == "tenant.create"


async def test_every_rule_is_in_the_audit_log(visibility: Visibility, directory: Directory) -> None:
    await visibility.show("smollm2", ["acme"], by="alice")
    await visibility.show("smollm2", None, by="bob")
    told = [(e.who, e.what, e.subject, dict(e.details)) for e in await directory.audit(limit=2)]
    assert told == [
        ("bob", "model.visibility", "smollm2", {"tenants": "all"}),
        ("alice", "model.visibility", "smollm2", {"tenants": ["acme"]}),
    ]


async def test_a_rule_without_tenants_does_not_become_everybodys(visibility: Visibility) -> None:
    await visibility.show("a", ["acme"], by="me")
    await visibility.show("b", ["acme", "other"], by="me")
    await visibility.show("c", ["other"], by="me")
    async with visibility.database.write() as c:
        assert await forget(c, "acme") == 2
    assert await visibility.rules() == {"a": set(), "b": {"other"}, "c": {"other"}}


async def test_what_is_hidden_is_so_within_a_second(
    visibility: Visibility, directory: Directory, peppers: Peppers
) -> None:
    clock = Clock()
    keys = WithSight(KeyAuthenticator(directory, peppers, clock=clock), visibility, clock=clock)
    _, acme = await directory.issue("acme", by="me")
    _, other = await directory.issue("other", by="me")

    async def seen() -> tuple[bool, bool]:
        principals = [await keys.principal(each.text) for each in (acme, other)]
        first, second = (each.sight.sees("smollm2", "poet") for each in principals)
        return first, second

    assert await seen() == (True, True)
    await visibility.show("smollm2:poet", ["acme"], by="me")
    clock.now += FRESH_S + 0.01
    assert await seen() == (True, False)
    await visibility.show("smollm2:poet", None, by="me")
    clock.now += FRESH_S + 0.01
    assert await seen() == (True, True)


async def test_who_says_who_sees_sees_all(
    visibility: Visibility, directory: Directory, peppers: Peppers
) -> None:
    clock = Clock()
    keys = WithSight(KeyAuthenticator(directory, peppers, clock=clock), visibility, clock=clock)
    await visibility.show("smollm2", [], by="me")
    for role in Role:
        _, minted = await directory.issue("other", role=role, by="me")
        principal = await keys.principal(minted.text)
        assert principal.sight.sees("smollm2") == (role in (Role.ADMIN, Role.OPERATOR)), role
    less = frozenset({Scope.INFERENCE})
    _, minted = await directory.issue("other", role=Role.ADMIN, scopes=less, by="me")
    assert not (await keys.principal(minted.text)).sight.sees("smollm2")


@pytest.mark.parametrize("oidc", [None, OidcConfig(issuer="https://nowhere.test", audience="x")])
async def test_whoever_comes_in_has_a_sight(
    visibility: Visibility, directory: Directory, peppers: Peppers, oidc: OidcConfig | None
) -> None:
    entrance = authenticator(AuthConfig(mode="keys", oidc=oidc), directory, peppers)
    assert entrance is not None
    await visibility.show("smollm2", ["acme"], by="me")
    for tenant, sees in (("acme", True), ("other", False)):
        _, minted = await directory.issue(tenant, by="me")
        assert (await entrance.principal(minted.text)).sight.sees("smollm2") is sees


async def test_without_the_rules_nobody_gets_through(
    visibility: Visibility, directory: Directory, peppers: Peppers, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    keys = WithSight(KeyAuthenticator(directory, peppers, clock=clock), visibility, clock=clock)
    _, minted = await directory.issue("acme", by="me")

    async def away(self: Visibility) -> None:
        raise StateUnavailable("away")

    monkeypatch.setattr(Visibility, "rules", away)
    with pytest.raises(StateUnavailable, match="away"):
        await keys.principal(minted.text)
